// Rotation, norms of heads, and what is written into the cache.
#include "check.h"

namespace check {
namespace {

// How far an element of the cache may be off for its type alone, and what it saturates at.
f64 step_of(u32 dtype) { return dtype == KVASIR_E4M3 ? 0.07 : dtype == KVASIR_BF16 ? 5e-3 : dtype == KVASIR_F16 ? 1e-3 : 1e-4; }
f64 most_of(u32 dtype) { return dtype == KVASIR_E4M3 ? 448.0 : dtype == KVASIR_F16 ? 65504.0 : 1e30; }

void grouped(u32 dtype, bool norms) {
    u32 dim = 2 * between(1, 70), half = dim / 2, kv_heads = between(1, 3), q_heads = kv_heads * between(1, 4);
    u32 size = between(5, 20), rows = between(1, 9), blocks = 9, width = (q_heads + 2 * kv_heads) * dim + 3;
    size_t head_bytes = (size_t)size * dim * bytes_of(dtype), layer = 2 * kv_heads * head_bytes, block = 2 * layer;
    Memory<u8> arena(blocks * block);
    Memory<f32> src((size_t)rows * width), q_norm(dim), k_norm(dim), q((size_t)rows * q_heads * dim);
    for (size_t i = 0; i < (size_t)rows * width; i++) src[i] = between(0, 96) == 0 ? 1e6f : gauss();
    for (u32 i = 0; i < dim; i++) q_norm[i] = gauss(), k_norm[i] = gauss();

    Memory<u32> positions(rows + 2), rotation_of(rows);
    Memory<f32> frequencies(half), cosines((size_t)(rows + 2) * half), sines((size_t)(rows + 2) * half);
    for (u32 i = 0; i < rows + 2; i++) positions[i] = between(0, 9000);
    for (u32 i = 0; i < half; i++) frequencies[i] = std::pow(1e4f, -2.0f * (f32)i / (f32)dim);
    launch("rotations", {rows + 2}, KVASIR_ROW_THREADS, 0, rotations_args{positions, frequencies, cosines, sines, rows + 2, half, 1.25f, 0});
    for (u32 i = 0; i < (rows + 2) * half; i++) {
        f64 angle = (f32)((f32)positions[i / half] * frequencies[i % half]);
        record("rotations", off(cosines[i], 1.25 * std::cos(angle), 1), 1e-6);
        record("rotations", off(sines[i], 1.25 * std::sin(angle), 1), 1e-6);
    }

    Memory<u64> slots(rows);
    for (u32 i = 0; i < rows; i++) slots[i] = i == 2 ? KVASIR_NO_SLOT : i * 5 + 1, rotation_of[i] = between(0, rows + 1);
    heads_args args = {};
    args.kv = {arena, block, layer, layer + kv_heads * head_bytes, size, kv_heads, dim, dim, dtype, 0};
    args.src = src, args.q_norm = norms ? (f32 *)q_norm : nullptr, args.k_norm = norms ? (f32 *)k_norm : nullptr;
    args.cos = cosines, args.sin = sines, args.rotation_of = rotation_of, args.slots = slots, args.q_out = q;
    args.rows = rows, args.ld_src = width, args.q_at = 0, args.k_at = q_heads * dim, args.v_at = (q_heads + kv_heads) * dim;
    args.q_heads = q_heads, args.kv_heads = kv_heads, args.dim = dim, args.q_eps = 1e-5f, args.k_eps = 1e-6f;
    u32 all = q_heads + 2 * kv_heads;
    launch("heads", {rows, ceil(all, KVASIR_ROW_THREADS / 32)}, KVASIR_ROW_THREADS, 0, args);

    for (u32 i = 0; i < rows * all; i++) {
        u32 r = i / all, h = i % all;
        bool query = h < q_heads, value = h >= q_heads + kv_heads;
        const f32 *from = src.host() + (size_t)r * width + h * dim;
        f64 squares = 0;
        for (u32 d = 0; d < dim; d++) squares += (f64)from[d] * from[d];
        f64 scale = norms && !value ? 1 / std::sqrt(squares / dim + (query ? 1e-5 : 1e-6)) : 1;
        auto normed = [&](u32 d) { return from[d] * scale * (norms && !value ? (query ? q_norm[d] : k_norm[d]) : 1.0f); };
        for (u32 d = 0; d < dim; d++) {
            f64 cosine = cosines[rotation_of[r] * half + d % half], sine = sines[rotation_of[r] * half + d % half];
            f64 wanted = value ? from[d] : d < half ? normed(d) * cosine - normed(d + half) * sine : normed(d) * cosine + normed(d - half) * sine;
            if (query) {
                record("heads", off(q[((size_t)r * q_heads + h) * dim + d], wanted, 1), 1e-3);
            } else if (slots[r] != KVASIR_NO_SLOT) {
                const u8 *row = arena.host() + slots[r] / size * block + layer + (h - q_heads) * head_bytes;
                wanted = std::fmax(-most_of(dtype), std::fmin(most_of(dtype), wanted));
                f64 error = off(read(row, dtype, slots[r] % size * dim + d), wanted, 0.03);
                record("heads", error / step_of(dtype) * 1e-3, 1e-3); // in steps of the type
            }
        }
    }
    for (u64 i = 0; i < layer; i++) require("heads", arena[i] == 0xff); // the layer before
}

void latent(u32 dtype) {
    u32 rank = between(1, 300), rope = 2 * between(1, 40), nope = between(1, 90), heads = between(1, 20), dim = rank + rope;
    u32 size = 4, rows = 3, ld = dim + 2, half = rope / 2;
    size_t block = (size_t)size * dim * bytes_of(dtype);
    Memory<u8> arena(3 * block);
    Memory<f32> src((size_t)rows * ld), norm(rank), cosines(rows * half), sines(rows * half);
    Memory<u64> slots(rows);
    for (u32 i = 0; i < rows * ld; i++) src[i] = gauss();
    for (u32 i = 0; i < rank; i++) norm[i] = gauss();
    for (u32 i = 0; i < rows * half; i++) cosines[i] = gauss(), sines[i] = gauss();
    slots[0] = 3, slots[1] = 9, slots[2] = 4;
    auto turned = [&](const f32 *pairs, u32 row, u32 i) {
        f64 a = pairs[i / 2 * 2], b = pairs[i / 2 * 2 + 1], cosine = cosines[row * half + i / 2], sine = sines[row * half + i / 2];
        return i % 2 == 0 ? a * cosine - b * sine : b * cosine + a * sine;
    };
    latent_keys_args keys = {};
    keys.kv = {arena, block, 0, 0, size, 1, dim, 0, dtype, 0};
    keys.src = src, keys.norm = norm, keys.cos = cosines, keys.sin = sines, keys.slots = slots;
    keys.rows = rows, keys.ld_src = ld, keys.rank = rank, keys.rope = rope, keys.eps = 1e-5f;
    launch("latent_keys", {rows}, KVASIR_ROW_THREADS, 0, keys);
    for (u32 r = 0; r < rows; r++) {
        const f32 *from = src.host() + r * ld;
        f64 squares = 0;
        for (u32 i = 0; i < rank; i++) squares += (f64)from[i] * from[i];
        for (u32 i = 0; i < dim; i++) {
            f64 wanted = i < rank ? from[i] / std::sqrt(squares / rank + 1e-5) * norm[i] : turned(from + rank, r, i - rank);
            f64 got = read(arena.host() + slots[r] / size * block, dtype, slots[r] % size * dim + i);
            record("latent_keys", off(got, wanted, 0.03) / step_of(dtype) * 1e-3, 1e-3);
        }
    }

    u32 nope_ld = padded(nope), width = heads * (nope + rope) + 1;
    Memory<f32> queries((size_t)rows * width), q((size_t)rows * heads * dim);
    for (u32 i = 0; i < rows * width; i++) queries[i] = gauss();
    Planes planes((size_t)rows * heads * nope_ld);
    latent_queries_args args = {};
    args.src = queries, args.cos = cosines, args.sin = sines, args.hi = planes.hi, args.lo = planes.lo, args.q_out = q;
    args.rows = rows, args.ld_src = width, args.heads = heads, args.nope = nope, args.rope = rope, args.rank = rank, args.nope_ld = nope_ld;
    launch("latent_queries", {rows, ceil(heads, KVASIR_ROW_THREADS / 32)}, KVASIR_ROW_THREADS, 0, args);
    for (u32 i = 0; i < rows * heads; i++) {
        const f32 *from = queries.host() + i / heads * width + i % heads * (nope + rope);
        for (u32 d = 0; d < nope_ld; d++) record("latent_queries", off(planes.at((size_t)i * nope_ld + d), d < nope ? from[d] : 0, 1e-3), 2e-5);
        for (u32 d = 0; d < rank; d++) require("latent_queries", std::isnan(q[(size_t)i * dim + d]));
        for (u32 d = 0; d < rope; d++) record("latent_queries", off(q[(size_t)i * dim + rank + d], turned(from + nope, i / heads, d), 1), 2e-5);
    }
}

} // namespace

void heads(u32 rounds) {
    for (u32 round = 0; round < rounds; round++) {
        grouped(round % 4, round % 3 != 0);
        latent(round % 4);
    }
}

} // namespace check
