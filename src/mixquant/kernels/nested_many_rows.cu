// y = x @ W.T + bias for up to 256 rows of x, by Hopper's wgmma (nested_block.cu explains W).
//
// From a few rows on, reading x counts too: every CTA reads all of it. So here a CTA takes 128 rows of W and X rows of
// x. Its first eight warps rebuild 16 rows of W each, and wgmma takes the very same fragments from registers, four
// warps side by side. The others bring x into shared memory, a block of columns each in turn. The SPLIT CTAs of a
// cluster share K, since few CTAs would leave most of the GPU idle, and add up their sums through each other's shared
// memory.
//
// The shuffle of K is a transposition of x in shared memory: two values are what it keeps together, and pair 8t + u of
// the 32 in a block of columns goes to place 4u + t. Then 16 consecutive values are one instruction's, in its own
// order.
//
// Why warps of their own bring x: wgmma reads shared memory by another path than threads write it, and the fence
// between the two waits for all that a thread has under way. A thread that also streams W would lose its stream at
// every block.

constexpr int TILE = 128, PITCH = TILE + 4;  // rows of W for a CTA; floats from one row of sums to the next
constexpr int CONSUMERS = 8;          // warps
constexpr int STAGES = 4, DEPTH = 4;  // blocks of columns of x, and of W, in shared memory at once

template <int X>
constexpr int PRODUCERS = X / 32;  // warps. With two, two CTAs of 64 rows of x share a multiprocessor

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

__device__ __forceinline__ void copy(uint4* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// A block of W on its way to a consumer, without a register in between: each thread copies what it will read itself,
// and the first of a warp the block's escapes.
struct Lane {
    uint4 upper[32], lower[32], nibbles[32], escapes;
};

// Where a thread copies from; a step leads on by `STEP` blocks.
template <int STEP>
struct Source {
    const u8* codes;
    const uint4 *nibbles, *escapes;
    size_t below;  // from a row of codes to the eighth below it

    __device__ __forceinline__ void begin(const Weight& w, int tile, int chunk) {
        const int lane = threadIdx.x % 32;
        const size_t block = (size_t)tile * (w.k / COLUMNS) + chunk;
        codes = w.plane + (size_t)(tile * ROWS + lane / 4) * w.k + chunk * COLUMNS + lane % 4 * 16;
        below = (size_t)8 * w.k;
        nibbles = w.nibbles + block * 32 + lane;
        escapes = w.escapes + block;
    }

    __device__ __forceinline__ void fetch(Lane& to) {
        const int lane = threadIdx.x % 32;
        copy(&to.upper[lane], codes);
        copy(&to.lower[lane], codes + below);
        copy(&to.nibbles[lane], nibbles);
        if (lane == 0) copy(&to.escapes, escapes);
        codes += STEP * COLUMNS, nibbles += STEP * 32, escapes += STEP;
    }
};

__device__ __forceinline__ Fragments unpack(const Weight& w, const Lane& from) {
    const int lane = threadIdx.x % 32;
    return unpack(w, Packed{from.upper[lane], from.lower[lane], from.nibbles[lane], from.escapes});
}

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

template <int X>
struct Shared {
    uint4 x[STAGES][X * 8];  // swizzled
    Lane w[CONSUMERS][DEPTH];
    u64 full[STAGES], empty[STAGES];
};

// Bring every block of columns of x whose turn it is into its stage.
template <int X, int SPLIT>
__device__ __forceinline__ void produce(Shared<X>& shared, const u16* x, int first, int m, int k, int rank, int count) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 - CONSUMERS;
    constexpr int PARTS = X / 64, EACH = 16;  // 64 rows at a time: 16-byte units for a thread, eight of whom read a row
    uint4 v[EACH];
    const auto read = [&](int i, int part) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int row = min(first + part * 64 + e * 4 + lane / 8, m - 1);
            v[e] = __ldg((const uint4*)(x + (size_t)row * k + (rank + i * SPLIT) * COLUMNS) + lane % 8);
        }
    };
    const auto write = [&](u32 stage, int part) {
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
    for (int i = own; i < count; i += PRODUCERS<X>) {
        const u32 stage = shared_address(shared.x[i % STAGES]);
        wait(&shared.empty[i % STAGES], i / STAGES % 2 ^ 1);  // the first time around nobody has filled it
        write(stage, 0);
#pragma unroll
        for (int part = 1; part < PARTS; part++) {
            read(i, part);
            write(stage, part);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        arrive(&shared.full[i % STAGES]);
        if (i + PRODUCERS<X> < count) read(i + PRODUCERS<X>, 0);
    }
}

// Multiply 16 rows of W in each warp by X rows of x.
template <int X, int SPLIT>
__device__ __forceinline__ void consume(
    Shared<X>& shared, float (&d)[X / 8][4], const Weight& w, int tile, int rank, int count) {
    Lane* const own = shared.w[threadIdx.x / 32];
    Source<SPLIT> source;
    source.begin(w, tile, rank);
    const auto fetch = [&](int i) {
        if (i < count) source.fetch(own[i % DEPTH]);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    const auto take = [&](int i) {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
        __syncwarp();  // the escapes came by another thread
        return unpack(w, own[i % DEPTH]);
    };
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) fetch(i);
    Fragments f;
    if (count) f = take(0);
    for (int i = 0; i < count; i++) {
        const int stage = i % STAGES;
        wait(&shared.full[stage], i / STAGES % 2);
        // The descriptor of x: address, 1024 bytes from 8 rows to the next 8, 128-byte swizzle; units of 16 bytes.
        const u64 b = (u64)1 << 62 | (u64)64 << 32 | 1 << 16 | shared_address(shared.x[stage]) >> 4;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(d, f.a[j], b + j * 2);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        fetch(i + DEPTH - 1);
        Fragments next;  // made while the tensor cores multiply
        if (i + 1 < count) next = take(i + 1);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(f);
        if (threadIdx.x % 32 == 0) arrive(&shared.empty[stage]);
        f = next;
    }
}

template <int X, int SPLIT>
__global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__((CONSUMERS + PRODUCERS<X>) * 32, X == 64 ? 2 : 1)
    many_rows(Weight w, const u16* __restrict__ x, u16* __restrict__ out, int m) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared<X>& shared = *(Shared<X>*)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.z, first_n = blockIdx.x * TILE, first_x = blockIdx.y * X;
    const int count = (w.k / COLUMNS - rank + SPLIT - 1) / SPLIT;  // blocks of columns: rank, rank + SPLIT, ...
    if (threadIdx.x < STAGES) {
        const u32 full = shared_address(&shared.full[threadIdx.x]), empty = shared_address(&shared.empty[threadIdx.x]);
        asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(full) : "memory");
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(empty), "n"(CONSUMERS) : "memory");
    }
    __syncthreads();

    float* sums = (float*)memory;  // in the end: [row of x][row of W]
    if (warp < CONSUMERS) {
        float d[X / 8][4] = {};
        // The last CTA may have warps to spare.
        consume<X, SPLIT>(shared, d, w, min(first_n / ROWS + warp, w.n / ROWS - 1), rank, count);
        asm volatile("cp.async.wait_all;\n\tbar.sync 1, 256;" ::: "memory");  // all consumers are done with the stages
#pragma unroll
        for (int i = 0; i < X / 2; i++)
            sums[(i / 4 * 8 + t * 2 + i % 2) * PITCH + warp * ROWS + g + i / 2 % 2 * 8] = d[i / 4][i % 4];
    } else {
        produce<X, SPLIT>(shared, x, first_x, m, w.k, rank, count);
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
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(theirs) : "memory");
            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        ushort4 rounded = {finish(w, first_n + n, total[0]), finish(w, first_n + n + 1, total[1]),
                           finish(w, first_n + n + 2, total[2]), finish(w, first_n + n + 3, total[3])};
        *(ushort4*)(out + (size_t)(first_x + i) * w.n + first_n + n) = rounded;
    }
    cluster_barrier();  // nobody leaves while others read its sums
}
