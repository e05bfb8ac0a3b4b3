// What every kernel may use of the machine, under one set of names for two machines.
//
// - Under CUDA (`__CUDACC__`: nvcc or NVRTC, no headers needed) these are the instructions, sm_80 and later.
// - Under a plain C++20 compiler they are emulated (`emulator/emulate.h`): threads are fibers, warps meet for collectives,
//   a copy of `cp.async` lands no earlier than the wait for it. Kernels must not know which of the two they run on.
//
// Rules for kernels, so that both see the same program:
// - `extern "C" __global__ void NAME(const Args args)`, then `KVASIR_EXPORT(NAME, Args)` after its body.
// - Block sizes are multiples of 32. Collectives (shuffles, votes, mma, ldmatrix) are for whole warps that have not left.
// - Shared memory: `KVASIR_DYNAMIC_SHARED(name)` (bytes, 128-byte aligned) or `KVASIR_SHARED(type, name)`; never a bare
//   `__shared__`. It is poisoned with NaN patterns when a block starts.
// - No static or global variables but tables: `KVASIR_TABLE(type, name, count) = { … }; KVASIR_EXPORT_TABLE(name);`.
// - Both compilers keep `a * b + c` as two roundings (`-fmad=false`, `-ffp-contract=off`); fused is `__fmaf_rn(a, b, c)`.
// - Wide loads go through `load16` and the like, or through types of 4, 8 or 16 bytes that are aligned so.
#pragma once

#include "types.h"

#if defined(__CUDACC__)

#define KVASIR_DEVICE __device__ __forceinline__
#ifndef INFINITY
#define INFINITY (1.0f / 0.0f)
#endif
#define KVASIR_EXPORT(name, Args)
#define KVASIR_EXPORT_TABLE(name)
#define KVASIR_TABLE(type, name, count) \
    extern "C" { extern __device__ __constant__ type name[count]; } \
    __device__ __constant__ type name[count]
#define KVASIR_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
template <typename T> struct KvasirShared { typedef T type; };
#define KVASIR_SHARED(T, name) __shared__ __align__(16) typename KvasirShared<T>::type name
// Stops the kernel with an error where the condition does not hold.
#define KVASIR_ASSERT(condition) do { if (!(condition)) __trap(); } while (0)

#else

#define KVASIR_DEVICE static inline
#include "emulator/emulate.h"

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Sixteen-bit and eight-bit floats: the bits, in types of their own.

struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct e4m3 { u8 bits; };

KVASIR_DEVICE u32 bits_of(f32 x) { return __float_as_uint(x); }
KVASIR_DEVICE f32 float_of(u32 bits) { return __uint_as_float(bits); }

KVASIR_DEVICE f32 to_f32(f32 x) { return x; }
KVASIR_DEVICE f32 to_f32(bf16 x) { return float_of((u32)x.bits << 16); }
KVASIR_DEVICE f32 to_f32(i8 x) { return (f32)x; }

// OCP e4m3. Every value is exact in f16 and in bf16; 0x7f and 0xff are NaN. Its bits in an f32's upper places have an
// exponent that is 120 too small, subnormal numbers included.
KVASIR_DEVICE f32 to_f32(e4m3 x) {
    u32 size = x.bits & 0x7f;
    f32 value = size == 0x7f ? float_of(0x7fc00000u) : float_of(size << 20) * float_of((120u + 127u) << 23);
    return float_of(bits_of(value) | (u32)(x.bits & 0x80) << 24);
}

// To the nearest, ties to even; beyond 448 becomes 448; a NaN stays one. As `weights/fp8.rs`, bit for bit.
KVASIR_DEVICE e4m3 to_e4m3(f32 x) {
    u32 bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    u32 size = magnitude > 0x43e00000u ? 0x43e00000u : magnitude; // 448
    u32 normal = ((size + 0x7ffffu + ((size >> 20) & 1)) >> 20) - (120u << 3);
    // Adding 2¹⁴ leaves a number in steps of 2⁻⁹ in the low bits: rounding by the addition itself.
    u32 small = bits_of(__fadd_rn(float_of(size), 16384.0f)) & 0xf;
    u32 byte = size < 0x3c800000u ? small : normal & 0x7f; // 2⁻⁶
    byte = magnitude > 0x7f800000u ? 0x7f : byte;
    e4m3 out;
    out.bits = (u8)(byte | (bits >> 24 & 0x80));
    return out;
}

#if defined(__CUDACC__)

KVASIR_DEVICE f32 to_f32(f16 x) { f32 y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
// To the nearest, ties to even; beyond the largest becomes infinite; a NaN stays one.
KVASIR_DEVICE f16 to_f16(f32 x) { f16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
KVASIR_DEVICE bf16 to_bf16(f32 x) { bf16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
// Two at once, `low` in the lower half: the order of memory.
KVASIR_DEVICE u32 pack_bf16(f32 low, f32 high) { u32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }
KVASIR_DEVICE u32 pack_f16(f32 low, f32 high) { u32 y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }

#else

KVASIR_DEVICE f32 to_f32(f16 x) { return kvemu::f16_to_f32(x.bits); }
KVASIR_DEVICE f16 to_f16(f32 x) { return f16{kvemu::f32_to_f16(x)}; }
KVASIR_DEVICE bf16 to_bf16(f32 x) { return bf16{kvemu::f32_to_bf16(x)}; }
KVASIR_DEVICE u32 pack_bf16(f32 low, f32 high) { return kvemu::f32_to_bf16(low) | (u32)kvemu::f32_to_bf16(high) << 16; }
KVASIR_DEVICE u32 pack_f16(f32 low, f32 high) { return kvemu::f32_to_f16(low) | (u32)kvemu::f32_to_f16(high) << 16; }

#endif

KVASIR_DEVICE f32 low_bf16(u32 pair) { return float_of(pair << 16); }
KVASIR_DEVICE f32 high_bf16(u32 pair) { return float_of(pair & 0xffff0000u); }
KVASIR_DEVICE f32 low_f16(u32 pair) { f16 x; x.bits = (u16)pair; return to_f32(x); }
KVASIR_DEVICE f32 high_f16(u32 pair) { f16 x; x.bits = (u16)(pair >> 16); return to_f32(x); }

// Four e4m3 (a word of memory) to two words of two bf16 or f16 each, exact. Sizes are moved into the place of the other format's
// exponent and multiplied by what the biases differ by. As bf16 a NaN becomes 480: weights hold none.
KVASIR_DEVICE u32 e4m3x2_to_bf16(u32 x) { // bytes 1 and 3
    u32 size = (x & 0x7f007f00u) >> 4, y;
#if defined(__CUDACC__)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(size), "r"(0x7b807b80u), "r"(0x80008000u)); // 2¹²⁰, and nothing
#else
    f32 scale = float_of((120u + 127u) << 23);
    y = bits_of(float_of(size << 16) * scale) >> 16 | (bits_of(float_of(size & 0xffff0000u) * scale) & 0xffff0000u);
#endif
    return y | (x & 0x80008000u);
}
KVASIR_DEVICE void e4m3x4_to_bf16(u32 word, u32 &low, u32 &high) {
    low = e4m3x2_to_bf16(__byte_perm(word, 0, 0x1404));
    high = e4m3x2_to_bf16(__byte_perm(word, 0, 0x3424));
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
KVASIR_DEVICE u32 e4m3x2_to_f16(u32 x) { // bytes 1 and 3; a NaN becomes 480 here too
    u32 size = (x & 0x7f007f00u) >> 1, y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(size), "r"(0x5c005c00u)); // 2⁸
    return y | (x & 0x80008000u);
}
#endif
KVASIR_DEVICE void e4m3x4_to_f16(u32 word, u32 &low, u32 &high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    low = e4m3x2_to_f16(__byte_perm(word, 0, 0x1404));
    high = e4m3x2_to_f16(__byte_perm(word, 0, 0x3424));
#elif defined(__CUDACC__)
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(low) : "h"((u16)word));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(high) : "h"((u16)(word >> 16)));
#else
    e4m3 a, b, c, d;
    a.bits = (u8)word, b.bits = (u8)(word >> 8), c.bits = (u8)(word >> 16), d.bits = (u8)(word >> 24);
    low = pack_f16(to_f32(a), to_f32(b));
    high = pack_f16(to_f32(c), to_f32(d));
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// The rest of the machine, under CUDA. `emulator/emulate.h` has the same functions.

#if defined(__CUDACC__)

// d += a · b: sixteen rows of a times eight columns of b, sixteen deep. Fragments as PTX names them: lane l holds of d rows
// l/4 and l/4+8, columns 2·(l%4) and the next; of a the same rows at depths 2·(l%4).. and those + 8; of b column l/4.
KVASIR_DEVICE void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KVASIR_DEVICE void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

KVASIR_DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Eight rows of 16 bytes in shared memory per matrix; lanes 0..8 name the rows of the first, 8..16 of the second and so on.
KVASIR_DEVICE void ldmatrix_x4(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
KVASIR_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
KVASIR_DEVICE void ldmatrix_x2(u32 (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
KVASIR_DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// Sixteen bytes from global to shared memory, seen by this thread after the wait and by others after a barrier too. Where
// `wanted` is false, nothing is read and zeros are written.
KVASIR_DEVICE void cp_async16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
KVASIR_DEVICE void cp_async16_if(void *shared, const void *global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(wanted ? 16 : 0) : "memory");
}
// Eight or four bytes (through the L1 cache).
KVASIR_DEVICE void cp_async8_if(void *shared, const void *global, bool wanted) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(wanted ? 8 : 0) : "memory");
}
KVASIR_DEVICE void cp_async4_if(void *shared, const void *global, bool wanted) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(wanted ? 4 : 0) : "memory");
}
KVASIR_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `left` of the committed groups are under way.
template <int left> KVASIR_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"); }

// Global loads. `stream`: read once, not kept in L1 (weights); the plain ones may be reordered with nothing written.
KVASIR_DEVICE uint4 load16(const void *p) { return *(const uint4 *)p; }
KVASIR_DEVICE uint4 load16_stream(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
KVASIR_DEVICE uint2 load8_stream(const void *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
KVASIR_DEVICE u32 load4_stream(const void *p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
KVASIR_DEVICE void store16(void *p, uint4 v) { *(uint4 *)p = v; }

// Butterflies over a warp, and over the four lanes of one row of an mma fragment (lanes 4·i .. 4·i+4). All lanes get the same
// bits: each step adds the same two numbers on both sides.
KVASIR_DEVICE f32 warp_sum(f32 x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
KVASIR_DEVICE f32 warp_max(f32 x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
KVASIR_DEVICE f32 quad_sum(f32 x) {
#pragma unroll
    for (int step = 2; step > 0; step >>= 1) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
KVASIR_DEVICE f32 quad_max(f32 x) {
#pragma unroll
    for (int step = 2; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// A barrier of its own number (1..16) for `threads` threads of the block, a multiple of 32.
KVASIR_DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Approximations of a few units in the last place, for `Compute::Fast` alone.
KVASIR_DEVICE f32 fast_exp(f32 x) { return __expf(x); }
KVASIR_DEVICE f32 fast_exp2(f32 x) { f32 y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
KVASIR_DEVICE f32 fast_divide(f32 x, f32 y) { return __fdividef(x, y); }

#endif
