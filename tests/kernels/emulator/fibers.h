// The threads of one cluster of CTAs as fibers of one thread of this machine. A fiber runs until it waits or gives way;
// then a seed decides who goes on, and when work that is under way by itself (a copy, a product) gets done. So threads
// that no barrier keeps in order come in one order under one seed and in another under the next.

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

struct Index {
    unsigned x, y, z;
};
struct Cta;
struct Warp;

struct Fiber {
    Index thread, block;
    Cta* cta;
    Warp* warp;
    const char* waits_for = "its start";
    bool started = false, done = false;
    bool waited = false;  // for the kernel before this one
    unsigned turn = 0;  // of the cluster's barrier, where it arrived last
    jmp_buf place;
    std::set<uint32_t> unfenced;  // mbarriers that it made and has not fenced
};

using Waiting = std::vector<Fiber*>;

unsigned registers_of_a_cta;
bool early;  // the kernel may have started while the one before it ends

// A barrier of so many threads, who all have to be at the same instruction.
struct Meeting {
    Waiting waiting;
    const char* what = nullptr;
};

Fiber* fiber;                                // the one that runs
std::vector<Fiber*> ready;                   // those that could
std::vector<std::function<void()>> pending;  // what happens at some time
jmp_buf scheduler;
sigjmp_buf failure;
char message[512];

[[noreturn]] void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    const int length = fiber ? snprintf(message, sizeof message, "CTA (%u, %u, %u), thread %u: ", fiber->block.x,
                                        fiber->block.y, fiber->block.z, fiber->thread.x) : 0;
    vsnprintf(message + length, sizeof message - length, format, values);
    siglongjmp(failure, 1);
}

void outside(int, siginfo_t* found, void*) { fail("touches memory that is none of its own: %p", found->si_addr); }

// --- What the seed decides.

uint64_t state;
bool by_priority;    // else all fibers are alike
unsigned haste;      // in 256: how often pending work comes before fibers. 0: as late as the waits allow
unsigned random_below(size_t n) {
    state = state * 6364136223846793005 + 1442695040888963407;
    return (state >> 33) % n;
}
void decide(unsigned seed) {
    state = seed * 2654435761u + 1;
    by_priority = seed % 2;
    const unsigned hastes[] = {0, 8, 64, 200};
    haste = hastes[seed / 2 % 4];
}

// --- Waiting.

void leave(const char* what) {
    fiber->waits_for = what;
    if (!_setjmp(fiber->place)) _longjmp(scheduler, 1);
}
void give_way() {
    ready.push_back(fiber);
    leave("its turn");
}
void wait_in(Waiting& waiting, const char* what) {
    waiting.push_back(fiber);
    leave(what);
}
void wake(Waiting& waiting) {
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}
void meet(Meeting& meeting, size_t size, const char* what) {
    if (meeting.waiting.empty()) meeting.what = what;
    if (strcmp(meeting.what, what)) fail("is at %s, where others are at %s", what, meeting.what);
    meeting.waiting.push_back(fiber);
    if (meeting.waiting.size() == size) wake(meeting.waiting);
    leave(what);
}

// --- A cluster.

struct Product;
struct Warp {
    Meeting lanes;
    uint32_t exchanged[32][8];
    unsigned priority = 0, registers = 0;
    // wgmma: products that it asked for and that are done, and how many were asked for at each commit.
    std::vector<std::shared_ptr<Product>> products;
    size_t done = 0;
    std::vector<size_t> commits;
    bool fenced = false;
    Waiting waiting;
};

constexpr unsigned BELOW = 1024;  // of a CTA's shared memory the system keeps so much

struct Cta {
    unsigned rank, running, threads, bytes;
    bool waited = false;  // one of its threads has
    char* memory;  // dynamic shared memory
    std::vector<Warp> warps;
    std::map<unsigned, Meeting> barriers;
    std::map<uint32_t, Waiting> mbarriers;  // who waits, by address
    std::set<uint32_t> unfenced;
    unsigned free_registers = 0;
    Waiting for_registers;
};

struct Cluster {
    std::vector<Cta> ctas;
    unsigned threads, gone = 0, arrived = 0, turn = 0;
    Waiting waiting;
};
Cluster* cluster;

// Who has ended counts as arrived.
void cluster_progress() {
    if (cluster->arrived && cluster->arrived + cluster->gone == cluster->threads)
        cluster->arrived = 0, cluster->turn++, wake(cluster->waiting);
}

constexpr size_t STACK = 64 << 10, ROOM = 256 << 10;  // bytes of a fiber's stack; of a CTA's shared memory and guard
std::function<void()> body;  // of a thread

void enter() {
    body();
    fiber->done = true, fiber->waits_for = "nothing";
    if (early && fiber->cta->running == 1 && !fiber->cta->waited) fail("ends without a wait for the kernel before");
    cluster->gone++, cluster_progress();
    if (--fiber->cta->running == 0) memset(fiber->cta->memory, 0xFF, fiber->cta->bytes);  // no more its own
    _longjmp(scheduler, 1);
}

void resume(Fiber* next, char* stack) {
    fiber = next;
    if (!_setjmp(scheduler)) {
        if (fiber->started) _longjmp(fiber->place, 1);
        fiber->started = true;
        static ucontext_t first;
        getcontext(&first);
        first.uc_stack.ss_sp = stack, first.uc_stack.ss_size = STACK, first.uc_link = nullptr;
        makecontext(&first, enter, 0);
        setcontext(&first);
    }
    fiber = nullptr;
}

template <class T>
T take(std::vector<T>& from, size_t i) {
    T taken = std::move(from[i]);
    if (i + 1 < from.size()) from[i] = std::move(from.back());
    from.pop_back();
    return taken;
}

size_t choose() {
    size_t best = random_below(ready.size());
    for (int i = 0; by_priority && i < 8; i++) {
        const size_t other = random_below(ready.size());
        if (ready[other]->warp->priority > ready[best]->warp->priority) best = other;
    }
    return best;
}

char* reserve(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) fail("no memory for %zu bytes", bytes);
    return (char*)found;
}

// Run `body` in all threads of a cluster whose first CTA is `first`.
void run_cluster(Index first, Index extent, unsigned threads, unsigned shared_bytes) {
    static char *stacks = nullptr, *shared = nullptr;
    static size_t room = 0, most = 0;
    const unsigned ctas = extent.x * extent.y * extent.z;
    if (room < ctas * threads) room = ctas * threads, stacks = reserve(room * STACK);
    if (most < ctas) most = ctas, shared = reserve(most * ROOM);
    mprotect(shared, most * ROOM, PROT_NONE);
    Cluster whole;
    cluster = &whole, whole.ctas.resize(ctas), whole.threads = ctas * threads;
    std::vector<Fiber> fibers(ctas * threads);
    ready.clear(), pending.clear();
    for (unsigned i = 0; i < ctas; i++) {
        Cta& cta = whole.ctas[i];
        cta.rank = i, cta.running = cta.threads = threads, cta.bytes = shared_bytes;
        // Behind its end, but for what alignment takes, nobody may touch memory.
        char* const end = shared + (i + 1) * ROOM - 4096;
        cta.memory = end - (shared_bytes + 1023) / 1024 * 1024;
        char* const page = (char*)((size_t)cta.memory & ~(size_t)4095);
        mprotect(page, end - page, PROT_READ | PROT_WRITE);
        memset(cta.memory, 0xFF, shared_bytes);
        cta.warps.resize(threads / 32);
        for (Warp& warp : cta.warps)
            warp.priority = random_below(1 << 30), warp.registers = registers_of_a_cta / threads / 8 * 8;
        for (unsigned t = 0; t < threads; t++) {
            Fiber& f = fibers[i * threads + t];
            f.thread = {t, 0, 0}, f.cta = &cta, f.warp = &cta.warps[t / 32];
            f.block = {first.x + i % extent.x, first.y + i / extent.x % extent.y, first.z + i / extent.x / extent.y};
            ready.push_back(&f);
        }
    }
    while (!ready.empty() || !pending.empty()) {
        const bool work = !pending.empty() && (ready.empty() || random_below(256) < haste);
        if (work) {
            take(pending, random_below(pending.size()))();
        } else {
            Fiber* const next = take(ready, choose());
            resume(next, stacks + (next - fibers.data()) * STACK);
        }
    }
    for (Fiber& f : fibers)
        if (!f.done) fiber = &f, fail("waits without end for %s", f.waits_for);
}
