// What works row by row, and blocks on their way.
#include "check.h"

namespace check {
namespace {

void embeddings(u32 dtype) {
    u32 width = between(1, 500), ld = padded(width), vocab = 50, count = between(1, 9);
    bool scaled = bytes_of(dtype) == 1;
    Memory<u8> weight((size_t)vocab * ld * bytes_of(dtype));
    for (size_t i = 0; i < (size_t)vocab * ld; i++) write(weight.host(), dtype, i, gauss());
    Memory<f32> scale(vocab), x((size_t)count * width);
    Memory<u32> tokens(count);
    for (u32 i = 0; i < vocab; i++) scale[i] = 0.5f + (f32)i;
    for (u32 i = 0; i < count; i++) tokens[i] = between(0, vocab - 1);
    embed_args args = {weight, scaled ? (f32 *)scale : nullptr, tokens, x, count, width, ld, dtype, 1.5f, 0};
    launch("embed", {count}, KVASIR_ROW_THREADS, 0, args);
    auto wanted = [&](u32 row, u32 i) { return read(weight.host(), dtype, (size_t)row * ld + i) * (scaled ? scale[row] : 1.0f); };
    for (u32 r = 0; r < count; r++) {
        for (u32 i = 0; i < width; i++) record("embed", off(x[(size_t)r * width + i], 1.5 * wanted(tokens[r], i), 1e-6), 1e-6);
    }
    require("embed", std::isnan(x[(size_t)count * width]));

    for (u32 to_f16 : {0u, 1u}) {
        Memory<u16> to((size_t)vocab * ld);
        widen_args widen = {weight, scaled ? (f32 *)scale : nullptr, to, vocab, ld, dtype, 0, to_f16, 0};
        launch("widen", {vocab, ceil(ld, KVASIR_ROW_THREADS)}, KVASIR_ROW_THREADS, 0, widen);
        for (size_t i = 0; i < (size_t)vocab * ld; i++) {
            record("widen", off(to_f16 ? from_f16(to[i]) : from_bf16(to[i]), wanted((u32)(i / ld), (u32)(i % ld)), 1e-2), 5e-3);
        }
    }
}

void norms(u32 width, bool change, bool post, bool planes) {
    u32 ld = padded(width), count = between(1, 5), ld_x = width + 4 * between(0, 1), ld_change = width + between(0, 3);
    Memory<f32> x((size_t)count * ld_x), added((size_t)count * ld_change), post_weight(width + 4), weight(width + 4);
    for (size_t i = 0; i < (size_t)count * ld_x; i++) x[i] = gauss();
    for (size_t i = 0; i < (size_t)count * ld_change; i++) added[i] = 2 * gauss();
    for (u32 i = 0; i < width; i++) post_weight[i] = gauss(), weight[i] = gauss();
    std::vector<f32> before = x.copy();
    Planes out((size_t)count * ld);
    rms_norm_args args = {x,      change ? (f32 *)added : nullptr, post ? (f32 *)post_weight : nullptr, planes ? (f32 *)weight : nullptr,
                          out.hi, out.lo, count, width, ld_x, ld_change, ld, 1e-5f, 1e-3f, 0};
    launch("rms_norm", {count}, KVASIR_ROW_THREADS, 0, args);
    for (u32 r = 0; r < count; r++) {
        f64 of_change = 0, of_row = 0;
        for (u32 i = 0; i < width; i++) of_change += (f64)added[(size_t)r * ld_change + i] * added[(size_t)r * ld_change + i];
        of_change = 1 / std::sqrt(of_change / width + 1e-3);
        std::vector<f64> row(width);
        for (u32 i = 0; i < width; i++) {
            row[i] = before[(size_t)r * ld_x + i];
            if (change) row[i] += added[(size_t)r * ld_change + i] * (post ? of_change * post_weight[i] : 1.0);
            of_row += row[i] * row[i];
            record("rms_norm", off(x[(size_t)r * ld_x + i], row[i], 1), 1e-4);
        }
        of_row = 1 / std::sqrt(of_row / width + 1e-5);
        for (u32 i = 0; planes && i < ld; i++) {
            record("rms_norm", i < width ? off(out.at((size_t)r * ld + i), row[i] * of_row * weight[i], 1) : out.at((size_t)r * ld + i) == 0 ? 0 : NAN, 1e-4);
        }
    }
}

void elements(u32 activation) {
    u32 width = between(1, 700), ld = padded(width), count = between(1, 5), ld_src = 2 * width + 3;
    Memory<f32> src((size_t)count * ld_src);
    for (size_t i = 0; i < (size_t)count * ld_src; i++) src[i] = 3 * gauss();
    Grid grid = {count, ceil(ld, KVASIR_ROW_THREADS)};
    for (const char *kernel : {"gate_exact", "gate_fast"}) {
        Planes out((size_t)count * ld);
        launch(kernel, grid, KVASIR_ROW_THREADS, 0, gate_args{src, out.hi, out.lo, count, width, ld_src, ld, activation, 0});
        for (size_t i = 0; i < (size_t)count * ld; i++) {
            f64 wanted = 0;
            if (i % ld < width) {
                f64 x = src[i / ld * ld_src + i % ld], up = src[i / ld * ld_src + width + i % ld];
                f64 z = activation == KVASIR_SILU ? x : 2 * 0.7978845608028654 * (x + 0.044715 * x * x * x);
                wanted = x / (1 + std::exp(-z)) * up;
            }
            record(kernel, off(out.at(i), wanted, 1e-3), 1e-3);
        }
    }
    Planes out((size_t)count * ld);
    launch("split", grid, KVASIR_ROW_THREADS, 0, split_args{src, out.hi, out.lo, count, width, ld_src, ld});
    for (size_t i = 0; i < (size_t)count * ld; i++) {
        record("split", off(out.at(i), i % ld < width ? src[i / ld * ld_src + i % ld] : 0, 1e-3), 2e-5);
    }

    std::vector<f32> before = src.copy();
    u64 most = (u64)count * ld_src - 1;
    launch("soft_cap", {ceil((u32)most, KVASIR_ROW_THREADS)}, KVASIR_ROW_THREADS, 0, soft_cap_args{src, most, 2.5f, 0});
    for (u64 i = 0; i < most; i++) record("soft_cap", off(src[i], 2.5 * std::tanh(before[i] / 2.5), 1e-3), 1e-4);
    require("soft_cap", src[most] == before[most]);

    Memory<f32> scale(width), bias(width);
    for (u32 i = 0; i < width; i++) scale[i] = gauss(), bias[i] = gauss();
    before = src.copy();
    launch("scale_bias", {count, ceil(width, KVASIR_ROW_THREADS)}, KVASIR_ROW_THREADS, 0, scale_bias_args{src, scale, bias, count, width, ld_src, 0});
    for (size_t i = 0; i < (size_t)count * ld_src; i++) {
        f64 wanted = i % ld_src < width ? (f64)before[i] * scale[i % ld_src] + bias[i % ld_src] : before[i];
        record("scale_bias", off(src[i], wanted, 1e-1), 1e-4);
    }

    // Three ranks' columns as rows, and zeros behind them.
    u32 part = 2 * between(1, 300), part_stride = part + 2 * between(0, 5), whole = 3 * part + 2 * between(0, 40);
    Memory<u8> parts((size_t)3 * 4 * part_stride), wholes((size_t)4 * whole);
    for (u32 i = 0; i < 3 * 4 * part_stride; i++) parts[i] = (u8)between(0, 255);
    launch("side_by_side", {4, 3}, KVASIR_ROW_THREADS, 0, side_by_side_args{parts, wholes, part, part_stride, whole, 4, 0});
    for (u32 i = 0; i < 4 * whole; i++) {
        u32 row = i / whole, at = i % whole;
        u8 wanted = at < 3 * part ? parts[(size_t)(at / part * 4 + row) * part_stride + at % part] : 0;
        require("side_by_side", wholes[i] == wanted);
    }

    u32 bytes = 4 * between(1, 200), from_stride = bytes + 16, to_stride = bytes + 8;
    Memory<u8> from((size_t)7 * from_stride), to((size_t)5 * to_stride);
    Memory<u32> row_of(5);
    for (u32 i = 0; i < 7 * from_stride; i++) from[i] = (u8)between(0, 255);
    for (u32 i = 0; i < 5; i++) row_of[i] = between(0, 6);
    launch("gather_rows", {5}, KVASIR_ROW_THREADS, 0, gather_rows_args{from, to, row_of, bytes, from_stride, to_stride, 5, 0});
    for (u32 i = 0; i < 5; i++) {
        require("gather_rows", memcmp(to.host() + i * to_stride, from.host() + row_of[i] * from_stride, bytes) == 0);
    }
}

void blocks(u32 dtype) {
    u32 dim = between(1, 40), heads = between(1, 3), size = between(2, 20), count = 9;
    size_t head = (size_t)size * dim * bytes_of(dtype), layer = 2 * heads * head, block = 2 * layer;
    // The other arena has the heads of `ranks` such as this one, and these are those from `rank` on.
    u32 ranks = between(1, 3), rank = between(0, ranks - 1);
    Memory<u8> arena(count * block), other(count * block * ranks), packed(2 * layer);
    for (size_t i = 0; i < count * block; i++) arena[i] = (u8)between(0, 254);
    Memory<kvasir_run> runs(2);
    runs[0] = {1, 1, size - 1, 0}, runs[1] = {3, 0, 2, 0};
    mirror_args mirror = {};
    mirror.kv = {arena, block, layer, layer + heads * head, size, heads, dim, dim, dtype, 0};
    size_t first = ranks * layer + rank * heads * head;
    mirror.to = {other, block * ranks, first, first + ranks * heads * head, size, heads, dim, dim, dtype, 0};
    mirror.runs = runs, mirror.count = 2;
    launch("mirror", {2, heads}, KVASIR_ROW_THREADS, 0, mirror);
    std::vector<u8> expected(count * block * ranks, 0xff);
    for (size_t i = 0; i < count * block; i++) {
        u32 in_block = (u32)(i / block), slot = (u32)(i % block % head / (dim * bytes_of(dtype)));
        if (i % block < layer || !((in_block == 1 && slot >= 1) || (in_block == 3 && slot < 2))) continue;
        size_t in_layer = i % block - layer, values = in_layer / (heads * head);
        expected[in_block * block * ranks + first + values * ranks * heads * head + in_layer % (heads * head)] = arena[i];
    }
    require("mirror", other.copy() == expected);

    std::vector<u8> before = arena.copy();
    Memory<u32> pairs(4), listed(2);
    pairs[0] = 1, pairs[1] = 2, pairs[2] = 4, pairs[3] = 0;
    launch("copy_blocks", {2, 3}, KVASIR_ROW_THREADS, 0, copy_blocks_args{arena, pairs, block, 2, 0});
    for (size_t i = 0; i < count * block; i++) {
        size_t from = i / block == 2 ? i - block : i / block == 0 ? i + 4 * block : i;
        require("copy_blocks", arena[i] == before[from]);
    }
    listed[0] = 5, listed[1] = 3;
    move_blocks_args move = {arena, packed, listed, block, layer, layer, 2, 0};
    launch("gather_blocks", {2, 2}, KVASIR_ROW_THREADS, 0, move);
    require("gather_blocks", memcmp(packed.host(), arena.host() + 5 * block + layer, layer) == 0);
    require("gather_blocks", memcmp(packed.host() + layer, arena.host() + 3 * block + layer, layer) == 0);
    before = arena.copy();
    memset(arena.host() + 5 * block + layer, 0, layer);
    launch("scatter_blocks", {2, 2}, KVASIR_ROW_THREADS, 0, move);
    require("scatter_blocks", before == arena.copy());
}

} // namespace

void rows(u32 rounds) {
    for (u32 round = 0; round < rounds; round++) {
        embeddings(round % 5);
        norms(round == 3 ? 20000 : round % 2 == 0 ? 4 * between(1, 700) : between(1, 3000), round % 2 == 1, round % 4 == 1, round % 6 != 5);
        elements(round % 2);
        blocks(round % 4);
    }
}

} // namespace check
