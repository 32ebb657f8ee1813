// What a CUDA kernel of one thread block cluster needs of a GPU, on a CPU: a thread for each of its threads, shared
// memory and barriers for each CTA, and Hopper's copy engine, mbarriers and wgmma. Copies and products are done at once,
// so a wait that is missing is not found; what lies where, who waits for whom and a wait that never ends are.
// test_nested_on_cpu.py puts the calls of this file in the place of the kernel's PTX.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __restrict__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
using std::min;

struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct ushort4 { unsigned short x, y, z, w; };
struct Index { int x, y, z; };
thread_local Index threadIdx, blockIdx;

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned char bytes[8];
    memcpy(bytes, &a, 4), memcpy(bytes + 4, &b, 4);
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)bytes[selector >> 4 * i & 7] << 8 * i;
    return result;
}
template <class T>
T __ldg(const T* p) { return *p; }
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned short to_bf16(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16;
}
inline unsigned lifted(unsigned pair) {  // both BF16 values, times 2^113
    unsigned result = 0;
    for (int i = 0; i < 2; i++) result |= (unsigned)to_bf16(ldexpf(__uint_as_float(pair >> 16 * i << 16), 113)) << 16 * i;
    return result;
}

struct MBarrier {
    std::mutex mutex;
    std::condition_variable changed;
    int expected = 0, pending = 0;
    long bytes = 0;
    unsigned phase = 0;

    void arrive(int arrivals, long expects) {
        std::lock_guard<std::mutex> lock(mutex);
        pending -= arrivals, bytes += expects;
        if (pending < 0) printf("too many arrivals\n"), exit(1);
        if (pending == 0 && bytes == 0) phase ^= 1, pending = expected, changed.notify_all();
    }
    void wait(unsigned of) {
        std::unique_lock<std::mutex> lock(mutex);
        if (!changed.wait_for(lock, std::chrono::seconds(120), [&] { return phase % 2 != of % 2; }))
            printf("a wait without end: CTA %d, thread %d\n", blockIdx.z, threadIdx.x), exit(1);
    }
};

struct Cta {
    std::vector<char> room;
    char* memory;
    std::mutex mutex;
    std::map<unsigned, std::unique_ptr<MBarrier>> barriers;
    std::unique_ptr<std::barrier<>> all, consumers;
    std::vector<std::unique_ptr<std::barrier<>>> groups;
    std::vector<unsigned> fragments;
};
struct Matrix { const char* data; int rows, columns, width, box; };

std::vector<Cta>* cluster;
std::unique_ptr<std::barrier<>> whole_cluster;
Matrix matrices[2];  // x, plane
thread_local int rank_in_cluster;

Cta& own() { return (*cluster)[rank_in_cluster]; }
unsigned offset_of(const void* p) { return (const char*)p - own().memory; }
unsigned elsewhere(const void* p, unsigned rank) { return offset_of(p) | (rank + 1) << 24; }  // what `mapa` gives
MBarrier& mbarrier(Cta& cta, unsigned offset) {
    std::lock_guard<std::mutex> lock(cta.mutex);
    auto& found = cta.barriers[offset];
    if (!found) found.reset(new MBarrier);
    return *found;
}
void start(unsigned at, int arrivals) {
    auto& barrier = mbarrier(own(), at);
    barrier.expected = barrier.pending = arrivals;
}
MBarrier& anywhere(unsigned at) { return mbarrier((*cluster)[(at >> 24) - 1], at & 0xFFFFFF); }
float4 load_from(unsigned at) {
    float4 value;
    memcpy(&value, (*cluster)[(at >> 24) - 1].memory + (at & 0xFFFFFF), 16);
    return value;
}

// A box of 64 columns, swizzled in rows of 128 bytes or of 64.
void box(unsigned to, const Matrix& m, int column, int row, unsigned full, unsigned mask) {
    const int pitch = 64 * m.width, swizzle = pitch == 128 ? 7 : 3;
    for (int cta = 0; cta < (int)cluster->size(); cta++) {
        if (!(mask >> cta & 1)) continue;
        for (int i = 0; i < m.box; i++)
            for (int b = 0; b < pitch; b++) {
                const unsigned at = to + i * pitch + b;
                (*cluster)[cta].memory[at ^ (at >> 7 & swizzle) << 4] =
                    row + i < m.rows ? m.data[((size_t)(row + i) * m.columns + column) * m.width + b] : 0;
            }
        mbarrier((*cluster)[cta], full).arrive(0, -m.box * pitch);
    }
}
void bytes(void* to, const void* from, unsigned count, unsigned full) {
    memcpy(to, from, count);
    mbarrier(own(), full).arrive(0, -(long)count);
}

// wgmma m64nNk16: A from the registers of 128 threads, B [8 * tiles][16] from shared memory, swizzled in rows of 128 bytes.
void multiply_group(float* d, int tiles, const unsigned* a, unsigned long long descriptor) {
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    unsigned* const all = &own().fragments[group * 512];
    own().groups[group]->arrive_and_wait();
    memcpy(all + thread * 4, a, 16);
    own().groups[group]->arrive_and_wait();
    const unsigned start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    for (int i = 0; i < tiles * 4; i++) {
        const int n = i / 4 * 8 + t * 2 + i % 2, half = i / 2 % 2;
        for (int k = 0; k < 16; k++) {
            const unsigned pair = all[(warp * 32 + g * 4 + k % 8 / 2) * 4 + k / 8 * 2 + half];
            const unsigned at = start + n / 8 * stride + n % 8 * 128 + k * 2;
            unsigned short b;
            memcpy(&b, own().memory + (at ^ (at >> 7 & 7) << 4), 2);
            d[i] += __uint_as_float(pair >> k % 2 * 16 << 16) * __uint_as_float((unsigned)b << 16);
        }
    }
}

// Run `kernel` in all threads of a grid of clusters, one cluster after another.
template <class Kernel>
void launch(Index grid, int share, int threads, int groups, size_t shared_bytes, Kernel kernel) {
    for (int y = 0; y < grid.y; y++)
        for (int x = 0; x < grid.x; x += share) {
            std::vector<Cta> ctas(share * grid.z);
            cluster = &ctas;
            whole_cluster.reset(new std::barrier<>(threads * ctas.size()));
            for (Cta& cta : ctas) {
                cta.room.resize(shared_bytes + 1024);
                cta.memory = (char*)(((size_t)cta.room.data() + 1023) / 1024 * 1024);
                memset(cta.memory, 0xFF, shared_bytes);  // NaN
                cta.all.reset(new std::barrier<>(threads)), cta.consumers.reset(new std::barrier<>(groups * 128));
                for (int i = 0; i < groups; i++) cta.groups.emplace_back(new std::barrier<>(128));
                cta.fragments.resize(groups * 512);
            }
            std::vector<std::thread> running;
            for (int cta = 0; cta < (int)ctas.size(); cta++)
                for (int thread = 0; thread < threads; thread++)
                    running.emplace_back([=] {
                        rank_in_cluster = cta, threadIdx = {thread, 0, 0}, blockIdx = {x + cta % share, y, cta / share};
                        kernel();
                    });
            for (std::thread& thread : running) thread.join();
        }
}
