// Threads of a block as fibers: they run until they must wait, in an order that a test may turn round.
//
//   worker (OS thread) ── runs a block at a time ── fibers of up to 1024 threads, 32 to a warp
//   collective: a lane leaves its operands and steps aside; the last lane computes for all and all may run again
//   barrier:    the same for the block; a thread that has left counts as having come
//
// If no thread may run and not all have left, that is a deadlock, told with who waits where. A kernel that touches memory
// that is not there (guard pages lie around every allocation, shared memory and stacks) ends its launch, not the process.

#include "simt.h"

#include "fiber.h"

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <thread>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

namespace kvemu {

thread_local Thread *self = nullptr;

namespace {

constexpr size_t PAGE = 4096, STACK = 64 * 1024;
constexpr unsigned char POISON = 0xff, CANARY = 0xa5;

std::map<std::string, Kernel, std::less<>> &kernels() {
    static std::map<std::string, Kernel, std::less<>> all;
    return all;
}
std::map<std::string, Table, std::less<>> &tables() {
    static std::map<std::string, Table, std::less<>> all;
    return all;
}

struct Copy {
    void *to;
    const void *from;
    u32 bytes;
    bool wanted;
};

struct Warp;
enum class At { Running, Collective, Barrier, Left };

struct Fiber : Thread {
    void *sp;
    unsigned char *stack_top;
    Warp *warp;
    u32 lane;
    At at;
    // Of the collective or barrier this thread waits at.
    const char *what;
    Collective compute;
    u32 mask;
    int barrier, threads;
    // Copies under way, oldest first, and how many of them each committed group has.
    std::vector<Copy> copies;
    std::vector<u32> groups;
    u32 uncommitted;
};

struct Warp {
    u32 index;
    u32 ready;   // lanes that may run, or do
    u32 waiting; // lanes at a collective
    void *lanes[32];
    Fiber *fibers[32];
};

struct Barrier {
    u32 come;
    std::vector<Fiber *> waiting;
};

struct StaticShared {
    const void *key;
    unsigned char *at;
};

unsigned char *pages(size_t bytes) {
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        perror("emulated device: no memory for fibers");
        abort();
    }
    return (unsigned char *)at;
}
size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

struct Worker {
    void *main_sp = nullptr;
    Fiber *current = nullptr;
    volatile bool in_kernel = false;
    volatile int error = OK;
    const Kernel *kernel = nullptr;
    const void *args = nullptr;
    bool backward = false;

    std::vector<Fiber> fibers{MAX_THREADS};
    Warp warps[MAX_THREADS / 32];
    u32 ready_warps = 0;
    u32 threads = 0, alive = 0;
    Barrier barriers[16];

    unsigned char *dynamic_end, *static_end, *static_next;
    std::vector<StaticShared> statics;

    Worker() {
        unsigned char *stacks = pages(MAX_THREADS * (STACK + PAGE));
        for (u32 i = 0; i < MAX_THREADS; i++) {
            unsigned char *at = stacks + i * (STACK + PAGE);
            mprotect(at, PAGE, PROT_NONE);
            fibers[i].stack_top = at + PAGE + STACK;
        }
        dynamic_end = guarded(MAX_DYNAMIC_SHARED);
        static_end = guarded(MAX_STATIC_SHARED);
        const char *order = getenv("EMULATED_CUDA_ORDER");
        backward = order != nullptr && strcmp(order, "backward") == 0;
    }
    // The end of so many bytes, with a page behind it that must not be touched.
    static unsigned char *guarded(size_t bytes) {
        unsigned char *at = pages(whole_pages(bytes) + 2 * PAGE);
        mprotect(at, PAGE, PROT_NONE);
        mprotect(at + PAGE + whole_pages(bytes), PAGE, PROT_NONE);
        return at + PAGE + whole_pages(bytes);
    }

    int run(const Kernel &kernel, const void *args, dim3 grid, dim3 block, u32 shared, uint3 at);
    [[noreturn]] void stop(int error);
    // The next thread that may run; its warp's, if there is one.
    Fiber *next();
    void wake(Fiber *fiber) {
        fiber->at = At::Running;
        fiber->warp->ready |= 1u << fiber->lane;
        ready_warps |= 1u << fiber->warp->index;
    }
    // Another thread runs; returns when this one may again.
    void step_aside(At at);
    bool barrier_done(Barrier &barrier, int threads);
    void tell(FILE *to, const Fiber *fiber) const;
    void deadlock();
};

thread_local Worker *worker __attribute__((tls_model("initial-exec"))) = nullptr;

// The lowest set bit above `from`, or the lowest at all; turned round, the highest below it, or the highest.
u32 bit_after(u32 mask, u32 from, bool backward) {
    if (backward) {
        u32 below = mask & ((1u << from) - 1);
        return 31 - __builtin_clz(below != 0 ? below : mask);
    }
    u32 above = from == 31 ? 0 : mask & ~((2u << from) - 1);
    return __builtin_ctz(above != 0 ? above : mask);
}

void Worker::stop(int what) {
    error = what;
    in_kernel = false;
    void *unused;
    kvemu_switch(&unused, main_sp);
    __builtin_unreachable();
}

void Worker::tell(FILE *to, const Fiber *f) const {
    fprintf(to, "  block (%u, %u, %u) thread (%u, %u, %u): ", f->block.x, f->block.y, f->block.z, f->thread.x, f->thread.y, f->thread.z);
    switch (f->at) {
    case At::Running: fprintf(to, "runs\n"); break;
    case At::Left: fprintf(to, "has left\n"); break;
    case At::Collective: fprintf(to, "waits for lanes %08x of warp %u: %s\n", f->mask, f->warp->index, f->what); break;
    case At::Barrier:
        if (f->barrier == 0 && f->threads == 0) fprintf(to, "waits at __syncthreads\n");
        else fprintf(to, "waits at barrier %d of %d threads\n", f->barrier, f->threads);
    }
}

void Worker::deadlock() {
    fprintf(stderr, "emulated device: kernel %s: deadlock: %u threads of %u have left, the others wait for each other\n", kernel->name.c_str(), threads - alive, threads);
    // One of each place is enough.
    const Fiber *last = nullptr;
    u32 told = 0;
    for (u32 i = 0; i < threads && told < 16; i++) {
        const Fiber *f = &fibers[i];
        if (last != nullptr && last->at == f->at && last->what == f->what && last->mask == f->mask && last->barrier == f->barrier) continue;
        tell(stderr, f);
        last = f;
        told++;
    }
}

Fiber *Worker::next() {
    Warp *warp = current->warp;
    u32 from = current->lane;
    if (warp->ready == 0) {
        ready_warps &= ~(1u << warp->index);
        if (ready_warps == 0) {
            if (alive == 0) stop(OK);
            deadlock();
            stop(LAUNCH_FAILED);
        }
        warp = &warps[bit_after(ready_warps, warp->index, backward)];
        from = backward ? 0 : 31;
    }
    return warp->fibers[bit_after(warp->ready, from, backward)];
}

void Worker::step_aside(At at) {
    Fiber *me = current;
    me->at = at;
    me->warp->ready &= ~(1u << me->lane);
    Fiber *other = next();
    current = other;
    self = other;
    kvemu_switch(&me->sp, other->sp);
}

bool Worker::barrier_done(Barrier &barrier, int wanted) {
    if (barrier.come == 0 || barrier.come < (wanted == 0 ? alive : (u32)wanted)) return false;
    for (Fiber *waiting : barrier.waiting) wake(waiting);
    barrier.waiting.clear();
    barrier.come = 0;
    return true;
}

void fiber_main() {
    worker->kernel->run(worker->args);
    Fiber *me = worker->current;
    if (!me->copies.empty() && me->uncommitted != me->copies.size()) {
        // As on a device, where they land some time.
        me->copies.clear();
    }
    worker->alive--;
    me->at = At::Left;
    if (worker->alive > 0) worker->barrier_done(worker->barriers[0], 0);
    worker->step_aside(At::Left);
    abort();
}

int Worker::run(const Kernel &which, const void *with, dim3 grid, dim3 block, u32 shared, uint3 at) {
    kernel = &which;
    args = with;
    threads = alive = block.x * block.y * block.z;
    error = OK;
    for (Barrier &barrier : barriers) barrier.come = 0, barrier.waiting.clear();
    statics.clear();
    static_next = static_end - whole_pages(MAX_STATIC_SHARED);

    u32 room = (shared + 127) / 128 * 128;
    unsigned char *dynamic = dynamic_end - room;
    memset(dynamic, POISON, shared);
    memset(dynamic + shared, CANARY, room - shared);

    ready_warps = 0;
    for (u32 i = 0; i < threads; i++) {
        Fiber &f = fibers[i];
        f.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        f.block = at;
        f.block_size = block;
        f.grid_size = grid;
        f.dynamic_shared = dynamic;
        f.sp = fresh_stack(f.stack_top, fiber_main);
        f.warp = &warps[i / 32];
        f.lane = i % 32;
        f.at = At::Running;
        f.what = nullptr;
        f.mask = 0;
        f.barrier = f.threads = 0;
        f.copies.clear();
        f.groups.clear();
        f.uncommitted = 0;
        f.warp->fibers[f.lane] = &f;
    }
    for (u32 w = 0; w < threads / 32; w++) {
        warps[w].index = w;
        warps[w].ready = 0xffffffffu;
        warps[w].waiting = 0;
        ready_warps |= 1u << w;
    }
    current = &fibers[backward ? threads - 1 : 0];
    self = current;
    in_kernel = true;
    kvemu_switch(&main_sp, current->sp);
    in_kernel = false;
    self = nullptr;
    if (error == OK)
        for (u32 i = shared; i < room; i++)
            if (dynamic[i] != CANARY) {
                fprintf(stderr, "emulated device: kernel %s: wrote beyond its %u bytes of dynamic shared memory\n", which.name.c_str(), shared);
                return ILLEGAL_ADDRESS;
            }
    return error;
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults of kernels.

struct sigaction old_actions[3];
constexpr int SIGNALS[3] = {SIGSEGV, SIGBUS, SIGFPE};

void on_fault(int signal, siginfo_t *info, void *context) {
    Worker *w = worker;
    if (w == nullptr || !w->in_kernel) {
        const struct sigaction &old = old_actions[signal == SIGSEGV ? 0 : signal == SIGBUS ? 1 : 2];
        if (old.sa_flags & SA_SIGINFO) old.sa_sigaction(signal, info, context);
        else if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) old.sa_handler(signal);
        else {
            sigaction(signal, &old, nullptr); // it comes again, and ends the process
        }
        return;
    }
    const Fiber *f = w->current;
    char line[256];
    int length = snprintf(line, sizeof line, "emulated device: kernel %s block (%u, %u, %u) thread (%u, %u, %u): %s %p\n", w->kernel->name.c_str(), f->block.x,
                          f->block.y, f->block.z, f->thread.x, f->thread.y, f->thread.z,
                          signal == SIGFPE ? "division by zero at" : "touched memory that is not there (or not aligned), at", info->si_addr);
    if (write(2, line, length) < 0) abort();
    w->error = signal == SIGFPE ? LAUNCH_FAILED : ILLEGAL_ADDRESS;
    w->in_kernel = false;
    auto &machine = ((ucontext_t *)context)->uc_mcontext;
#if defined(__x86_64__)
    machine.gregs[REG_RSP] = (greg_t)w->main_sp;
    machine.gregs[REG_RIP] = (greg_t)kvemu_resume;
#else
    machine.sp = (u64)w->main_sp;
    machine.pc = (u64)kvemu_resume;
#endif
}

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &old_actions[i]);
    });
}

// A handler needs a stack where a fiber's is at its end.
void need_signal_stack() {
    stack_t now = {};
    if (sigaltstack(nullptr, &now) == 0 && !(now.ss_flags & SS_DISABLE)) return;
    stack_t fresh = {};
    fresh.ss_size = 64 * 1024;
    fresh.ss_sp = pages(fresh.ss_size);
    sigaltstack(&fresh, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks over OS threads.

struct Grid {
    const Kernel *kernel;
    const void *args;
    dim3 grid, block;
    u32 shared;
    u64 blocks;
    std::atomic<u64> taken{0};
    std::atomic<int> error{OK};

    void work() {
        if (worker == nullptr) {
            worker = new Worker; // a handful of threads, for as long as the process runs
            need_signal_stack();
        }
        for (u64 i; error.load() == OK && (i = taken.fetch_add(1)) < blocks;) {
            u64 at = worker->backward ? blocks - 1 - i : i;
            int result = worker->run(*kernel, args, grid, block, shared, {u32(at % grid.x), u32(at / grid.x % grid.y), u32(at / grid.x / grid.y)});
            if (result != OK) error.store(result);
        }
    }
};

// One helper beside the caller, or as many as EMULATED_CUDA_THREADS says less one.
struct Helpers {
    std::mutex lock;
    std::condition_variable changed;
    Grid *grid = nullptr;
    u64 generation = 0;
    u32 busy = 0, count;

    Helpers() {
        const char *wanted = getenv("EMULATED_CUDA_THREADS");
        long threads = wanted != nullptr ? atol(wanted) : (long)std::thread::hardware_concurrency();
        count = threads < 1 ? 0 : threads > 16 ? 15 : (u32)threads - 1;
        for (u32 i = 0; i < count; i++) std::thread([this] { serve(); }).detach();
    }
    void serve() {
        u64 seen = 0;
        std::unique_lock held(lock);
        for (;;) {
            changed.wait(held, [&] { return generation != seen; });
            seen = generation;
            if (grid == nullptr) continue;
            Grid *mine = grid;
            busy++;
            held.unlock();
            mine->work();
            held.lock();
            busy--;
            changed.notify_all();
        }
    }
    void run(Grid &work) {
        if (work.blocks > 1 && count > 0) {
            std::lock_guard held(lock);
            grid = &work;
            generation++;
            changed.notify_all();
        }
        work.work();
        std::unique_lock held(lock);
        grid = nullptr;
        changed.wait(held, [&] { return busy == 0; });
    }
};

Worker &must_be_in_kernel() {
    if (worker == nullptr || self == nullptr) {
        fprintf(stderr, "emulated device: a device function was called outside a kernel\n");
        abort();
    }
    return *worker;
}

} // namespace

bool add_kernel(const char *name, size_t args, void (*run)(const void *)) {
    kernels()[name] = {name, args, run};
    return true;
}
bool add_table(const char *name, const void *at, size_t bytes) {
    tables()[name] = {name, at, bytes};
    return true;
}
const Kernel *find_kernel(std::string_view name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}
const Table *find_table(std::string_view name) {
    auto found = tables().find(name);
    return found == tables().end() ? nullptr : &found->second;
}
bool in_a_table(const void *at, size_t bytes) {
    for (auto &[name, table] : tables())
        if (at >= table.at && bytes <= table.bytes && (const char *)at - (const char *)table.at <= (ptrdiff_t)(table.bytes - bytes)) return true;
    return false;
}

int launch(const Kernel &kernel, dim3 grid, dim3 block, u32 shared, const void *args) {
    catch_faults();
    u32 threads = block.x * block.y * block.z;
    if (threads % 32 != 0) {
        fprintf(stderr, "emulated device: kernel %s: blocks of %u threads: must be a multiple of 32\n", kernel.name.c_str(), threads);
        return LAUNCH_FAILED;
    }
    static Helpers &helpers = *new Helpers;
    Grid work{&kernel, args, grid, block, shared, (u64)grid.x * grid.y * grid.z};
    helpers.run(work);
    return work.error.load();
}

void collective(u32 mask, Collective compute, void *mine, const char *what) {
    Worker &w = *worker;
    Fiber *me = w.current;
    Warp *warp = me->warp;
    u32 bit = 1u << me->lane;
    me->mask = mask;
    me->compute = compute;
    me->what = what;
    if (!(mask & bit)) trap(what, 0, "called by a lane that is not in its mask");
    warp->lanes[me->lane] = mine;
    if (((warp->waiting | bit) & mask) != mask) {
        warp->waiting |= bit;
        w.step_aside(At::Collective);
        return;
    }
    // The others stand still; what they brought lies on their stacks.
    for (u32 rest = mask & ~bit; rest != 0; rest &= rest - 1) {
        Fiber *other = warp->fibers[__builtin_ctz(rest)];
        if (other->mask != mask || other->compute != compute) {
            fprintf(stderr, "emulated device: kernel %s: lanes of a warp are at different collectives\n", w.kernel->name.c_str());
            me->at = At::Collective;
            w.tell(stderr, me);
            w.tell(stderr, other);
            w.stop(LAUNCH_FAILED);
        }
        other->at = At::Running;
    }
    compute(warp->lanes, mask);
    warp->waiting &= ~mask;
    warp->ready |= mask;
}

void barrier(int id, int threads) {
    Worker &w = *worker;
    Fiber *me = w.current;
    if (id < 0 || id > 15 || threads < 0 || threads % 32 != 0) trap("barrier", 0, "its number must be 0 to 15, its threads a multiple of 32");
    Barrier &b = w.barriers[id];
    me->barrier = id;
    me->threads = threads;
    me->what = "barrier";
    b.come++;
    if (w.barrier_done(b, threads)) return;
    b.waiting.push_back(me);
    w.step_aside(At::Barrier);
}

void cp_async(void *shared, const void *global, u32 bytes, bool wanted) {
    Fiber *me = must_be_in_kernel().current;
    if ((uintptr_t)shared % bytes != 0 || (wanted && (uintptr_t)global % bytes != 0)) trap("cp.async", 0, "an address is not aligned to the bytes copied");
    memset(shared, POISON, bytes); // whoever reads before the wait sees this
    me->copies.push_back({shared, global, bytes, wanted});
    me->uncommitted++;
}
void cp_async_commit() {
    Fiber *me = must_be_in_kernel().current;
    me->groups.push_back(me->uncommitted);
    me->uncommitted = 0;
}
void cp_async_wait(int left) {
    Fiber *me = must_be_in_kernel().current;
    if ((int)me->groups.size() <= left) return;
    u32 groups = (u32)me->groups.size() - left, copies = 0;
    for (u32 i = 0; i < groups; i++) copies += me->groups[i];
    for (u32 i = 0; i < copies; i++) {
        const Copy &copy = me->copies[i];
        if (copy.wanted) memcpy(copy.to, copy.from, copy.bytes);
        else memset(copy.to, 0, copy.bytes);
    }
    me->copies.erase(me->copies.begin(), me->copies.begin() + copies);
    me->groups.erase(me->groups.begin(), me->groups.begin() + groups);
}

void *static_shared(const void *key, size_t bytes, const char *name) {
    Worker &w = must_be_in_kernel();
    for (const StaticShared &known : w.statics)
        if (known.key == key) return known.at;
    size_t room = (bytes + 127) / 128 * 128;
    if (w.static_next + room > w.static_end) trap(name, 0, "static shared memory is beyond 48 KiB");
    unsigned char *at = w.static_next;
    w.static_next += room;
    memset(at, POISON, bytes);
    w.statics.push_back({key, at});
    return at;
}

void trap(const char *file, int line, const char *what) {
    Worker &w = must_be_in_kernel();
    fprintf(stderr, "emulated device: kernel %s: %s:%d: %s\n", w.kernel->name.c_str(), file, line, what);
    w.tell(stderr, w.current);
    w.stop(strstr(what, "align") != nullptr ? MISALIGNED_ADDRESS : LAUNCH_FAILED);
}

} // namespace kvemu
