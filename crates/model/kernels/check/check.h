// What the checks of kernels share: the driver through `dlopen`, memory on both sides, and who was how far off.
//
// Plain C++17 without CUDA's headers, so that it builds and runs where there is no toolkit: against a real libcuda and a
// compiled image, or against the emulated device. Outputs are poisoned with 0xff before each launch, so what a kernel leaves
// out or writes beyond shows.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../abi.h"

namespace check {

struct Grid {
    u32 x = 1, y = 1, z = 1;
};

// Loads the driver and the image with the kernels; ends the program where that cannot be.
void open(const char *libcuda, const char *image);

// Runs a kernel to its end. All memory there is goes to the device before and comes back after.
void launch(const std::string &kernel, Grid grid, u32 threads, u32 shared, const void *args, size_t bytes);
template <typename Args> void launch(const std::string &kernel, Grid grid, u32 threads, u32 shared, const Args &args) {
    launch(kernel, grid, threads, shared, &args, sizeof args);
}

// The same without any copying, and without waiting; and waiting for all of it.
void fire(const std::string &kernel, Grid grid, u32 threads, u32 shared, const void *args, size_t bytes);
template <typename Args> void fire(const std::string &kernel, Grid grid, u32 threads, u32 shared, const Args &args) {
    fire(kernel, grid, threads, shared, &args, sizeof args);
}
void copy(u64 to, u64 from, u64 bytes);
void wait();

// Memory of the device alone.
struct Device {
    explicit Device(u64 bytes);
    template <typename T> explicit Device(const std::vector<T> &values) : Device(values.size() * sizeof(T)) { put(values.data()); }
    ~Device();
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;
    void fill(u8 byte);
    void put(const void *from);
    u64 at = 0, bytes;
};

// Memory of the host that the device writes to.
struct Shared {
    explicit Shared(u64 bytes);
    ~Shared();
    Shared(const Shared &) = delete;
    Shared &operator=(const Shared &) = delete;
    void download(u64 from, u64 bytes);
    void *host = nullptr;
    u64 device = 0;
};

// How far off a kernel was, and how far it may be. The worst of all calls is what is told in the end; NaN is the worst of all.
void record(const std::string &kernel, double error, double limit);
inline void require(const std::string &kernel, bool right) { record(kernel, right ? 0 : INFINITY, 1); }
// Prints a line per kernel; whether all were right.
bool report();

// Memory with a twin on the device.
class Bytes {
public:
    explicit Bytes(size_t bytes);
    ~Bytes();
    Bytes(const Bytes &) = delete;
    Bytes &operator=(const Bytes &) = delete;
    std::vector<u8> host;
    u64 device = 0;
};
template <typename T> class Memory {
public:
    explicit Memory(size_t count) : bytes(count * sizeof(T)), count(count) {}
    T &operator[](size_t i) { return ((T *)bytes.host.data())[i]; }
    T *host() { return (T *)bytes.host.data(); }
    // For arguments.
    operator T *() { return (T *)bytes.device; }
    std::vector<T> copy() { return std::vector<T>(host(), host() + count); }
    void poison() { memset(bytes.host.data(), 0xff, bytes.host.size()); }

private:
    Bytes bytes;
    size_t count;
};

inline u32 ceil(u32 a, u32 b) { return (a + b - 1) / b; }
inline u32 padded(u32 width) { return ceil(width, KVASIR_K_UNIT) * KVASIR_K_UNIT; }

// Random numbers, the same in every run.
std::mt19937_64 &random();
f32 gauss();
u32 between(u32 low, u32 high);

// Stored elements.
u16 to_bf16(f32 x);
f32 from_bf16(u16 bits);
u16 to_f16(f32 x);
f32 from_f16(u16 bits);
f32 from_e4m3(u8 bits);
u32 bytes_of(u32 dtype);
const char *name_of(u32 dtype);
f64 read(const u8 *from, u32 dtype, size_t i);
// Writes the nearest element (of e4m3 and i8 a random one) and returns what it is.
f64 write(u8 *to, u32 dtype, size_t i, f32 value);

// |value - wanted| against what is wanted, or `scale` where that is larger.
inline f64 off(f64 value, f64 wanted, f64 scale) { return std::fabs(value - wanted) / std::fmax(std::fabs(wanted), scale); }

// Planes of activations.
struct Planes {
    Memory<u16> hi, lo;
    explicit Planes(size_t count) : hi(count), lo(count) {}
    f64 at(size_t i) { return (f64)from_bf16(hi[i]) + from_bf16(lo[i]); }
    void put(size_t i, f32 value) { hi[i] = to_bf16(value), lo[i] = to_bf16(value - from_bf16(hi[i])); }
};

void linear(u32 rounds);
void attention(u32 rounds);
void rows(u32 rounds);
void heads(u32 rounds);
void experts(u32 rounds);
void shortlist(u32 rounds);
// Times single kernels; whether all were as fast as they are to be. `json`: where to write that, or null.
bool speed(bool quick, const char *json);

} // namespace check
