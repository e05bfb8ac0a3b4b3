// The pretend driver's state: one device, its memory, streams whose work waits until somebody waits for it.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "simt.h"

namespace kvemu {

// CUDA's numbers of results, those that are given here.
enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    R_ILLEGAL_ADDRESS = 700,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    R_MISALIGNED_ADDRESS = 716,
    R_LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNJOINED = 904,
};

struct Stream;

// A recording of an event: its place in a stream's work.
struct Mark {
    Stream *stream = nullptr;
    bool done = false;
    bool captured = false; // its place is in a graph
    std::chrono::steady_clock::time_point at;
};
struct Event {
    std::shared_ptr<Mark> mark;
    bool timing = true;
    bool asked = false;
};

// Some work; gives a launch error or 0. `kernels` counts launches, for faults that are asked for.
struct Op {
    std::function<int()> run;
    u32 kernels = 0;
};
struct Graph {
    std::vector<Op> ops;
    bool invalid = false;
    Stream *origin = nullptr;
};
struct Stream {
    std::deque<Op> ops;
    bool blocking = true; // waits for the null stream, and it for this
    std::shared_ptr<Graph> capture;
    bool unjoined = false; // forked from a capture, and nobody has waited for the rest of it
};

struct Module {
    std::string image;
};
struct Function {
    const Kernel *kernel;
    u32 max_dynamic = 49152;
};

struct Driver {
    std::recursive_mutex lock;
    bool initialized = false;
    int fault = 0; // sticky
    u64 total = 0, used = 0;
    int capability = 90;
    bool pinning = true, eager = false;
    u64 launches = 0, fail_after = 0;
    int fail_code = R_ILLEGAL_ADDRESS;

    struct Range { unsigned char *mapping; size_t mapped, bytes; u64 charged; };
    std::map<uintptr_t, Range> device;   // by where an allocation begins
    std::map<uintptr_t, Range> host;     // pinned: allocated here (mapping) or registered (none)
    std::deque<Range> freed;             // unmapped late, so that a use after the end faults

    Stream null_stream;
    std::vector<Stream *> streams;
    std::vector<std::unique_ptr<Function>> functions;

    void initialize();
    Result add_work(Stream *stream, Op op);
    // All of a stream's work, or up to a mark.
    void run(Stream *stream, const Mark *until);
    void run_all();
    Stream *stream(void *handle);
    bool on_device(u64 at, size_t bytes) const;
    bool pinned(const void *at, size_t bytes) const;
};

Driver &driver();

// The context that this thread has made current.
extern thread_local void *current_context __attribute__((tls_model("initial-exec"), visibility("hidden")));

// Whether any stream is captured into a graph.
bool capturing(Driver &d);

struct Locked {
    Driver &d = driver();
    std::lock_guard<std::recursive_mutex> held{d.lock};
    Driver *operator->() { return &d; }
};

// What every call on the device must first know.
#define READY(d)                                                  \
    Locked d;                                                     \
    if (!d->initialized) return NOT_INITIALIZED;                  \
    if (current_context == nullptr) return INVALID_CONTEXT;       \
    if (d->fault != 0) return d->fault

// Calls that may not be made while any stream is captured (in the global mode, the strictest).
#define NOT_IN_CAPTURE(d)                                                                     \
    if (capturing(*d.operator->())) {                                                         \
        for (Stream *s : d->streams)                                                          \
            if (s->capture) s->capture->invalid = true;                                       \
        return STREAM_CAPTURE_UNSUPPORTED;                                                    \
    }

} // namespace kvemu

#define API extern "C" __attribute__((visibility("default")))

// For libcublasLt: work on a stream, and whether bytes are on the device.
extern "C" int kvemu_add_work(void *stream, std::function<int()> work, u32 kernels);
extern "C" bool kvemu_on_device(const void *at, size_t bytes);
