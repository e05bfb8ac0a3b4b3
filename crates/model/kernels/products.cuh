// Products of stored weights with activations on tensor cores: fragments, their terms, and the one order of their sums.
//
// Weights are the left side of an mma (16 rows), activations the right one (8 tokens). Both sides of a step of 32 columns take
// their columns in the same permuted order, so that a thread's share of a row is one piece of memory: thread t of a quad holds
// eight neighbouring columns, the pairs 0 1 2 3 of which are
//
//     mma 0: depths 2t, 2t+1 = pair 0    depths 2t+8, 2t+9 = pair 1
//     mma 1: depths 2t, 2t+1 = pair 2    depths 2t+8, 2t+9 = pair 3
//
// A sum does not care which column is called which depth, and every kernel here calls them alike: that is what makes a row's
// bits the same in all of them.
//
// Activations are the sum of two bf16 terms (exact) or one (fast). Weights are the sum of as many bf16 terms as hold all their
// bits: one for bf16, e4m3 and i8, two for f16, three for f32 (two of those in fast). All products of terms are summed but
// those below the rounding of f32.
//
// Columns are cut in KVASIR_K_SLICES slices whose bounds depend on the width alone. A slice is one chain of mmas from zero;
// slices are added in ascending order.
//
// Where blocks of weights share a scale, a chain is in units of the scale of the block that it has come to: from one block to
// the next it is multiplied by the quotient of their scales, and at the end of the slice by the last one's.
#pragma once

#include "rows.cuh"

// Stored types, and how many bf16 terms hold one.
template <typename T> struct Stored;
template <> struct Stored<bf16> { static constexpr u32 bytes = 2, exact_terms = 1, fast_terms = 1; };
template <> struct Stored<f16> { static constexpr u32 bytes = 2, exact_terms = 2, fast_terms = 2; };
template <> struct Stored<f32> { static constexpr u32 bytes = 4, exact_terms = 3, fast_terms = 2; };
template <> struct Stored<e4m3> { static constexpr u32 bytes = 1, exact_terms = 1, fast_terms = 1; };
template <> struct Stored<i8> { static constexpr u32 bytes = 1, exact_terms = 1, fast_terms = 1; };

// Steps of 32 columns in a unit.
#define PRODUCT_STEPS (KVASIR_K_UNIT / 32)

// The first of the eight columns of a unit that thread `t` of a quad has in step `step`. Of types of one byte a thread's columns
// of both steps are neighbours, so that it can load all of them at once.
template <typename T> KVASIR_DEVICE u32 column_of(u32 step, u32 t) {
    return Stored<T>::bytes == 1 ? 16 * t + 8 * step : 32 * step + 8 * t;
}

// What a thread has of one row in one unit, as it is stored: 16 columns.
template <typename T> struct RawRow {
    static constexpr u32 loads = Stored<T>::bytes; // of sixteen bytes
    uint4 data[loads];
};

// Where load `i` of those begins, in bytes from the unit's first column.
template <typename T> KVASIR_DEVICE u32 raw_at(u32 i, u32 t) {
    if (Stored<T>::bytes == 1) return 16 * t;
    if (Stored<T>::bytes == 2) return 64 * i + 16 * t;
    return 128 * (i / 2) + 32 * t + 16 * (i % 2);
}

// Two f32 to `terms` words of two bf16 each: first terms, second terms and so on.
template <u32 terms> KVASIR_DEVICE void terms_of(f32 low, f32 high, u32 (&out)[terms]) {
#pragma unroll
    for (u32 term = 0; term < terms; term++) {
        out[term] = pack_bf16(low, high);
        low -= low_bf16(out[term]), high -= high_bf16(out[term]);
    }
}

// Eight columns of a row in step `step` as words of two columns: out[term][pair].
template <u32 terms> KVASIR_DEVICE void widen_step(const RawRow<bf16> &row, u32 step, u32 (&out)[terms][4]) {
    uint4 v = row.data[step];
    out[0][0] = v.x, out[0][1] = v.y, out[0][2] = v.z, out[0][3] = v.w;
}
template <u32 terms> KVASIR_DEVICE void widen_step(const RawRow<f16> &row, u32 step, u32 (&out)[terms][4]) {
    uint4 v = row.data[step];
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 pair = 0; pair < 4; pair++) {
        u32 both[terms];
        terms_of<terms>(low_f16(words[pair]), high_f16(words[pair]), both);
#pragma unroll
        for (u32 term = 0; term < terms; term++) out[term][pair] = both[term];
    }
}
template <u32 terms> KVASIR_DEVICE void widen_step(const RawRow<f32> &row, u32 step, u32 (&out)[terms][4]) {
    uint4 v = row.data[2 * step], w = row.data[2 * step + 1];
    u32 words[8] = {v.x, v.y, v.z, v.w, w.x, w.y, w.z, w.w};
#pragma unroll
    for (u32 pair = 0; pair < 4; pair++) {
        u32 both[terms];
        terms_of<terms>(float_of(words[2 * pair]), float_of(words[2 * pair + 1]), both);
#pragma unroll
        for (u32 term = 0; term < terms; term++) out[term][pair] = both[term];
    }
}
template <u32 terms> KVASIR_DEVICE void widen_step(const RawRow<e4m3> &row, u32 step, u32 (&out)[terms][4]) {
    e4m3x4_to_bf16(step == 0 ? row.data[0].x : row.data[0].z, out[0][0], out[0][1]);
    e4m3x4_to_bf16(step == 0 ? row.data[0].y : row.data[0].w, out[0][2], out[0][3]);
}
// Four signed bytes to two words of two bf16 each. A byte moved up by 128 in the last place of 2²³ is a number of its own.
KVASIR_DEVICE void i8x4_to_bf16(u32 word, u32 &low, u32 &high) {
    u32 moved = word ^ 0x80808080u;
    f32 value[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) value[i] = float_of(__byte_perm(moved, 0x4b000000u, 0x7540 + i)) - 8388736.0f;
    low = __byte_perm(bits_of(value[0]), bits_of(value[1]), 0x7632);
    high = __byte_perm(bits_of(value[2]), bits_of(value[3]), 0x7632);
}
template <u32 terms> KVASIR_DEVICE void widen_step(const RawRow<i8> &row, u32 step, u32 (&out)[terms][4]) {
    i8x4_to_bf16(step == 0 ? row.data[0].x : row.data[0].z, out[0][0], out[0][1]);
    i8x4_to_bf16(step == 0 ? row.data[0].y : row.data[0].w, out[0][2], out[0][3]);
}

// sum += weights · activations over a step of 32 columns: rows g and g+8 of the weights, x[plane] of a token.
template <u32 terms, u32 planes>
KVASIR_DEVICE void add_step(f32 (&sum)[4], const u32 (&top)[terms][4], const u32 (&bottom)[terms][4], const uint4 (&x)[planes]) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 term = 0; term < terms; term++) {
            const u32 a[4] = {top[term][2 * half], bottom[term][2 * half], top[term][2 * half + 1], bottom[term][2 * half + 1]};
#pragma unroll
            for (u32 plane = 0; plane < planes; plane++) {
                if (term + plane > 2) continue;
                const u32 b[2] = {half == 0 ? x[plane].x : x[plane].z, half == 0 ? x[plane].y : x[plane].w};
                mma_bf16(sum, a, b);
            }
        }
    }
}

// Slice `slice` of a row of `units` units begins here (and the one before ends).
KVASIR_DEVICE u32 slice_begin(u32 units, u32 slice) { return units * slice / KVASIR_K_SLICES; }

// Which rows go through which matrix, for one block of the grid.
struct Batch {
    const u8 *weights;
    const f32 *scale;   // of rows, or null
    const float2 *pairs; // of blocks, or null
    const u16 *x[2];
    f32 *out;
    u32 first, rows;
};

template <typename T> KVASIR_DEVICE Batch batch_of(const linear_args &args, u32 index) {
    Batch batch;
    u32 matrix = index;
    batch.first = 0, batch.rows = args.rows;
    u64 x_at = 0, out_at = 0;
    if (args.groups) {
        kvasir_group group = args.groups[index];
        matrix = group.matrix, batch.first = group.first, batch.rows = group.count;
    } else {
        x_at = index * args.x_stride, out_at = index * args.out_stride;
    }
    batch.weights = (const u8 *)args.w + matrix * args.w_stride * Stored<T>::bytes;
    const f32 *scale = args.scale ? args.scale + matrix * args.scale_stride : nullptr;
    bool blocks = Stored<T>::bytes == 1 && args.scale_blocks > 0;
    batch.scale = blocks ? nullptr : scale;
    batch.pairs = blocks ? (const float2 *)scale : nullptr;
    batch.x[0] = args.x_hi + x_at;
    batch.x[1] = args.x_lo + x_at;
    batch.out = args.out + out_at;
    return batch;
}

// The row of activations of row `i` of a batch.
KVASIR_DEVICE u64 row_of_x(const linear_args &args, const Batch &batch, u32 i) {
    u32 row = batch.first + i;
    return (u64)(args.x_rows ? args.x_rows[row] : row) * args.ld_x;
}

// Whether a block of columns ends with `unit`, and which one it is.
KVASIR_DEVICE bool ends_block(u32 unit) { return (unit + 1) % (KVASIR_SCALE_COLS / KVASIR_K_UNIT) == 0; }
KVASIR_DEVICE u32 block_of(u32 unit) { return unit / (KVASIR_SCALE_COLS / KVASIR_K_UNIT); }

// The pairs of the block of rows that begins with `row`.
KVASIR_DEVICE const float2 *pairs_of(const linear_args &args, const Batch &batch, u32 row) {
    return batch.pairs + (u64)(min(row, args.n - 1) / KVASIR_SCALE_ROWS) * args.scale_blocks;
}

// What is done to a finished sum.
KVASIR_DEVICE f32 finish(f32 sum, const f32 *scale, const f32 *bias, u32 n) {
    if (scale) sum *= scale[n];
    if (bias) sum += bias[n];
    return sum;
}

// `define(size, type, mode)` for types of weights.
#define FOR_BOTH_MODES(define, size, T) define(size, T, exact) define(size, T, fast)
