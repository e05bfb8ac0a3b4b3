// Attention for every shape and type, without tensor cores; and the merge of parts, for all kernels.
//
// A block takes up to KVASIR_ANY_ROWS rows (tokens × query heads) that share a KV head, so a key or value that was read serves
// all of them. Warps take keys for the scores, threads take columns for the sums of values.
#include "attention.cuh"

#define ANY_WARPS (KVASIR_ANY_THREADS / 32)
// Widest key and value: a thread's columns.
#define ANY_WIDEST 1024

// Rows whose sums of a column are added up at a time: a value is read once for all of them.
#define ANY_SIDE_BY_SIDE 4

// What rows tell each other, behind queries, scores, sums and totals.
struct AnyRow {
    f32 max, sum, factor, total_max, total_sum, unused[3];
};

template <typename T> KVASIR_DEVICE void attend_any(const attend_args &args) {
    constexpr u32 rows_at_most = KVASIR_ANY_ROWS, key_columns = ANY_WIDEST / 32;
    KVASIR_DYNAMIC_SHARED(shared);
    kvasir_unit unit = args.units[blockIdx.x];
    if (unit.tokens == 0) return;
    u32 kv_head = blockIdx.y, rows = unit.tokens * unit.heads, k_dim = args.kv.k_dim, v_dim = args.v_dim;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Of sums and totals a thread touches its own columns only.
    f32 *q = (f32 *)shared, *scores = q + rows_at_most * k_dim, *sums = scores + rows_at_most * KVASIR_TILE;
    f32 *totals = sums + rows_at_most * v_dim;
    AnyRow *running = (AnyRow *)(totals + rows_at_most * v_dim);

    u32 begin = first_seen(unit.position, args.window), end = unit.position + unit.tokens;
    u32 first_part = begin / KVASIR_PART, last_part = (end - 1) / KVASIR_PART;
    if (args.parts > 0) {
        first_part += blockIdx.z;
        if (first_part > last_part) return;
        last_part = first_part;
    }
    for (u32 i = threadIdx.x; i < rows * k_dim; i += KVASIR_ANY_THREADS) {
        q[i] = args.q[row_of_unit(args, unit, kv_head, i / k_dim).place * k_dim + i % k_dim];
    }
    if (threadIdx.x < rows) running[threadIdx.x].total_max = LOWEST, running[threadIdx.x].total_sum = 0.0f;

    for (u32 part = first_part; part <= last_part; part++) {
        for (u32 r = 0; r < rows_at_most; r++) {
            for (u32 column = threadIdx.x; column < v_dim; column += KVASIR_ANY_THREADS) sums[r * v_dim + column] = 0.0f;
        }
        if (threadIdx.x < rows) running[threadIdx.x].max = LOWEST, running[threadIdx.x].sum = 0.0f;
        u32 from = max(begin, part * KVASIR_PART), to = min(end, (part + 1) * KVASIR_PART);
        for (u32 tile = from / KVASIR_TILE * KVASIR_TILE; tile < to; tile += KVASIR_TILE) {
            u32 tile_first = max(from, tile) - tile, tile_end = min(to, tile + KVASIR_TILE) - tile;
            __syncthreads();
            for (u32 j = warp; j < KVASIR_TILE; j += ANY_WARPS) {
                bool there = j >= tile_first && j < tile_end; // for some row; blocks before may be gone
                f32 key[key_columns];
                if (there) {
                    u32 position = tile + j, block = args.tables[unit.table + position / args.kv.block_size];
                    const T *from_cache = (const T *)key_at(args.kv, block, position % args.kv.block_size, kv_head);
#pragma unroll
                    for (u32 c = 0; c < key_columns; c++) {
                        u32 i = 32 * c + lane;
                        key[c] = i < k_dim ? to_f32(from_cache[i]) : 0.0f;
                    }
                }
#pragma unroll 1
                for (u32 r = 0; r < rows; r++) {
                    f32 score = LOWEST;
                    if (there) {
                        f32 dot = 0.0f;
#pragma unroll
                        for (u32 c = 0; c < key_columns; c++) {
                            u32 i = 32 * c + lane;
                            if (i < k_dim) dot = __fmaf_rn(q[r * k_dim + i], key[c], dot);
                        }
                        dot = warp_sum(dot);
                        UnitRow row = row_of_unit(args, unit, kv_head, r);
                        bool seen = tile + j >= row.first && tile + j <= row.position;
                        if (seen) score = scored(dot, args.scale, args.soft_cap);
                    }
                    if (lane == 0) scores[r * KVASIR_TILE + j] = score;
                }
            }
            __syncthreads();
            for (u32 r = warp; r < rows; r += ANY_WARPS) {
                f32 *mine = scores + r * KVASIR_TILE;
                f32 low = mine[lane], high = mine[32 + lane];
                f32 before = running[r].max, max = fmaxf(before, warp_max(fmaxf(low, high)));
                f32 base = max == LOWEST ? 0.0f : max;
                f32 low_weight = low == LOWEST ? 0.0f : expf(low - base), high_weight = high == LOWEST ? 0.0f : expf(high - base);
                f32 factor = before == LOWEST ? 0.0f : expf(before - base), sum = warp_sum(low_weight + high_weight);
                mine[lane] = low_weight, mine[32 + lane] = high_weight;
                __syncwarp();
                if (lane == 0) {
                    running[r].max = max, running[r].factor = factor;
                    running[r].sum = __fmaf_rn(running[r].sum, factor, sum);
                }
            }
            __syncthreads();
#pragma unroll 1
            for (u32 column = threadIdx.x; column < v_dim; column += KVASIR_ANY_THREADS) {
#pragma unroll 1
                for (u32 first = 0; first < rows; first += ANY_SIDE_BY_SIDE) {
                    f32 mine[ANY_SIDE_BY_SIDE];
                    // Rows beyond the last have room of their own, and weights that nobody looks at.
#pragma unroll
                    for (u32 r = 0; r < ANY_SIDE_BY_SIDE; r++) {
                        mine[r] = first + r < rows ? sums[(first + r) * v_dim + column] * running[first + r].factor : 0.0f;
                    }
                    for (u32 j = tile_first; j < tile_end; j++) {
                        u32 position = tile + j, block = args.tables[unit.table + position / args.kv.block_size];
                        f32 value = to_f32(((const T *)value_at(args.kv, block, position % args.kv.block_size, kv_head))[column]);
#pragma unroll
                        for (u32 r = 0; r < ANY_SIDE_BY_SIDE; r++) {
                            f32 weight = first + r < rows ? scores[(first + r) * KVASIR_TILE + j] : 0.0f;
                            if (weight != 0.0f) mine[r] = __fmaf_rn(weight, value, mine[r]);
                        }
                    }
#pragma unroll
                    for (u32 r = 0; r < ANY_SIDE_BY_SIDE; r++) {
                        if (first + r < rows) sums[(first + r) * v_dim + column] = mine[r];
                    }
                }
            }
        }
        // Everyone has the part's running sums from behind the last barrier on.
#pragma unroll 1
        for (u32 r = 0; r < rows; r++) {
            UnitRow row = row_of_unit(args, unit, kv_head, r);
            Running mine = {running[r].max, running[r].sum};
            if (args.parts > 0) {
                u64 at = partial_at(args, row, part);
                if (at == KVASIR_NO_SLOT) continue;
                for (u32 column = threadIdx.x; column < v_dim; column += KVASIR_ANY_THREADS) {
                    args.partial_sums[at * v_dim + column] = sums[r * v_dim + column];
                }
                if (threadIdx.x == 0) args.partial_max[2 * at] = mine.max, args.partial_max[2 * at + 1] = mine.sum;
                continue;
            }
            Merged by = merge<true>({running[r].total_max, running[r].total_sum}, mine);
            Place place = place_of_head(row.place, args.heads, args.ld, args.head_ld);
            for (u32 column = threadIdx.x; column < place.width; column += KVASIR_ANY_THREADS) {
                f32 value = 0.0f;
                if (column < v_dim) {
                    f32 *total = totals + r * v_dim + column;
                    *total = merged(by, by.mine == 0.0f ? 0.0f : *total, sums[r * v_dim + column]);
                    value = *total / by.running.sum;
                }
                if (part == last_part) put_planes(args.hi, args.lo, place.at + column, value);
            }
        }
        if (args.parts > 0) return;
        __syncthreads();
        if (threadIdx.x < rows) {
            AnyRow &row = running[threadIdx.x];
            Running total = merge<true>({row.total_max, row.total_sum}, {row.max, row.sum}).running;
            row.total_max = total.max, row.total_sum = total.sum;
        }
    }
}

#define ANY(name, T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(KVASIR_ANY_THREADS) attend_any_##name(const attend_args args) {                \
        attend_any<T>(args);                                                                                                    \
    }                                                                                                                           \
    KVASIR_EXPORT(attend_any_##name, attend_args);
ANY(bf16, bf16)
ANY(f16, f16)
ANY(f32, f32)
ANY(e4m3, e4m3)

template <bool exact> KVASIR_DEVICE void merge_row(const merge_args &args) {
    u32 row = args.rows[blockIdx.x], head = blockIdx.y;
    u32 position = args.positions[row], first = first_seen(position, args.window) / KVASIR_PART;
    u32 parts = position / KVASIR_PART - first + 1;
    u64 place = (u64)row * args.heads + head, at = place * args.parts;
    Place to = place_of_head(place, args.heads, args.ld, args.head_ld);
    for (u32 column = threadIdx.x; column < to.width; column += KVASIR_ROW_THREADS) {
        f32 value = 0.0f;
        if (column < args.v_dim) {
            Running running = {LOWEST, 0.0f};
#pragma unroll 4
            for (u32 part = 0; part < parts; part++) {
                Merged by = merge<exact>(running, {args.partial_max[2 * (at + part)], args.partial_max[2 * (at + part) + 1]});
                value = merged(by, value, args.partial_sums[(at + part) * args.v_dim + column]);
                running = by.running;
            }
            value /= running.sum;
        }
        put_planes(args.hi, args.lo, to.at + column, value);
    }
}

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) attend_merge(const merge_args args) {
    if (args.rows[blockIdx.x] == KVASIR_NONE) return;
    if (args.fast == KVASIR_FAST) {
        merge_row<false>(args);
    } else {
        merge_row<true>(args);
    }
}
KVASIR_EXPORT(attend_merge, merge_args);
