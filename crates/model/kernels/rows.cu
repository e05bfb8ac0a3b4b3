// The steps between products that work row by row: embedding, norms, activations, rounding.
//
// A block takes a row (or a piece of one), so nothing of a row's result depends on its neighbours. Sums have one order: a
// thread's own elements ascending, then a butterfly over its warp, then the warps in order.
#include "rows.cuh"

KVASIR_TABLE(u32, kvasir_abi_sizes, KVASIR_ABI_STRUCTS) = KVASIR_ABI_SIZES;
KVASIR_EXPORT_TABLE(kvasir_abi_sizes);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) embed(const embed_args args) {
    u32 row = blockIdx.x, token = args.tokens[row];
    f32 *x = args.x + (u64)row * args.width;
    f32 row_scale = args.row_scale ? args.row_scale[token] : 1.0f;
    for (u32 i = threadIdx.x; i < args.width; i += KVASIR_ROW_THREADS) {
        x[i] = stored(args.weight, args.dtype, (u64)token * args.ld + i) * row_scale * args.scale;
    }
}
KVASIR_EXPORT(embed, embed_args);

// Columns of one step of a block, and how many steps of a row stay in registers from the sum to the product.
#define NORM_STEP (4 * KVASIR_ROW_THREADS)
#define NORM_KEPT 4

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) rms_norm(const rms_norm_args args) {
    KVASIR_SHARED(f32[KVASIR_ROW_THREADS / 32], of_change);
    KVASIR_SHARED(f32[KVASIR_ROW_THREADS / 32], of_row);
    u32 row = blockIdx.x, width = args.width, first = 4 * threadIdx.x;
    f32 *x = args.x + (u64)row * args.ld_x;
    const f32 *change = args.change ? args.change + (u64)row * args.ld_change : nullptr;
    bool x_aligned = rows_aligned(args.x, args.ld_x), change_aligned = rows_aligned(args.change, args.ld_change);

    f32 change_scale = 1.0f;
    if (change && args.post_weight) {
        f32 sum = 0.0f;
        for (u32 i = first; i < width; i += NORM_STEP) sum = add_squares(sum, load4(change, i, width, change_aligned));
        change_scale = 1.0f / sqrtf(block_sum(sum, of_change) / (f32)width + args.post_eps);
    }
    float4 kept[NORM_KEPT];
    f32 sum = 0.0f;
    auto take = [&](u32 i) {
        float4 v = load4(x, i, width, x_aligned);
        if (change) {
            float4 c = load4(change, i, width, change_aligned);
            if (args.post_weight) {
                float4 w = load4(args.post_weight, i, width, true);
                c = make_float4(c.x * change_scale * w.x, c.y * change_scale * w.y, c.z * change_scale * w.z,
                                c.w * change_scale * w.w);
            }
            v = make_float4(v.x + c.x, v.y + c.y, v.z + c.z, v.w + c.w);
            store4(x, i, width, x_aligned, v);
        }
        sum = add_squares(sum, v);
        return v;
    };
#pragma unroll
    for (u32 step = 0; step < NORM_KEPT; step++) {
        u32 i = first + step * NORM_STEP;
        if (i < width) kept[step] = take(i);
    }
    for (u32 i = first + NORM_KEPT * NORM_STEP; i < width; i += NORM_STEP) take(i);
    if (!args.weight) return;

    f32 scale = 1.0f / sqrtf(block_sum(sum, of_row) / (f32)width + args.eps);
    u64 to = (u64)row * args.ld;
    auto give = [&](u32 i, float4 v) {
        float4 w = load4(args.weight, i, width, true);
        v = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
        put_planes4(args.hi, args.lo, to + i, v);
    };
#pragma unroll
    for (u32 step = 0; step < NORM_KEPT; step++) {
        u32 i = first + step * NORM_STEP;
        if (i < width) give(i, kept[step]);
    }
    // What this thread wrote above it may read again.
    for (u32 i = first + NORM_KEPT * NORM_STEP; i < width; i += NORM_STEP) give(i, load4(x, i, width, x_aligned));
    for (u32 i = (width + 3) / 4 * 4 + first; i < args.ld; i += NORM_STEP) {
        put_planes4(args.hi, args.lo, to + i, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
}
KVASIR_EXPORT(rms_norm, rms_norm_args);

template <bool exact> KVASIR_DEVICE void gate_row(const gate_args &args) {
    u32 row = blockIdx.x, i = blockIdx.y * KVASIR_ROW_THREADS + threadIdx.x;
    if (i >= args.ld) return;
    f32 value = 0.0f;
    if (i < args.width) {
        const f32 *src = args.src + (u64)row * args.ld_src;
        f32 x = src[i], up = src[args.width + i];
        // x/2 · (1 + tanh z) = x · sigmoid(2 z) with z = √(2/π) · (x + 0.044715 x³)
        f32 z = args.activation == KVASIR_SILU ? x : 1.595769f * (x + 0.044715f * x * x * x);
        value = exact ? x / (1.0f + expf(-z)) * up : fast_divide(x, 1.0f + fast_exp(-z)) * up;
    }
    put_planes(args.hi, args.lo, (u64)row * args.ld + i, value);
}
extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) gate_exact(const gate_args args) { gate_row<true>(args); }
KVASIR_EXPORT(gate_exact, gate_args);
extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) gate_fast(const gate_args args) { gate_row<false>(args); }
KVASIR_EXPORT(gate_fast, gate_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) split(const split_args args) {
    u32 row = blockIdx.x, i = blockIdx.y * KVASIR_ROW_THREADS + threadIdx.x;
    if (i >= args.ld) return;
    f32 value = i < args.width ? args.src[(u64)row * args.ld_src + i] : 0.0f;
    put_planes(args.hi, args.lo, (u64)row * args.ld + i, value);
}
KVASIR_EXPORT(split, split_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) soft_cap(const soft_cap_args args) {
    u64 i = (u64)blockIdx.x * KVASIR_ROW_THREADS + threadIdx.x;
    if (i < args.count) args.y[i] = args.cap * tanhf(args.y[i] / args.cap);
}
KVASIR_EXPORT(soft_cap, soft_cap_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) gather_rows(const gather_rows_args args) {
    const u8 *from = (const u8 *)args.from + args.row_of[blockIdx.x] * args.from_stride;
    u8 *to = (u8 *)args.to + blockIdx.x * args.to_stride;
    if (((u64)from | (u64)to | args.bytes) % 16 == 0) {
        for (u64 i = threadIdx.x; i < args.bytes / 16; i += KVASIR_ROW_THREADS) store16(to + 16 * i, load16(from + 16 * i));
    } else {
        for (u64 i = threadIdx.x; i < args.bytes / 4; i += KVASIR_ROW_THREADS) ((u32 *)to)[i] = ((const u32 *)from)[i];
    }
}
KVASIR_EXPORT(gather_rows, gather_rows_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) scale_bias(const scale_bias_args args) {
    u32 i = blockIdx.y * KVASIR_ROW_THREADS + threadIdx.x;
    if (i >= args.width) return;
    f32 *y = args.y + (u64)blockIdx.x * args.ld + i;
    f32 value = *y;
    if (args.scale) value *= args.scale[i];
    if (args.bias) value += args.bias[i];
    *y = value;
}
KVASIR_EXPORT(scale_bias, scale_bias_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) widen(const widen_args args) {
    u32 row = blockIdx.x, i = blockIdx.y * KVASIR_ROW_THREADS + threadIdx.x;
    if (i >= args.ld) return;
    u64 at = (u64)row * args.ld + i;
    f32 value = stored(args.from, args.dtype, at);
    if (args.scale) value *= args.scale[row];
    args.to[at] = args.to_f16 ? to_f16(value).bits : to_bf16(value).bits;
}
KVASIR_EXPORT(widen, widen_args);
