// What the pretend driver asks of the emulated machine.
#pragma once

#include <string>
#include <string_view>

#include "emulate.h"

namespace kvemu {

// Launch errors, by CUDA's numbers.
enum : int { OK = 0, ILLEGAL_ADDRESS = 700, MISALIGNED_ADDRESS = 716, LAUNCH_FAILED = 719 };

constexpr u32 MAX_THREADS = 1024;
constexpr u32 MAX_DYNAMIC_SHARED = 232448;
constexpr u32 MAX_STATIC_SHARED = 49152;

struct Kernel {
    std::string name;
    size_t args;
    void (*run)(const void *args);
};
struct Table {
    std::string name;
    const void *at;
    size_t bytes;
};
const Kernel *find_kernel(std::string_view name);
const Table *find_table(std::string_view name);
bool in_a_table(const void *at, size_t bytes);

// Runs all blocks of a launch to their end. What went wrong is said on standard error.
int launch(const Kernel &kernel, dim3 grid, dim3 block, u32 dynamic_shared, const void *args);

} // namespace kvemu
