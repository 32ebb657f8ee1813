// A nested weight W in the registers of a GPU: 12 bits a weight in memory, BF16 where it is multiplied
// (formats/nested.py). nested_split.cu lays it out; nested_few_rows.cu and nested_many_rows.cu multiply x by it:
// y = x @ W.T + bias.
//
// Why it can be fast. With few rows of x a product is as slow as its weight is large: it waits for memory. Three
// quarters of the bytes are three quarters of the time, if rebuilding costs less than the memory takes. An H200 brings
// three weights in each cycle of each of its schedulers, where an instruction works on 32 threads at once; rebuilding
// takes about 100 of them for 1,024 weights.
//
// How W lies in memory.
//     plane      [N][K] bytes: sign and E4M3 code of each weight, row by row, because FP8 prefill reads it as it is.
//     nibbles    the 4 bits below, in the order in which threads want them: 16 bytes for each thread of a block.
//     A block is 16 rows and 64 columns, what one warp rebuilds at once. Thread 4g + t of the warp takes columns
//     16t .. 16t+15 of rows g and g + 8: 16 bytes of the plane from each, and 16 bytes of nibbles for both.
//     Blocks that share their columns follow each other, so that the warps of a CTA, one below the other, find theirs
//     in one piece.
//
// How K is shuffled. A matrix instruction wants from thread t the columns 2t, 2t+1, 2t+8 and 2t+9 of every 16. A sum
// does not care about the order of its terms, so we call the 16 columns that a thread holds its share of four
// instructions, four neighbours each, and read x in the same order. No weight moves between threads or through shared
// memory.
//
// How a weight is rebuilt. With u = code << 4 | nibble, the BF16 bit pattern under offset 0 is sign << 15 | (u - 8):
// see `rebuild`. Exponents then lie in 0 .. 15, where products with small x would leave FP32's range, so one exact
// multiplication lifts them by 2^113; the row's scale, at the end of the sum, takes it back.
//
// Escapes are weights of which the 12 bits hold too little. One is column << 20 | row << 16 | its BF16 bits, lifted as
// `rebuild` lifts, with column and row in its block, and overwrites the rebuilt weight in the register where it stands.
// Most blocks have none, and nearly all at most three, which travel with the block: to follow a list would stall a CTA.

typedef unsigned char u8;
typedef unsigned short u16;  // the bits of a BF16
typedef unsigned int u32;

struct Weight {
    const u8* plane;      // [N][K]
    const uint4* nibbles; // [K / 64][N / 16][32]
    const uint4* escapes; // [K / 64][N / 16]: x counts a block's escapes; y, z and w are the first three
    const u32* more;      // the others of all blocks; those of a block begin at x >> 11
    const float* scales;  // [N]: takes the lift back
    const u16* bias;      // [N] or null
    int n, k;
};

constexpr int ROWS = 16, COLUMNS = 64;  // of a block

// How kernels follow each other. From Hopper on a kernel may start while the one before it ends: it then asks for its
// first blocks of W, and waits before it reads x or writes y. So memory does not rest in between. All CTAs wait: then all
// that came before has ended where a kernel has. The kernel before is not the one that wrote W, and started when that had
// ended: when a weight has been laid out, its scales are computed; when it has been loaded anew, x is.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where the 16 bytes of thread 4g + t stand among a block's: those of one t meet no bank of shared memory twice.
__device__ __forceinline__ int unit(int g, int t) { return 4 * g + (t ^ g / 2); }

// What a thread reads of a block: codes of rows g and g + 8, and what else there is of both.
struct Packed {
    uint4 upper, lower, nibbles, escapes;
};

// Read once, and not again soon: leave the first-level cache to x.
__device__ __forceinline__ uint4 stream(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ Packed read(const Weight& w, int tile, int chunk) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 block = (u32)chunk * (w.n / ROWS) + tile;
    const u8* codes = w.plane + (size_t)(tile * ROWS + g) * w.k + chunk * COLUMNS + t * 16;
    return {stream(codes), stream(codes + (size_t)8 * w.k), stream(w.nibbles + (size_t)block * 32 + unit(g, t)),
            stream(w.escapes + block)};
}

// Four weights of a row, as two registers of two. `codes`: one in each byte; `nibbles`: in the lower half of each byte.
__device__ __forceinline__ void rebuild(u32 codes, u32 nibbles, u32& first, u32& second) {
    u32 low;  // the lower byte of each u: codes where the mask is 1, else nibbles
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(low) : "r"(codes << 4), "r"(nibbles), "r"(0xF0F0F0F0));
    const u32 high = (codes >> 4 & 0x07070707) | (codes & 0x80808080);         // the upper byte, and the sign
    const u32 pairs[2] = {__byte_perm(low, high, 0x5140) - 0x00080008,         // u - 8 never borrows: u >= 8
                          __byte_perm(low, high, 0x7362) - 0x00080008};
    const u32 lift = 0x78007800, minus_zero = 0x80008000;                      // 2^113; -0 keeps the sign of a zero
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(first) : "r"(pairs[0]), "r"(lift), "r"(minus_zero));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(second) : "r"(pairs[1]), "r"(lift), "r"(minus_zero));
}

// A block as operands of four instructions, four registers each: [row g, row g + 8] x [its first pair, its second].
struct Fragments {
    u32 a[4][4];
};

// Overwrite one weight, if it is this thread's: NATURAL says which weights a thread has (`many_rows` takes columns in
// the order of the instruction; all others take 16 neighbours).
template <bool NATURAL>
__device__ __forceinline__ void put(Fragments& f, u32 escape) {
    const u32 row = escape >> 16 & 15, column = escape >> 20;
    const u32 owner = row % 8 * 4 + (NATURAL ? column / 2 % 4 : column / 16);
    const u32 pair = NATURAL ? column / 16 * 2 + column / 8 % 2 : column / 4 % 4 * 2 + column / 2 % 2;
    const u32 place = pair * 2 + row / 8;
    const u32 slot = threadIdx.x % 32 == owner ? place : 16, half = column % 2 ? 0x5410 : 0x3254;
#pragma unroll
    for (int i = 0; i < 16; i++)  // registers have no run-time index
        if (i == slot) f.a[i / 4][i % 4] = __byte_perm(f.a[i / 4][i % 4], escape, half);
}

template <bool NATURAL>
__device__ __forceinline__ void patch(Fragments& f, const Weight& w, uint4 escapes) {
    const u32 count = escapes.x & 0x7FF;
#pragma unroll 1
    for (u32 e = 0; e < count; e++) {
        put<NATURAL>(f, escapes.y);
        escapes.y = escapes.z, escapes.z = escapes.w;
        if (e + 3 < count) escapes.w = __ldg(w.more + (escapes.x >> 11) + e);
    }
}

__device__ __forceinline__ Fragments unpack(const Weight& w, const Packed& p) {
    Fragments f;
    // Nibbles stand in the order of `many_rows`: words of columns 2i, 2i+1, 2i+8 and 2i+9.
    const uint4 n = p.nibbles;
    const u32 nibbles[4] = {__byte_perm(n.x, n.y, 0x5410), __byte_perm(n.z, n.w, 0x5410),
                            __byte_perm(n.x, n.y, 0x7632), __byte_perm(n.z, n.w, 0x7632)};
    const u32 upper[4] = {p.upper.x, p.upper.y, p.upper.z, p.upper.w};
    const u32 lower[4] = {p.lower.x, p.lower.y, p.lower.z, p.lower.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        rebuild(upper[j], nibbles[j], f.a[j][0], f.a[j][2]);
        rebuild(lower[j], nibbles[j] >> 4, f.a[j][1], f.a[j][3]);
    }
    patch<false>(f, w, p.escapes);
    return f;
}

__device__ __forceinline__ u16 bf16(float value) {
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

// What becomes of the sum of column n of y.
struct Finish {
    float scale, bias;

    __device__ __forceinline__ Finish(const Weight& w, int n)
        : scale(w.scales[n]), bias(w.bias ? __uint_as_float((u32)w.bias[n] << 16) : 0.0f) {}
    __device__ __forceinline__ u16 operator()(float sum) const { return bf16(sum * scale + bias); }
};

// W as it was, for who asks for it, and for more rows of x than a kernel is made for: bfloat16 [N][K].

__global__ void __launch_bounds__(256) join(Weight w, u16* __restrict__ out) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, tile = blockIdx.x;
    for (int chunk = blockIdx.y * 8 + threadIdx.x / 32; chunk < w.k / COLUMNS; chunk += gridDim.y * 8) {
        const Fragments f = unpack(w, read(w, tile, chunk));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int n = tile * ROWS + half * 8 + g;
            u32 pairs[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u32 lifted = f.a[i / 2][i % 2 * 2 + half];
                // One product at a time would leave BF16's range where the scale and the weight are far apart: in FP32.
                pairs[i] = bf16(__uint_as_float(lifted << 16) * w.scales[n]) |
                           (u32)bf16(__uint_as_float(lifted & 0xFFFF0000) * w.scales[n]) << 16;
            }
            uint4* to = (uint4*)(out + (size_t)n * w.k + chunk * COLUMNS + t * 16);
            to[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
            to[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
        }
    }
}
