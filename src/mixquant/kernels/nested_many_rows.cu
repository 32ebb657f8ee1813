// y = x @ W.T + bias for 9 to 512 rows of x, by Hopper's wgmma (nested_block.cu explains W).
//
// From a few rows on, reading x counts too: every CTA reads all of it. So here a CTA takes 64 * GROUPS rows of W and X
// rows of x. Each of its warps rebuilds 16 rows of W, and wgmma takes the very same fragments from registers, four
// warps side by side, and x from shared memory. The copy engine (TMA) brings both there, a block of columns into each
// of STAGES places in turn; two threads of other warps do nothing but start its copies.
//
// How it uses all multiprocessors. SPLIT CTAs, a cluster, share the columns, where N alone gives too few, and add up their
// sums through each other's shared memory.
//
// How columns stand. The copy engine keeps 16 bytes of x together, so here x keeps its order, and W gives way: thread
// 4g + t wants the columns 2t, 2t+1, 2t+8 and 2t+9 of every 16, two bytes of the plane here and two there. They are
// halves of two words that it shares with a neighbour, which shared memory gives to both at once; one permutation puts
// the halves together. Rows of the plane are 64 bytes, and the copy engine swizzles their four units of 16 bytes, so
// that eight rows stand in different banks; the nibbles lie in memory like that.
//
// How it overlaps. A dozen warps are few, so none should wait for what could have been asked for before: while the
// tensor cores multiply a block, its warp rebuilds the next one into other registers, and then asks for the words of
// the one after that.
//
// What was tried and is no faster on an H200 (nested-ideas-h200.txt, nested-sweep-h200.txt in benchmarks/results): sums
// through global memory in the place of clusters, groups that multiply in turn, a part of rebuilding on another pipe, CTAs
// that bring x to each other.

typedef unsigned long long u64;

struct alignas(64) Map {  // the copy engine's description of a matrix
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

// All threads of the cluster. `.release` here would make visible all that was written before, wherever: for that Hopper
// has a fence for the whole GPU only, which waits for all that is under way.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Before that barrier: what this thread has written into its CTA's shared memory, the cluster shall see behind it. With
// this fence, its arrival is a release after all, but of shared memory alone, and the others' waits acquire that.
__device__ __forceinline__ void release_shared() {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
}

// --- Barriers in shared memory: each turn of a stage ends one phase.

__device__ __forceinline__ void expect(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 phase) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1, %2;\n\t"  // asleep, for 10 ms at most
        "@!done bra again;\n\t}" ::"r"(shared_address(barrier)), "r"(phase), "n"(10000000) : "memory");
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

// --- Shared memory, STAGES blocks of columns at once.

template <int X, int GROUPS, int STAGES>
struct Shared {
    uint4 x[STAGES][X * 8];           // in 128-byte rows, swizzled
    uint4 plane[STAGES][GROUPS * 64 * 4];  // in 64-byte rows, swizzled
    uint4 nibbles[STAGES][GROUPS * 4][32];
    uint4 escapes[STAGES][GROUPS * 4];
    u64 full[STAGES], empty[STAGES];
};

// A box of a matrix that `map` describes, from (row, column) on.
__device__ __forceinline__ void copy_box(uint4* to, const Map& map, int row, int column, u64* full) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(full)) : "memory");
}
__device__ __forceinline__ void copy_bytes(uint4* to, const uint4* from, u32 bytes, u64* full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(full)) : "memory");
}

// The rows of W of a CTA, 16 for each of its warps. The last CTA may have warps to spare: they multiply its last 16 rows
// once more.
struct Tiles {
    int first, count;

    __device__ __forceinline__ Tiles(const Weight& w, int warps)
        : first(blockIdx.x * warps), count(min(warps, w.n / ROWS - first)) {}
};

// Bring each block of columns: a thread of one warp what there is of W, a thread of another x, since each copy takes its
// time to start, however little it brings, also beside one of another lane.
template <int X, int GROUPS, int STAGES>
__device__ __forceinline__ void produce(
    Shared<X, GROUPS, STAGES>& shared, const Weight& w, const Map& map, const Map& plane, int chunk, int count,
    bool brings_x) {
    constexpr int WARPS = GROUPS * 4;
    const Tiles tiles(w, WARPS);
    if (brings_x) wait_for_before();
    Turn<STAGES> turn;
#pragma unroll 1
    for (int i = 0; i < count; i++, turn.next()) {
        const int at = turn.place, column = (chunk + i) * COLUMNS;
        const u32 block = (u32)(chunk + i) * (w.n / ROWS) + tiles.first;
        u64* const full = &shared.full[at];
        wait(&shared.empty[at], turn.phase ^ 1);  // the first time around nobody has filled it
        // A box counts all of its bytes, also those of rows that are not there.
        if (brings_x) {
            expect_bytes(full, X * COLUMNS * 2);
            copy_box(shared.x[at], map, blockIdx.y * X, column, full);
        } else {
            expect_bytes(full, WARPS * 1024 + tiles.count * (512 + 16));
            copy_box(shared.plane[at], plane, tiles.first * ROWS, column, full);
            copy_bytes(shared.nibbles[at][0], w.nibbles + (size_t)block * 32, tiles.count * 512, full);
            copy_bytes(shared.escapes[at], w.escapes + block, tiles.count * 16, full);
        }
    }
}

// What a thread reads of a block to rebuild it.
struct Words {
    u32 upper[4][2], lower[4][2], nibbles[4], escapes;
};

// Unit j is the 16 columns of an instruction. Of it thread 4g + t wants the bytes 2t, 2t+1, 2t+8 and 2t+9: the first or
// second halves of words t / 2 and t / 2 + 2. Their nibbles are word t of thread 4g + j.
struct Places {
    u32 codes[4], nibbles[4];  // of each unit: bytes from the first of the CTA's, so that a stage only adds a constant
    u32 halves;                // which of two words, as a permutation

    // Of a thread that rebuilds this one of the CTA's tiles.
    __device__ __forceinline__ Places(int tile) : halves(threadIdx.x % 2 ? 0x7632 : 0x5410) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            codes[j] = tile * 1024 + unit(g, j) * 16 + t / 2 * 4;
            nibbles[j] = tile * 512 + unit(g, j) * 16 + t * 4;
            asm volatile("" : "+r"(codes[j]), "+r"(nibbles[j]));  // else the compiler works them out for every block
        }
        asm volatile("" : "+r"(halves));
    }

    __device__ __forceinline__ void fetch(
        Words& words, const void* plane, const void* below, const uint4* escapes) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32* const from = (const u32*)((const u8*)plane + codes[j]);
            words.upper[j][0] = from[0], words.upper[j][1] = from[2];
            words.lower[j][0] = from[128], words.lower[j][1] = from[130];
            words.nibbles[j] = *(const u32*)((const u8*)below + nibbles[j]);
        }
        words.escapes = escapes->x;
    }
};

__device__ __forceinline__ void rebuild(
    Fragments& f, const Words& words, u32 halves, const Weight& w, const uint4* escapes) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 nibbles = words.nibbles[j];
        rebuild(__byte_perm(words.upper[j][0], words.upper[j][1], halves), nibbles, f.a[j][0], f.a[j][2]);
        rebuild(__byte_perm(words.lower[j][0], words.lower[j][1], halves), nibbles >> 4, f.a[j][1], f.a[j][3]);
    }
    if (words.escapes & 0x7FF) patch<true>(f, w, *escapes);
}

// Multiply 16 rows of W in each warp by X rows of x.
template <int X, int GROUPS, int STAGES>
__device__ __forceinline__ void consume(
    Shared<X, GROUPS, STAGES>& shared, float (&d)[X / 8][4], const Weight& w, int count) {
    constexpr int WIDE = X < 128 ? X : 128;  // rows of x for an instruction
    const int lane = threadIdx.x % 32, tile = min((int)threadIdx.x / 32, Tiles(w, GROUPS * 4).count - 1);
    Turn<STAGES> fetched, made;  // a block is made, and then multiplied before it is the next one's turn
    int before = 0;              // where the block stands that was multiplied before
    Words words;
    const Places places(tile);
    const auto ask = [&] {
        const int at = fetched.place;
        wait(&shared.full[at], fetched.phase);
        places.fetch(words, shared.plane[at], shared.nibbles[at], &shared.escapes[at][tile]);
        fetched.next();
    };
    const auto make = [&](Fragments& f) { rebuild(f, words, places.halves, w, &shared.escapes[made.place][tile]); };
    const auto multiply = [&](Fragments& now, Fragments& other, int i) {
        // The descriptor of x: address, 1024 bytes from 8 rows to the next 8, 128-byte swizzle; units of 16 bytes.
        const u64 b = (u64)1 << 62 | (u64)64 << 32 | 1 << 16 | shared_address(shared.x[made.place]) >> 4;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int part = 0; part < X / WIDE; part++)
                wgmma(*(float(*)[WIDE / 8][4])d[part * WIDE / 8], now.a[j], b + j * 2 + part * WIDE * 8);
        asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 1;" ::: "memory");
        hold(other);  // the block before is done
        if (i && lane == 0) arrive(&shared.empty[before]);
        before = made.place;
        made.next();
        if (i + 1 < count) make(other);
        if (i + 2 < count) ask();
    };
    Fragments even, odd = {};
    if (count) ask(), make(even);
    if (count > 1) ask();
    for (int i = 0; i < count; i += 2) {
        multiply(even, odd, i);
        if (i + 1 < count) multiply(odd, even, i + 1);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(even), hold(odd);
}

// CTAs of a multiprocessor.
template <int X, int GROUPS>
constexpr int BESIDE = GROUPS == 2 && X <= 32 ? 2 : 1;

// Registers of a thread: of those who multiply, and of the four warps of which two bring blocks, and which
// give theirs; they are four because only whole groups can.
template <int X, int GROUPS>
constexpr int MANY = GROUPS == 3 ? 160 : BESIDE<X, GROUPS> == 2 ? 104 : 240;
template <int GROUPS>
constexpr int FEW = GROUPS == 3 ? 32 : 24;

// --- The kernel.

template <int X, int GROUPS, int SPLIT, int STAGES>
__global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__(GROUPS * 128 + 128, BESIDE<X, GROUPS>) many_rows(
    Weight w, const __grid_constant__ Map map, const __grid_constant__ Map plane, u16* __restrict__ out, int m) {
    constexpr int TILE = GROUPS * 64, PITCH = TILE + 4;  // rows of W for a CTA; floats from one row of sums to the next
    static_assert(STAGES >= 3, "a block is multiplied, one is rebuilt and one is read");
    extern __shared__ __align__(1024) u8 memory[];
    auto& shared = *(Shared<X, GROUPS, STAGES>*)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_n = blockIdx.x * TILE, first_x = blockIdx.y * X, rank = blockIdx.z;
    const int chunks = w.k / COLUMNS, chunk = rank * chunks / SPLIT, count = (rank + 1) * chunks / SPLIT - chunk;
    let_next_start();
    if (threadIdx.x == GROUPS * 128) {  // who starts the copies: what describes them travels while barriers are made
        asm volatile("prefetch.tensormap [%0];\n\tprefetch.tensormap [%1];" ::"l"(&plane), "l"(&map) : "memory");
#pragma unroll
        for (int i = 0; i < STAGES; i++) expect(&shared.full[i], 2), expect(&shared.empty[i], GROUPS * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    __syncthreads();

    if (warp < GROUPS * 4) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY<X, GROUPS>));
        float d[X / 8][4] = {};
        consume(shared, d, w, count);
        asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * 128) : "memory");  // all are done with the stages
        float* const sums = (float*)memory;                              // [row of x][row of W]
#pragma unroll
        for (int i = 0; i < X / 2; i++)
            sums[(i / 4 * 8 + t * 2 + i % 2) * PITCH + warp * ROWS + g + i / 2 % 2 * 8] = d[i / 4][i % 4];
        if constexpr (SPLIT == 1) asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * 128) : "memory");
        else release_shared(), cluster_barrier();
        // Each CTA finishes its share: a thread four columns of every STEP-th row of y. It asks for all CTAs' sums of a
        // row at once, and where there are only its own, of four rows; of others' that was slower.
        constexpr int STEP = SPLIT * 8, AT_ONCE = SPLIT > 1 || X < 32 ? 1 : 4;
        const int n = threadIdx.x % (TILE / 4) * 4, rows = min(X, m - first_x);
        if (first_n + n < w.n) {
            const Finish f0(w, first_n + n), f1(w, first_n + n + 1), f2(w, first_n + n + 2), f3(w, first_n + n + 3);
            for (int first = rank * 8 + threadIdx.x / (TILE / 4); first < rows; first += AT_ONCE * STEP) {
                float4 parts[AT_ONCE][SPLIT];
#pragma unroll
                for (int p = 0; p < AT_ONCE * SPLIT; p++) {
                    const int i = min(first + p / SPLIT * STEP, X - 1), k = p % SPLIT;
                    const u32 theirs = cluster_address(sums + i * PITCH + n, k);
                    float4& v = parts[p / SPLIT][k];
                    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(theirs));
                }
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) {
                    float4 v = parts[j][0];
#pragma unroll
                    for (int k = 1; k < SPLIT; k++)
                        v.x += parts[j][k].x, v.y += parts[j][k].y, v.z += parts[j][k].z, v.w += parts[j][k].w;
                    const int i = first + j * STEP;
                    u16* const to = out + (size_t)(first_x + i) * w.n + first_n + n;
                    if (i < rows) *(ushort4*)to = {f0(v.x), f1(v.y), f2(v.z), f3(v.w)};
                }
            }
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW<GROUPS>));
        const int bringer = warp - GROUPS * 4;
        if (lane == 0 && bringer < 2) produce(shared, w, map, plane, chunk, count, bringer == 1);
        __syncwarp();
        if constexpr (SPLIT > 1) cluster_barrier();
    }
    if constexpr (SPLIT > 1) cluster_barrier();  // nobody leaves while others read its sums
}
