// Routed experts: who goes where, rows in the order of their experts, and the sum of what comes back. As `cpu/mlp.rs`.
#include "rows.cuh"

// A number's place in the order of all f32, NaNs at the ends: what `f32::total_cmp` compares.
KVASIR_DEVICE u32 order_of(f32 x) {
    u32 bits = bits_of(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The index of the largest of `count` keys, the lowest on a tie, to all lanes of a warp.
KVASIR_DEVICE u32 largest_of(const u32 *keys, u32 count) {
    u64 best = 0;
    for (u32 i = threadIdx.x % 32; i < count; i += 32) {
        u64 key = (u64)keys[i] << 32 | (0xffffffffu - i);
        if (key > best) best = key;
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
        u64 other = __shfl_xor_sync(0xffffffffu, best, step);
        if (other > best) best = other;
    }
    return 0xffffffffu - (u32)best;
}

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) route(const route_args args) {
    KVASIR_DYNAMIC_SHARED(room_of_experts);
    KVASIR_SHARED(f32[KVASIR_ROW_THREADS / 32], room);
    KVASIR_SHARED(u32[KVASIR_MAX_TOP_K], chosen);
    KVASIR_SHARED(f32[KVASIR_MAX_TOP_K], weights);
    u32 experts = args.experts, lane = threadIdx.x % 32;
    f32 *scores = (f32 *)room_of_experts, *worth = scores + experts;
    u32 *keys = (u32 *)(worth + experts);
    const f32 *given = args.scores + (u64)blockIdx.x * args.ld;

    if (args.scoring == KVASIR_SIGMOID) {
        for (u32 i = threadIdx.x; i < experts; i += KVASIR_ROW_THREADS) scores[i] = 1.0f / (1.0f + expf(-given[i]));
    } else {
        f32 max = -INFINITY, sum = 0.0f;
        for (u32 i = threadIdx.x; i < experts; i += KVASIR_ROW_THREADS) max = fmaxf(max, given[i]);
        max = warp_max(max);
        if (lane == 0) room[threadIdx.x / 32] = max;
        __syncthreads();
        for (u32 warp = 0; warp < KVASIR_ROW_THREADS / 32; warp++) max = fmaxf(max, room[warp]);
        __syncthreads();
        for (u32 i = threadIdx.x; i < experts; i += KVASIR_ROW_THREADS) sum += scores[i] = expf(given[i] - max);
        sum = block_sum(sum, room);
        for (u32 i = threadIdx.x; i < experts; i += KVASIR_ROW_THREADS) scores[i] /= sum;
    }
    for (u32 i = threadIdx.x; i < experts; i += KVASIR_ROW_THREADS) {
        keys[i] = order_of(scores[i] + (args.correction ? args.correction[i] : 0.0f));
    }
    __syncthreads();
    if (args.groups > 0) {
        // A group is worth the sum of its best, largest first.
        u32 size = experts / args.groups;
        for (u32 group = threadIdx.x; group < args.groups; group += KVASIR_ROW_THREADS) {
            f32 sum = 0.0f;
            u64 below = ~0ull;
            for (u32 n = 0; n < min(args.groups_best, size); n++) {
                u64 best = 0;
                for (u32 i = group * size; i < (group + 1) * size; i++) {
                    u64 key = (u64)keys[i] << 32 | (0xffffffffu - i);
                    if (key < below && key > best) best = key;
                }
                u32 expert = 0xffffffffu - (u32)best;
                sum += scores[expert] + (args.correction ? args.correction[expert] : 0.0f);
                below = best;
            }
            worth[group] = sum;
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < experts; i += KVASIR_ROW_THREADS) {
            u32 group = i / size, better = 0, key = order_of(worth[group]);
            for (u32 other = 0; other < args.groups; other++) {
                u32 theirs = order_of(worth[other]);
                better += theirs > key || (theirs == key && other < group);
            }
            if (better >= args.groups_kept) keys[i] = order_of(-INFINITY);
        }
        __syncthreads();
    }
    if (threadIdx.x >= 32) return;

    for (u32 n = 0; n < args.top_k; n++) {
        u32 best = largest_of(keys, experts);
        __syncwarp();
        if (lane == 0) keys[best] = 0, chosen[n] = best, weights[n] = scores[best];
        __syncwarp();
    }
    f32 sum = 0.0f;
    if (args.normalise) {
        for (u32 n = 0; n < args.top_k; n++) sum += weights[n];
    }
    for (u32 n = lane; n < args.top_k; n += 32) {
        f32 weight = weights[n];
        if (args.normalise) weight /= sum + 1.17549435e-38f;
        u32 place = 0;
        for (u32 other = 0; other < args.top_k; other++) place += chosen[other] < chosen[n];
        u64 to = (u64)blockIdx.x * args.top_k + place;
        args.experts_out[to] = chosen[n];
        args.weights_out[to] = weight * args.scale;
    }
}
KVASIR_EXPORT(route, route_args);

extern "C" __global__ void __launch_bounds__(KVASIR_GROUP_THREADS) group(const group_args args) {
    KVASIR_DYNAMIC_SHARED(room_of_experts);
    u32 *counts = (u32 *)room_of_experts, *places = counts + args.experts, lane = threadIdx.x % 32;
    u32 all = args.rows * args.top_k;
    for (u32 i = threadIdx.x; i < args.experts; i += KVASIR_GROUP_THREADS) counts[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < all; i += KVASIR_GROUP_THREADS) atomicAdd(&counts[args.chosen[i]], 1u);
    __syncthreads();
    if (threadIdx.x < 32) {
        // Where each expert's rows begin, and which of those with rows it is: sums over all before it.
        u32 first = 0, index = 0;
        for (u32 from = 0; from < args.experts; from += 32) {
            u32 expert = from + lane, count = expert < args.experts ? counts[expert] : 0;
            u32 before = count, used = __ballot_sync(0xffffffffu, count > 0);
            for (u32 step = 1; step < 32; step *= 2) {
                u32 lower = __shfl_up_sync(0xffffffffu, before, step);
                if (lane >= step) before += lower;
            }
            u32 begin = first + before - count;
            if (expert < args.experts) places[expert] = begin;
            if (count > 0) {
                kvasir_group mine = {expert, begin, count, 0};
                args.groups[index + __popc(used & ((1u << lane) - 1))] = mine;
            }
            first += __shfl_sync(0xffffffffu, before, 31);
            index += __popc(used);
        }
        for (u32 i = index + lane; i < args.max_groups; i += 32) {
            kvasir_group none = {0, 0, 0, 0};
            args.groups[i] = none;
        }
    }
    __syncthreads();
    // The order of an expert's rows is whoever came first: they do not know of each other.
    for (u32 i = threadIdx.x; i < all; i += KVASIR_GROUP_THREADS) {
        u32 place = atomicAdd(&places[args.chosen[i]], 1u);
        args.row_of[place] = i / args.top_k;
        args.place_of[i] = place;
    }
}
KVASIR_EXPORT(group, group_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) combine(const combine_args args) {
    u32 row = blockIdx.x, i = blockIdx.y * KVASIR_ROW_THREADS + threadIdx.x;
    if (i >= args.width) return;
    f32 sum = 0.0f;
    for (u32 n = 0; n < args.top_k; n++) {
        u64 at = (u64)row * args.top_k + n;
        sum += args.weights[at] * args.change[(u64)args.place_of[at] * args.ld_change + i];
    }
    if (args.shared) sum += args.shared[(u64)row * args.ld_shared + i];
    args.out[(u64)row * args.ld_out + i] = sum;
}
KVASIR_EXPORT(combine, combine_args);
