// How __init__.py starts a kernel: by its name, with pointers to its arguments, as the driver does.

#define EXPORTED extern "C" __attribute__((visibility("default")))

struct Bounds {
    Index cluster;
    unsigned threads, beside;  // at most in a CTA; CTAs of a multiprocessor
};
struct Kernel {
    Bounds bounds;
    void (*run)(void** arguments);
};
extern const std::map<std::string, Kernel> kernels;

template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<Arguments>*)arguments[I]...);
}
template <class... Arguments>
void call(void (*kernel)(Arguments...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Arguments...>{});
}

void run_grid(const Kernel& kernel, Index grid, unsigned threads, unsigned shared_bytes, void** arguments) {
    const Index extent = kernel.bounds.cluster;
    grid_of_launch = grid, fiber = nullptr;
    if (threads > kernel.bounds.threads || threads % 32) fail("%u threads", threads);
    if (grid.x % extent.x || grid.y % extent.y || grid.z % extent.z) fail("a grid that clusters do not divide");
    if (shared_bytes > 232448 || !(grid.x * grid.y * grid.z)) fail("cannot be launched");
    body = [&] { kernel.run(arguments); }, registers_of_a_cta = 65536 / kernel.bounds.beside;
    for (unsigned z = 0; z < grid.z; z += extent.z)
        for (unsigned y = 0; y < grid.y; y += extent.y)
            for (unsigned x = 0; x < grid.x; x += extent.x) run_cluster({x, y, z}, extent, threads, shared_bytes);
}

// What went wrong, or null.
EXPORTED const char* launch(
    const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, void** arguments, unsigned seed,
    bool starts_early) {
    static char* const stack = reserve(STACK);
    stack_t own{stack, 0, STACK}, before;
    struct sigaction action {}, previous[2];
    action.sa_sigaction = outside, action.sa_flags = SA_ONSTACK | SA_SIGINFO;
    sigaltstack(&own, &before);
    sigaction(SIGSEGV, &action, previous), sigaction(SIGBUS, &action, previous + 1);
    decide(seed), early = starts_early;
    const char* volatile answer = message;
    if (!sigsetjmp(failure, 1))
        run_grid(kernels.at(name), {grid[0], grid[1], grid[2]}, threads, shared_bytes, arguments), answer = nullptr;
    sigaction(SIGSEGV, previous, nullptr), sigaction(SIGBUS, previous + 1, nullptr);
    sigaltstack(&before, nullptr);
    return answer;
}

// Memory for a tensor, with pages behind and before it that nobody may touch.
EXPORTED void* guarded(size_t bytes) {
    const size_t pages = (bytes + 4095) / 4096 * 4096;
    char* const found = reserve(pages + 8192);
    mprotect(found, 4096, PROT_NONE), mprotect(found + 4096 + pages, 4096, PROT_NONE);
    return found + 4096 + pages - bytes;
}
