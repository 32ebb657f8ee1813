// y = x @ W.T + bias in BF16, where W is stored nested: 12 bits a weight, rebuilt in registers (formats/nested.py).
//
// Why it can be fast. With few rows of x a product is as slow as its weight is large: it waits for memory. Three quarters
// of the bytes are three quarters of the time, if rebuilding costs less than the memory takes. On an H200 a scheduler has
// a third of a cycle for a weight; rebuilding takes 2.4 instructions for one weight of each of 32 threads.
//
// How W lies in memory.
//     plane      [N][K] bytes: sign and E4M3 code of each weight, row by row, because FP8 prefill reads it as it is.
//     nibbles    the 4 bits below, in the order in which threads want them: 16 bytes for each thread of a block.
//     A block is 16 rows and 64 columns, what one warp rebuilds at once. Thread 4g + t of the warp takes columns
//     16t .. 16t+15 of rows g and g + 8: 16 bytes of the plane from each, and 16 bytes of nibbles for both.
//
// How K is shuffled. A matrix instruction wants from thread t the columns 2t, 2t+1, 2t+8 and 2t+9 of every 16. A sum does
// not care about the order of its terms, so we call the 16 columns that a thread holds its share of four instructions, four
// neighbours each, and read x in the same order. No weight moves between threads or through shared memory.
//
// How a weight is rebuilt. With u = code << 4 | nibble, the BF16 bit pattern under offset 0 is sign << 15 | (u - 8): see
// `rebuild`. Exponents then lie in 0 .. 15, where products with small x would leave FP32's range, so one exact
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
    const uint4* nibbles; // [N / 16][K / 64][32]
    const uint4* escapes; // [N / 16][K / 64]: x counts a block's escapes; y, z and w are the first three
    const u32* more;      // the others of all blocks; those of a block begin at x >> 11
    const float* scales;  // [N]: takes the lift back
    const u16* bias;      // [N] or null
    int n, k;
};

constexpr int ROWS = 16, COLUMNS = 64;  // of a block

// ---------------------------------------------------------------------------------------------------- a block of W

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

// Volatile, so that the compiler does not move it to where it is waited for.
__device__ __forceinline__ uint4 cached(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ Packed read(const Weight& w, int tile, int chunk) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const size_t block = (size_t)tile * (w.k / COLUMNS) + chunk;
    const u8* codes = w.plane + (size_t)(tile * ROWS + g) * w.k + chunk * COLUMNS + t * 16;
    return {stream(codes), stream(codes + (size_t)8 * w.k), stream(w.nibbles + block * 32 + lane), stream(w.escapes + block)};
}

// Four weights of a row, as two registers of two. `codes`: one in each byte; `nibbles`: in the lower half of each byte.
__device__ __forceinline__ void rebuild(u32 codes, u32 nibbles, u32& first, u32& second) {
    const u32 low = (codes << 4 & 0xF0F0F0F0) | (nibbles & 0x0F0F0F0F);        // the lower byte of each u
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

// Overwrite one weight, if it is this thread's.
__device__ __forceinline__ void put(Fragments& f, u32 escape) {
    const u32 row = escape >> 16 & 15, column = escape >> 20;
    if (threadIdx.x % 32 != row % 8 * 4 + column / 16) return;
    const u32 slot = column / 4 % 4 * 4 + column / 2 % 2 * 2 + row / 8;
#pragma unroll
    for (int i = 0; i < 16; i++) {  // registers have no run-time index
        u32& pair = f.a[i / 4][i % 4];
        if (i == slot) pair = column % 2 ? __byte_perm(pair, escape, 0x5410) : __byte_perm(pair, escape, 0x3254);
    }
}

__device__ __forceinline__ void patch(Fragments& f, const Weight& w, uint4 escapes) {
    const u32 count = escapes.x & 0x7FF;
    put(f, escapes.y);
    if (count > 1) put(f, escapes.z);
    if (count > 2) put(f, escapes.w);
    for (u32 e = 3; e < count; e++) put(f, __ldg(w.more + (escapes.x >> 11) + e - 3));
}

__device__ __forceinline__ Fragments unpack(const Weight& w, const Packed& p) {
    Fragments f;
    rebuild(p.upper.x, p.nibbles.x, f.a[0][0], f.a[0][2]);
    rebuild(p.upper.y, p.nibbles.x >> 4, f.a[1][0], f.a[1][2]);
    rebuild(p.upper.z, p.nibbles.y, f.a[2][0], f.a[2][2]);
    rebuild(p.upper.w, p.nibbles.y >> 4, f.a[3][0], f.a[3][2]);
    rebuild(p.lower.x, p.nibbles.z, f.a[0][1], f.a[0][3]);
    rebuild(p.lower.y, p.nibbles.z >> 4, f.a[1][1], f.a[1][3]);
    rebuild(p.lower.z, p.nibbles.w, f.a[2][1], f.a[2][3]);
    rebuild(p.lower.w, p.nibbles.w >> 4, f.a[3][1], f.a[3][3]);
    if (p.escapes.x & 0x7FF) patch(f, w, p.escapes);
    return f;
}

__device__ __forceinline__ u16 bf16(float value) {
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

__device__ __forceinline__ u16 finish(const Weight& w, int n, float sum) {
    return bf16(sum * w.scales[n] + (w.bias ? __uint_as_float((u32)w.bias[n] << 16) : 0.0f));
}

// ------------------------------------------------------------------------------------------------- few rows of x, up to 32
//
// Memory alone counts. A warp takes 16 * W rows of W, and all 8 * X rows of x, straight from the cache: x is small, and every
// warp reads the same. A CTA has N warps side by side, and K behind each of them that share the columns, with every K-th
// block, and add up their sums in shared memory.

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int X, int W, int N, int K>
__global__ void __launch_bounds__(N * K * 32) few_rows(Weight w, const u16* __restrict__ x, u16* __restrict__ out, int m) {
    constexpr int TILE = N * W * ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int chunks = w.k / COLUMNS, first_n = blockIdx.x * TILE, first_x = blockIdx.y * X * 8;
    int tile[W];
    const u16* row[X];
#pragma unroll
    for (int i = 0; i < W; i++) tile[i] = min(first_n / ROWS + warp / K * W + i, w.n / ROWS - 1);  // the last CTA may have to spare
#pragma unroll
    for (int i = 0; i < X; i++) row[i] = x + (size_t)min(first_x + i * 8 + g, m - 1) * w.k + t * 16;

    float sums[W][X][4] = {};
    Packed ahead[W];  // the next blocks: they travel while these are multiplied
    const auto look_ahead = [&](int chunk) {
        if (chunk >= chunks) return;
#pragma unroll
        for (int i = 0; i < W; i++) ahead[i] = read(w, tile[i], chunk);
    };
    look_ahead(warp % K);
    for (int chunk = warp % K; chunk < chunks; chunk += K) {
        uint4 b[2][X];
#pragma unroll
        for (int i = 0; i < X * 2; i++) b[i % 2][i / 2] = cached(row[i / 2] + chunk * COLUMNS + i % 2 * 8);
        Packed packed[W];
        Fragments f[W];
#pragma unroll
        for (int i = 0; i < W; i++) packed[i] = ahead[i];
        look_ahead(chunk + K);
#pragma unroll
        for (int i = 0; i < W; i++) f[i] = unpack(w, packed[i]);  // while x travels
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int step = 0; step < 2; step++) {
#pragma unroll
                for (int i = 0; i < X * W; i++) {  // inside, so that no instruction waits for the one before it
                    const uint4 v = b[half][i / W];
                    multiply(sums[i % W][i / W], f[i % W].a[half * 2 + step], step ? v.z : v.x, step ? v.w : v.y);
                }
            }
        }
    }

    extern __shared__ float parts[];  // [N][K][W * X * 4][32]
#pragma unroll
    for (int i = 0; i < W * X * 4; i++) parts[(warp * W * X * 4 + i) * 32 + lane] = sums[i / (X * 4)][i / 4 % X][i % 4];
    __syncthreads();
    for (int e = threadIdx.x; e < TILE * X * 8; e += N * K * 32) {
        const int n = e % TILE, i = e / TILE;  // neighbouring threads write neighbouring columns of y
        const int place = (n / ROWS % W * X + i / 8) * 4 + n % ROWS / 8 * 2 + i % 2, from = n % 8 * 4 + i % 8 / 2;
        float sum = 0;
#pragma unroll
        for (int k = 0; k < K; k++) sum += parts[((n / (W * ROWS) * K + k) * W * X * 4 + place) * 32 + from];
        if (first_x + i < m && first_n + n < w.n)
            out[(size_t)(first_x + i) * w.n + first_n + n] = finish(w, first_n + n, sum);
    }
}

// ------------------------------------------------------------------------------------------------------- the weight
//
// W as it was, for more rows than the kernels above are made for, and for who asks for it: bfloat16 [N][K].

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

// -------------------------------------------------------------------------------------- many rows of x: Hopper's wgmma
//
// From a few rows on, reading x counts too: every CTA reads all of it. So here a CTA takes 128 rows of W and X rows of x.
// Its first eight warps rebuild 16 rows of W each, and wgmma takes the very same fragments from registers, four warps side
// by side. Its last four bring x into shared memory, a block of columns each in turn. The two CTAs of a cluster share K,
// since few CTAs would leave most of the GPU idle, and add up their sums through each other's shared memory.
//
// The shuffle of K is a transposition of x in shared memory: two values are what it keeps together, and pair 8t + u of the
// 32 in a block of columns goes to place 4u + t. Then 16 consecutive values are one instruction's, in its own order.
//
// Why warps of their own bring x: wgmma reads shared memory by another path than threads write it, and the fence between
// the two waits for all that a thread has under way. A thread that also streams W would lose its stream at every block.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int TILE = 128, PITCH = TILE + 4;  // rows of W for a CTA; floats from one row of sums to the next
constexpr int CONSUMERS = 8, PRODUCERS = 4;  // warps; each producer has a stage of x of its own
constexpr int DEPTH = 6;                     // blocks of W on their way
constexpr int SPLIT = 2;                     // CTAs of a cluster

typedef unsigned long long u64;

#define D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define WGMMA(n, sums, a0, a1, a2, a3, b, ...)                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" sums "}, {" a0 ", " a1 \
                 ", " a2 ", " a3 "}, " b ", 1, 1, 1, 0;"                                            \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x))
#define S32                                                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define S64                                                                                            \
    S32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

__device__ __forceinline__ void wgmma(float (&d)[8][4], const u32 (&a)[4], u64 x) {
    WGMMA("64", S32, "%32", "%33", "%34", "%35", "%36", D(0), D(1), D(2), D(3), D(4), D(5), D(6), D(7));
}
__device__ __forceinline__ void wgmma(float (&d)[16][4], const u32 (&a)[4], u64 x) {
    WGMMA("128", S64, "%64", "%65", "%66", "%67", "%68", D(0), D(1), D(2), D(3), D(4), D(5), D(6), D(7), D(8), D(9),
          D(10), D(11), D(12), D(13), D(14), D(15));
}

// What an instruction in flight reads must stay where it is: a use behind the wait keeps the compiler from reusing it.
__device__ __forceinline__ void hold(const Fragments& f) {
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" ::"r"(f.a[j][0]), "r"(f.a[j][1]), "r"(f.a[j][2]), "r"(f.a[j][3]));
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 phase) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Blocks of W on their way to a consumer, without a register in between: each thread copies what it will read itself, and
// the first of a warp the block's escapes.
struct Ring {
    uint4 upper[DEPTH][CONSUMERS * 32], lower[DEPTH][CONSUMERS * 32], nibbles[DEPTH][CONSUMERS * 32];
    uint4 escapes[DEPTH][CONSUMERS];

    __device__ __forceinline__ void copy(void* to, const void* from) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
    }

    __device__ __forceinline__ void fetch(int slot, const Weight& w, int tile, int chunk) {
        const int id = threadIdx.x, lane = id % 32, g = lane / 4, t = lane % 4;
        if (chunk < w.k / COLUMNS) {
            const size_t block = (size_t)tile * (w.k / COLUMNS) + chunk;
            const u8* codes = w.plane + (size_t)(tile * ROWS + g) * w.k + chunk * COLUMNS + t * 16;
            copy(&upper[slot][id], codes);
            copy(&lower[slot][id], codes + (size_t)8 * w.k);
            copy(&nibbles[slot][id], w.nibbles + block * 32 + lane);
            if (lane == 0) copy(&escapes[slot][id / 32], w.escapes + block);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    // The oldest of the blocks that were fetched.
    __device__ __forceinline__ Fragments take(int slot, const Weight& w) const {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
        __syncwarp();  // the escapes came by another thread
        const int id = threadIdx.x;
        return unpack(w, {upper[slot][id], lower[slot][id], nibbles[slot][id], escapes[slot][id / 32]});
    }
};

template <int X>
struct Shared {
    uint4 x[PRODUCERS][X * 8];  // stages, swizzled
    Ring ring;
    u64 full[PRODUCERS], empty[PRODUCERS];
};

// Bring every fourth block of columns of x into this warp's stage.
template <int X>
__device__ __forceinline__ void produce(Shared<X>& shared, const u16* x, int first, int m, int k, int rank, int count) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 - CONSUMERS;
    const u32 stage = shared_address(shared.x[own]);
    constexpr int PARTS = X / 64, EACH = 16;  // 64 rows at a time: 16-byte units for a thread, eight of whom read a row
    uint4 v[EACH];
    const auto read = [&](int i, int part) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int row = min(first + part * 64 + e * 4 + lane / 8, m - 1);
            v[e] = __ldg((const uint4*)(x + (size_t)row * k + (rank + i * SPLIT) * COLUMNS) + lane % 8);
        }
    };
    const auto write = [&](int part) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int row = part * 64 + e * 4 + lane / 8, q = lane % 8;
            const u32 values[4] = {v[e].x, v[e].y, v[e].z, v[e].w};
#pragma unroll
            for (int j = 0; j < 4; j++) {  // pair 4q + j goes to word q / 2 of 16-byte unit 4(q % 2) + j
                const u32 to = stage + row * 128 + ((q % 2 * 4 + j ^ row % 8) << 4) + q / 2 * 4;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(values[j]) : "memory");
            }
        }
    };
    if (own < count) read(own, 0);
    for (int i = own; i < count; i += PRODUCERS) {
        wait(&shared.empty[own], i / PRODUCERS % 2 ^ 1);  // the first time around nobody has filled it
        write(0);
#pragma unroll
        for (int part = 1; part < PARTS; part++) {
            read(i, part);
            write(part);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        arrive(&shared.full[own]);
        if (i + PRODUCERS < count) read(i + PRODUCERS, 0);
    }
}

// Multiply 16 rows of W in each warp by X rows of x.
template <int X>
__device__ __forceinline__ void consume(Shared<X>& shared, float (&d)[X / 8][4], const Weight& w, int tile, int rank, int count) {
    Ring& ring = shared.ring;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) ring.fetch(i, w, tile, rank + i * SPLIT);
    Fragments f;
    if (count) f = ring.take(0, w);
    for (int i = 0, slot = 0; i < count; i++) {
        const int stage = i % PRODUCERS;
        wait(&shared.full[stage], i / PRODUCERS % 2);
        // The descriptor of x: address, 1024 bytes from 8 rows to the next 8, 128-byte swizzle; units of 16 bytes.
        const u64 b = (u64)1 << 62 | (u64)64 << 32 | 1 << 16 | shared_address(shared.x[stage]) >> 4;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(d, f.a[j], b + j * 2);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        ring.fetch(slot, w, tile, rank + (i + DEPTH) * SPLIT);  // what was there is in f
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        Fragments next;  // made while the tensor cores multiply
        if (i + 1 < count) next = ring.take(slot, w);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(f);
        if (threadIdx.x % 32 == 0) arrive(&shared.empty[stage]);
        f = next;
    }
}

template <int X>
__global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__((CONSUMERS + PRODUCERS) * 32)
    many_rows(Weight w, const u16* __restrict__ x, u16* __restrict__ out, int m) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared<X>& shared = *(Shared<X>*)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.z, first_n = blockIdx.x * TILE, first_x = blockIdx.y * X;
    const int count = (w.k / COLUMNS - rank + SPLIT - 1) / SPLIT;  // blocks of columns: rank, rank + SPLIT, ...
    if (threadIdx.x < PRODUCERS) {
        const u32 full = shared_address(&shared.full[threadIdx.x]), empty = shared_address(&shared.empty[threadIdx.x]);
        asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(full) : "memory");
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(empty), "n"(CONSUMERS) : "memory");
    }
    __syncthreads();

    float* sums = (float*)memory;  // in the end: [row of x][row of W]
    if (warp < CONSUMERS) {
        float d[X / 8][4] = {};
        consume(shared, d, w, min(first_n / ROWS + warp, w.n / ROWS - 1), rank, count);
        asm volatile("cp.async.wait_all;\n\tbar.sync 1, 256;" ::: "memory");  // all consumers are done with the stages
#pragma unroll
        for (int i = 0; i < X / 2; i++)
            sums[(i / 4 * 8 + t * 2 + i % 2) * PITCH + warp * ROWS + g + i / 2 % 2 * 8] = d[i / 4][i % 4];
    } else {
        produce(shared, x, first_x, m, w.k, rank, count);
    }
    cluster_barrier();
    // Each CTA finishes its share, four columns of y a thread.
    for (int e = rank * blockDim.x + threadIdx.x; e < X * TILE / 4; e += SPLIT * blockDim.x) {
        const int n = e % (TILE / 4) * 4, i = e / (TILE / 4);
        if (first_x + i >= m || first_n + n >= w.n) continue;
        float total[4] = {};
#pragma unroll
        for (int k = 0; k < SPLIT; k++) {
            u32 theirs;
            float4 v;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(sums + i * PITCH + n)), "r"(k));
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(theirs) : "memory");
            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        ushort4 rounded = {finish(w, first_n + n, total[0]), finish(w, first_n + n + 1, total[1]),
                           finish(w, first_n + n + 2, total[2]), finish(w, first_n + n + 3, total[3])};
        *(ushort4*)(out + (size_t)(first_x + i) * w.n + first_n + n) = rounded;
    }
    cluster_barrier();  // nobody leaves while others read its sums
}
#endif
