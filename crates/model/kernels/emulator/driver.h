// The pretend driver's state: one device, its memory, streams whose work waits until somebody waits for it.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
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
    STREAM_CAPTURE_WRONG_THREAD = 908,
};

struct Stream;
struct Graph;

// A recording of an event: its place in a stream's work.
struct Mark {
    Stream *stream = nullptr;
    bool done = false;
    bool captured = false; // its place is in a graph, behind so many of a lane's
    std::weak_ptr<Graph> graph;
    size_t lane = 0, place = 0;
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
// What one stream did while it was captured; without `run`, an op waits for so many of another lane's.
struct Captured {
    Op op;
    size_t lane = 0, place = 0;
};
struct Lane {
    std::vector<Captured> ops;
    size_t joined = 0; // so many somebody else has waited for
};
// Lanes wait for each other only where their streams did.
struct Graph {
    std::vector<Lane> lanes{1}; // the first is that of the stream which was captured
    bool invalid = false, ended = false;
    int mode = 0; // who may call what meanwhile: nobody (0), all but this thread (1), all (2)
    std::thread::id thread;
    Stream *origin = nullptr;

    // Lane by lane, the others as late as can be: what waits for too little finds wrong data.
    int replay() const;
};
struct Stream {
    std::deque<Op> ops;
    void *context = nullptr; // in which it was made
    bool blocking = true; // waits for the null stream, and it for this
    std::shared_ptr<Graph> capture;
    size_t lane = 0; // of its capture
};

struct Module {
    std::string image;
};
struct Function {
    const Kernel *kernel;
    u32 max_dynamic = 49152;
};

constexpr int MAX_DEVICES = 8;

struct Driver {
    std::recursive_mutex lock;
    bool initialized = false;
    int fault = 0; // sticky
    int devices = 1;
    u64 total = 0, used[MAX_DEVICES] = {}; // of each device
    std::condition_variable_any moved; // something has happened that work may wait for
    int capability = 90;
    bool pinning = true, eager = false, graphs = true;
    u64 launches = 0, fail_after = 0;
    int fail_code = R_ILLEGAL_ADDRESS;

    struct Range { unsigned char *mapping; size_t mapped, bytes; u64 charged; int device; };
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
    // All work of a device.
    void run_all(void *context);
    Stream *stream(void *handle);
    bool on_device(u64 at, size_t bytes) const;
    bool pinned(const void *at, size_t bytes) const;
};

Driver &driver();

// The context that this thread has made current.
extern thread_local void *current_context __attribute__((tls_model("initial-exec"), visibility("hidden")));

// Whether a capture forbids this thread what may not be captured; such a capture is lost.
bool spoils_capture(Driver &d);

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

// Calls that may not be made during a capture.
#define NOT_IN_CAPTURE(d) \
    if (spoils_capture(*d.operator->())) return STREAM_CAPTURE_UNSUPPORTED

} // namespace kvemu

#define API extern "C" __attribute__((visibility("default")))

// For libcublasLt and libnccl: work on a stream, and whether bytes are on a device.
extern "C" int kvemu_add_work(void *stream, std::function<int()> work, u32 kernels);
extern "C" bool kvemu_on_device(const void *at, size_t bytes);
// For work that is running: waits until `ready`, while other threads use the driver; whether it came to that in time, and no
// device has failed. And for whoever makes it so.
extern "C" bool kvemu_wait(std::function<bool()> ready, int milliseconds);
extern "C" void kvemu_moved();
