// Attention on tensor cores, for keys and values as wide as each other.
//
// A block of four warps takes rows (tokens × query heads) that share a KV head: 16 of a few tokens, whose four warps share the
// keys for the scores and the columns for the sums; or 64 (32 of the widest heads) of a prompt, 16 a warp. Which warp computes
// an element is all that differs: each score is one chain of mmas over columns, each sum one over the keys of a tile, so both
// give the same bits.
//
// Keys and values of a tile come into shared memory while others are computed with. Queries and weights are two terms of the
// cache's type (exact) or one (fast); e4m3 is widened to f16, in which each of its values is exact.
#include "attention.cuh"

#define ATTEND_WARPS (KVASIR_ATTEND_THREADS / 32)
#define TILES_A_PART (KVASIR_PART / KVASIR_TILE)

// What a cached type is multiplied as.
template <typename T> struct Operand {
    static constexpr bool is_bf16 = false;
};
template <> struct Operand<bf16> {
    static constexpr bool is_bf16 = true;
};

template <bool is_bf16> KVASIR_DEVICE void multiply(f32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if (is_bf16) {
        mma_bf16(sum, a, b);
    } else {
        mma_f16(sum, a, b);
    }
}

// Two numbers as `terms` words of two operands each: what the first leaves is the second's. f16 saturates.
template <bool is_bf16, u32 terms> KVASIR_DEVICE void operands(f32 low, f32 high, u32 (&out)[terms]) {
#pragma unroll
    for (u32 term = 0; term < terms; term++) {
        if (is_bf16) {
            out[term] = pack_bf16(low, high);
            low -= low_bf16(out[term]), high -= high_bf16(out[term]);
        } else {
            out[term] = pack_f16(low > 65504.0f ? 65504.0f : low < -65504.0f ? -65504.0f : low,
                                 high > 65504.0f ? 65504.0f : high < -65504.0f ? -65504.0f : high);
            low -= low_f16(out[term]), high -= high_f16(out[term]);
        }
    }
}

// Where a piece of 16 bytes of a row of `dim` operands lies in shared memory: as eight lanes read it that take four pieces of
// two rows (keys and queries) ...
template <u32 dim> KVASIR_DEVICE u32 key_piece(u32 row, u32 piece) {
    return row * dim * 2 + 16 * (dim % 64 == 0 ? piece ^ (row % 2 * 4) : piece);
}
// ... or one piece of eight rows (values).
template <u32 dim> KVASIR_DEVICE u32 value_piece(u32 row, u32 piece) {
    return row * dim * 2 + 16 * (dim % 64 == 0 ? piece ^ row % 8 : piece ^ row / 2 % 4);
}

// The parts of shared memory, as KVASIR_ATTEND_SHARED counts them.
template <typename T, u32 dim, bool exact, u32 rows, u32 stages, bool totals> struct Layout {
    static constexpr u32 terms = exact ? 2 : 1, widened = sizeof(T) == 1 ? 2 : 0;
    static constexpr u32 tile_bytes = KVASIR_TILE * dim * sizeof(T), wide_bytes = KVASIR_TILE * dim * widened;
    static constexpr u32 keys = 0, values = stages * tile_bytes;
    static constexpr u32 wide_keys = 2 * stages * tile_bytes, wide_values = wide_keys + wide_bytes;
    static constexpr u32 queries = wide_values + wide_bytes, query_bytes = rows * dim * 2;
    static constexpr u32 weights = queries + terms * query_bytes;
    static constexpr u32 weight_row = (KVASIR_TILE + 8) * 2, weight_bytes = rows * weight_row;
    static constexpr u32 totals_at = weights + terms * weight_bytes;
    static constexpr u32 maxima = totals_at + (totals ? rows * dim * 4 : 0);
    static constexpr u32 places = maxima + 4 * rows * 4;
    static_assert(places + 2 * KVASIR_PART * 8 == KVASIR_ATTEND_SHARED(dim, sizeof(T), terms, rows, stages, totals),
                  "as the host asks for it");
};

// `row_warps` warps lie side by side over rows, 16 each; the others of the block over keys and columns.
template <typename T, u32 dim, bool exact, u32 row_warps, u32 stages, bool prompt> KVASIR_DEVICE void attend(const attend_args &args) {
    constexpr u32 rows_at_most = 16 * row_warps, across = ATTEND_WARPS / row_warps, terms = exact ? 2 : 1;
    constexpr u32 key_tiles = KVASIR_TILE / 8 / across, column_tiles = dim / 8 / across;
    constexpr bool is_bf16 = Operand<T>::is_bf16, widened = sizeof(T) == 1;
    constexpr u32 pieces = dim * sizeof(T) / 16; // of a row in the cache
    typedef Layout<T, dim, exact, rows_at_most, stages, prompt> At;
    KVASIR_DYNAMIC_SHARED(shared);

    kvasir_unit unit = args.units[blockIdx.x];
    if (unit.tokens == 0) return;
    u32 kv_head = blockIdx.y, rows = unit.tokens * unit.heads;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 warp_row = warp / across * 16, side = warp % across;

    u32 begin = first_seen(unit.position, args.window), end = unit.position + unit.tokens;
    u32 first_tile = begin / KVASIR_TILE, last_tile = (end - 1) / KVASIR_TILE;
    if (!prompt) {
        u32 part = begin / KVASIR_PART + blockIdx.z;
        if (part > (end - 1) / KVASIR_PART) return;
        first_tile = max(first_tile, part * TILES_A_PART);
        last_tile = min(last_tile, part * TILES_A_PART + TILES_A_PART - 1);
    }
    u32 tiles = last_tile - first_tile + 1;

    // Where the rows of a part lie in the arena; not at all where nobody sees them: blocks there may be gone.
    u64 *places = (u64 *)(shared + At::places);
    auto find = [&](u32 part) {
        for (u32 i = threadIdx.x; i < KVASIR_PART; i += KVASIR_ATTEND_THREADS) {
            u32 position = part * KVASIR_PART + i;
            u64 at = KVASIR_NO_SLOT;
            if (position >= begin && position < end) {
                u32 block = args.tables[unit.table + position / args.kv.block_size];
                at = key_at(args.kv, block, position % args.kv.block_size, kv_head) - args.kv.arena;
            }
            places[part % 2 * KVASIR_PART + i] = at;
        }
    };
    u64 to_values = args.kv.values - args.kv.keys; // keys and values have rows of one size
    auto load = [&](u32 tile, bool values) {
        u8 *to = shared + (values ? At::values : At::keys) + (tile - first_tile) % stages * At::tile_bytes;
        const u64 *place = places + tile * KVASIR_TILE % (2 * KVASIR_PART);
        const u8 *from = args.kv.arena + (values ? to_values : 0);
#pragma unroll 4
        for (u32 i = threadIdx.x; i < KVASIR_TILE * pieces; i += KVASIR_ATTEND_THREADS) {
            u32 row = i / pieces, piece = i % pieces;
            u64 at = place[row];
            bool there = at != KVASIR_NO_SLOT;
            u32 where = widened ? 16 * i : values ? value_piece<dim>(row, piece) : key_piece<dim>(row, piece);
            cp_async16_if(to + where, there ? from + at + 16 * piece : args.kv.arena, there);
        }
    };
    // A tile of e4m3 to f16.
    auto raise = [&](u32 tile, bool values) {
        const u8 *from = shared + (values ? At::values : At::keys) + (tile - first_tile) % stages * At::tile_bytes;
        u8 *to = shared + (values ? At::wide_values : At::wide_keys);
#pragma unroll 2
        for (u32 i = threadIdx.x; i < KVASIR_TILE * pieces; i += KVASIR_ATTEND_THREADS) {
            u32 row = i / pieces, piece = i % pieces * 2;
            uint4 v = load16(from + 16 * i), low, high;
            e4m3x4_to_f16(v.x, low.x, low.y);
            e4m3x4_to_f16(v.y, low.z, low.w);
            e4m3x4_to_f16(v.z, high.x, high.y);
            e4m3x4_to_f16(v.w, high.z, high.w);
            store16(to + (values ? value_piece<dim>(row, piece) : key_piece<dim>(row, piece)), low);
            store16(to + (values ? value_piece<dim>(row, piece + 1) : key_piece<dim>(row, piece + 1)), high);
        }
    };

    u32 first_part = first_tile / TILES_A_PART;
    find(first_part);
    if (prompt) find(first_part + 1);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < rows_at_most * dim / 8; i += KVASIR_ATTEND_THREADS) {
        u32 row = i / (dim / 8), piece = i % (dim / 8);
        float4 low = make_float4(0.0f, 0.0f, 0.0f, 0.0f), high = low;
        if (row < rows) {
            const f32 *q = args.q + row_of_unit(args, unit, kv_head, row).place * dim + 8 * piece;
            low = *(const float4 *)q, high = *(const float4 *)(q + 4);
        }
        u32 words[4][terms];
        operands<is_bf16, terms>(low.x, low.y, words[0]);
        operands<is_bf16, terms>(low.z, low.w, words[1]);
        operands<is_bf16, terms>(high.x, high.y, words[2]);
        operands<is_bf16, terms>(high.z, high.w, words[3]);
#pragma unroll
        for (u32 term = 0; term < terms; term++) {
            store16(shared + At::queries + term * At::query_bytes + key_piece<dim>(row, piece),
                    make_uint4(words[0][term], words[1][term], words[2][term], words[3][term]));
        }
    }
    __syncthreads();
    // Keys and values take turns; the values of the last tile of these follow in the loop.
#pragma unroll 1
    for (u32 i = 0; i < stages; i++) {
        if (i < tiles) load(first_tile + i, false);
        cp_async_commit();
        if (i + 1 == stages) break;
        if (i < tiles) load(first_tile + i, true);
        cp_async_commit();
    }

    // This thread's two rows: g and g + 8 of its warp's.
    UnitRow mine[2];
    bool real[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 row = warp_row + g + 8 * half;
        real[half] = row < rows;
        mine[half] = row_of_unit(args, unit, kv_head, real[half] ? row : 0);
    }
    f32 sums[column_tiles][4], count[4], max[2];
    Running total[2] = {{LOWEST, 0.0f}, {LOWEST, 0.0f}};
    const u32 one = is_bf16 ? 0x3f803f80u : 0x3c003c00u;
    const u32 ones[2] = {one, one};
    f32 *maxima = (f32 *)(shared + At::maxima);

    for (u32 i = 0; i < tiles; i++) {
        u32 tile = first_tile + i, part = tile / TILES_A_PART;
        if (i == 0 || tile % TILES_A_PART == 0) {
#pragma unroll
            for (u32 c = 0; c < column_tiles; c++) {
#pragma unroll
                for (u32 j = 0; j < 4; j++) sums[c][j] = 0.0f;
            }
            count[0] = count[1] = count[2] = count[3] = 0.0f;
            max[0] = max[1] = LOWEST;
            // All loads of the part before are on their way: its places make room for those of the part after this one.
            if (prompt && i > 0) find(part + 1);
        }
        cp_async_wait<2 * stages - 2>();
        __syncthreads();
        if (i + stages - 1 < tiles) load(tile + stages - 1, true);
        cp_async_commit();
        const u8 *keys = shared + At::keys + i % stages * At::tile_bytes;
        const u8 *values = shared + At::values + i % stages * At::tile_bytes;
        if (widened) {
            raise(tile, false);
            __syncthreads();
            keys = shared + At::wide_keys, values = shared + At::wide_values;
        }

        f32 scores[key_tiles][4] = {};
#pragma unroll
        for (u32 step = 0; step < dim / 32; step++) {
            uint4 q[terms][2];
#pragma unroll
            for (u32 term = 0; term < terms; term++) {
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    q[term][half] = load16(shared + At::queries + term * At::query_bytes +
                                           key_piece<dim>(warp_row + g + 8 * half, 4 * step + t));
                }
            }
#pragma unroll
            for (u32 j = 0; j < key_tiles; j++) {
                uint4 k = load16(keys + key_piece<dim>((side * key_tiles + j) * 8 + g, 4 * step + t));
                const u32 low[2] = {k.x, k.y}, high[2] = {k.z, k.w};
#pragma unroll
                for (u32 term = 0; term < terms; term++) {
                    const u32 a[4] = {q[term][0].x, q[term][1].x, q[term][0].y, q[term][1].y};
                    multiply<is_bf16>(scores[j], a, low);
                }
#pragma unroll
                for (u32 term = 0; term < terms; term++) {
                    const u32 a[4] = {q[term][0].z, q[term][1].z, q[term][0].w, q[term][1].w};
                    multiply<is_bf16>(scores[j], a, high);
                }
            }
        }
        // What a row does not see has no weight.
        f32 largest[2] = {LOWEST, LOWEST};
#pragma unroll
        for (u32 j = 0; j < key_tiles; j++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                u32 half = c / 2, position = tile * KVASIR_TILE + (side * key_tiles + j) * 8 + 2 * t + c % 2;
                bool seen = real[half] && position >= mine[half].first && position <= mine[half].position;
                scores[j][c] = seen ? scored(scores[j][c], args.scale, args.soft_cap) : LOWEST;
                largest[half] = fmaxf(largest[half], scores[j][c]);
            }
        }
        largest[0] = quad_max(largest[0]), largest[1] = quad_max(largest[1]);
        if (across > 1 && t == 0) {
            maxima[side * rows_at_most + warp_row + g] = largest[0];
            maxima[side * rows_at_most + warp_row + g + 8] = largest[1];
        }
        __syncthreads(); // all are done with the keys
        if (i + stages < tiles) load(tile + stages, false);
        cp_async_commit();
        f32 base[2];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            if (across > 1) {
#pragma unroll
                for (u32 s = 0; s < across; s++) {
                    largest[half] = fmaxf(largest[half], maxima[s * rows_at_most + warp_row + g + 8 * half]);
                }
            }
            f32 before = max[half];
            max[half] = fmaxf(before, largest[half]);
            base[half] = max[half] == LOWEST ? 0.0f : max[half];
            f32 factor = before == LOWEST ? 0.0f : power<exact>(before - base[half]);
            count[2 * half] *= factor, count[2 * half + 1] *= factor;
#pragma unroll
            for (u32 c = 0; c < column_tiles; c++) sums[c][2 * half] *= factor, sums[c][2 * half + 1] *= factor;
        }
#pragma unroll
        for (u32 j = 0; j < key_tiles; j++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                f32 low = scores[j][2 * half], high = scores[j][2 * half + 1];
                low = low == LOWEST ? 0.0f : power<exact>(low - base[half]);
                high = high == LOWEST ? 0.0f : power<exact>(high - base[half]);
                u32 words[terms];
                operands<is_bf16, terms>(low, high, words);
                u32 at = (warp_row + g + 8 * half) * At::weight_row + ((side * key_tiles + j) * 8 + 2 * t) * 2;
#pragma unroll
                for (u32 term = 0; term < terms; term++) {
                    *(u32 *)(shared + At::weights + term * At::weight_bytes + at) = words[term];
                }
            }
        }
        cp_async_wait<2 * stages - 1>();
        __syncthreads();
        if (widened) {
            raise(tile, true);
            __syncthreads();
        }
#pragma unroll
        for (u32 pair = 0; pair < KVASIR_TILE / 32; pair++) {
            u32 weights[2][terms][4];
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
#pragma unroll
                for (u32 term = 0; term < terms; term++) {
                    const u8 *at = shared + At::weights + term * At::weight_bytes + (warp_row + g) * At::weight_row +
                                   (pair * 32 + half * 16 + 2 * t) * 2;
                    weights[half][term][0] = *(const u32 *)at;
                    weights[half][term][1] = *(const u32 *)(at + 8 * At::weight_row);
                    weights[half][term][2] = *(const u32 *)(at + 16);
                    weights[half][term][3] = *(const u32 *)(at + 8 * At::weight_row + 16);
                    multiply<is_bf16>(count, weights[half][term], ones);
                }
            }
#pragma unroll
            for (u32 c = 0; c < column_tiles; c++) {
                u32 v[4];
                ldmatrix_x4_trans(v, values + value_piece<dim>(pair * 32 + lane, side * column_tiles + c));
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    const u32 b[2] = {v[2 * half], v[2 * half + 1]};
#pragma unroll
                    for (u32 term = 0; term < terms; term++) multiply<is_bf16>(sums[c], weights[half][term], b);
                }
            }
        }
        if (i + 1 < tiles && tile % TILES_A_PART + 1 < TILES_A_PART) continue;

        // The end of a part.
        bool last = i + 1 == tiles;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            if (!real[half]) continue;
            Running running = {max[half], count[2 * half]};
            if (!prompt) {
                u64 at = partial_at(args, mine[half], part);
                if (at == KVASIR_NO_SLOT) continue;
#pragma unroll
                for (u32 c = 0; c < column_tiles; c++) {
                    u32 column = (side * column_tiles + c) * 8 + 2 * t;
                    *(float2 *)(args.partial_sums + at * dim + column) = make_float2(sums[c][2 * half], sums[c][2 * half + 1]);
                }
                if (side == 0 && t == 0) args.partial_max[2 * at] = running.max, args.partial_max[2 * at + 1] = running.sum;
                continue;
            }
            Merged by = merge<exact>(total[half], running);
            total[half] = by.running;
            u32 row = warp_row + g + 8 * half;
            if (last && side == 0 && t == 0) maxima[row] = by.running.sum;
#pragma unroll
            for (u32 c = 0; c < column_tiles; c++) {
                u32 column = (side * column_tiles + c) * 8 + 2 * t;
                float2 *so_far = (float2 *)(shared + At::totals_at + (row * dim + column) * 4);
                float2 value = by.mine == 0.0f ? make_float2(0.0f, 0.0f) : *so_far;
                *so_far = make_float2(merged(by, value.x, sums[c][2 * half]), merged(by, value.y, sums[c][2 * half + 1]));
            }
        }
    }
    cp_async_wait<0>();
    if (!prompt) return;
    __syncthreads();
    // A warp a row.
    for (u32 row = warp; row < rows; row += ATTEND_WARPS) {
        Place place = place_of_head(row_of_unit(args, unit, kv_head, row).place, args.heads, args.ld, args.head_ld);
        const f32 *from = (const f32 *)(shared + At::totals_at) + row * dim;
        for (u32 column = lane; column < place.width; column += 32) {
            put_planes(args.hi, args.lo, place.at + column, column < dim ? from[column] / maxima[row] : 0.0f);
        }
    }
}

#define ATTEND(name, T, dim, mode)                                                                                              \
    extern "C" __global__ void __launch_bounds__(KVASIR_ATTEND_THREADS)                                                         \
        attend_decode_##name##_##dim##_##mode(const attend_args args) {                                                         \
        attend<T, dim, mode##_mode, KVASIR_DECODE_ROWS / 16, KVASIR_DECODE_STAGES, false>(args);                                \
    }                                                                                                                           \
    KVASIR_EXPORT(attend_decode_##name##_##dim##_##mode, attend_args);                                                          \
    extern "C" __global__ void __launch_bounds__(KVASIR_ATTEND_THREADS)                                                         \
        attend_prompt_##name##_##dim##_##mode(const attend_args args) {                                                         \
        attend<T, dim, mode##_mode, KVASIR_PROMPT_ROWS(dim) / 16, 1, true>(args);                                               \
    }                                                                                                                           \
    KVASIR_EXPORT(attend_prompt_##name##_##dim##_##mode, attend_args);
#define ATTEND_TYPES(dim)                                                                                                       \
    ATTEND(f16, f16, dim, exact) ATTEND(f16, f16, dim, fast) ATTEND(bf16, bf16, dim, exact) ATTEND(bf16, bf16, dim, fast)       \
    ATTEND(e4m3, e4m3, dim, exact) ATTEND(e4m3, e4m3, dim, fast)
ATTEND_TYPES(32)
ATTEND_TYPES(64)
ATTEND_TYPES(128)
ATTEND_TYPES(256)
