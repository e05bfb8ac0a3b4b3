// From products to queries, keys and values: norms of heads, rotation by position, and the write into the cache.
#include "kv.cuh"
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) rotations(const rotations_args args) {
    f32 position = (f32)args.positions[blockIdx.x];
    for (u32 i = threadIdx.x; i < args.half; i += KVASIR_ROW_THREADS) {
        // The angle as the reference rounds it; its sine and cosine without a further error.
        f64 angle = (f64)(position * args.frequencies[i]);
        u64 at = (u64)blockIdx.x * args.half + i;
        args.cos[at] = (f32)cos(angle) * args.magnitude;
        args.sin[at] = (f32)sin(angle) * args.magnitude;
    }
}
KVASIR_EXPORT(rotations, rotations_args);

// The row of sines and cosines of a row.
KVASIR_DEVICE u64 rotation_at(const u32 *rotation_of, u32 row, u32 half) {
    return (u64)(rotation_of ? rotation_of[row] : row) * half;
}

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) heads(const heads_args args) {
    u32 row = blockIdx.x, lane = threadIdx.x % 32;
    u32 head = blockIdx.y * (KVASIR_ROW_THREADS / 32) + threadIdx.x / 32;
    if (head >= args.q_heads + 2 * args.kv_heads) return;
    bool is_query = head < args.q_heads, is_value = head >= args.q_heads + args.kv_heads;
    u32 index = is_query ? head : is_value ? head - args.q_heads - args.kv_heads : head - args.q_heads;
    const f32 *src = args.src + (u64)row * args.ld_src + (is_query ? args.q_at : is_value ? args.v_at : args.k_at) + index * args.dim;

    u8 *cached = nullptr;
    if (!is_query) {
        u64 slot = args.slots[row];
        if (slot == KVASIR_NO_SLOT) return;
        u32 block = (u32)(slot / args.kv.block_size), in_block = (u32)(slot % args.kv.block_size);
        cached = is_value ? value_at(args.kv, block, in_block, index) : key_at(args.kv, block, in_block, index);
    }
    if (is_value) {
        for (u32 i = lane; i < args.dim; i += 32) put_cached(cached, args.kv.dtype, i, src[i]);
        return;
    }
    u32 half = args.dim / 2;
    const f32 *norm = is_query ? args.q_norm : args.k_norm;
    f32 scale = 1.0f;
    if (norm) {
        f32 sum = 0.0f;
        for (u32 i = lane; i < half; i += 32) sum = __fmaf_rn(src[half + i], src[half + i], __fmaf_rn(src[i], src[i], sum));
        scale = 1.0f / sqrtf(warp_sum(sum) / (f32)args.dim + (is_query ? args.q_eps : args.k_eps));
    }
    u64 turn = rotation_at(args.rotation_of, row, half);
    f32 *q = args.q_out + ((u64)row * args.q_heads + index) * args.dim;
    for (u32 i = lane; i < half; i += 32) {
        f32 a = src[i], b = src[half + i], cosine = args.cos[turn + i], sine = args.sin[turn + i];
        if (norm) a = a * scale * norm[i], b = b * scale * norm[half + i];
        f32 first = a * cosine - b * sine, second = b * cosine + a * sine;
        if (is_query) {
            q[i] = first, q[half + i] = second;
        } else {
            put_cached(cached, args.kv.dtype, i, first);
            put_cached(cached, args.kv.dtype, half + i, second);
        }
    }
}
KVASIR_EXPORT(heads, heads_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) latent_keys(const latent_keys_args args) {
    KVASIR_SHARED(f32[KVASIR_ROW_THREADS / 32], room);
    u32 row = blockIdx.x;
    u64 slot = args.slots[row];
    if (slot == KVASIR_NO_SLOT) return;
    const f32 *src = args.src + (u64)row * args.ld_src;
    u8 *cached = key_at(args.kv, (u32)(slot / args.kv.block_size), (u32)(slot % args.kv.block_size), 0);

    f32 sum = 0.0f;
    for (u32 i = threadIdx.x; i < args.rank; i += KVASIR_ROW_THREADS) sum = __fmaf_rn(src[i], src[i], sum);
    f32 scale = 1.0f / sqrtf(block_sum(sum, room) / (f32)args.rank + args.eps);
    for (u32 i = threadIdx.x; i < args.rank; i += KVASIR_ROW_THREADS) {
        put_cached(cached, args.kv.dtype, i, src[i] * scale * args.norm[i]);
    }
    u64 turn = rotation_at(args.rotation_of, row, args.rope / 2);
    for (u32 i = threadIdx.x; i < args.rope / 2; i += KVASIR_ROW_THREADS) {
        f32 a = src[args.rank + 2 * i], b = src[args.rank + 2 * i + 1];
        f32 cosine = args.cos[turn + i], sine = args.sin[turn + i];
        put_cached(cached, args.kv.dtype, args.rank + 2 * i, a * cosine - b * sine);
        put_cached(cached, args.kv.dtype, args.rank + 2 * i + 1, b * cosine + a * sine);
    }
}
KVASIR_EXPORT(latent_keys, latent_keys_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) latent_queries(const latent_queries_args args) {
    u32 row = blockIdx.x, lane = threadIdx.x % 32;
    u32 head = blockIdx.y * (KVASIR_ROW_THREADS / 32) + threadIdx.x / 32;
    if (head >= args.heads) return;
    const f32 *src = args.src + (u64)row * args.ld_src + head * (args.nope + args.rope);
    u64 at = (u64)row * args.heads + head;
    for (u32 i = lane; i < args.nope_ld; i += 32) {
        put_planes(args.hi, args.lo, at * args.nope_ld + i, i < args.nope ? src[i] : 0.0f);
    }
    f32 *q = args.q_out + at * (args.rank + args.rope) + args.rank;
    u64 turn = rotation_at(args.rotation_of, row, args.rope / 2);
    for (u32 i = lane; i < args.rope / 2; i += 32) {
        f32 a = src[args.nope + 2 * i], b = src[args.nope + 2 * i + 1];
        f32 cosine = args.cos[turn + i], sine = args.sin[turn + i];
        q[2 * i] = a * cosine - b * sine;
        q[2 * i + 1] = b * cosine + a * sine;
    }
}
KVASIR_EXPORT(latent_queries, latent_queries_args);
