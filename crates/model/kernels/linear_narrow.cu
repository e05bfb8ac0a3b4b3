// Linear maps of a few tokens: bound by reading the weights.
//
// A block takes 16 rows of weights, each of its warps one slice of the columns, so every weight is read once, by the thread
// that multiplies it, in pieces of 16 bytes of which several units are on their way at any time. The slices meet in shared
// memory. Activations are so few that they come out of the caches.
#include "products.cuh"

// Units of which loads are under way: up to 64 registers.
template <typename T> struct Ahead { static constexpr u32 units = Stored<T>::bytes == 4 ? 2 : 4; };

template <typename T, bool exact, u32 tiles> KVASIR_DEVICE void linear_narrow(const linear_args &args) {
    constexpr u32 terms = exact ? Stored<T>::exact_terms : Stored<T>::fast_terms, planes = exact ? 2 : 1;
    constexpr u32 ahead = Ahead<T>::units, tokens = 8 * tiles;
    KVASIR_SHARED(f32[KVASIR_K_SLICES * KVASIR_NARROW_ROWS * 8 * tiles], sums);

    Batch batch = batch_of<T>(args, blockIdx.z);
    u32 lane = threadIdx.x % 32, slice = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 first_row = blockIdx.x * KVASIR_NARROW_ROWS, units = args.k / KVASIR_K_UNIT;
    u32 begin = slice_begin(units, slice), end = slice_begin(units, slice + 1);

    // Rows beyond the last are the last one again; what comes of them is not written.
    u64 unit_bytes = KVASIR_K_UNIT * Stored<T>::bytes, row_bytes = (u64)args.ld_w * Stored<T>::bytes;
    const u8 *top = batch.weights + min(first_row + g, args.n - 1) * row_bytes;
    const u8 *bottom = batch.weights + min(first_row + g + 8, args.n - 1) * row_bytes;

    for (u32 first = blockIdx.y * tokens; first < batch.rows; first += gridDim.y * tokens) {
        RawRow<T> raw[ahead][2];
        auto load = [&](RawRow<T>(&to)[2], u32 unit) {
#pragma unroll
            for (u32 i = 0; i < RawRow<T>::loads; i++) {
                to[0].data[i] = load16_stream(top + unit * unit_bytes + raw_at<T>(i, t));
                to[1].data[i] = load16_stream(bottom + unit * unit_bytes + raw_at<T>(i, t));
            }
        };
#pragma unroll
        for (u32 i = 0; i < ahead; i++) {
            if (begin + i < end) load(raw[i], begin + i);
        }
        u64 x_at[tiles];
        bool there[tiles];
#pragma unroll
        for (u32 tile = 0; tile < tiles; tile++) {
            u32 token = first + 8 * tile + g;
            there[tile] = token < batch.rows;
            x_at[tile] = there[tile] ? row_of_x(args, batch, token) : 0;
        }
        f32 chain[tiles][4] = {};
        for (u32 group = begin; group < end; group += ahead) {
#pragma unroll
            for (u32 i = 0; i < ahead; i++) {
                u32 unit = group + i;
                if (unit >= end) break;
#pragma unroll
                for (u32 step = 0; step < PRODUCT_STEPS; step++) {
                    u32 above[terms][4], below[terms][4];
                    widen_step<terms>(raw[i][0], step, above);
                    widen_step<terms>(raw[i][1], step, below);
#pragma unroll
                    for (u32 tile = 0; tile < tiles; tile++) {
                        uint4 x[planes];
#pragma unroll
                        for (u32 plane = 0; plane < planes; plane++) {
                            const u16 *from = batch.x[plane] + x_at[tile] + unit * KVASIR_K_UNIT + column_of<T>(step, t);
                            x[plane] = there[tile] ? load16(from) : make_uint4(0, 0, 0, 0);
                        }
                        add_step<terms, planes>(chain[tile], above, below, x);
                    }
                }
                if (unit + ahead < end) load(raw[i], unit + ahead);
                if (Stored<T>::bytes == 1 && batch.pairs && (unit + 1 == end || ends_block(unit))) {
                    float2 pair = pairs_of(args, batch, first_row)[block_of(unit)];
                    f32 factor = unit + 1 == end ? pair.x : pair.y;
#pragma unroll
                    for (u32 tile = 0; tile < tiles; tile++) {
#pragma unroll
                        for (u32 j = 0; j < 4; j++) chain[tile][j] *= factor;
                    }
                }
            }
        }
        // sums[slice][token][row]
#pragma unroll
        for (u32 tile = 0; tile < tiles; tile++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 token = 8 * tile + 2 * t + j % 2, row = g + 8 * (j / 2);
                sums[(slice * tokens + token) * KVASIR_NARROW_ROWS + row] = chain[tile][j];
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < tokens * KVASIR_NARROW_ROWS; i += KVASIR_NARROW_THREADS) {
            u32 token = first + i / KVASIR_NARROW_ROWS, n = first_row + i % KVASIR_NARROW_ROWS;
            if (token >= batch.rows || n >= args.n) continue;
            f32 total = sums[i];
#pragma unroll
            for (u32 s = 1; s < KVASIR_K_SLICES; s++) total += sums[s * tokens * KVASIR_NARROW_ROWS + i];
            batch.out[(u64)(batch.first + token) * args.ld_out + n] = finish(total, batch.scale, args.bias, n);
        }
        __syncthreads();
    }
}

#define NARROW(tokens, T, mode)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(KVASIR_NARROW_THREADS, 2)                                                      \
        linear_narrow##tokens##_##T##_##mode(const linear_args args) {                                                          \
        linear_narrow<T, mode##_mode, tokens / 8>(args);                                                                        \
    }                                                                                                                           \
    KVASIR_EXPORT(linear_narrow##tokens##_##T##_##mode, linear_args);

FOR_BOTH_MODES(NARROW, 8, bf16)
FOR_BOTH_MODES(NARROW, 8, f16)
FOR_BOTH_MODES(NARROW, 8, f32)
FOR_BOTH_MODES(NARROW, 8, e4m3)
FOR_BOTH_MODES(NARROW, 8, i8)
