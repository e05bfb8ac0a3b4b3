// A pretend `libcuda`: the part of the driver API that Kvasir calls, over the emulated machine. For tests only.
//
// Work is queued and runs when somebody waits for it (a synchronise, an event asked for, memory freed), stream by stream. So
// what only happens to be in order on a device is out of order here: a missing event shows as wrong data.
//
// Environment, read by `cuInit`:
//   EMULATED_CUDA_MEMORY      bytes of device memory (1 GiB)
//   EMULATED_CUDA_CAPABILITY  compute capability, 90 or 80 (90)
//   EMULATED_CUDA_FAIL_AFTER  the n-th launch fails, and everything after it, as on a device that was lost
//   EMULATED_CUDA_FAIL_CODE   how it fails (700, an illegal address)
//   EMULATED_CUDA_NO_PINNING  host memory cannot be registered
//   EMULATED_CUDA_EAGER       work runs when it is queued
//   EMULATED_CUDA_ORDER       `backward`: the last block and thread first
//   EMULATED_CUDA_THREADS     OS threads that run blocks (as many as there are processors)

#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define API extern "C" __attribute__((visibility("default")))

namespace kvemu {

Driver &driver() {
    static Driver &it = *new Driver;
    return it;
}

namespace {

constexpr size_t PAGE = 4096, ALIGN = 256, POISONED = 32ull << 20;
constexpr unsigned char POISON = 0xff;
constexpr const char *NAME = "emulated device (Kvasir, no GPU)";

thread_local void *current_context = nullptr;
char the_context;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

u64 number(const char *name, u64 otherwise) {
    const char *text = getenv(name);
    return text == nullptr || *text == 0 ? otherwise : strtoull(text, nullptr, 0);
}
bool flag(const char *name) {
    const char *text = getenv(name);
    return text != nullptr && *text != 0 && strcmp(text, "0") != 0;
}

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

bool capturing(Driver &d) {
    if (d.null_stream.capture) return true;
    for (Stream *s : d.streams)
        if (s->capture) return true;
    return false;
}
// Calls that may not be made while any stream is captured (in the global mode, the strictest).
#define NOT_IN_CAPTURE(d)                                                                     \
    if (capturing(*d.operator->())) {                                                         \
        for (Stream *s : d->streams)                                                          \
            if (s->capture) s->capture->invalid = true;                                       \
        return STREAM_CAPTURE_UNSUPPORTED;                                                    \
    }

} // namespace

void Driver::initialize() {
    if (initialized) return;
    total = number("EMULATED_CUDA_MEMORY", 1ull << 30);
    capability = (int)number("EMULATED_CUDA_CAPABILITY", 90);
    fail_after = number("EMULATED_CUDA_FAIL_AFTER", 0);
    fail_code = (int)number("EMULATED_CUDA_FAIL_CODE", R_ILLEGAL_ADDRESS);
    pinning = !flag("EMULATED_CUDA_NO_PINNING");
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
        if (result != 0 && fault == 0) fault = result;
    }
}
void Driver::run_all() {
    run(&null_stream, nullptr);
    for (Stream *s : std::vector<Stream *>(streams)) run(s, nullptr);
}

Result Driver::add_work(Stream *stream, Op op) {
    if (stream->capture) {
        if (stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
        stream->capture->ops.push_back(std::move(op));
        if (stream != stream->capture->origin) stream->unjoined = true;
        return SUCCESS;
    }
    launches += op.kernels;
    if (fail_after != 0 && launches >= fail_after && op.kernels > 0) {
        fprintf(stderr, "emulated device: launch %llu fails, as asked for\n", (unsigned long long)launches);
        fault = fail_code;
        return (Result)fault;
    }
    if (stream == &null_stream) {
        for (Stream *s : streams)
            if (s->blocking) run(s, nullptr);
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
    *count = 1;
    return SUCCESS;
}
API int cuDeviceGet(int *device, int ordinal) {
    Locked d;
    if (!d->initialized) return NOT_INITIALIZED;
    if (ordinal != 0) return INVALID_DEVICE;
    *device = 0;
    return SUCCESS;
}
API int cuDeviceGetName(char *name, int length, int device) {
    if (device != 0) return INVALID_DEVICE;
    snprintf(name, (size_t)length, "%s", NAME);
    return SUCCESS;
}
API int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    Locked d;
    if (device != 0) return INVALID_DEVICE;
    *bytes = d->total;
    return SUCCESS;
}
API int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    if (device != 0) return INVALID_DEVICE;
    memset(uuid, 0, 16);
    return SUCCESS;
}
API int cuDeviceGetUuid(unsigned char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
API int cuDeviceGetPCIBusId(char *id, int length, int device) {
    if (device != 0) return INVALID_DEVICE;
    snprintf(id, (size_t)length, "0000:00:00.0");
    return SUCCESS;
}
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    Locked d;
    if (device != 0) return INVALID_DEVICE;
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
    if (device != 0) return INVALID_DEVICE;
    *context = &the_context;
    return SUCCESS;
}
API int cuDevicePrimaryCtxRelease_v2(int) {
    Locked d;
    d->run_all();
    return SUCCESS;
}
API int cuCtxSetCurrent(void *context) {
    if (context != nullptr && context != &the_context) return INVALID_CONTEXT;
    current_context = context;
    return SUCCESS;
}
API int cuCtxGetCurrent(void **context) {
    *context = current_context;
    return SUCCESS;
}
API int cuCtxGetDevice(int *device) {
    if (current_context == nullptr) return INVALID_CONTEXT;
    *device = 0;
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
    d->run_all();
    return d->fault;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory.

API int cuMemGetInfo_v2(size_t *free, size_t *total) {
    READY(d);
    *total = d->total;
    *free = d->total - d->used;
    return SUCCESS;
}
API int cuMemAlloc_v2(u64 *at, size_t bytes) {
    READY(d);
    NOT_IN_CAPTURE(d);
    if (bytes == 0) return INVALID_VALUE;
    u64 charged = round_up(bytes, 512);
    if (bytes > d->total || charged > d->total - d->used) return OUT_OF_MEMORY;
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
    d->device[(uintptr_t)start] = {(unsigned char *)mapping, mapped, bytes, charged};
    d->used += charged;
    *at = (u64)start;
    return SUCCESS;
}
API int cuMemFree_v2(u64 at) {
    Locked d;
    if (!d->initialized) return NOT_INITIALIZED;
    if (at == 0) return SUCCESS;
    d->run_all();
    auto found = d->device.find(at);
    if (found == d->device.end()) return INVALID_VALUE;
    Driver::Range range = found->second;
    d->device.erase(found);
    d->used -= range.charged;
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
    d->host[(uintptr_t)mapping] = {(unsigned char *)mapping, mapped, bytes, 0};
    *at = mapping;
    return SUCCESS;
}
API int cuMemFreeHost(void *at) {
    Locked d;
    d->run_all();
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
    d->host[(uintptr_t)at] = {nullptr, 0, bytes, 0};
    return SUCCESS;
}
API int cuMemHostUnregister(void *at) {
    Locked d;
    d->run_all();
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

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events.

API int cuStreamCreate(void **stream, u32 flags) {
    READY(d);
    auto *fresh = new Stream;
    fresh->blocking = !(flags & 1);
    d->streams.push_back(fresh);
    *stream = fresh;
    return SUCCESS;
}
API int cuStreamCreateWithPriority(void **stream, u32 flags, int) { return cuStreamCreate(stream, flags); }
API int cuStreamDestroy_v2(void *handle) {
    Locked d;
    for (size_t i = 0; i < d->streams.size(); i++)
        if (d->streams[i] == handle) {
            Stream *stream = d->streams[i];
            d->run(stream, nullptr);
            d->streams.erase(d->streams.begin() + (ptrdiff_t)i);
            delete stream;
            return d->fault;
        }
    return INVALID_HANDLE;
}
API int cuStreamSynchronize(void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->invalid = true;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    if (stream == &d->null_stream)
        for (Stream *s : d->streams)
            if (s->blocking) d->run(s, nullptr);
    d->run(stream, nullptr);
    return d->fault;
}
// The first who asks is told to come again, so that such a path is walked too.
API int cuStreamQuery(void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (stream->ops.empty()) return SUCCESS;
    d->run(stream, nullptr);
    return d->fault != 0 ? d->fault : NOT_READY;
}
API int cuStreamWaitEvent(void *handle, void *event, u32) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr || event == nullptr) return INVALID_HANDLE;
    std::shared_ptr<Mark> mark = ((Event *)event)->mark;
    if (!mark) return SUCCESS;
    if (mark->captured) {
        // The waiting stream joins the capture, whose work is one list in the order of the calls; or a fork ends.
        Stream *other = d->stream(mark->stream);
        if (other == nullptr || !other->capture) return STREAM_CAPTURE_UNSUPPORTED;
        if (!stream->capture) stream->capture = other->capture;
        other->unjoined = false;
        if (stream != stream->capture->origin) stream->unjoined = true;
        return SUCCESS;
    }
    if (stream->capture) return mark->done ? SUCCESS : STREAM_CAPTURE_UNSUPPORTED;
    return d->add_work(stream, {[mark] {
        Driver &all = driver();
        if (!mark->done) {
            Stream *other = all.stream(mark->stream);
            if (other != nullptr) all.run(other, mark.get());
        }
        return 0;
    }});
}
API int cuEventCreate(void **event, u32 flags) {
    READY(d);
    auto *fresh = new Event;
    fresh->timing = !(flags & 2);
    *event = fresh;
    return SUCCESS;
}
API int cuEventDestroy_v2(void *event) {
    Locked d;
    delete (Event *)event;
    return SUCCESS;
}
API int cuEventRecord(void *event, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr || event == nullptr) return INVALID_HANDLE;
    auto mark = std::make_shared<Mark>();
    mark->stream = stream;
    auto *e = (Event *)event;
    e->mark = mark;
    e->asked = false;
    if (stream->capture) {
        mark->captured = true;
        return SUCCESS;
    }
    return d->add_work(stream, {[mark] {
        mark->done = true;
        mark->at = std::chrono::steady_clock::now();
        return 0;
    }});
}
API int cuEventSynchronize(void *event) {
    READY(d);
    if (event == nullptr) return INVALID_HANDLE;
    std::shared_ptr<Mark> mark = ((Event *)event)->mark;
    if (!mark || mark->done) return SUCCESS;
    if (mark->captured) return STREAM_CAPTURE_UNSUPPORTED;
    Stream *stream = d->stream(mark->stream);
    if (stream != nullptr) d->run(stream, mark.get());
    return d->fault;
}
API int cuEventQuery(void *event) {
    READY(d);
    if (event == nullptr) return INVALID_HANDLE;
    auto *e = (Event *)event;
    if (!e->mark || e->mark->done) return SUCCESS;
    if (e->mark->captured) return STREAM_CAPTURE_UNSUPPORTED;
    int result = cuEventSynchronize(event);
    return result != SUCCESS ? result : NOT_READY;
}
API int cuEventElapsedTime_v2(float *ms, void *start, void *end) {
    READY(d);
    auto *from = (Event *)start, *to = (Event *)end;
    if (from == nullptr || to == nullptr || !from->mark || !to->mark || !from->timing || !to->timing) return INVALID_HANDLE;
    if (!from->mark->done || !to->mark->done) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(to->mark->at - from->mark->at).count();
    return SUCCESS;
}
API int cuEventElapsedTime(float *ms, void *start, void *end) { return cuEventElapsedTime_v2(ms, start, end); }
API int cuLaunchHostFunc(void *handle, void (*call)(void *), void *data) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr || call == nullptr) return INVALID_HANDLE;
    return d->add_work(stream, {[=] { call(data); return 0; }});
}

// ---------------------------------------------------------------------------------------------------------------------
// Modules and launches. Kernels are those compiled into this library; the image is only asked whether it has them too.

namespace {
// Bytes of an image: an ELF file ends with its section headers, PTX with a zero.
std::string image_bytes(const void *image) {
    auto *at = (const unsigned char *)image;
    if (memcmp(at, "\177ELF", 4) == 0) {
        u64 sections;
        u16 size, count;
        memcpy(&sections, at + 40, 8);
        memcpy(&size, at + 58, 2);
        memcpy(&count, at + 60, 2);
        u64 end = sections + (u64)size * count;
        u64 programs;
        u16 program_size, program_count;
        memcpy(&programs, at + 32, 8);
        memcpy(&program_size, at + 54, 2);
        memcpy(&program_count, at + 56, 2);
        u64 other = programs + (u64)program_size * program_count;
        return std::string((const char *)at, end > other ? end : other);
    }
    return std::string((const char *)at);
}
bool image_has(const std::string &image, const std::string &name) {
    if (image.compare(0, 4, "\177ELF") == 0) // a function has a section of its own, a table only a name
        return image.find("." + name + std::string(1, 0)) != std::string::npos || image.find(std::string(1, 0) + name + std::string(1, 0)) != std::string::npos;
    if (image.find(".entry") == std::string::npos) return true; // no image at all: tests of the emulator itself
    return image.find(".entry " + name + "(") != std::string::npos || image.find(" " + name + "[") != std::string::npos;
}
} // namespace

API int cuModuleLoadData(void **module, const void *image) {
    READY(d);
    if (image == nullptr) return INVALID_VALUE;
    *module = new Module{image_bytes(image)};
    return SUCCESS;
}
API int cuModuleLoadDataEx(void **module, const void *image, u32, int *, void **) { return cuModuleLoadData(module, image); }
API int cuModuleUnload(void *module) {
    Locked d;
    d->run_all();
    delete (Module *)module;
    return SUCCESS;
}
API int cuModuleGetFunction(void **function, void *module, const char *name) {
    READY(d);
    if (module == nullptr || name == nullptr) return INVALID_HANDLE;
    const Kernel *kernel = find_kernel(name);
    if (kernel == nullptr) return NOT_FOUND;
    if (!image_has(((Module *)module)->image, name)) {
        fprintf(stderr, "emulated device: the module that was loaded has no kernel %s: is kernels/built behind its sources? (scripts/kernels)\n", name);
        return NOT_FOUND;
    }
    d->functions.push_back(std::make_unique<Function>(Function{kernel}));
    *function = d->functions.back().get();
    return SUCCESS;
}
API int cuModuleGetGlobal_v2(u64 *at, size_t *bytes, void *module, const char *name) {
    READY(d);
    if (module == nullptr || name == nullptr) return INVALID_HANDLE;
    const Table *table = find_table(name);
    if (table == nullptr || !image_has(((Module *)module)->image, name)) return NOT_FOUND;
    if (at != nullptr) *at = (u64)table->at;
    if (bytes != nullptr) *bytes = table->bytes;
    return SUCCESS;
}
API int cuFuncSetAttribute(void *handle, int attribute, int value) {
    READY(d);
    if (handle == nullptr) return INVALID_HANDLE;
    if (attribute == 8) { // most dynamic shared memory
        u32 limit = d->capability >= 90 ? MAX_DYNAMIC_SHARED : 166912;
        if (value < 0 || (u32)value > limit) return INVALID_VALUE;
        ((Function *)handle)->max_dynamic = (u32)value;
    }
    return SUCCESS;
}
API int cuFuncGetAttribute(int *value, int attribute, void *handle) {
    READY(d);
    if (handle == nullptr) return INVALID_HANDLE;
    switch (attribute) {
    case 0: *value = MAX_THREADS; break;
    case 4: *value = 64; break; // registers
    case 5: case 6: *value = d->capability; break;
    case 8: *value = (int)((Function *)handle)->max_dynamic; break;
    default: *value = 0;
    }
    return SUCCESS;
}
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    if (function == nullptr || threads <= 0) return INVALID_VALUE;
    int by_threads = 2048 / threads, by_shared = shared == 0 ? 32 : (int)(233472 / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return SUCCESS;
}
API int cuLaunchKernel(void *handle, u32 grid_x, u32 grid_y, u32 grid_z, u32 block_x, u32 block_y, u32 block_z, u32 shared, void *stream_handle, void **params, void **extra) {
    READY(d);
    Stream *stream = d->stream(stream_handle);
    if (handle == nullptr || stream == nullptr) return INVALID_HANDLE;
    auto *function = (Function *)handle;
    bool fits = grid_x > 0 && grid_y > 0 && grid_z > 0 && grid_x <= 2147483647u && grid_y <= 65535 && grid_z <= 65535 && block_x > 0 && block_y > 0 && block_z > 0 &&
                block_x <= 1024 && block_y <= 1024 && block_z <= 64 && (u64)block_x * block_y * block_z <= MAX_THREADS && shared <= function->max_dynamic &&
                params != nullptr && extra == nullptr;
    if (!fits) {
        fprintf(stderr, "emulated device: launch of %s refused: grid (%u, %u, %u), block (%u, %u, %u), %u bytes of shared memory (at most %u)\n",
                function->kernel->name.c_str(), grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, function->max_dynamic);
        return INVALID_VALUE;
    }
    auto *args = (const unsigned char *)params[0];
    // On 16 bytes, as a struct of them wants to lie.
    auto copy = std::make_shared<std::vector<uint4>>((function->kernel->args + 15) / 16);
    memcpy(copy->data(), args, function->kernel->args);
    return d->add_work(stream, {[=] { return launch(*function->kernel, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, copy->data()); }, 1});
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs: what was captured, in the order of the calls.

API int cuStreamBeginCapture_v2(void *handle, int) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (stream == &d->null_stream || stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    stream->capture = std::make_shared<Graph>();
    stream->capture->origin = stream;
    return SUCCESS;
}
API int cuStreamIsCapturing(void *handle, int *status) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return SUCCESS;
}
API int cuThreadExchangeStreamCaptureMode(int *) { return SUCCESS; }
API int cuStreamEndCapture(void *handle, void **graph) {
    READY(d);
    Stream *stream = d->stream(handle);
    *graph = nullptr;
    if (stream == nullptr || !stream->capture || stream->capture->origin != stream) return INVALID_VALUE;
    std::shared_ptr<Graph> captured = stream->capture;
    bool unjoined = false;
    for (Stream *s : d->streams)
        if (s->capture == captured) {
            unjoined |= s->unjoined;
            s->unjoined = false;
            s->capture.reset();
        }
    if (captured->invalid) return STREAM_CAPTURE_INVALIDATED;
    if (unjoined) return STREAM_CAPTURE_UNJOINED;
    *graph = new Graph(*captured);
    return SUCCESS;
}
API int cuGraphGetNodes(void *graph, void **, size_t *count) {
    if (graph == nullptr || count == nullptr) return INVALID_VALUE;
    *count = ((Graph *)graph)->ops.size();
    return SUCCESS;
}
API int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long) {
    READY(d);
    if (graph == nullptr) return INVALID_VALUE;
    *exec = new Graph(*(Graph *)graph);
    return SUCCESS;
}
API int cuGraphUpload(void *exec, void *) { return exec == nullptr ? INVALID_VALUE : SUCCESS; }
API int cuGraphLaunch(void *exec, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (exec == nullptr || stream == nullptr) return INVALID_HANDLE;
    if (stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    auto graph = std::make_shared<Graph>(*(Graph *)exec);
    u32 kernels = 0;
    for (const Op &op : graph->ops) kernels += op.kernels;
    return d->add_work(stream, {[graph] {
        for (const Op &op : graph->ops)
            if (int result = op.run()) return result;
        return 0;
    }, kernels});
}
API int cuGraphExecDestroy(void *exec) {
    delete (Graph *)exec;
    return SUCCESS;
}
API int cuGraphDestroy(void *graph) {
    delete (Graph *)graph;
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors.

namespace {
struct Said { int code; const char *name, *text; };
constexpr Said SAID[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {R_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {R_MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {R_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
};
const Said *said(int code) {
    for (const Said &one : SAID)
        if (one.code == code) return &one;
    return nullptr;
}
} // namespace
API int cuGetErrorName(int code, const char **name) {
    const Said *one = said(code);
    *name = one == nullptr ? nullptr : one->name;
    return one == nullptr ? INVALID_VALUE : SUCCESS;
}
API int cuGetErrorString(int code, const char **text) {
    const Said *one = said(code);
    *text = one == nullptr ? nullptr : one->text;
    return one == nullptr ? INVALID_VALUE : SUCCESS;
}
