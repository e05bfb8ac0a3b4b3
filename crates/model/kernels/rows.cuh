// What kernels that work row by row share: sums over a block in one order, and activations as products take them.
#pragma once

#include "abi.h"
#include "common.cuh"

// What the last part of a kernel's name says of its arithmetic.
static const bool exact_mode = true, fast_mode = false;

// The sum over all threads of a block of KVASIR_ROW_THREADS, in one order, to every thread. `room` is for one call at a time:
// all threads must have passed the next barrier before it is used again.
KVASIR_DEVICE f32 block_sum(f32 value, f32 (&room)[KVASIR_ROW_THREADS / 32]) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    f32 sum = room[0];
#pragma unroll
    for (u32 warp = 1; warp < KVASIR_ROW_THREADS / 32; warp++) sum += room[warp];
    return sum;
}

// Element `i` of a stored vector.
KVASIR_DEVICE f32 stored(const void *from, u32 dtype, u64 i) {
    switch (dtype) {
    case KVASIR_BF16: return to_f32(((const bf16 *)from)[i]);
    case KVASIR_F16: return to_f32(((const f16 *)from)[i]);
    case KVASIR_F32: return ((const f32 *)from)[i];
    case KVASIR_E4M3: return to_f32(((const e4m3 *)from)[i]);
    default: return to_f32(((const i8 *)from)[i]);
    }
}

// What is left of a value when its first bf16 term is taken off. An infinite one has no second term.
KVASIR_DEVICE f32 rest_of(f32 value, bf16 first) {
    f32 rest = value - to_f32(first);
    return rest == rest ? rest : 0.0f;
}

// Writes element `at` of planes.
KVASIR_DEVICE void put_planes(u16 *hi, u16 *lo, u64 at, f32 value) {
    bf16 first = to_bf16(value);
    hi[at] = first.bits;
    if (lo) lo[at] = to_bf16(rest_of(value, first)).bits;
}

// Writes the four elements from `at` on, a multiple of four.
KVASIR_DEVICE void put_planes4(u16 *hi, u16 *lo, u64 at, float4 value) {
    u32 low = pack_bf16(value.x, value.y), high = pack_bf16(value.z, value.w);
    *(uint2 *)(hi + at) = make_uint2(low, high);
    if (lo) {
        bf16 a, b, c, d;
        a.bits = (u16)low, b.bits = (u16)(low >> 16), c.bits = (u16)high, d.bits = (u16)(high >> 16);
        *(uint2 *)(lo + at) = make_uint2(pack_bf16(rest_of(value.x, a), rest_of(value.y, b)),
                                         pack_bf16(rest_of(value.z, c), rest_of(value.w, d)));
    }
}

// The four elements from `at` on, zeros from `width` on; in one load where rows are laid out for it.
KVASIR_DEVICE float4 load4(const f32 *row, u32 at, u32 width, bool aligned) {
    if (aligned && at + 4 <= width) return *(const float4 *)(row + at);
    float4 v;
    v.x = at < width ? row[at] : 0.0f;
    v.y = at + 1 < width ? row[at + 1] : 0.0f;
    v.z = at + 2 < width ? row[at + 2] : 0.0f;
    v.w = at + 3 < width ? row[at + 3] : 0.0f;
    return v;
}

KVASIR_DEVICE void store4(f32 *row, u32 at, u32 width, bool aligned, float4 v) {
    if (aligned && at + 4 <= width) {
        *(float4 *)(row + at) = v;
        return;
    }
    if (at < width) row[at] = v.x;
    if (at + 1 < width) row[at + 1] = v.y;
    if (at + 2 < width) row[at + 2] = v.z;
    if (at + 3 < width) row[at + 3] = v.w;
}

// Whether rows `ld` elements apart can be read sixteen bytes at a time.
KVASIR_DEVICE bool rows_aligned(const void *base, u32 ld) { return ld % 4 == 0 && (u64)base % 16 == 0; }

KVASIR_DEVICE f32 add_squares(f32 sum, float4 v) {
    return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, sum))));
}
