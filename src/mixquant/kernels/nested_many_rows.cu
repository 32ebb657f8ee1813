// y = x @ W.T + bias for 9 to 256 rows of x, by Hopper's wgmma (nested_block.cu explains W).
//
// From a few rows on, reading x counts too: every CTA reads all of it. So here a CTA takes 64 * GROUPS rows of W and X
// rows of x. Each of its warps rebuilds 16 rows of W, and wgmma takes the very same fragments from registers, four warps
// side by side, and x from shared memory, where the copy engine (TMA) puts it: a block of columns into each of STAGES
// places in turn. One thread of a last warp does nothing but start these copies.
//
// Two ways to use all multiprocessors, and to read less. SPLIT CTAs share the columns, where N alone gives too few CTAs,
// and add up their sums through each other's shared memory. SHARE CTAs side by side take the same x: each has the copy
// engine bring one part of it to all of them. Both are one cluster, (SHARE, 1, SPLIT).
//
// How W comes. Each warp copies its own blocks asynchronously, DEPTH of them ahead: nobody else reads them, and no
// register waits for memory.
//
// How columns stand. The copy engine keeps 16 bytes of x together, so here x keeps its order, and W gives way: a thread
// of 4g + t wants the columns 2t, 2t+1, 2t+8 and 2t+9 of every 16, two bytes of the plane here and two there. They are
// halves of two words that it shares with a neighbour, which shared memory gives to both at once; one permutation puts
// the halves together. The 16-byte units of a row are swizzled (`unit`), so that eight rows stand in different banks.
//
// How it overlaps. While the tensor cores multiply a block, its warp rebuilds the next one into other registers.

typedef unsigned long long u64;

struct alignas(64) Map {  // the copy engine's description of x
    u64 opaque[16];
};

#define D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define WGMMA(n, sums, a0, a1, a2, a3, b, ...)                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" sums "}, {" a0 ", " a1 \
                 ", " a2 ", " a3 "}, " b ", 1, 1, 1, 0;"                                            \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x))
#define S8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define S16 S8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define S32                                                                                              \
    S16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define S64                                                                                            \
    S32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// 16 columns of 64 rows of W by 8 * (first extent of d) rows of x, whose descriptor is `x`.
__device__ __forceinline__ void wgmma(float (&d)[2][4], const u32 (&a)[4], u64 x) {
    WGMMA("16", S8, "%8", "%9", "%10", "%11", "%12", D(0), D(1));
}
__device__ __forceinline__ void wgmma(float (&d)[4][4], const u32 (&a)[4], u64 x) {
    WGMMA("32", S16, "%16", "%17", "%18", "%19", "%20", D(0), D(1), D(2), D(3));
}
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

// The same place in another CTA of the cluster.
__device__ __forceinline__ u32 cluster_address(const void* p, u32 rank) {
    u32 theirs;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(p)), "r"(rank));
    return theirs;
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- Barriers in shared memory: each turn of a stage ends one phase.

__device__ __forceinline__ void expect(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier, u32 rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank)) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 phase) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}

// Whose turn it is among SIZE places, and how often all of them have had theirs, modulo 2.
template <int SIZE>
struct Turn {
    int place = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++place == SIZE) place = 0, phase ^= 1;
    }
};

// --- W.

__device__ __forceinline__ void copy(uint4* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// A block of W for a warp.
struct Block {
    uint4 upper[32], lower[32], nibbles[32], escapes;
};

// Where the 16 bytes of unit c (0 to 3) of row g stand: threads that read one unit of eight rows meet no bank twice.
__device__ __forceinline__ int unit(int g, int c) { return 4 * g + (c ^ g / 2); }

// Where a thread copies from, block by block.
struct Source {
    const u8* codes;
    const uint4 *nibbles, *escapes;
    size_t below;  // from a row of codes to the eighth below it

    __device__ __forceinline__ Source(const Weight& w, int tile, int chunk) {
        const int lane = threadIdx.x % 32;
        const size_t block = (size_t)tile * (w.k / COLUMNS) + chunk;
        codes = w.plane + (size_t)(tile * ROWS + lane / 4) * w.k + chunk * COLUMNS + lane % 4 * 16;
        below = (size_t)8 * w.k;
        nibbles = w.nibbles + block * 32 + lane;
        escapes = w.escapes + block;
    }

    __device__ __forceinline__ void fetch(Block& to) {
        const int lane = threadIdx.x % 32, place = unit(lane / 4, lane % 4);
        copy(&to.upper[place], codes);
        copy(&to.lower[place], codes + below);
        copy(&to.nibbles[place], nibbles);
        if (lane == 0) copy(&to.escapes, escapes);
        codes += COLUMNS, nibbles += 32, escapes++;
    }
};

// The fragments of a block in the order of x. Of unit j thread 4g + t wants the bytes 2t, 2t+1, 2t+8 and 2t+9: the first
// or second halves of words t / 2 and t / 2 + 2. The nibbles of the same columns stand with thread 4g + j: in the same
// bytes of its words, lower ones of columns 0 to 3, upper ones of columns 4 to 7 (`interleave` in nested_cuda.py).
__device__ __forceinline__ void unpack(Fragments& f, const Weight& w, const Block& from) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 halves = t % 2 ? 0x7632 : 0x5410, shift = t / 2 * 4;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32* upper = (const u32*)&from.upper[unit(g, j)] + t / 2;
        const u32* lower = (const u32*)&from.lower[unit(g, j)] + t / 2;
        const uint4 nibbles = from.nibbles[unit(g, j)];
        rebuild(__byte_perm(upper[0], upper[2], halves), __byte_perm(nibbles.x, nibbles.y, halves) >> shift, f.a[j][0], f.a[j][2]);
        rebuild(__byte_perm(lower[0], lower[2], halves), __byte_perm(nibbles.z, nibbles.w, halves) >> shift, f.a[j][1], f.a[j][3]);
    }
    patch<true>(f, w, from.escapes);
}

// --- The kernel.

template <int X, int GROUPS, int STAGES, int DEPTH>
struct Shared {
    uint4 x[STAGES][X * 8];  // in 128-byte rows, swizzled by the copy engine
    Block w[GROUPS * 4][DEPTH];
    u64 full[STAGES], empty[STAGES];
};

// Bring this CTA's part of each block of columns of x, to all CTAs that share it.
template <int X, int SHARE, int GROUPS, int STAGES, int DEPTH>
__device__ __forceinline__ void produce(Shared<X, GROUPS, STAGES, DEPTH>& shared, const Map& map, int chunk, int count) {
    constexpr int PART = X / SHARE;
    const int part = blockIdx.x % SHARE * PART, row = blockIdx.y * X + part;
    const u32 mask = ((1 << SHARE) - 1) << (blockIdx.z * SHARE);
    Turn<STAGES> turn;
    for (int i = 0; i < count; i++, turn.next()) {
        const u32 full = shared_address(&shared.full[turn.place]), to = shared_address(&shared.x[turn.place][part * 8]);
        const int column = (chunk + i) * COLUMNS;
        wait(&shared.empty[turn.place], turn.phase ^ 1);  // the first time around nobody has filled it
        expect_bytes(&shared.full[turn.place], X * COLUMNS * 2);
        if constexpr (SHARE == 1)
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                         "l"(&map), "r"(column), "r"(row), "r"(full) : "memory");
        else
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                         "l"(&map), "r"(column), "r"(row), "r"(full), "h"((u16)mask) : "memory");
    }
}

// Multiply 16 rows of W in each warp by X rows of x.
template <int X, int SHARE, int GROUPS, int STAGES, int DEPTH>
__device__ __forceinline__ void consume(
    Shared<X, GROUPS, STAGES, DEPTH>& shared, float (&d)[X / 8][4], const Weight& w, int tile, int chunk, int count) {
    constexpr int WIDE = X < 128 ? X : 128;  // rows of x for an instruction
    Block* const own = shared.w[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    Source source(w, tile, chunk);
    Turn<DEPTH> arriving, arrived;
    Turn<STAGES> full, empty;
    int ahead = 0;
    const auto fetch = [&] {
        if (ahead++ < count) source.fetch(own[arriving.place]);
        asm volatile("cp.async.commit_group;" ::: "memory");
        arriving.next();
    };
    const auto take = [&](Fragments& f) {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
        __syncwarp();  // a block came by all threads
        unpack(f, w, own[arrived.place]);
        arrived.next();
    };
    const auto release = [&] {
        if (lane < SHARE) arrive(&shared.empty[empty.place], blockIdx.z * SHARE + lane);
        empty.next();
    };
    const auto multiply = [&](Fragments& now, Fragments& other, int i) {
        wait(&shared.full[full.place], full.phase);
        // The descriptor of x: address, 1024 bytes from 8 rows to the next 8, 128-byte swizzle; units of 16 bytes.
        const u64 b = (u64)1 << 62 | (u64)64 << 32 | 1 << 16 | shared_address(shared.x[full.place]) >> 4;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int part = 0; part < X / WIDE; part++)
                wgmma(*(float(*)[WIDE / 8][4])d[part * WIDE / 8], now.a[j], b + j * 2 + part * WIDE * 8);
        asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 1;" ::: "memory");
        hold(other);  // the block before is done
        if (i) release();
        full.next();
        fetch();
        if (i + 1 < count) take(other);
    };
    Fragments even, odd = {};
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) fetch();
    if (count) take(even);
    for (int i = 0; i < count; i += 2) {
        multiply(even, odd, i);
        if (i + 1 < count) multiply(odd, even, i + 1);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;\n\tcp.async.wait_all;" ::: "memory");
    hold(even), hold(odd);
}

// Warps that do not multiply. One is enough; a group of four can give registers to the others, which 256 rows need.
template <int X>
constexpr int PRODUCERS = X == 256 ? 4 : 1;

template <int X, int GROUPS, int SPLIT, int SHARE, int STAGES, int DEPTH>
__global__ void __cluster_dims__(SHARE, 1, SPLIT)
    __launch_bounds__((GROUPS * 4 + PRODUCERS<X>) * 32, sizeof(Shared<X, GROUPS, STAGES, DEPTH>) < 113 << 10 ? 2 : 1)
    many_rows(Weight w, const __grid_constant__ Map map, u16* __restrict__ out, int m) {
    constexpr int TILE = GROUPS * 64, PITCH = TILE + 4;  // rows of W for a CTA; floats from one row of sums to the next
    extern __shared__ __align__(1024) u8 memory[];
    auto& shared = *(Shared<X, GROUPS, STAGES, DEPTH>*)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_n = blockIdx.x * TILE, first_x = blockIdx.y * X, rank = blockIdx.z;
    const int chunks = w.k / COLUMNS, chunk = rank * chunks / SPLIT, count = (rank + 1) * chunks / SPLIT - chunk;
    if (threadIdx.x < STAGES) {
        expect(&shared.full[threadIdx.x], 1);
        expect(&shared.empty[threadIdx.x], GROUPS * 4 * SHARE);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_barrier();

    if (warp < GROUPS * 4) {
        if constexpr (PRODUCERS<X> == 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        float d[X / 8][4] = {};
        // The last CTA may have warps to spare.
        consume<X, SHARE>(shared, d, w, min(first_n / ROWS + warp, w.n / ROWS - 1), chunk, count);
        asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * 128) : "memory");  // all are done with the stages
        float* const sums = (float*)memory;                              // [row of x][row of W]
#pragma unroll
        for (int i = 0; i < X / 2; i++)
            sums[(i / 4 * 8 + t * 2 + i % 2) * PITCH + warp * ROWS + g + i / 2 % 2 * 8] = d[i / 4][i % 4];
        cluster_barrier();
        // Each CTA finishes its share, four columns of y a thread.
        const int rows = min(X, m - first_x);
        for (int e = rank * GROUPS * 128 + threadIdx.x; e < rows * (TILE / 4); e += SPLIT * GROUPS * 128) {
            const int n = e % (TILE / 4) * 4, i = e / (TILE / 4);
            if (first_n + n >= w.n) continue;
            float total[4] = {};
#pragma unroll
            for (int k = 0; k < SPLIT; k++) {
                const u32 theirs = cluster_address(sums + i * PITCH + n, k * SHARE + blockIdx.x % SHARE);
                float4 v;
                asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(theirs) : "memory");
                total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
            }
            ushort4 rounded = {finish(w, first_n + n, total[0]), finish(w, first_n + n + 1, total[1]),
                               finish(w, first_n + n + 2, total[2]), finish(w, first_n + n + 3, total[3])};
            *(ushort4*)(out + (size_t)(first_x + i) * w.n + first_n + n) = rounded;
        }
        __syncwarp();
    } else {
        if constexpr (PRODUCERS<X> == 4) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == GROUPS * 4 && lane == 0) produce<X, SHARE>(shared, map, chunk, count);
        __syncwarp();
        cluster_barrier();
    }
    cluster_barrier();  // nobody leaves while others read its sums
}
