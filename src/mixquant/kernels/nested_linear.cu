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

__device__ __forceinline__ u16 finish(const Weight& w, int n, float sum) {
    sum *= w.scales[n];
    if (w.bias) sum += __uint_as_float((u32)w.bias[n] << 16);
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(sum));
    return rounded;
}

// ------------------------------------------------------------------------------------------------- few rows of x, <= 16
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

// ------------------------------------------------------------------------------------------------------ many rows of x
//
// From some rows on, x counts too: every CTA reads all of it, and waits for it. So here W and x are on their way to shared
// memory, without a register in between, DEPTH blocks of columns before they are multiplied. A CTA takes 128 rows of W, 16
// in each of its eight warps, and X rows of x, which the warps share. The SPLIT CTAs of a cluster share the columns, since
// few CTAs would leave most of the GPU idle, and add up their sums through each other's shared memory.
#if __CUDA_ARCH__ >= 900

constexpr int WARPS = 8, THREADS = WARPS * 32, TILE = WARPS * ROWS, DEPTH = 4;
constexpr int PITCH = TILE + 4;  // floats from one row of sums to the next: neighbouring rows start in other banks

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy(uint4* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ float4 from_cluster(const float* mine, int rank) {
    u32 theirs;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(theirs) : "memory");
    return v;
}

// One block of columns: of W as its threads will read it, of x row by row.
template <int X>
struct Stage {
    uint4 upper[THREADS], lower[THREADS], nibbles[THREADS], escapes[WARPS];
    uint4 x[X][8];

    __device__ __forceinline__ Packed packed() const {
        const int id = threadIdx.x;
        return {upper[id], lower[id], nibbles[id], escapes[id / 32]};
    }

    // Eight threads that read together read two rows, of each every other 16 bytes: swapping the pairs of odd rows keeps
    // them out of each other's banks.
    __device__ __forceinline__ uint4& unit(int row, int column) { return x[row][column ^ row % 2]; }
};

// Where a thread copies from. A step leads to the next block of columns of its CTA.
template <int X, int SPLIT>
struct Source {
    static constexpr int UNITS = X * 8, EACH = (UNITS + THREADS - 1) / THREADS;  // of 16 bytes of x; of them, for a thread
    const u8* codes;
    const uint4 *nibbles, *escapes;
    const u16* x[EACH];
    u32 below;  // from a row of codes to the eighth below it

    __device__ __forceinline__ Source(const Weight& w, int tile, const u16* from, int first, int m) {
        const int id = threadIdx.x, lane = id % 32, rank = blockIdx.z;
        const size_t block = (size_t)tile * (w.k / COLUMNS) + rank;
        codes = w.plane + (size_t)(tile * ROWS + lane / 4) * w.k + rank * COLUMNS + lane % 4 * 16;
        below = 8 * w.k;
        nibbles = w.nibbles + block * 32 + lane;
        escapes = w.escapes + block;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int row = min(first + id / 8 + i * (THREADS / 8), m - 1);
            x[i] = from + (size_t)row * w.k + rank * COLUMNS + id % 8 * 8;
        }
    }

    __device__ __forceinline__ void fetch(Stage<X>& stage) {
        const int id = threadIdx.x;
        copy(&stage.upper[id], codes);
        copy(&stage.lower[id], codes + below);
        copy(&stage.nibbles[id], nibbles);
        if (id % 32 == 0) copy(&stage.escapes[id / 32], escapes);
        codes += SPLIT * COLUMNS, nibbles += SPLIT * 32, escapes += SPLIT;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (UNITS >= THREADS || id < UNITS) copy(&stage.unit(id / 8 + i * (THREADS / 8), id % 8), x[i]);
            x[i] += SPLIT * COLUMNS;
        }
    }
};

template <int X, int SPLIT>
__global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__(THREADS, X <= 64 ? 2 : 1)
    many_rows(Weight w, const u16* __restrict__ x, u16* __restrict__ out, int m) {
    extern __shared__ uint4 memory[];
    Stage<X>* stages = (Stage<X>*)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.z, first_n = blockIdx.x * TILE, first_x = blockIdx.y * X;
    const int tile = min(first_n / ROWS + warp, w.n / ROWS - 1);  // the last CTA may have warps to spare
    const int count = (w.k / COLUMNS - rank + SPLIT - 1) / SPLIT;  // blocks of columns: rank, rank + SPLIT, ...
    Source<X, SPLIT> source(w, tile, x, first_x, m);

    float sums[X / 8][4] = {};
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) {
        if (i < count) source.fetch(stages[i]);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
#pragma unroll 1
    for (int i = 0; i < count;) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; slot++) {  // unrolled: addresses in shared memory are constants
            if (i == count) break;
            asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
            __syncthreads();  // block i is here for everybody, and nobody reads block i - 1 any more
            if (i + DEPTH - 1 < count) source.fetch(stages[(slot + DEPTH - 1) % DEPTH]);
            asm volatile("cp.async.commit_group;" ::: "memory");
            Stage<X>& stage = stages[slot];
            const Fragments f = unpack(w, stage.packed());
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int j = 0; j < X / 8; j += 2) {  // two at once, so that no instruction waits for the one before it
                    const uint4 one = stage.unit(j * 8 + g, t * 2 + half), two = stage.unit(j * 8 + 8 + g, t * 2 + half);
                    multiply(sums[j], f.a[half * 2], one.x, one.y);
                    multiply(sums[j + 1], f.a[half * 2], two.x, two.y);
                    multiply(sums[j], f.a[half * 2 + 1], one.z, one.w);
                    multiply(sums[j + 1], f.a[half * 2 + 1], two.z, two.w);
                }
            }
            i++;
        }
    }

    float* parts = (float*)memory;  // [row of x][row of W]
    __syncthreads();
#pragma unroll
    for (int i = 0; i < X / 2; i++)
        parts[(i / 4 * 8 + t * 2 + i % 2) * PITCH + warp * ROWS + g + i / 2 % 2 * 8] = sums[i / 4][i % 4];
    cluster_barrier();
    // Each CTA finishes its share, four neighbouring columns of y a thread.
    for (int e = rank * THREADS + threadIdx.x; e < X * TILE / 4; e += SPLIT * THREADS) {
        const int n = e % (TILE / 4) * 4, i = e / (TILE / 4);
        if (first_x + i >= m || first_n + n >= w.n) continue;
        float4 sum = {};
#pragma unroll
        for (int k = 0; k < SPLIT; k++) {
            const float4 part = from_cluster(parts + i * PITCH + n, k);
            sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
        }
        *(ushort4*)(out + (size_t)(first_x + i) * w.n + first_n + n) = {
            finish(w, first_n + n, sum.x), finish(w, first_n + n + 1, sum.y),
            finish(w, first_n + n + 2, sum.z), finish(w, first_n + n + 3, sum.w)};
    }
    cluster_barrier();  // nobody leaves while others read its sums
}
#endif
