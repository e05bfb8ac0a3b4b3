// Linear maps of many tokens: bound by the tensor cores.
//
// A block takes 128 rows of weights and a tile of tokens; units of both pass through shared memory, some on their way while one
// is multiplied. Pieces of 16 bytes lie there so that the eight threads of a quarter warp find them in eight different banks.
// Where tokens are too few to fill the device, the slices of the columns go to blocks of their own, and `linear_sum` adds them.
#include "products.cuh"

#define WIDE_WARPS (KVASIR_WIDE_THREADS / 32)
// Sums of a token in shared memory, rows of weights side by side; the distance keeps a warp's banks apart.
#define OUT_ROW (KVASIR_WIDE_ROWS + 4)

// A unit of both sides in shared memory: rows of weights, then each plane's rows of activations.
template <typename T, u32 planes, u32 tokens> struct Stage {
    static constexpr u32 row_bytes = KVASIR_K_UNIT * Stored<T>::bytes, pieces = row_bytes / 16;
    static constexpr u32 weight_bytes = KVASIR_WIDE_ROWS * row_bytes;
    static constexpr u32 x_row_bytes = KVASIR_K_UNIT * 2, x_pieces = x_row_bytes / 16;
    static constexpr u32 bytes = weight_bytes + planes * tokens * x_row_bytes;
};

// Where a piece of a row is, counted from the first row.
template <typename T> KVASIR_DEVICE u32 weight_at(u32 row, u32 piece) {
    u32 swizzled = Stored<T>::bytes == 1 ? piece : Stored<T>::bytes == 2 ? piece ^ (row % 2 * 4) : piece ^ row % 2;
    return row * (KVASIR_K_UNIT * Stored<T>::bytes) + 16 * swizzled;
}
template <typename T> KVASIR_DEVICE u32 x_at(u32 token, u32 piece) {
    u32 swizzled = Stored<T>::bytes == 1 ? piece ^ token % 2 : piece ^ (token % 2 * 4);
    return token * (KVASIR_K_UNIT * 2) + 16 * swizzled;
}

template <typename T, bool exact, u32 tokens> KVASIR_DEVICE void linear_wide(const linear_args &args) {
    constexpr u32 terms = exact ? Stored<T>::exact_terms : Stored<T>::fast_terms, planes = exact ? 2 : 1;
    constexpr u32 stages = KVASIR_WIDE_STAGES(Stored<T>::bytes);
    // Warps lie side by side over tokens, 32 each, and then over rows.
    constexpr u32 across = tokens / 32, row_tiles = KVASIR_WIDE_ROWS / (WIDE_WARPS / across) / 16, token_tiles = 4;
    typedef Stage<T, planes, tokens> Unit;
    static_assert(stages * Unit::bytes == KVASIR_WIDE_SHARED(Stored<T>::bytes, planes, tokens), "as the host asks for it");
    KVASIR_DYNAMIC_SHARED(shared);

    Batch batch = batch_of<T>(args, blockIdx.z / args.splits);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 warp_row = warp / across * row_tiles * 16, warp_token = warp % across * 32;
    u32 first_row = blockIdx.y * KVASIR_WIDE_ROWS, units = args.k / KVASIR_K_UNIT;
    u32 split = blockIdx.z % args.splits, slices = KVASIR_K_SLICES / args.splits;
    u32 first_slice = split * slices, first_unit = slice_begin(units, first_slice);
    u32 end_unit = slice_begin(units, first_slice + slices);
    u64 row_bytes = (u64)args.ld_w * Stored<T>::bytes;

    for (u32 first = blockIdx.x * tokens; first < batch.rows; first += gridDim.x * tokens) {
        // This thread copies the same piece of every so manieth row: of weights, and of activations, which may lie anywhere.
        constexpr u32 pieces = Unit::pieces, row_step = KVASIR_WIDE_THREADS / pieces;
        constexpr u32 x_pieces = Unit::x_pieces, token_step = KVASIR_WIDE_THREADS / x_pieces, copies = tokens / token_step;
        u32 row = threadIdx.x / pieces, piece = threadIdx.x % pieces;
        u32 token = threadIdx.x / x_pieces, x_piece = threadIdx.x % x_pieces;
        const u8 *weights_from = batch.weights + (first_row + row) * row_bytes + 16 * piece;
        u32 x_from[copies]; // in sixteen bytes
#pragma unroll
        for (u32 i = 0; i < copies; i++) {
            u32 index = first + token + i * token_step;
            x_from[i] = (u32)(index < batch.rows ? row_of_x(args, batch, index) / 8 : 0) + x_piece;
        }
        auto load = [&](u32 unit) {
            u8 *to = shared + (unit - first_unit) % stages * Unit::bytes;
            const u8 *from = weights_from + (u64)unit * Unit::row_bytes;
#pragma unroll
            for (u32 i = 0; i < KVASIR_WIDE_ROWS / row_step; i++) {
                cp_async16_if(to + weight_at<T>(row + i * row_step, piece), from + i * row_step * row_bytes,
                              first_row + row + i * row_step < args.n);
            }
#pragma unroll
            for (u32 i = 0; i < copies; i++) {
                bool there = first + token + i * token_step < batch.rows;
#pragma unroll
                for (u32 plane = 0; plane < planes; plane++) {
                    cp_async16_if(to + Unit::weight_bytes + plane * tokens * Unit::x_row_bytes + x_at<T>(token + i * token_step, x_piece),
                                  (const uint4 *)batch.x[plane] + (x_from[i] + unit * (KVASIR_K_UNIT / 8)), there);
                }
            }
        };
        for (u32 i = 0; i + 1 < stages; i++) {
            if (first_unit + i < end_unit) load(first_unit + i);
            cp_async_commit();
        }
        f32 total[row_tiles][token_tiles][4];
        u32 unit = first_unit;
        for (u32 slice = first_slice; slice < first_slice + slices; slice++) {
            f32 chain[row_tiles][token_tiles][4] = {};
            for (u32 end = slice_begin(units, slice + 1); unit < end; unit++) {
                cp_async_wait<stages - 2>();
                __syncthreads();
                if (unit + stages - 1 < end_unit) load(unit + stages - 1);
                cp_async_commit();
                const u8 *at = shared + (unit - first_unit) % stages * Unit::bytes;
#pragma unroll
                for (u32 step = 0; step < PRODUCT_STEPS; step++) {
                    uint4 x[token_tiles][planes];
#pragma unroll
                    for (u32 tile = 0; tile < token_tiles; tile++) {
#pragma unroll
                        for (u32 plane = 0; plane < planes; plane++) {
                            u32 token = warp_token + 8 * tile + g;
                            x[tile][plane] = load16(at + Unit::weight_bytes + plane * tokens * Unit::x_row_bytes +
                                                    x_at<T>(token, column_of<T>(step, t) / 8));
                        }
                    }
#pragma unroll
                    for (u32 r = 0; r < row_tiles; r++) {
                        u32 halves[2][terms][4];
#pragma unroll
                        for (u32 half = 0; half < 2; half++) {
                            RawRow<T> raw;
#pragma unroll
                            for (u32 i = 0; i < RawRow<T>::loads; i++) {
                                // Only this step's loads are used; the compiler leaves out the others.
                                raw.data[i] = load16(at + weight_at<T>(warp_row + 16 * r + 8 * half + g, raw_at<T>(i, t) / 16));
                            }
                            widen_step<terms>(raw, step, halves[half]);
                        }
#pragma unroll
                        for (u32 tile = 0; tile < token_tiles; tile++) {
                            add_step<terms, planes>(chain[r][tile], halves[0], halves[1], x[tile]);
                        }
                    }
                }
                if (Stored<T>::bytes == 1 && batch.pairs && (unit + 1 == end || ends_block(unit))) {
#pragma unroll
                    for (u32 r = 0; r < row_tiles; r++) {
                        float2 pair = pairs_of(args, batch, first_row + warp_row + 16 * r)[block_of(unit)];
                        f32 factor = unit + 1 == end ? pair.x : pair.y;
#pragma unroll
                        for (u32 tile = 0; tile < token_tiles; tile++) {
#pragma unroll
                            for (u32 j = 0; j < 4; j++) chain[r][tile][j] *= factor;
                        }
                    }
                }
            }
#pragma unroll
            for (u32 r = 0; r < row_tiles; r++) {
#pragma unroll
                for (u32 tile = 0; tile < token_tiles; tile++) {
#pragma unroll
                    for (u32 j = 0; j < 4; j++) {
                        total[r][tile][j] = slice == first_slice ? chain[r][tile][j] : total[r][tile][j] + chain[r][tile][j];
                    }
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        // By way of shared memory, token by token, so that neighbours in memory are written together.
        static_assert(tokens * OUT_ROW * 4 <= stages * Unit::bytes, "there is room");
        f32 *staged = (f32 *)shared;
#pragma unroll
        for (u32 r = 0; r < row_tiles; r++) {
#pragma unroll
            for (u32 tile = 0; tile < token_tiles; tile++) {
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    u32 index = warp_token + 8 * tile + 2 * t + j % 2;
                    staged[index * OUT_ROW + warp_row + 16 * r + g + 8 * (j / 2)] = total[r][tile][j];
                }
            }
        }
        __syncthreads();
        u32 n = first_row + threadIdx.x % KVASIR_WIDE_ROWS;
        for (u32 i = threadIdx.x / KVASIR_WIDE_ROWS; i < tokens; i += KVASIR_WIDE_THREADS / KVASIR_WIDE_ROWS) {
            u32 index = first + i;
            if (index >= batch.rows || n >= args.n) break;
            f32 sum = staged[i * OUT_ROW + n - first_row];
            if (args.splits > 1) {
                args.partials[((u64)first_slice * args.rows + index) * args.n + n] = sum;
            } else {
                batch.out[(u64)(batch.first + index) * args.ld_out + n] = finish(sum, batch.scale, args.bias, n);
            }
        }
        __syncthreads();
    }
}

#define WIDE(tokens, T, mode)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(KVASIR_WIDE_THREADS, tokens == 64 ? 2 : 1)                                     \
        linear_wide##tokens##_##T##_##mode(const linear_args args) {                                                            \
        linear_wide<T, mode##_mode, tokens>(args);                                                                              \
    }                                                                                                                           \
    KVASIR_EXPORT(linear_wide##tokens##_##T##_##mode, linear_args);

FOR_BOTH_MODES(WIDE, 64, bf16)
FOR_BOTH_MODES(WIDE, 64, f16)
FOR_BOTH_MODES(WIDE, 64, f32)
FOR_BOTH_MODES(WIDE, 64, e4m3)
FOR_BOTH_MODES(WIDE, 64, i8)
FOR_BOTH_MODES(WIDE, 128, bf16)
FOR_BOTH_MODES(WIDE, 128, f16)
FOR_BOTH_MODES(WIDE, 128, e4m3)
FOR_BOTH_MODES(WIDE, 128, i8)

// Adds the slices that blocks of their own left.
extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) linear_sum(const linear_args args) {
    u32 n = blockIdx.x * KVASIR_ROW_THREADS + threadIdx.x, row = blockIdx.y;
    if (n >= args.n) return;
    f32 total = args.partials[(u64)row * args.n + n];
    for (u32 slice = 1; slice < KVASIR_K_SLICES; slice++) total += args.partials[((u64)slice * args.rows + row) * args.n + n];
    args.out[(u64)row * args.ld_out + n] = finish(total, args.scale_blocks ? nullptr : args.scale, args.bias, n);
}
KVASIR_EXPORT(linear_sum, linear_args);
