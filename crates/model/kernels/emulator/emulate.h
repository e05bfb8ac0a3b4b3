// CUDA's words for a plain C++20 compiler: included by `common.cuh` where there is no CUDA, for tests only.
//
// Each thread of a block is a fiber of `simt.cpp`. It runs until it must wait for others: at a barrier, or at a collective
// of its warp, where every lane leaves a pointer to its operands and the last one to come computes for all. So threads of a
// warp are *not* in step, as on real devices since Volta, and a missing barrier shows.
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "../types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint2 { u32 x, y; } __attribute__((aligned(8)));
struct uint3 { u32 x, y, z; };
struct uint4 { u32 x, y, z, w; } __attribute__((aligned(16)));
struct int2 { i32 x, y; } __attribute__((aligned(8)));
struct int4 { i32 x, y, z, w; } __attribute__((aligned(16)));
struct float2 { f32 x, y; } __attribute__((aligned(8)));
struct float4 { f32 x, y, z, w; } __attribute__((aligned(16)));
struct dim3 { u32 x = 1, y = 1, z = 1; };
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline int2 make_int2(i32 x, i32 y) { return {x, y}; }
static inline int4 make_int4(i32 x, i32 y, i32 z, i32 w) { return {x, y, z, w}; }
static inline float2 make_float2(f32 x, f32 y) { return {x, y}; }
static inline float4 make_float4(f32 x, f32 y, f32 z, f32 w) { return {x, y, z, w}; }

namespace kvemu {

// What a thread knows of itself; `simt.cpp` has the rest of it.
struct Thread {
    uint3 thread, block;
    dim3 block_size, grid_size;
    unsigned char *dynamic_shared;
};
extern thread_local Thread *self __attribute__((tls_model("initial-exec"), visibility("hidden")));

// Computes for all lanes of `mask`: `lanes[l]` is what lane l brought.
typedef void (*Collective)(void **lanes, u32 mask);
void collective(u32 mask, Collective compute, void *mine, const char *what);
// All threads of the block that have not left (`threads` = 0), or so many of them.
void barrier(int id, int threads);
void cp_async(void *shared, const void *global, u32 bytes, bool wanted);
void cp_async_commit();
void cp_async_wait(int left);
void *static_shared(const void *key, size_t bytes, const char *name);
[[noreturn]] void trap(const char *file, int line, const char *what);
void mma_bf16(void **lanes, u32 mask);
void mma_f16(void **lanes, u32 mask);

bool add_kernel(const char *name, size_t args, void (*run)(const void *args));
bool add_table(const char *name, const void *at, size_t bytes);

#if defined(__aarch64__)
typedef __fp16 half;
#else
typedef _Float16 half;
#endif
static inline f32 f16_to_f32(u16 bits) { half h; memcpy(&h, &bits, 2); return (f32)h; }
static inline u16 f32_to_f16(f32 x) {
    if (x != x) return 0x7fff;
    half h = (half)x;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}
static inline u16 f32_to_bf16(f32 x) {
    if (x != x) return 0x7fff;
    u32 bits;
    memcpy(&bits, &x, 4);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Mma { f32 *d; const u32 *a, *b; };
struct Ldmatrix { u32 *r; const void *row; };

template <int matrices, bool transposed> void ldmatrix(void **lanes, u32) {
    for (int m = 0; m < matrices; m++) {
        u16 at[8][8];
        for (int row = 0; row < 8; row++) memcpy(at[row], ((Ldmatrix *)lanes[m * 8 + row])->row, 16);
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4, pair = lane % 4 * 2;
            u32 low = transposed ? at[pair][row] : at[row][pair], high = transposed ? at[pair + 1][row] : at[row][pair + 1];
            ((Ldmatrix *)lanes[lane])->r[m] = low | high << 16;
        }
    }
}

template <typename T> struct Shuffle { T value, out; int from; };
// `from` outside the mask is undefined on a device; here it is an error.
template <typename T> void shuffle(void **lanes, u32 mask) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        auto *mine = (Shuffle<T> *)lanes[lane];
        if (!(mask >> mine->from & 1)) trap("shuffle", 0, "a lane outside the mask is asked for its value");
        mine->out = ((Shuffle<T> *)lanes[mine->from])->value;
    }
}
static inline int lane() {
    const Thread &t = *self;
    return (t.thread.x + t.block_size.x * (t.thread.y + t.block_size.y * t.thread.z)) % 32;
}
template <typename T> T shuffled(u32 mask, T value, int from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    Shuffle<T> mine{value, value, from};
    collective(mask, shuffle<T>, &mine, "shuffle");
    return mine.out;
}

struct Vote { u32 yes, out; };
static inline void vote(void **lanes, u32 mask) {
    u32 all = 0;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) all |= (u32)(((Vote *)lanes[lane])->yes != 0) << lane;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) ((Vote *)lanes[lane])->out = all;
}
static inline void nothing(void **, u32) {}

// Butterflies of lanes `step` apart, `first` first, on all 32 at once: the bits of the shuffles they stand for.
struct Butterfly { f32 value; };
template <int first, bool sum> void butterfly(void **lanes, u32) {
    f32 x[32], y[32];
    for (int lane = 0; lane < 32; lane++) x[lane] = ((Butterfly *)lanes[lane])->value;
    for (int step = first; step > 0; step >>= 1) {
        for (int lane = 0; lane < 32; lane++) y[lane] = sum ? x[lane] + x[lane ^ step] : fmaxf(x[lane], x[lane ^ step]);
        memcpy(x, y, sizeof x);
    }
    for (int lane = 0; lane < 32; lane++) ((Butterfly *)lanes[lane])->value = x[lane];
}
template <int first, bool sum> f32 butterflied(f32 x) {
    Butterfly mine{x};
    collective(0xffffffffu, butterfly<first, sum>, &mine, "reduction");
    return mine.value;
}
template <typename T> T aligned_load(const void *p) {
    if ((uintptr_t)p % sizeof(T) != 0) trap("load", 0, "address is not aligned");
    T v;
    memcpy(&v, p, sizeof(T));
    return v;
}

} // namespace kvemu

#define threadIdx (kvemu::self->thread)
#define blockIdx (kvemu::self->block)
#define blockDim (kvemu::self->block_size)
#define gridDim (kvemu::self->grid_size)
#define warpSize 32

#define KVASIR_EXPORT(name, Args) \
    [[maybe_unused]] static const bool kvemu_kernel_##name = \
        kvemu::add_kernel(#name, sizeof(Args), [](const void *args) { name(*(const Args *)args); })
#define KVASIR_TABLE(type, name, count) \
    extern "C" { extern const type name[count]; } \
    const type name[count]
#define KVASIR_EXPORT_TABLE(name) [[maybe_unused]] static const bool kvemu_table_##name = kvemu::add_table(#name, name, sizeof(name))
#define KVASIR_DYNAMIC_SHARED(name) unsigned char *name = kvemu::self->dynamic_shared
namespace kvemu { template <typename T> struct Shared { typedef T type; }; }
#define KVASIR_SHARED(T, name) \
    static const char kvemu_key_##name = 0; \
    auto &name = *(typename kvemu::Shared<T>::type *)kvemu::static_shared(&kvemu_key_##name, sizeof(typename kvemu::Shared<T>::type), #name)
#define KVASIR_ASSERT(condition) do { if (!(condition)) kvemu::trap(__FILE__, __LINE__, #condition); } while (0)
#define __trap() kvemu::trap(__FILE__, __LINE__, "trap")

static inline void __syncthreads() { kvemu::barrier(0, 0); }
static inline void named_barrier(int id, int threads) { kvemu::barrier(id, threads); }
static inline void __syncwarp(u32 mask = 0xffffffffu) { kvemu::collective(mask, kvemu::nothing, nullptr, "__syncwarp"); }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T> T __shfl_sync(u32 mask, T v, int from, int width = 32) {
    int lane = kvemu::lane();
    return kvemu::shuffled(mask, v, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <typename T> T __shfl_xor_sync(u32 mask, T v, int with, int width = 32) {
    int lane = kvemu::lane(), from = lane ^ with;
    return kvemu::shuffled(mask, v, from / width > lane / width ? lane : from);
}
template <typename T> T __shfl_down_sync(u32 mask, T v, u32 by, int width = 32) {
    int lane = kvemu::lane(), from = lane + (int)by;
    return kvemu::shuffled(mask, v, from / width != lane / width ? lane : from);
}
template <typename T> T __shfl_up_sync(u32 mask, T v, u32 by, int width = 32) {
    int lane = kvemu::lane(), from = lane - (int)by;
    return kvemu::shuffled(mask, v, from < (lane & ~(width - 1)) ? lane : from);
}
static inline u32 __ballot_sync(u32 mask, int yes) {
    kvemu::Vote mine{yes != 0, 0};
    kvemu::collective(mask, kvemu::vote, &mine, "vote");
    return mine.out;
}
static inline int __any_sync(u32 mask, int yes) { return __ballot_sync(mask, yes) != 0; }
static inline int __all_sync(u32 mask, int yes) { return __ballot_sync(mask, yes) == mask; }
static inline f32 warp_sum(f32 x) { return kvemu::butterflied<16, true>(x); }
static inline f32 warp_max(f32 x) { return kvemu::butterflied<16, false>(x); }
static inline f32 quad_sum(f32 x) { return kvemu::butterflied<2, true>(x); }
static inline f32 quad_max(f32 x) { return kvemu::butterflied<2, false>(x); }

static inline void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    kvemu::Mma mine{d, a, b};
    kvemu::collective(0xffffffffu, kvemu::mma_bf16, &mine, "mma");
}
static inline void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    kvemu::Mma mine{d, a, b};
    kvemu::collective(0xffffffffu, kvemu::mma_f16, &mine, "mma");
}
namespace kvemu {
template <int matrices, bool transposed> void ldmatrix_all(u32 *r, const void *row) {
    if (lane() < matrices * 8 && (uintptr_t)row % 16 != 0) trap("ldmatrix", 0, "a row is not aligned to 16 bytes");
    Ldmatrix mine{r, row};
    collective(0xffffffffu, ldmatrix<matrices, transposed>, &mine, "ldmatrix");
}
}
static inline void ldmatrix_x4(u32 (&r)[4], const void *row) { kvemu::ldmatrix_all<4, false>(r, row); }
static inline void ldmatrix_x4_trans(u32 (&r)[4], const void *row) { kvemu::ldmatrix_all<4, true>(r, row); }
static inline void ldmatrix_x2(u32 (&r)[2], const void *row) { kvemu::ldmatrix_all<2, false>(r, row); }
static inline void ldmatrix_x2_trans(u32 (&r)[2], const void *row) { kvemu::ldmatrix_all<2, true>(r, row); }

static inline void cp_async16(void *shared, const void *global) { kvemu::cp_async(shared, global, 16, true); }
static inline void cp_async16_if(void *shared, const void *global, bool wanted) { kvemu::cp_async(shared, global, 16, wanted); }
static inline void cp_async8_if(void *shared, const void *global, bool wanted) { kvemu::cp_async(shared, global, 8, wanted); }
static inline void cp_async4_if(void *shared, const void *global, bool wanted) { kvemu::cp_async(shared, global, 4, wanted); }
static inline void cp_async_commit() { kvemu::cp_async_commit(); }
template <int left> static inline void cp_async_wait() { kvemu::cp_async_wait(left); }

static inline uint4 load16(const void *p) { return kvemu::aligned_load<uint4>(p); }
static inline uint4 load16_stream(const void *p) { return kvemu::aligned_load<uint4>(p); }
static inline uint2 load8_stream(const void *p) { return kvemu::aligned_load<uint2>(p); }
static inline u32 load4_stream(const void *p) { return kvemu::aligned_load<u32>(p); }
static inline void store16(void *p, uint4 v) {
    if ((uintptr_t)p % 16 != 0) kvemu::trap("store16", 0, "address is not aligned");
    memcpy(p, &v, 16);
}
template <typename T> T __ldg(const T *p) { return *p; }

// Sums of floats in whatever order blocks come are not the same to the bit twice.
static inline f32 atomicAdd(f32 *p, f32 v) = delete;
template <typename T> T atomicAdd(T *p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline u32 atomicCAS(u32 *p, u32 expected, u32 v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
static inline u64 atomicCAS(u64 *p, u64 expected, u64 v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
static inline i32 atomicCAS(i32 *p, i32 expected, i32 v) { return (i32)atomicCAS((u32 *)p, (u32)expected, (u32)v); }
template <typename T> T atomicExch(T *p, T v) { T old; __atomic_exchange(p, &v, &old, __ATOMIC_SEQ_CST); return old; }
template <typename T> T atomicOr(T *p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
template <typename T> T atomicAnd(T *p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
template <typename T> T atomicMax(T *p, T v) {
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
template <typename T> T atomicMin(T *p, T v) {
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old > v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}

static inline u32 __float_as_uint(f32 x) { u32 b; memcpy(&b, &x, 4); return b; }
static inline f32 __uint_as_float(u32 b) { f32 x; memcpy(&x, &b, 4); return x; }
static inline i32 __float_as_int(f32 x) { i32 b; memcpy(&b, &x, 4); return b; }
static inline f32 __int_as_float(i32 b) { f32 x; memcpy(&x, &b, 4); return x; }
static inline f32 __fadd_rn(f32 a, f32 b) { return a + b; }
static inline f32 __fsub_rn(f32 a, f32 b) { return a - b; }
static inline f32 __fmul_rn(f32 a, f32 b) { return a * b; }
static inline f32 __fmaf_rn(f32 a, f32 b, f32 c) { return fmaf(a, b, c); }
static inline f32 __fdiv_rn(f32 a, f32 b) { return a / b; }
static inline f32 __frcp_rn(f32 a) { return 1.0f / a; }
static inline f32 __fsqrt_rn(f32 a) { return sqrtf(a); }
static inline f32 rsqrtf(f32 a) { return (f32)(1.0 / sqrt((f64)a)); }
#define __expf expf
#define __logf logf
#define __sinf sinf
#define __cosf cosf
static inline f32 __fdividef(f32 a, f32 b) { return a / b; }
static inline f32 fast_exp(f32 a) { return expf(a); }
static inline f32 fast_exp2(f32 a) { return exp2f(a); }
static inline f32 fast_divide(f32 a, f32 b) { return a / b; }
static inline i32 __float2int_rn(f32 a) { return (i32)lrintf(a); }
static inline f32 __int2float_rn(i32 a) { return (f32)a; }
static inline f32 __uint2float_rn(u32 a) { return (f32)a; }
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __popcll(u64 x) { return __builtin_popcountll(x); }
static inline int __clz(i32 x) { return x == 0 ? 32 : __builtin_clz((u32)x); }
static inline int __ffs(i32 x) { return __builtin_ffs(x); }
static inline u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
static inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 both = a | (u64)b << 32;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        u32 pick = selector >> (4 * i), byte = (u32)(both >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * i);
    }
    return out;
}
static inline i32 min(i32 a, i32 b) { return a < b ? a : b; }
static inline i32 max(i32 a, i32 b) { return a > b ? a : b; }
static inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
static inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
static inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 max(i64 a, i64 b) { return a > b ? a : b; }
static inline u64 min(u64 a, u64 b) { return a < b ? a : b; }
static inline u64 max(u64 a, u64 b) { return a > b ? a : b; }
static inline u64 min(u32 a, u64 b) { return a < b ? a : b; }
static inline u64 min(u64 a, u32 b) { return a < b ? a : b; }
