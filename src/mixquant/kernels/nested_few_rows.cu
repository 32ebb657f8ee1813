// y = x @ W.T + bias for up to 32 rows of x (nested_block.cu explains W).
//
// Memory alone counts. A warp takes 16 * W rows of W, and all 8 * X rows of x, straight from the cache: x is small, and
// every warp reads the same. A CTA has N warps side by side, and K behind each of them that share the columns, with
// every K-th block, and add up their sums in shared memory.
//
// What was tried and is slower on an H200: W by asynchronous copies through shared memory (15 % at one row), x in shared
// memory, x a block ahead like W (a third at 16 rows: loads of both then wait on the same of a warp's six barriers), two
// CTAs of a cluster that share the columns.

// Volatile, so that the compiler does not move it to where it is waited for. Not `.nc`: while this kernel runs, the one
// before it may still write x.
__device__ __forceinline__ uint4 cached(const void* address) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// CTAs that fit into a multiprocessor: small warps live of their number.
template <int X, int W, int N, int K>
constexpr int RESIDENT = (X * W == 1 ? 32 : X == 2 && W == 1 ? 24 : N * K) / (N * K);

template <int X, int W, int N, int K>
__global__ void __launch_bounds__(N * K * 32, RESIDENT<X, W, N, K>)
    few_rows(Weight w, const u16* __restrict__ x, u16* __restrict__ out, int m) {
    constexpr int TILE = N * W * ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int chunks = w.k / COLUMNS, first_n = blockIdx.x * TILE, first_x = blockIdx.y * X * 8;
    int tile[W];
    const u16* row[X];
#pragma unroll
    for (int i = 0; i < W; i++)  // the last CTA may have warps to spare
        tile[i] = min(first_n / ROWS + warp / K * W + i, w.n / ROWS - 1);
#pragma unroll
    for (int i = 0; i < X; i++) row[i] = x + (size_t)min(first_x + i * 8 + g, m - 1) * w.k + t * 16;

    float sums[W][X][4] = {};
    Packed ahead[W];  // the next blocks: they travel while these are multiplied
    const auto look_ahead = [&](int chunk) {
        if (chunk >= chunks) return;
#pragma unroll
        for (int i = 0; i < W; i++) ahead[i] = read(w, tile[i], chunk);
    };
    let_next_start();
    look_ahead(warp % K);
    wait_for_before();
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
            out[(size_t)(first_x + i) * w.n + first_n + n] = Finish(w, first_n + n)(sum);
    }
}
