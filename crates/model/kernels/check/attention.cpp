// Attention: every type, shape and mode against sums in double precision; the same bits however it is cut.
#include "check.h"

#include <algorithm>

namespace check {
namespace {

struct Sequence {
    u32 start, count;
    std::vector<u32> blocks;
};

struct Case {
    u32 dtype, dim, v_dim, kv_heads, group, block_size, window;
    f32 soft_cap;
    bool latent;
};

u32 first_seen(u32 position, u32 window) { return window == 0 || position < window ? 0 : position + 1 - window; }

// Three sequences of one step: a prompt, a few tokens after many, a chunk in the middle.
void attend(const Case &c) {
    u32 heads = c.kv_heads * c.group, element = bytes_of(c.dtype), layers = 2, layer = 1, dim = c.dim, v_dim = c.v_dim;
    size_t key_bytes = (size_t)c.block_size * dim * element, value_bytes = c.latent ? 0 : key_bytes;
    size_t layer_bytes = c.kv_heads * (key_bytes + value_bytes), block_bytes = layers * layer_bytes;
    std::vector<Sequence> sequences = {{0, between(1, 60), {}}, {between(100, 900), between(1, 3), {}}, {between(1, 700), between(1, 70), {}}};
    u32 blocks = 0, rows = 0, parts = 1;
    for (Sequence &s : sequences) {
        u32 end = s.start + s.count;
        blocks += ceil(end, c.block_size), rows += s.count;
        parts = std::max(parts, (end - 1) / KVASIR_PART - first_seen(s.start, c.window) / KVASIR_PART + 1);
    }
    std::vector<u32> ids(blocks);
    for (u32 i = 0; i < blocks; i++) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), random());

    Memory<u8> arena(blocks * block_bytes); // whatever nobody may look at is NaN in every type
    memset(arena.host(), 0x7f, blocks * block_bytes);
    Memory<u32> tables(blocks), positions(rows), listed(rows + 1);
    std::vector<std::vector<f64>> keys(3), values(3);
    std::vector<u32> table_of(3), row_of(3);
    u32 next = 0, row = 0;
    for (u32 s = 0; s < 3; s++) {
        Sequence &sequence = sequences[s];
        u32 end = sequence.start + sequence.count, seen = first_seen(sequence.start, c.window);
        table_of[s] = next, row_of[s] = row;
        keys[s].resize((size_t)end * c.kv_heads * dim), values[s] = keys[s];
        for (u32 i = 0; i < ceil(end, c.block_size); i++) {
            // Blocks that nobody sees are gone.
            tables[next + i] = (i + 1) * c.block_size <= seen ? KVASIR_NONE : ids[next + i];
        }
        for (u32 p = seen / c.block_size * c.block_size; p < end; p++) {
            for (u32 h = 0; h < c.kv_heads; h++) {
                for (u32 d = 0; d < dim; d++) {
                    size_t at = ((size_t)p * c.kv_heads + h) * dim + d, in_block = p % c.block_size * dim + d;
                    u8 *base = arena.host() + tables[next + p / c.block_size] * block_bytes + layer * layer_bytes;
                    keys[s][at] = write(base + h * key_bytes, c.dtype, in_block, gauss());
                    values[s][at] = c.latent ? keys[s][at] : write(base + c.kv_heads * key_bytes + h * value_bytes, c.dtype, in_block, gauss());
                }
            }
        }
        next += ceil(end, c.block_size);
        for (u32 i = 0; i < sequence.count; i++) positions[row] = sequence.start + i, listed[row] = row, row++;
    }
    listed[rows] = KVASIR_NONE;
    Memory<f32> q((size_t)rows * heads * dim);
    for (size_t i = 0; i < (size_t)rows * heads * dim; i++) q[i] = gauss();

    f32 scale = 1.0f / std::sqrt((f32)dim);
    u32 head_ld = c.latent ? padded(v_dim) : v_dim, ld = c.latent ? heads * head_ld : padded(heads * v_dim);
    std::vector<f64> wanted((size_t)rows * ld, 0.0);
    for (u32 s = 0; s < 3; s++) {
        for (u32 i = 0; i < sequences[s].count * heads; i++) {
            u32 r = row_of[s] + i / heads, h = i % heads, position = positions[r], first = first_seen(position, c.window);
            std::vector<f64> scores;
            for (u32 p = first; p <= position; p++) {
                f64 dot = 0;
                for (u32 d = 0; d < dim; d++) {
                    dot += (f64)q[((size_t)r * heads + h) * dim + d] * keys[s][((size_t)p * c.kv_heads + h / c.group) * dim + d];
                }
                dot *= scale;
                scores.push_back(c.soft_cap == 0 ? dot : c.soft_cap * std::tanh(dot / c.soft_cap));
            }
            f64 max = *std::max_element(scores.begin(), scores.end()), sum = 0;
            for (f64 &score : scores) sum += score = std::exp(score - max);
            for (u32 p = first; p <= position; p++) {
                for (u32 d = 0; d < v_dim; d++) {
                    wanted[(size_t)r * ld + h * head_ld + d] +=
                        scores[p - first] / sum * values[s][((size_t)p * c.kv_heads + h / c.group) * dim + d];
                }
            }
        }
    }

    // Units of at most so many rows, of any size.
    auto units = [&](u32 most) {
        std::vector<kvasir_unit> all;
        u32 side = std::min(c.group, most);
        for (u32 s = 0; s < 3; s++) {
            u32 tokens = between(1, std::max(1u, most / side));
            for (u32 i = 0; i < sequences[s].count; i += tokens) {
                for (u32 h = 0; h < c.group; h += side) {
                    all.push_back({row_of[s] + i, std::min(tokens, sequences[s].count - i), sequences[s].start + i, table_of[s], h,
                                   std::min(side, c.group - h)});
                }
            }
        }
        all.push_back({0, 0, 0, 0, 0, 0});
        return all;
    };
    bool tensor_cores = !c.latent && c.dtype != KVASIR_F32 && (dim == 32 || dim == 64 || dim == 128 || dim == 256);
    std::vector<u16> bits[3][2]; // of any, exact and fast: of both planes
    auto run = [&](const std::string &kernel, u32 which, bool partial, u32 most, u32 threads, u32 shared, f64 limit) {
        Planes out((size_t)rows * ld);
        u32 room = partial ? parts + between(0, 1) : 0;
        Memory<f32> sums((size_t)rows * heads * room * v_dim + 1), maxima((size_t)rows * heads * room * 2 + 1);
        std::vector<kvasir_unit> list = units(most);
        Memory<kvasir_unit> unit(list.size());
        for (size_t i = 0; i < list.size(); i++) unit[i] = list[i];
        attend_args args = {};
        args.kv = {arena, block_bytes, layer * layer_bytes, layer * layer_bytes + c.kv_heads * key_bytes, c.block_size, c.kv_heads, dim,
                   c.latent ? 0 : v_dim, c.dtype, 0};
        args.q = q, args.units = unit, args.tables = tables, args.partial_sums = sums, args.partial_max = maxima;
        args.hi = out.hi, args.lo = out.lo, args.scale = scale, args.soft_cap = c.soft_cap, args.window = c.window;
        args.heads = heads, args.group = c.group, args.v_dim = v_dim, args.parts = room, args.ld = ld, args.head_ld = head_ld;
        launch(kernel, {(u32)list.size(), c.kv_heads, std::max(room, 1u)}, threads, shared, args);
        if (partial) {
            merge_args merge = {};
            merge.partial_sums = sums, merge.partial_max = maxima, merge.rows = listed, merge.positions = positions;
            merge.hi = out.hi, merge.lo = out.lo, merge.count = rows + 1, merge.window = c.window, merge.heads = heads;
            merge.v_dim = v_dim, merge.parts = room, merge.ld = ld, merge.head_ld = head_ld;
            merge.fast = which == 2 ? KVASIR_FAST : KVASIR_EXACT;
            launch("attend_merge", {rows + 1, heads}, KVASIR_ROW_THREADS, 0, merge);
        }
        for (size_t i = 0; i < wanted.size(); i++) record(kernel, off(out.at(i), wanted[i], 1), limit);
        std::vector<u16> hi = out.hi.copy(), lo = out.lo.copy();
        if (bits[which][0].empty()) bits[which][0] = hi, bits[which][1] = lo;
        require(kernel, bits[which][0] == hi && bits[which][1] == lo);
    };
    std::string type = name_of(c.dtype);
    for (bool partial : {true, false}) {
        run("attend_any_" + type, 0, partial, KVASIR_ANY_ROWS, KVASIR_ANY_THREADS, KVASIR_ANY_SHARED(dim, v_dim), 1e-4);
    }
    for (u32 mode = 1; tensor_cores && mode <= 2; mode++) {
        std::string shape = "_" + type + "_" + std::to_string(dim) + (mode == 1 ? "_exact" : "_fast");
        u32 terms = mode == 1 ? 2 : 1;
        // Queries and weights of fast arithmetic have the eight bits of bf16.
        f64 limit = mode == 1 ? 1e-4 : 1e-2;
        run("attend_decode" + shape, mode, true, KVASIR_DECODE_ROWS, KVASIR_ATTEND_THREADS, KVASIR_DECODE_SHARED(dim, element, terms), limit);
        run("attend_prompt" + shape, mode, false, KVASIR_PROMPT_ROWS(dim), KVASIR_ATTEND_THREADS, KVASIR_PROMPT_SHARED(dim, element, terms), limit);
    }
}

} // namespace

void attention(u32 rounds) {
    const u32 dims[] = {32, 64, 96, 128, 256};
    for (u32 round = 0; round < rounds; round++) {
        for (u32 dtype : {KVASIR_BF16, KVASIR_F16, KVASIR_F32, KVASIR_E4M3}) {
            Case c = {};
            c.dtype = dtype, c.latent = round % 6 == 5;
            c.dim = c.latent ? 32 : dtype == KVASIR_F32 ? 2 * between(3, 40) : dims[round % 5];
            c.v_dim = c.latent ? 24 : c.dim;
            c.kv_heads = c.latent ? 1 : between(1, 3), c.group = c.latent ? between(1, 20) : between(1, 5);
            c.block_size = round % 2 == 0 ? 16 : between(3, 40);
            c.window = round % 3 == 1 ? between(5, 400) : 0;
            c.soft_cap = round % 3 == 2 ? 5.0f : 0.0f;
            attend(c);
        }
    }
}

} // namespace check
