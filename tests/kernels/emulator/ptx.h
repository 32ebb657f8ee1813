// CUDA's names and PTX's instructions, as a fiber executes them. A function is called like its instruction, with _
// where that has a dot or colons, so that an instruction which is not here does not compile. Meanings: the PTX ISA.
//
// What takes time on a GPU (copies, wgmma) is asked for here and done later. Until then, where a copy goes there are
// NaNs.

#include <algorithm>
#include <cmath>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define threadIdx (fiber->thread)
#define blockIdx (fiber->block)
#define gridDim grid_of_launch
using std::max, std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};
Index grid_of_launch;

// --- Numbers.

uint32_t bits_of(float value) {
    uint32_t bits;
    return memcpy(&bits, &value, 4), bits;
}
float __uint_as_float(uint32_t bits) {
    float value;
    return memcpy(&value, &bits, 4), value;
}
uint32_t __popc(uint32_t x) { return __builtin_popcount(x); }
int __ffs(uint32_t x) { return __builtin_ffs(x); }
float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
uint16_t to_bf16(double value) {  // to nearest, ties to even, subnormals too
    if (std::isnan(value)) return 0x7FFF;
    const double unit = std::ldexp(1.0, (value == 0 ? -126 : std::max(std::ilogb(value), -126)) - 7);
    return bits_of((float)(std::nearbyint(value / unit) * unit)) >> 16;
}
uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
template <class T>
T __ldg(const T* p) { return *p; }

void lop3_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c, int table) {
    d = 0;
    for (int i = 0; i < 32; i++) {
        const int which = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
        d |= (uint32_t)(table >> which & 1) << i;
    }
}
void fma_rn_bf16x2(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 32; i += 16)
        result |= (uint32_t)to_bf16(std::fma((double)from_bf16(a >> i & 0xFFFF), from_bf16(b >> i & 0xFFFF),
                                             from_bf16(c >> i & 0xFFFF))) << i;
    d = result;
}
void cvt_rn_bf16_f32(uint16_t& d, float a) { d = to_bf16(a); }

// --- Memory.

char* dynamic_shared() { return fiber->cta->memory; }

template <class P>
void aligned(P p, unsigned to, const char* what) {
    if ((size_t)p % to) fail("%s is not aligned to %u bytes", what, to);
}
// An address in shared memory: of the thread's own CTA, or, with a rank + 1 in the upper byte, of any in the cluster.
char* at(Cta& own, uint32_t address, unsigned bytes) {
    Cta& cta = address >> 24 ? cluster->ctas.at((address >> 24) - 1) : own;
    const unsigned offset = (address & 0xFFFFFF) - BELOW;
    if (offset > cta.bytes || offset + bytes > cta.bytes) fail("touches shared memory that is not there");
    if (!cta.running) fail("touches the shared memory of a CTA that has ended");
    return cta.memory + offset;
}
uint64_t __cvta_generic_to_shared(const void* p) { return (const char*)p - fiber->cta->memory + BELOW; }
void mapa_shared_cluster_u32(uint32_t& d, uint32_t address, uint32_t rank) { d = address | (rank + 1) << 24; }

void griddepcontrol_launch_dependents() {}
void griddepcontrol_wait() {
    give_way();
    fiber->waited = fiber->cta->waited = true;
}
// What the kernel before may write: x, which is read by the plain load and by boxes of two bytes an element.
void written_before() {
    if (early && !fiber->waited) fail("reads x before the wait for the kernel before");
}

void ld_global_nc_L1_no_allocate_v4_u32(unsigned& x, unsigned& y, unsigned& z, unsigned& w, const void* address) {
    aligned(address, 16, "a load");
    const uint4 v = *(const uint4*)address;
    x = v.x, y = v.y, z = v.z, w = v.w;
}
void ld_global_v4_u32(unsigned& x, unsigned& y, unsigned& z, unsigned& w, const void* address) {
    written_before();
    ld_global_nc_L1_no_allocate_v4_u32(x, y, z, w, address);
}
void ld_shared_cluster_v4_f32(float& x, float& y, float& z, float& w, uint32_t address) {
    aligned(address, 16, "a load");
    give_way();
    const float4 v = *(const float4*)at(*fiber->cta, address, 16);
    x = v.x, y = v.y, z = v.z, w = v.w;
}

// --- Barriers of threads. `aligned` instructions want all lanes of a warp at once.

void converge(const char* what) { meet(fiber->warp->lanes, 32, what); }
void __syncwarp() { converge("__syncwarp"); }

// What lane `from` passes; each lane asks for another.
uint32_t exchange(uint32_t value, unsigned from) {
    const unsigned lane = fiber->thread.x % 32;
    Warp& warp = *fiber->warp;
    warp.exchanged[lane][0] = value;
    converge("a shuffle");
    const uint32_t found = warp.exchanged[from][0];
    converge("a shuffle, done");
    return found;
}
void whole(uint32_t mask) {
    if (~mask) fail("a shuffle of some lanes");
}
uint32_t __shfl_sync(uint32_t mask, uint32_t value, unsigned from) { return whole(mask), exchange(value, from % 32); }
uint32_t __shfl_up_sync(uint32_t mask, uint32_t value, unsigned by) {
    const unsigned lane = fiber->thread.x % 32;
    return whole(mask), exchange(value, lane < by ? lane : lane - by);
}
bool __any_sync(uint32_t mask, uint32_t value) {
    for (unsigned step = 1; step < 32; step *= 2) value |= exchange(value, fiber->thread.x % 32 ^ step);
    return whole(mask), value;
}
void bar_sync(unsigned which, unsigned threads) {
    converge("bar.sync");
    meet(fiber->cta->barriers[which], threads, "bar.sync");
}
void __syncthreads() { bar_sync(0, fiber->cta->threads); }

void barrier_cluster_arrive_relaxed_aligned() {
    converge("barrier.cluster.arrive");
    fiber->turn = cluster->turn, cluster->arrived++;
    cluster_progress();
}
void fence_release_sync_restrict_shared_cta_cluster() {}
void barrier_cluster_wait_acquire_aligned() {
    converge("barrier.cluster.wait");
    if (fiber->turn == cluster->turn) wait_in(cluster->waiting, "barrier.cluster");
}

void setmaxnreg(unsigned count, const char* what) {
    converge(what);
    if (count % 8 || count < 24 || count > 256) fail("%s %u", what, count);
    Warp& warp = *fiber->warp;
    Cta& cta = *fiber->cta;
    if (fiber->thread.x / 128 * 128 + 128 > cta.threads) fail("%s in a group of less than four warps", what);
    while (count > warp.registers && cta.free_registers < (count - warp.registers) * 32)
        wait_in(cta.for_registers, "registers");
    cta.free_registers += (warp.registers - count) * 32, warp.registers = count;  // the first lane for all
    wake(cta.for_registers);
}
void setmaxnreg_inc_sync_aligned_u32(unsigned count) { setmaxnreg(count, "setmaxnreg.inc"); }
void setmaxnreg_dec_sync_aligned_u32(unsigned count) { setmaxnreg(count, "setmaxnreg.dec"); }

// --- Barriers in shared memory: in its eight bytes, which nothing else may overwrite.

struct MBarrier {
    uint64_t phase : 1, missing : 20, expected : 20;
    int64_t bytes : 21;
    uint64_t valid : 2;  // 2
};
static_assert(sizeof(MBarrier) == 8);

MBarrier& mbarrier(Cta& own, uint32_t address) {
    Cta& cta = address >> 24 ? cluster->ctas.at((address >> 24) - 1) : own;
    MBarrier& found = *(MBarrier*)at(own, address, 8);
    if (address % 8 || found.valid != 2) fail("uses something that is no mbarrier");
    if (cta.unfenced.count(address & 0xFFFFFF) && !(fiber && fiber->unfenced.count(address & 0xFFFFFF)))
        fail("uses an mbarrier whose maker has not fenced");
    return found;
}
void progress(Cta& own, uint32_t address, int arrivals, int bytes) {
    MBarrier& barrier = mbarrier(own, address);
    if (arrivals > (int)barrier.missing) fail("too many arrive at an mbarrier");
    barrier.missing -= arrivals, barrier.bytes += bytes;
    if (barrier.missing || barrier.bytes) return;
    barrier.phase ^= 1, barrier.missing = barrier.expected;
    Cta& cta = address >> 24 ? cluster->ctas[(address >> 24) - 1] : own;
    wake(cta.mbarriers[address & 0xFFFFFF]);
}
void mbarrier_init_shared_b64(uint32_t address, uint32_t arrivals) {
    MBarrier made{0, arrivals, arrivals, 0, 2};
    memcpy(at(*fiber->cta, address, 8), &made, 8);
    fiber->unfenced.insert(address), fiber->cta->unfenced.insert(address);
    give_way();
}
void fence_mbarrier_init_release_cluster() {
    for (uint32_t address : fiber->unfenced) fiber->cta->unfenced.erase(address);
    fiber->unfenced.clear();
}
void mbarrier_arrive_expect_tx_shared_b64(uint32_t address, uint32_t bytes) {
    progress(*fiber->cta, address, 1, bytes);
    give_way();
}
void mbarrier_arrive_shared_b64(uint32_t address) {
    give_way();
    progress(*fiber->cta, address, 1, 0);
}
void mbarrier_try_wait_parity_shared_b64(bool& done, uint32_t address, uint32_t parity, unsigned) {
    give_way();
    done = mbarrier(*fiber->cta, address).phase != (parity & 1);
    if (!done) wait_in(fiber->cta->mbarriers[address], "an mbarrier");
}

// --- The copy engine.

struct Tensor {  // what `tensor_map` of __init__.py makes
    uint64_t address, rows, columns, width, box_rows, box_columns, unused[10];
};

void prefetch_tensormap(const void* map) { aligned(map, 64, "a tensor map"); }

// Copy rows of `bytes` bytes, zeros where a row is null, to `to` of a CTA, some time; then tell its mbarrier.
void copy_later(Cta* cta, uint32_t to, std::vector<const char*> rows, unsigned bytes, unsigned swizzle, uint32_t full) {
    const auto place = [=](unsigned i) { return at(*cta, i ^ (i >> 7 & swizzle) << 4, 16); };
    for (unsigned i = 0; i < rows.size() * bytes; i += 16) memset(place(to + i), 0xFF, 16);
    pending.push_back([=] {
        for (unsigned i = 0; i < rows.size() * bytes; i += 16)
            if (const char* const row = rows[i / bytes]) memcpy(place(to + i), row + i % bytes, 16);
            else memset(place(to + i), 0, 16);
        progress(*cta, full, 0, -(int)(rows.size() * bytes));
    });
}
void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes(
    uint32_t to, const void* map, int column, int row, uint32_t full) {
    const Tensor& m = *(const Tensor*)map;
    if (m.width == 2) written_before();
    const unsigned bytes = m.box_columns * m.width, swizzle = bytes == 128 ? 7 : 3;
    aligned(map, 64, "a tensor map"), aligned(to, 128, "a box");
    aligned(m.address, 16, "a matrix"), aligned(m.columns * m.width, 16, "a row");
    if (m.box_rows > 256 || (bytes != 128 && bytes != 64)) fail("no such box");
    for (unsigned i = 0; i < m.box_rows; i += 8) {  // not all at once
        std::vector<const char*> rows;
        for (unsigned r = i; r < std::min<unsigned>(i + 8, m.box_rows); r++)
            rows.push_back(row + r < m.rows ? (const char*)m.address + ((row + r) * m.columns + column) * m.width : 0);
        copy_later(fiber->cta, to + i * bytes, rows, bytes, swizzle, full);
    }
    give_way();
}
void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(
    uint32_t to, const void* from, uint32_t bytes, uint32_t full) {
    aligned(to, 16, "a copy"), aligned(from, 16, "a copy"), aligned(bytes, 16, "a copy");
    copy_later(fiber->cta, to, {(const char*)from}, bytes, 0, full);
    give_way();
}

// --- Tensor cores. Fragments of A [16][16] and of D [16][8 * tiles] are the same for mma and for a warp of wgmma.

template <class Of>  // of(lane) -> four registers
void read_fragments(float (&a)[16][16], Of of) {
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) {
            const uint32_t pair = of(row % 8 * 4 + k % 8 / 2)[k / 8 * 2 + row / 8];
            a[row][k] = from_bf16(pair >> k % 2 * 16 & 0xFFFF);
        }
}
float dot(const float* a, const float* b) {
    float sum = 0;
    for (int k = 0; k < 16; k++) sum += a[k] * b[k];
    return sum;
}

void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3) {
    Warp& warp = *fiber->warp;
    const int lane = fiber->thread.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(warp.exchanged[lane], mine, sizeof mine);
    converge("mma.sync");
    float* const d[4] = {&d0, &d1, &d2, &d3};
    const float c[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = t * 2 + i % 2;
        float a[16], b[16];
        for (int k = 0; k < 16; k++) {
            a[k] = from_bf16(warp.exchanged[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8] >> k % 2 * 16 & 0xFFFF);
            b[k] = from_bf16(warp.exchanged[column * 4 + k % 8 / 2][4 + k / 8] >> k % 2 * 16 & 0xFFFF);
        }
        *d[i] = c[i] + dot(a, b);
    }
    converge("mma.sync, done");
}

struct Product {  // of a warp: where its lanes keep sums and A, which it reads when it is done
    int tiles, issued = 0;
    float* d[32];
    const uint32_t* a[32];
    uint64_t x;
};

// A warp's next product: rows of B are in shared memory, swizzled in rows of 128 bytes.
void do_product(Cta* cta, Warp* warp) {
    const Product& p = *warp->products[warp->done++];
    const uint32_t start = (p.x & 0x3FFF) << 4, stride = (p.x >> 32 & 0x3FFF) << 4;
    float a[16][16], b[16];
    read_fragments(a, [&](int lane) { return p.a[lane]; });
    for (int n = 0; n < p.tiles * 8; n++) {
        for (int k = 0; k < 16; k++) {
            const uint32_t from = start + n / 8 * stride + n % 8 * 128 + k * 2;
            b[k] = from_bf16(*(uint16_t*)at(*cta, from ^ (from >> 7 & 7) << 4, 2));
        }
        for (int row = 0; row < 16; row++)
            p.d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2] += dot(a[row], b);
    }
    wake(warp->waiting);
}

void wgmma_fence_sync_aligned() {
    converge("wgmma.fence");
    fiber->warp->fenced = true;
}
void wgmma_commit_group_sync_aligned() {
    converge("wgmma.commit_group");
    if (fiber->thread.x % 32 == 0) fiber->warp->commits.push_back(fiber->warp->products.size());
    converge("wgmma.commit_group, done");
}
void wgmma_wait_group_sync_aligned(size_t but) {
    converge("wgmma.wait_group");
    Warp& warp = *fiber->warp;
    warp.fenced = false;
    const size_t until = warp.commits.size() > but ? warp.commits[warp.commits.size() - 1 - but] : 0;
    while (warp.done < until) wait_in(warp.waiting, "wgmma");
}
// Operands: sums by row of `tiles`, A, the descriptor of B, and 1, 1, 1, 0: add, plus, plus, not transposed.
template <class... Operands>
void wgmma_mma_async(int tiles, Operands&... operands) {
    static_assert(sizeof...(operands) >= 13);
    const void* const places[] = {&operands...};
    Warp& warp = *fiber->warp;
    Cta& cta = *fiber->cta;
    const int lane = fiber->thread.x % 32;
    converge("wgmma.mma_async");
    if (!warp.fenced) fail("wgmma without a fence");
    if (lane == 0) warp.products.emplace_back(new Product{tiles});
    converge("wgmma.mma_async, made");
    Product& p = *warp.products.back();
    p.d[lane] = (float*)places[0], p.a[lane] = (const uint32_t*)places[tiles * 4];
    p.x = *(const uint64_t*)places[tiles * 4 + 4];
    for (int i = 0; i < tiles * 4; i++)
        if (places[i] != p.d[lane] + i) fail("sums that do not lie side by side");
    if (p.x >> 62 != 1 || (p.x >> 49 & 7)) fail("not the swizzle of 128 bytes");
    if (++p.issued < 32) return converge("wgmma.mma_async, done");
    // Once the four warps of a group have asked, each is done by itself.
    const size_t index = warp.products.size(), first = fiber->thread.x / 128 * 4;
    bool all = true;
    for (size_t w = first; w < first + 4; w++)
        all &= cta.warps[w].products.size() >= index && cta.warps[w].products[index - 1]->issued == 32;
    for (size_t w = first; all && w < first + 4; w++)
        pending.push_back([&cta, w] { do_product(&cta, &cta.warps[w]); });
    converge("wgmma.mma_async, done");
}
#define WGMMA_OF(n)                                                                    \
    template <class... Operands>                                                       \
    void wgmma_mma_async_sync_aligned_m64n##n##k16_f32_bf16_bf16(Operands&&... operands) { \
        wgmma_mma_async(n / 8, operands...);                                           \
    }
WGMMA_OF(16)
WGMMA_OF(32)
WGMMA_OF(64)
WGMMA_OF(128)
#undef WGMMA_OF
