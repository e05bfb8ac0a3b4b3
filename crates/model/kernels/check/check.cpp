// check LIBCUDA IMAGE [ROUNDS]: runs every kernel on random inputs of odd sizes and compares with sums in double precision.
// check LIBCUDA IMAGE speed|quick-speed [JSON]: times single kernels.
//
//   LIBCUDA  libcuda.so.1, or the emulated one
//   IMAGE    the cubin or PTX with the kernels; `emulated` for the emulated device
//
// Prints a line per kernel, `name worst-error ok|WRONG`; exits with 1 where one is wrong, with 2 where there is no device.
#include "check.h"

#include <dlfcn.h>

#include <fstream>
#include <iterator>
#include <map>
#include <set>

namespace check {
namespace {

// The driver's functions that are used, by their signatures.
struct Driver {
    int (*init)(unsigned);
    int (*device)(int *, int);
    int (*retain)(void **, int);
    int (*set_current)(void *);
    int (*load)(void **, const void *);
    int (*function)(void **, void *, const char *);
    int (*set_attribute)(void *, int, int);
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    int (*synchronise)(void *);
    int (*allocate)(u64 *, size_t);
    int (*release)(u64);
    int (*to_device)(u64, const void *, size_t, void *);
    int (*to_host)(void *, u64, size_t, void *);
    int (*within)(u64, u64, size_t, void *);
    int (*fill)(u64, unsigned char, size_t, void *);
    int (*host_allocate)(void **, size_t, unsigned);
    int (*host_release)(void *);
    int (*host_at)(u64 *, void *, unsigned);
} driver;
void *module;
std::set<Bytes *> memory;

struct Worst {
    double error = 0, limit = 0;
    bool wrong = false;
};
std::map<std::string, Worst> results;

void must(int result, const std::string &what) {
    if (result == 0) return;
    fprintf(stderr, "check: %s: error %d of the driver\n", what.c_str(), result);
    exit(result == 100 || what == "cuInit" ? 2 : 1);
}

} // namespace

void open(const char *libcuda, const char *image) {
    void *library = dlopen(libcuda, RTLD_NOW);
    if (library == nullptr) {
        fprintf(stderr, "check: no driver: %s\n", dlerror());
        exit(2);
    }
    auto find = [&](auto &function, const char *name) {
        function = (std::remove_reference_t<decltype(function)>)dlsym(library, name);
        if (function == nullptr) {
            fprintf(stderr, "check: the driver has no %s\n", name);
            exit(2);
        }
    };
    find(driver.init, "cuInit");
    find(driver.device, "cuDeviceGet");
    find(driver.retain, "cuDevicePrimaryCtxRetain");
    find(driver.set_current, "cuCtxSetCurrent");
    find(driver.load, "cuModuleLoadData");
    find(driver.function, "cuModuleGetFunction");
    find(driver.set_attribute, "cuFuncSetAttribute");
    find(driver.launch, "cuLaunchKernel");
    find(driver.synchronise, "cuStreamSynchronize");
    find(driver.allocate, "cuMemAlloc_v2");
    find(driver.release, "cuMemFree_v2");
    find(driver.to_device, "cuMemcpyHtoDAsync_v2");
    find(driver.to_host, "cuMemcpyDtoHAsync_v2");
    find(driver.within, "cuMemcpyDtoDAsync_v2");
    find(driver.fill, "cuMemsetD8Async");
    find(driver.host_allocate, "cuMemHostAlloc");
    find(driver.host_release, "cuMemFreeHost");
    find(driver.host_at, "cuMemHostGetDevicePointer_v2");
    must(driver.init(0), "cuInit");
    int device;
    void *context;
    must(driver.device(&device, 0), "cuDeviceGet");
    must(driver.retain(&context, device), "cuDevicePrimaryCtxRetain");
    must(driver.set_current(context), "cuCtxSetCurrent");
    std::string bytes = image;
    if (bytes != "emulated") {
        std::ifstream file(image, std::ios::binary);
        bytes.assign(std::istreambuf_iterator<char>(file), {});
    }
    must(driver.load(&module, bytes.c_str()), std::string("cuModuleLoadData of ") + image);
}

Bytes::Bytes(size_t bytes) : host(bytes + 64, 0xff) {
    must(driver.allocate(&device, host.size()), "cuMemAlloc");
    memory.insert(this);
}
Bytes::~Bytes() {
    memory.erase(this);
    driver.release(device);
}

void launch(const std::string &kernel, Grid grid, u32 threads, u32 shared, const void *args, size_t bytes) {
    for (Bytes *each : memory) must(driver.to_device(each->device, each->host.data(), each->host.size(), nullptr), "copying");
    fire(kernel, grid, threads, shared, args, bytes);
    must(driver.synchronise(nullptr), kernel);
    for (Bytes *each : memory) must(driver.to_host(each->host.data(), each->device, each->host.size(), nullptr), "copying");
    must(driver.synchronise(nullptr), "copying");
}

void fire(const std::string &kernel, Grid grid, u32 threads, u32 shared, const void *args, size_t bytes) {
    static std::map<std::string, void *> known;
    void *&function = known[kernel];
    if (function == nullptr) must(driver.function(&function, module, kernel.c_str()), "cuModuleGetFunction of " + kernel);
    if (shared > 48 << 10) must(driver.set_attribute(function, 8, (int)shared), "shared memory of " + kernel);
    std::vector<u8> copy((const u8 *)args, (const u8 *)args + bytes);
    void *parameters[] = {copy.data()};
    must(driver.launch(function, grid.x, grid.y, grid.z, threads, 1, 1, shared, nullptr, parameters, nullptr), "launching " + kernel);
}
void copy(u64 to, u64 from, u64 bytes) { must(driver.within(to, from, bytes, nullptr), "copying"); }
void wait() { must(driver.synchronise(nullptr), "waiting"); }

Device::Device(u64 bytes) : bytes(bytes) { must(driver.allocate(&at, bytes + 64), "cuMemAlloc"); }
Device::~Device() { driver.release(at); }
void Device::fill(u8 byte) { must(driver.fill(at, byte, bytes, nullptr), "cuMemsetD8Async"); }
void Device::put(const void *from) {
    must(driver.to_device(at, from, bytes, nullptr), "copying");
    wait();
}
Shared::Shared(u64 bytes) {
    must(driver.host_allocate(&host, bytes, 2), "cuMemHostAlloc"); // mapped
    must(driver.host_at(&device, host, 0), "cuMemHostGetDevicePointer");
}
Shared::~Shared() { driver.host_release(host); }
void Shared::download(u64 from, u64 bytes) { must(driver.to_host(host, from, bytes, nullptr), "copying"); }

void record(const std::string &kernel, double error, double limit) {
    Worst &worst = results[kernel];
    worst.limit = limit;
    if (!(error <= worst.error)) worst.error = error;
    if (!(error <= limit)) worst.wrong = true;
}

bool report() {
    bool right = true;
    for (auto &[kernel, worst] : results) {
        printf("%-40s %.3g %s\n", kernel.c_str(), worst.error, worst.wrong ? "WRONG" : "ok");
        right = right && !worst.wrong;
    }
    return right;
}

std::mt19937_64 &random() {
    static std::mt19937_64 source(7);
    return source;
}
f32 gauss() {
    static std::normal_distribution<f64> normal;
    return (f32)normal(random());
}
u32 between(u32 low, u32 high) { return low + (u32)(random()() % (high - low + 1)); }

u16 to_bf16(f32 x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
f32 from_bf16(u16 bits) {
    u32 wide = (u32)bits << 16;
    f32 x;
    memcpy(&x, &wide, 4);
    return x;
}
f32 from_f16(u16 bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    f32 size = exponent == 0 ? std::ldexp((f32)mantissa, -24) : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                                                               : std::ldexp(1024.0f + mantissa, exponent - 25);
    return bits & 0x8000 ? -size : size;
}
u16 to_f16(f32 x) {
    // By search among the positive ones, which ascend: slow, and beyond doubt.
    u32 low = 0, high = 0x7bff;
    f32 size = std::fabs(x);
    while (low < high) {
        u32 middle = (low + high + 1) / 2;
        if (from_f16((u16)middle) <= size) low = middle; else high = middle - 1;
    }
    f32 below = size - from_f16((u16)low), above = low < 0x7bff ? from_f16((u16)(low + 1)) - size : INFINITY;
    if (above < below || (above == below && low % 2 == 1)) low++;
    return (u16)(low | (std::signbit(x) ? 0x8000 : 0));
}
f32 from_e4m3(u8 bits) {
    int exponent = bits >> 3 & 15, mantissa = bits & 7;
    f32 size = exponent == 15 && mantissa == 7 ? NAN : exponent == 0 ? std::ldexp((f32)mantissa, -9) : std::ldexp(8.0f + mantissa, exponent - 10);
    return bits & 0x80 ? -size : size;
}
u32 bytes_of(u32 dtype) { return dtype == KVASIR_F32 ? 4 : dtype == KVASIR_BF16 || dtype == KVASIR_F16 ? 2 : 1; }
const char *name_of(u32 dtype) {
    const char *names[] = {"bf16", "f16", "f32", "e4m3", "i8"};
    return names[dtype];
}
f64 read(const u8 *from, u32 dtype, size_t i) {
    u16 half;
    f32 whole;
    switch (dtype) {
    case KVASIR_BF16: memcpy(&half, from + 2 * i, 2); return from_bf16(half);
    case KVASIR_F16: memcpy(&half, from + 2 * i, 2); return from_f16(half);
    case KVASIR_F32: memcpy(&whole, from + 4 * i, 4); return whole;
    case KVASIR_E4M3: return from_e4m3(from[i]);
    default: return (i8)from[i];
    }
}
f64 write(u8 *to, u32 dtype, size_t i, f32 value) {
    u16 half = dtype == KVASIR_BF16 ? to_bf16(value) : dtype == KVASIR_F16 ? to_f16(value) : 0;
    switch (dtype) {
    case KVASIR_BF16:
    case KVASIR_F16: memcpy(to + 2 * i, &half, 2); break;
    case KVASIR_F32: memcpy(to + 4 * i, &value, 4); break;
    case KVASIR_E4M3: to[i] = value == 0 ? 0 : (u8)(between(0, 0x40) | between(0, 1) << 7); break;
    default: to[i] = value == 0 ? 0 : (u8)(i8)((int)between(0, 254) - 127);
    }
    return read(to, dtype, i);
}

} // namespace check

int main(int count, char **values) {
    if (count < 3) {
        fprintf(stderr, "usage: check LIBCUDA IMAGE [ROUNDS | speed [JSON] | quick-speed [JSON]]\n");
        return 1;
    }
    std::string what = count > 3 ? values[3] : "12";
    if (what == "speed" || what == "quick-speed") {
        check::open(values[1], values[2]);
        return check::speed(what == "quick-speed", count > 4 ? values[4] : nullptr) ? 0 : 1;
    }
    u32 rounds = (u32)atoi(what.c_str());
    check::open(values[1], values[2]);
    check::rows(rounds);
    check::heads(rounds);
    check::linear(rounds);
    check::attention(rounds);
    check::experts(rounds);
    check::shortlist(rounds);
    return check::report() ? 0 : 1;
}
