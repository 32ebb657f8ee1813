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
// not care about the order of its terms, so we call the 16 consecutive columns that a thread holds its share of four
// instructions, four columns each, and read x in the same order. No weight moves between threads or through shared memory.
//
// How a weight is rebuilt. With u = code << 4 | nibble, the BF16 bit pattern under offset 0 is sign << 15 | (u - 8): see
// `rebuild`. Exponents then lie in 0 .. 15, where products with small x would leave FP32's range, so one exact
// multiplication lifts them by 2^113; the row's scale, at the end of the sum, takes it back.
//
// Escapes are weights of which the 12 bits hold too little. They come as a list for each block and overwrite the rebuilt
// weight in the register where it stands (`patch`). Most blocks have none.

typedef unsigned char u8;
typedef unsigned short u16;  // the bits of a BF16
typedef unsigned int u32;

struct Weight {
    const u8* plane;      // [N][K]
    const uint4* nibbles; // [N / 16][K / 64][32]
    const u32* starts;    // [N / 16 * K / 64 + 1]: where the escapes of each block begin in `escapes`
    const u32* escapes;   // column in the block << 20 | row in the block << 16 | BF16 bits, lifted as `rebuild` lifts
    const float* scales;  // [N]: takes the lift back
    const u16* bias;      // [N] or null
    int n, k;
};

constexpr int ROWS = 16, COLUMNS = 64;  // of a block

// ---------------------------------------------------------------------------------------------------- a block of W

// What a thread reads of a block.
struct Packed {
    uint4 upper, lower;  // codes of rows g and g + 8
    uint4 nibbles;
    u32 first, last;     // the block's escapes
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
    const size_t block = (size_t)tile * (w.k / COLUMNS) + chunk;
    const u8* codes = w.plane + (size_t)(tile * ROWS + g) * w.k + chunk * COLUMNS + t * 16;
    return {stream(codes), stream(codes + (size_t)8 * w.k), stream(w.nibbles + block * 32 + lane),
            __ldg(w.starts + block), __ldg(w.starts + block + 1)};
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

__device__ __forceinline__ void patch(Fragments& f, const Weight& w, u32 first, u32 last) {
    for (u32 e = first; e < last; e++) {
        const u32 escape = __ldg(w.escapes + e), row = escape >> 16 & 15, column = escape >> 20;
        if (threadIdx.x % 32 != row % 8 * 4 + column / 16) continue;
        const u32 slot = column / 4 % 4 * 4 + column / 2 % 2 * 2 + row / 8;
#pragma unroll
        for (int i = 0; i < 16; i++) {  // registers have no run-time index
            u32& pair = f.a[i / 4][i % 4];
            if (i == slot) pair = column % 2 ? __byte_perm(pair, escape, 0x5410) : __byte_perm(pair, escape, 0x3254);
        }
    }
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
    if (p.first != p.last) patch(f, w, p.first, p.last);
    return f;
}

__device__ __forceinline__ u16 finish(const Weight& w, int n, float sum) {
    sum *= w.scales[n];
    if (w.bias) sum += __uint_as_float((u32)w.bias[n] << 16);
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(sum));
    return rounded;
}

// --------------------------------------------------------------------------------- few rows of x: up to 8 * X, X <= 8
//
// Memory alone counts. A CTA takes 16 * W rows of W; its warps share K, each with every WARPS-th block, and add up their
// sums in shared memory. x comes straight from the cache: it is small, and every CTA reads the same.

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int X, int W, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) few_rows(Weight w, const u16* __restrict__ x, u16* __restrict__ out, int m) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tiles = w.n / ROWS, chunks = w.k / COLUMNS, first = blockIdx.x * W;
    int tile[W];
    const u16* row[X];
#pragma unroll
    for (int i = 0; i < W; i++) tile[i] = min(first + i, tiles - 1);
#pragma unroll
    for (int i = 0; i < X; i++) row[i] = x + (size_t)min(i * 8 + g, m - 1) * w.k + t * 16;

    float sums[W][X][4] = {};
    Packed ahead[W];  // the next block: it travels while this one is multiplied
    if (warp < chunks) {
#pragma unroll
        for (int i = 0; i < W; i++) ahead[i] = read(w, tile[i], warp);
    }
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
        Packed packed[W];
#pragma unroll
        for (int i = 0; i < W; i++) packed[i] = ahead[i];
        if (chunk + WARPS < chunks) {
#pragma unroll
            for (int i = 0; i < W; i++) ahead[i] = read(w, tile[i], chunk + WARPS);
        }
        Fragments f[W];
#pragma unroll
        for (int i = 0; i < W; i++) f[i] = unpack(w, packed[i]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < X; i++) {
                const uint4 b = __ldg((const uint4*)(row[i] + chunk * COLUMNS) + half);
#pragma unroll
                for (int j = 0; j < W; j++) {
                    multiply(sums[j][i], f[j].a[half * 2], b.x, b.y);
                    multiply(sums[j][i], f[j].a[half * 2 + 1], b.z, b.w);
                }
            }
        }
    }

    extern __shared__ float parts[];  // [WARPS][W * X * 4][32]
#pragma unroll
    for (int i = 0; i < W * X * 4; i++) parts[(warp * W * X * 4 + i) * 32 + lane] = sums[i / (X * 4)][i / 4 % X][i % 4];
    __syncthreads();
    for (int e = threadIdx.x; e < W * X * 128; e += WARPS * 32) {
        const int n = e % (W * ROWS), i = e / (W * ROWS);  // neighbouring threads write neighbouring columns of y
        const int place = (n / ROWS * X + i / 8) * 4 + n % ROWS / 8 * 2 + i % 2;
        float sum = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++) sum += parts[(k * W * X * 4 + place) * 32 + n % 8 * 4 + i % 8 / 2];
        if (i < m && first * ROWS + n < w.n) out[(size_t)i * w.n + first * ROWS + n] = finish(w, first * ROWS + n, sum);
    }
}

// -------------------------------------------------------------------------------------- many rows of x: Hopper's wgmma
//
// Here tensor cores count too, and wgmma takes the very same fragments from registers, four warps side by side. It wants
// x in shared memory. A CTA multiplies 128 rows of W by 128 rows of x; the SPLIT CTAs of a cluster share K and add up
// through each other's shared memory, since few CTAs would leave most of the GPU idle.
//
// x arrives by asynchronous copies of two values each, since two values are what the shuffle of K keeps together: pair
// p = 8t + u of a row of 64 goes to place 4u + t. Then 16 consecutive values are one instruction's in its own order.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int TILE_X = 128, STAGES = 4, STAGE_BYTES = TILE_X * COLUMNS * 2, PITCH = 128 + 4;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void fetch_x(u32 stage, const u16* x, int first, int m, int k, int chunk) {
    const int lane = threadIdx.x % 32, unit = lane % 8, word = lane / 8;
    for (int i = threadIdx.x / 32; i < TILE_X; i += 8) {
        const u32 to = stage + i * 128 + ((unit ^ i % 8) << 4) + word * 4;  // the hardware's 128-byte swizzle
        const u16* from = x + (size_t)min(first + i, m - 1) * k + chunk * COLUMNS + lane * 2;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
    }
}

#define D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
__device__ __forceinline__ void wgmma(float (&d)[16][4], const u32 (&a)[4], unsigned long long b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
        : D4(0), D4(1), D4(2), D4(3), D4(4), D4(5), D4(6), D4(7), D4(8), D4(9), D4(10), D4(11), D4(12), D4(13), D4(14),
          D4(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <int SPLIT>
__global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__(256, 2)
    many_rows(Weight w, const u16* __restrict__ x, u16* __restrict__ out, int m) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 stages = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.z, first_n = blockIdx.x * 128, first_x = blockIdx.y * TILE_X;
    const int tile = min(first_n / ROWS + warp, w.n / ROWS - 1);
    const int count = (w.k / COLUMNS - rank + SPLIT - 1) / SPLIT;  // blocks of K: rank, rank + SPLIT, ...

#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < count) fetch_x(stages + i * STAGE_BYTES, x, first_x, m, w.k, rank + i * SPLIT);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    float d[16][4] = {};
    Fragments f;
    Packed ahead;
    if (count) f = unpack(w, read(w, tile, rank));
    if (count > 1) ahead = read(w, tile, rank + SPLIT);
    for (int i = 0; i < count; i++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads through another path than copies write
        __syncthreads();  // block i of x is here, and nobody reads block i - 1 any more
        if (i + STAGES - 1 < count)
            fetch_x(stages + (i + STAGES - 1) % STAGES * STAGE_BYTES, x, first_x, m, w.k, rank + (i + STAGES - 1) * SPLIT);
        asm volatile("cp.async.commit_group;" ::: "memory");

        // The descriptor of x: address, 1024 bytes from 8 rows to the next 8, 128-byte swizzle; units of 16 bytes.
        const unsigned long long b = (unsigned long long)1 << 62 | (unsigned long long)64 << 32 | 1 << 16 |
                                     (stages + i % STAGES * STAGE_BYTES) >> 4;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(d, f.a[j], b + j * 2);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        Fragments next;
        if (i + 1 < count) next = unpack(w, ahead);  // while the tensor cores multiply
        if (i + 2 < count) ahead = read(w, tile, rank + (i + 2) * SPLIT);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        f = next;
    }

    float* part = (float*)shared;  // [row of x][row of W], over the stages
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++)
        part[(i / 4 * 8 + t * 2 + i % 2) * PITCH + warp * ROWS + g + i / 2 % 2 * 8] = d[i / 4][i % 4];
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
    for (int e = threadIdx.x; e < TILE_X / SPLIT * 128; e += 256) {  // each CTA finishes its share of the rows of x
        const int n = e % 128, i = e / 128 + rank * (TILE_X / SPLIT);
        const u32 mine = shared_address(part + i * PITCH + n);
        float sum = 0;
#pragma unroll
        for (int k = 0; k < SPLIT; k++) {
            u32 theirs;
            float value;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(k));
            asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(theirs));
            sum += value;
        }
        if (first_x + i < m && first_n + n < w.n)
            out[(size_t)(first_x + i) * w.n + first_n + n] = finish(w, first_n + n, sum);
    }
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif
