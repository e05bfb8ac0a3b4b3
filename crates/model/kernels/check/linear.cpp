// Linear maps: every type of weight, exact and fast; and the same bits from every kernel that can compute them.
#include "check.h"

namespace check {
namespace {

enum Kind { ONE, BATCHED, GROUPED };

// One product of random sizes through all kernels.
void product(u32 dtype, bool exact, Kind shape, bool many_rows, u32 widest) {
    u32 width = between(1, widest), k = padded(width), n = between(1, 300), rows = many_rows ? between(17, 150) : between(1, 16);
    u32 matrices = shape == ONE ? 1 : 3, bytes = bytes_of(dtype);
    bool scaled = bytes == 1 || between(0, 1) == 1, biased = shape == ONE && between(0, 1) == 1;
    bool blocks = bytes == 1 && between(0, 1) == 1;

    Memory<u8> weights((size_t)matrices * n * k * bytes);
    std::vector<f64> w((size_t)matrices * n * k);
    for (size_t i = 0; i < w.size(); i++) w[i] = write(weights.host(), dtype, i, i % k < width ? gauss() : 0.0f);
    // Of rows; of blocks pairs.
    u32 across = ceil(k, KVASIR_SCALE_COLS), down = ceil(n, KVASIR_SCALE_ROWS);
    u32 stride = blocks ? 2 * across * down : n;
    Memory<f32> scale((size_t)matrices * stride), bias(n);
    for (size_t i = 0; i < (size_t)matrices * stride; i++) scale[i] = 0.5f + 0.01f * (f32)between(0, 100);
    for (size_t i = 0; blocks && i < (size_t)matrices * across * down; i++) {
        scale[2 * i + 1] = (i + 1) % across == 0 ? 1.0f : scale[2 * i] / scale[2 * i + 2];
    }
    for (u32 i = 0; i < n; i++) bias[i] = gauss();
    u32 copies = shape == BATCHED ? matrices : 1;
    Planes x((size_t)rows * copies * k);
    for (size_t i = 0; i < (size_t)rows * copies * k; i++) x.put(i, i % k < width ? gauss() : 0.0f);
    Memory<u32> x_rows(rows);
    for (u32 i = 0; i < rows; i++) x_rows[i] = (i * 7 + 3) % rows;
    Memory<kvasir_group> groups(4);
    u32 first = rows / 3, second = first + rows / 2;
    groups[0] = {2, 0, first, 0};
    groups[1] = {0, first, second - first, 0};
    groups[2] = {1, second, rows - second, 0};
    groups[3] = {0, 0, 0, 0};

    // What is to come out, and how large the summands are.
    u32 ld_out = n * copies + 5;
    std::vector<f64> wanted((size_t)rows * ld_out, NAN), size(wanted);
    for (u32 r = 0; r < rows; r++) {
        for (u32 b = 0; b < copies; b++) {
            u32 matrix = shape != GROUPED ? b : r < first ? 2 : r < second ? 0 : 1;
            size_t from = shape == GROUPED ? (size_t)x_rows[r] * k : ((size_t)r * copies + b) * k;
            for (u32 j = 0; j < n; j++) {
                f64 sum = 0, squares = 0;
                for (u32 c = 0; c < k; c++) {
                    f64 term = x.at(from + c) * w[((size_t)matrix * n + j) * k + c];
                    if (blocks) term *= scale[matrix * stride + 2 * (j / KVASIR_SCALE_ROWS * across + c / KVASIR_SCALE_COLS)];
                    sum += term, squares += term * term;
                }
                f64 factor = scaled && !blocks ? scale[matrix * n + j] : 1.0;
                wanted[(size_t)r * ld_out + b * n + j] = sum * factor + (biased ? bias[j] : 0.0f);
                size[(size_t)r * ld_out + b * n + j] = std::sqrt(squares) * factor + 1e-9;
            }
        }
    }
    std::vector<f32> bits;
    for (const char *width_of_tile : {"narrow8", "wide64", "wide128"}) {
        bool wide = width_of_tile[0] == 'w';
        u32 tile = (u32)atoi(width_of_tile + (wide ? 4 : 6));
        if (dtype == KVASIR_F32 && tile == 128) continue;
        std::string kernel = std::string("linear_") + width_of_tile + "_" + name_of(dtype) + (exact ? "_exact" : "_fast");
        for (u32 splits : {1, KVASIR_K_SLICES}) {
            if (splits > 1 && (!wide || shape != ONE)) continue;
            Memory<f32> out((size_t)rows * ld_out), partials((size_t)KVASIR_K_SLICES * rows * n);
            linear_args args = {};
            args.w = weights, args.scale = scaled ? (f32 *)scale : nullptr, args.bias = biased ? (f32 *)bias : nullptr;
            args.x_hi = x.hi, args.x_lo = exact ? (u16 *)x.lo : nullptr, args.out = out, args.partials = partials;
            args.w_stride = (u64)n * k, args.scale_stride = stride;
            args.rows = rows, args.n = n, args.k = k, args.ld_w = k, args.ld_x = copies * k, args.ld_out = ld_out, args.splits = splits;
            args.scale_blocks = blocks ? across : 0;
            u32 batch = 1, tiles = ceil(rows, tile);
            if (shape == BATCHED) args.x_stride = k, args.out_stride = n, batch = matrices;
            if (shape == GROUPED) args.groups = groups, args.x_rows = x_rows, batch = 4, tiles = 1;
            if (wide) {
                launch(kernel, {tiles, ceil(n, KVASIR_WIDE_ROWS), batch * splits}, KVASIR_WIDE_THREADS,
                       KVASIR_WIDE_SHARED(bytes, exact ? 2 : 1, tile), args);
            } else {
                launch(kernel, {ceil(n, KVASIR_NARROW_ROWS), tiles, batch}, KVASIR_NARROW_THREADS, 0, args);
            }
            if (splits > 1) launch("linear_sum", {ceil(n, KVASIR_ROW_THREADS), rows}, KVASIR_ROW_THREADS, 0, args);
            for (size_t i = 0; i < wanted.size(); i++) {
                if (std::isnan(wanted[i])) {
                    require(kernel, std::isnan(out[i])); // nobody writes there
                } else {
                    record(kernel, std::fabs(out[i] - wanted[i]) / size[i], exact ? 1e-4 : 1e-2);
                }
            }
            std::vector<f32> mine = out.copy();
            if (bits.empty()) bits = mine;
            require(splits > 1 ? "linear_sum" : kernel, memcmp(bits.data(), mine.data(), mine.size() * 4) == 0);
        }
    }
}

} // namespace

void linear(u32 rounds) {
    for (u32 round = 0; round < rounds; round++) {
        for (u32 dtype : {KVASIR_BF16, KVASIR_F16, KVASIR_F32, KVASIR_E4M3, KVASIR_I8}) {
            for (bool exact : {true, false}) product(dtype, exact, (Kind)(round % 3), round % 2 == 0, round < 6 ? 300 : 1100);
        }
    }
}

} // namespace check
