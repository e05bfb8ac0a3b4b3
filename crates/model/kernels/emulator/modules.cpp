// The pretend driver's modules, launches and names of errors; see driver.cpp.

#include <stdio.h>
#include <stdlib.h>

#include "driver.h"

using namespace kvemu;

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
    if (const char *any = getenv("EMULATED_CUDA_ANY_IMAGE"); any != nullptr && *any != 0) return true;
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
    d->run_all(current_context);
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
    {STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
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
