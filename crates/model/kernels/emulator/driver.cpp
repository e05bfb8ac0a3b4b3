// A pretend `libcuda`: the part of the driver API that Kvasir calls, over the emulated machine. For tests only.
//
// Work is queued and runs when somebody waits for it (a synchronise, an event asked for, memory freed), stream by stream. So
// what only happens to be in order on a device is out of order here: a missing event shows as wrong data.
//
// Environment, read by `cuInit`:
//   EMULATED_CUDA_DEVICES     how many devices there are (1)
//   EMULATED_CUDA_MEMORY      bytes of memory of each (1 GiB)
//   EMULATED_CUDA_CAPABILITY  compute capability, 90 or 80 (90)
//   EMULATED_CUDA_FAIL_AFTER  the n-th launch fails, and everything after it, as on a device that was lost
//   EMULATED_CUDA_FAIL_CODE   how it fails (700, an illegal address)
//   EMULATED_CUDA_NO_PINNING  host memory cannot be registered
//   EMULATED_CUDA_NO_GRAPHS   streams cannot be captured
//   EMULATED_CUDA_ANY_IMAGE   the module that is loaded need not have the kernels: those that are not built for GPUs yet
//   EMULATED_CUDA_EAGER       work runs when it is queued
//   EMULATED_CUDA_ORDER       `backward`: the last block and thread first
//   EMULATED_CUDA_THREADS     OS threads that run blocks (as many as there are processors)

#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

namespace kvemu {

Driver &driver() {
    static Driver &it = *new Driver;
    return it;
}

thread_local void *current_context __attribute__((tls_model("initial-exec"))) = nullptr;

bool spoils_capture(Driver &d) {
    bool spoiled = false;
    for (Stream *s : d.streams) {
        if (!s->capture || s->capture->mode == 2 || (s->capture->mode == 1 && s->capture->thread != std::this_thread::get_id())) continue;
        spoiled = s->capture->invalid = true;
    }
    return spoiled;
}

namespace {

constexpr size_t PAGE = 4096, ALIGN = 256, POISONED = 32ull << 20;
constexpr unsigned char POISON = 0xff;
constexpr const char *NAME = "emulated device (Kvasir, no GPU)";

// One for each device.
char contexts[MAX_DEVICES];
int device_of(void *context) { return (int)((char *)context - contexts); }
bool there(Driver &d, int device) { return device >= 0 && device < d.devices; }

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

u64 number(const char *name, u64 otherwise) {
    const char *text = getenv(name);
    return text == nullptr || *text == 0 ? otherwise : strtoull(text, nullptr, 0);
}
bool flag(const char *name) {
    const char *text = getenv(name);
    return text != nullptr && *text != 0 && strcmp(text, "0") != 0;
}

} // namespace

void Driver::initialize() {
    if (initialized) return;
    devices = (int)std::min<u64>(number("EMULATED_CUDA_DEVICES", 1), MAX_DEVICES);
    total = number("EMULATED_CUDA_MEMORY", 1ull << 30);
    capability = (int)number("EMULATED_CUDA_CAPABILITY", 90);
    fail_after = number("EMULATED_CUDA_FAIL_AFTER", 0);
    fail_code = (int)number("EMULATED_CUDA_FAIL_CODE", R_ILLEGAL_ADDRESS);
    pinning = !flag("EMULATED_CUDA_NO_PINNING");
    graphs = !flag("EMULATED_CUDA_NO_GRAPHS");
    eager = flag("EMULATED_CUDA_EAGER");
    initialized = true;
}

Stream *Driver::stream(void *handle) {
    if ((uintptr_t)handle <= 2) return &null_stream;
    for (Stream *s : streams)
        if (s == handle) return s;
    return nullptr;
}

void Driver::run(Stream *stream, const Mark *until) {
    while (fault == 0 && !stream->ops.empty() && (until == nullptr || !until->done)) {
        Op op = std::move(stream->ops.front());
        stream->ops.pop_front();
        int result = op.run();
        if (result != 0 && fault == 0) {
            fault = result;
            moved.notify_all();
        }
    }
}
void Driver::run_all(void *context) {
    run(&null_stream, nullptr);
    for (Stream *s : std::vector<Stream *>(streams))
        if (s->context == context) run(s, nullptr);
}

Result Driver::add_work(Stream *stream, Op op) {
    if (stream->capture) {
        if (stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
        stream->capture->lanes[stream->lane].ops.push_back({std::move(op)});
        return SUCCESS;
    }
    launches += op.kernels;
    if (fail_after != 0 && launches >= fail_after && op.kernels > 0) {
        fprintf(stderr, "emulated device: launch %llu fails, as asked for\n", (unsigned long long)launches);
        fault = fail_code;
        moved.notify_all();
        return (Result)fault;
    }
    if (stream == &null_stream) {
        for (Stream *s : streams)
            if (s->blocking && s->context == current_context) run(s, nullptr);
    } else if (stream->blocking) {
        run(&null_stream, nullptr);
    }
    stream->ops.push_back(std::move(op));
    if (eager) run(stream, nullptr);
    return SUCCESS;
}

bool Driver::on_device(u64 at, size_t bytes) const {
    auto after = device.upper_bound(at);
    if (after == device.begin()) return in_a_table((const void *)at, bytes);
    auto &[begin, range] = *std::prev(after);
    if (at - begin <= range.bytes && bytes <= range.bytes - (at - begin)) return true;
    return in_a_table((const void *)at, bytes);
}
bool Driver::pinned(const void *at, size_t bytes) const {
    auto after = host.upper_bound((uintptr_t)at);
    if (after == host.begin()) return false;
    auto &[begin, range] = *std::prev(after);
    return (uintptr_t)at - begin <= range.bytes && bytes <= range.bytes - ((uintptr_t)at - begin);
}

} // namespace kvemu

using namespace kvemu;

extern "C" __attribute__((visibility("default"))) int kvemu_add_work(void *handle, std::function<int()> work, u32 kernels) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    return d->add_work(stream, {std::move(work), kernels});
}
extern "C" __attribute__((visibility("default"))) bool kvemu_on_device(const void *at, size_t bytes) {
    Locked d;
    return d->on_device((u64)at, bytes);
}
extern "C" __attribute__((visibility("default"))) bool kvemu_wait(std::function<bool()> ready, int milliseconds) {
    Driver &d = driver();
    // Held once, by the call that runs the work.
    std::unique_lock<std::recursive_mutex> held(d.lock, std::adopt_lock);
    d.moved.wait_for(held, std::chrono::milliseconds(milliseconds), [&] { return d.fault != 0 || ready(); });
    held.release();
    return d.fault == 0 && ready();
}
extern "C" __attribute__((visibility("default"))) void kvemu_moved() { driver().moved.notify_all(); }

// ---------------------------------------------------------------------------------------------------------------------
// Device and context.

API int cuInit(u32) {
    Locked d;
    d->initialize();
    return SUCCESS;
}
API int cuDriverGetVersion(int *version) {
    *version = 12080;
    return SUCCESS;
}
API int cuDeviceGetCount(int *count) {
    Locked d;
    if (!d->initialized) return NOT_INITIALIZED;
    *count = d->devices;
    return SUCCESS;
}
API int cuDeviceGet(int *device, int ordinal) {
    Locked d;
    if (!d->initialized) return NOT_INITIALIZED;
    if (!there(*d.operator->(), ordinal)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}
API int cuDeviceGetName(char *name, int length, int device) {
    if (!there(driver(), device)) return INVALID_DEVICE;
    snprintf(name, (size_t)length, "%s", NAME);
    return SUCCESS;
}
API int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    Locked d;
    if (!there(*d.operator->(), device)) return INVALID_DEVICE;
    *bytes = d->total;
    return SUCCESS;
}
API int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    if (!there(driver(), device)) return INVALID_DEVICE;
    memset(uuid, device, 16);
    return SUCCESS;
}
API int cuDeviceGetUuid(unsigned char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
API int cuDeviceGetPCIBusId(char *id, int length, int device) {
    if (!there(driver(), device)) return INVALID_DEVICE;
    snprintf(id, (size_t)length, "0000:0%d:00.0", device);
    return SUCCESS;
}
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    Locked d;
    if (!there(*d.operator->(), device)) return INVALID_DEVICE;
    switch (attribute) {
    case 1: *value = MAX_THREADS; break;                    // threads of a block
    case 2: case 3: *value = 1024; break;                   // x and y of a block
    case 4: *value = 64; break;                             // z of a block
    case 5: *value = 2147483647; break;                     // x of a grid
    case 6: case 7: *value = 65535; break;                  // y and z of a grid
    case 8: *value = 49152; break;                          // shared memory of a block
    case 9: *value = 65536; break;                          // constant memory
    case 10: *value = 32; break;                            // lanes of a warp
    case 12: *value = 65536; break;                         // registers of a block
    case 13: *value = 1000000; break;                       // clock, kHz
    case 16: *value = 4; break;                             // multiprocessors
    case 19: *value = 1; break;                             // maps host memory
    case 36: *value = 1000000; break;                       // memory clock, kHz
    case 37: *value = 64; break;                            // memory bus, bits
    case 38: *value = 1 << 20; break;                       // L2 cache
    case 39: *value = 2048; break;                          // threads of a multiprocessor
    case 40: *value = 2; break;                             // copy engines
    case 41: *value = 1; break;                             // one address space
    case 75: *value = d->capability / 10; break;            // compute capability
    case 76: *value = d->capability % 10; break;
    case 78: *value = 1; break;                             // stream priorities
    case 81: *value = 233472; break;                        // shared memory of a multiprocessor
    case 82: *value = 65536; break;                         // registers of a multiprocessor
    case 91: *value = 1; break;                             // registered host memory has one address
    case 97: *value = d->capability >= 90 ? MAX_DYNAMIC_SHARED : 166912; break; // shared memory of a block that asks for it
    case 99: *value = d->pinning ? 1 : 0; break;            // registers host memory
    case 11: case 14: case 15: case 17: case 18: case 20: case 31: case 33: case 34: case 35: case 79: case 80: case 83: case 84: case 86: case 88: case 89:
    case 95: case 96: case 100: case 101: case 106: case 108: case 111: case 115: case 116: case 119: *value = 0; break; // it has none of these
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}
API int cuDevicePrimaryCtxRetain(void **context, int device) {
    Locked d;
    if (!d->initialized) return NOT_INITIALIZED;
    if (!there(*d.operator->(), device)) return INVALID_DEVICE;
    *context = &contexts[device];
    return SUCCESS;
}
API int cuDevicePrimaryCtxRelease_v2(int device) {
    Locked d;
    if (!there(*d.operator->(), device)) return INVALID_DEVICE;
    d->run_all(&contexts[device]);
    return SUCCESS;
}
API int cuCtxSetCurrent(void *context) {
    if (context != nullptr && !there(driver(), device_of(context))) return INVALID_CONTEXT;
    current_context = context;
    return SUCCESS;
}
API int cuCtxGetCurrent(void **context) {
    *context = current_context;
    return SUCCESS;
}
API int cuCtxGetDevice(int *device) {
    if (current_context == nullptr) return INVALID_CONTEXT;
    *device = device_of(current_context);
    return SUCCESS;
}
API int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return SUCCESS;
}
API int cuCtxSynchronize() {
    READY(d);
    NOT_IN_CAPTURE(d);
    d->run_all(current_context);
    return d->fault;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory.

API int cuMemGetInfo_v2(size_t *free, size_t *total) {
    READY(d);
    *total = d->total;
    *free = d->total - d->used[device_of(current_context)];
    return SUCCESS;
}
API int cuMemAlloc_v2(u64 *at, size_t bytes) {
    READY(d);
    NOT_IN_CAPTURE(d);
    if (bytes == 0) return INVALID_VALUE;
    int device = device_of(current_context);
    u64 charged = round_up(bytes, 512);
    if (bytes > d->total || charged > d->total - d->used[device]) return OUT_OF_MEMORY;
    // Pages that nobody may touch lie on both sides, and the end of the allocation lies at the page behind it.
    size_t room = round_up(round_up(bytes, ALIGN), PAGE), mapped = room + 2 * PAGE;
    void *mapping = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    unsigned char *begin = (unsigned char *)mapping + PAGE;
    if (mprotect(begin, room, PROT_READ | PROT_WRITE) != 0) {
        munmap(mapping, mapped);
        return OUT_OF_MEMORY;
    }
    unsigned char *start = begin + room - round_up(bytes, ALIGN);
    // Of a large arena the ends are enough: the rest need not become real memory.
    if (bytes <= 2 * POISONED) {
        memset(start, POISON, bytes);
    } else {
        memset(start, POISON, POISONED);
        memset(start + bytes - POISONED, POISON, POISONED);
    }
    d->device[(uintptr_t)start] = {(unsigned char *)mapping, mapped, bytes, charged, device};
    d->used[device] += charged;
    *at = (u64)start;
    return SUCCESS;
}
API int cuMemFree_v2(u64 at) {
    Locked d;
    if (!d->initialized) return NOT_INITIALIZED;
    if (at == 0) return SUCCESS;
    NOT_IN_CAPTURE(d);
    d->run_all(current_context);
    auto found = d->device.find(at);
    if (found == d->device.end()) return INVALID_VALUE;
    Driver::Range range = found->second;
    d->device.erase(found);
    d->used[range.device] -= range.charged;
    madvise(range.mapping, range.mapped, MADV_DONTNEED);
    mprotect(range.mapping, range.mapped, PROT_NONE);
    d->freed.push_back(range);
    if (d->freed.size() > 1024) {
        munmap(d->freed.front().mapping, d->freed.front().mapped);
        d->freed.pop_front();
    }
    return d->fault;
}
API int cuMemHostAlloc(void **at, size_t bytes, u32) {
    READY(d);
    NOT_IN_CAPTURE(d);
    if (bytes == 0) return INVALID_VALUE;
    size_t mapped = round_up(bytes, PAGE);
    void *mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    d->host[(uintptr_t)mapping] = {(unsigned char *)mapping, mapped, bytes, 0, 0};
    *at = mapping;
    return SUCCESS;
}
API int cuMemFreeHost(void *at) {
    Locked d;
    d->run_all(current_context);
    auto found = d->host.find((uintptr_t)at);
    if (found == d->host.end() || found->second.mapping == nullptr) return INVALID_VALUE;
    munmap(found->second.mapping, found->second.mapped);
    d->host.erase(found);
    return d->fault;
}
API int cuMemHostRegister_v2(void *at, size_t bytes, u32) {
    READY(d);
    NOT_IN_CAPTURE(d);
    if (!d->pinning) return NOT_SUPPORTED;
    if (at == nullptr || bytes == 0) return INVALID_VALUE;
    for (auto &[begin, range] : d->host)
        if (begin < (uintptr_t)at + bytes && (uintptr_t)at < begin + range.bytes) return HOST_MEMORY_ALREADY_REGISTERED;
    d->host[(uintptr_t)at] = {nullptr, 0, bytes, 0, 0};
    return SUCCESS;
}
API int cuMemHostUnregister(void *at) {
    Locked d;
    d->run_all(current_context);
    auto found = d->host.find((uintptr_t)at);
    if (found == d->host.end() || found->second.mapping != nullptr) return HOST_MEMORY_NOT_REGISTERED;
    d->host.erase(found);
    return d->fault;
}
API int cuMemHostGetDevicePointer_v2(u64 *device, void *at, u32) {
    READY(d);
    if (!d->pinned(at, 1)) return INVALID_VALUE;
    *device = (u64)at;
    return SUCCESS;
}

// Host memory that is not pinned is read before the call returns and written before it returns, as a driver does.
API int cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t bytes, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!d->on_device(to, bytes)) return INVALID_VALUE;
    if (d->pinned(from, bytes)) return d->add_work(stream, {[=] { memcpy((void *)to, from, bytes); return 0; }});
    if (stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    auto staged = std::make_shared<std::vector<unsigned char>>((const unsigned char *)from, (const unsigned char *)from + bytes);
    return d->add_work(stream, {[=] { memcpy((void *)to, staged->data(), bytes); return 0; }});
}
API int cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t bytes, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!d->on_device(from, bytes)) return INVALID_VALUE;
    bool pinned = d->pinned(to, bytes);
    if (!pinned && stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    int result = d->add_work(stream, {[=] { memcpy(to, (const void *)from, bytes); return 0; }});
    if (result != SUCCESS || pinned) return result;
    d->run(stream, nullptr);
    return d->fault;
}
API int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!d->on_device(to, bytes) || !d->on_device(from, bytes)) return INVALID_VALUE;
    return d->add_work(stream, {[=] { memmove((void *)to, (const void *)from, bytes); return 0; }});
}

// `CUDA_MEMCPY2D`.
struct Copy2D {
    size_t from_x, from_y;
    int from_type;
    const void *from_host;
    u64 from_device;
    void *from_array;
    size_t from_pitch, to_x, to_y;
    int to_type;
    void *to_host;
    u64 to_device;
    void *to_array;
    size_t to_pitch, width, height;
};
API int cuMemcpy2DAsync_v2(const Copy2D *copy, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    Copy2D c = *copy;
    if (c.width == 0 || c.height == 0) return SUCCESS;
    constexpr int HOST = 1, DEVICE = 2;
    bool down = c.from_type == DEVICE && c.to_type == HOST, up = c.from_type == HOST && c.to_type == DEVICE;
    if ((!down && !up) || c.from_x || c.from_y || c.to_x || c.to_y) return NOT_SUPPORTED;
    if (c.from_pitch < c.width || c.to_pitch < c.width) return INVALID_VALUE;
    u64 device = down ? c.from_device : c.to_device, pitch = down ? c.from_pitch : c.to_pitch;
    if (!d->on_device(device, (c.height - 1) * pitch + c.width)) return INVALID_VALUE;
    auto *from = down ? (const unsigned char *)c.from_device : (const unsigned char *)c.from_host;
    auto *to = down ? (unsigned char *)c.to_host : (unsigned char *)c.to_device;
    bool pinned = d->pinned(down ? c.to_host : c.from_host, (c.height - 1) * (down ? c.to_pitch : c.from_pitch) + c.width);
    if (!pinned && stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    int result = d->add_work(stream, {[=] {
        for (size_t row = 0; row < c.height; row++) memcpy(to + row * c.to_pitch, from + row * c.from_pitch, c.width);
        return 0;
    }});
    if (result != SUCCESS || pinned) return result;
    // What is not pinned is done when the call returns.
    d->run(stream, nullptr);
    return d->fault;
}
API int cuMemsetD8Async(u64 to, unsigned char value, size_t bytes, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!d->on_device(to, bytes)) return INVALID_VALUE;
    return d->add_work(stream, {[=] { memset((void *)to, value, bytes); return 0; }});
}
namespace {
int waited(int result) {
    if (result != SUCCESS) return result;
    Locked d;
    d->run(&d->null_stream, nullptr);
    return d->fault;
}
} // namespace
API int cuMemcpyHtoD_v2(u64 to, const void *from, size_t bytes) { return waited(cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr)); }
API int cuMemcpyDtoH_v2(void *to, u64 from, size_t bytes) { return waited(cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr)); }
API int cuMemcpyDtoD_v2(u64 to, u64 from, size_t bytes) { return waited(cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr)); }
API int cuMemsetD8_v2(u64 to, unsigned char value, size_t bytes) { return waited(cuMemsetD8Async(to, value, bytes, nullptr)); }
