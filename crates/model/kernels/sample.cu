// From a row of logits to the few tokens that sampling looks at.
//
// A token's rank is one number, value before token, so the KVASIR_SHORTLIST largest are those above a bound, and the bound is
// found digit by digit: count the candidates by digit, step into the digit in which the last one falls. The largest value of
// each thread's share comes first: as many of those as the list is long are a bound already, and few others reach it.
#include "rows.cuh"

// The token is the lower part of a rank.
#define TOKEN_BITS 22
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)

// Ranks ascend with values, and descend with tokens among equal ones. A zero's sign makes no difference.
KVASIR_DEVICE u64 rank_of(f32 value, u32 token) {
    u32 bits = bits_of(value == 0.0f ? 0.0f : value);
    u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)order << TOKEN_BITS | ((1u << TOKEN_BITS) - 1 - token);
}

// Sorts `count` (a power of two, at most the threads) numbers, largest first.
KVASIR_DEVICE void sort_descending(u64 *numbers, u32 count) {
    for (u32 size = 2; size <= count; size *= 2) {
        for (u32 step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            u32 i = threadIdx.x, j = i ^ step;
            if (i < count && j > i) {
                u64 a = numbers[i], b = numbers[j];
                if ((a < b) == ((i & size) == 0)) numbers[i] = b, numbers[j] = a;
            }
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(KVASIR_SHORTLIST_THREADS) shortlist(const shortlist_args args) {
    KVASIR_SHARED(u64[KVASIR_SHORTLIST_THREADS], ranks);
    KVASIR_SHARED(u32[DIGITS], counts);
    KVASIR_SHARED(f32[KVASIR_SHORTLIST_THREADS / 32], room);
    KVASIR_SHARED(u32[4], found); // digit, how many are in higher digits, how many in this one, listed
    const u32 threads = KVASIR_SHORTLIST_THREADS, thread = threadIdx.x, lane = thread % 32;
    u32 row = blockIdx.x;
    f32 *logits = args.logits + (u64)row * args.ld;

    if (args.bias_tokens) {
        for (u32 i = args.bias_at[row] + thread; i < args.bias_at[row + 1]; i += threads) {
            logits[args.bias_tokens[i]] += args.bias_values[i];
        }
        __syncthreads();
    }
    const u32 *allowed = args.allowed && args.allowed_at[row] != KVASIR_NONE ? args.allowed + args.allowed_at[row] : nullptr;
    u64 best = 0;
    f32 max = -INFINITY;
    for (u32 i = thread; i < args.vocab; i += threads) {
        f32 value = logits[i];
        if (allowed && !(allowed[i / 32] >> i % 32 & 1)) logits[i] = value = -INFINITY;
        max = fmaxf(max, value);
        u64 rank = value == -INFINITY ? 0 : rank_of(value, i);
        if (rank > best) best = rank;
    }
    ranks[thread] = best;
    max = warp_max(max);
    if (lane == 0) room[thread / 32] = max;
    __syncthreads();
    for (u32 warp = 0; warp < threads / 32; warp++) max = fmaxf(max, room[warp]);
    __syncthreads();
    f32 sum = 0.0f;
    for (u32 i = thread; i < args.vocab; i += threads) {
        f32 value = logits[i];
        if (value != -INFINITY) sum += expf(value - max);
    }
    sum = warp_sum(sum);
    if (lane == 0) room[thread / 32] = sum;
    __syncthreads();
    if (thread == 0) {
        for (u32 warp = 1; warp < threads / 32; warp++) sum += room[warp];
        args.summary[2 * row] = max;
        args.summary[2 * row + 1] = max == -INFINITY ? max : max + logf(sum);
    }
    sort_descending(ranks, threads);
    // Nothing below it is among the largest; 0 where there are fewer.
    u64 bound = ranks[KVASIR_SHORTLIST - 1];

    u32 wanted = KVASIR_SHORTLIST;
    u64 prefix = 0;
    for (int shift = 4 * DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        __syncthreads();
        for (u32 i = thread; i < DIGITS; i += threads) counts[i] = 0;
        __syncthreads();
        for (u32 i = thread; i < args.vocab; i += threads) {
            f32 value = logits[i];
            if (value == -INFINITY) continue;
            u64 rank = rank_of(value, i);
            if (rank < bound || rank >> (shift + DIGIT_BITS) != prefix) continue;
            atomicAdd(&counts[(u32)(rank >> shift) % DIGITS], 1u);
        }
        __syncthreads();
        if (thread < 32) {
            // Each lane has neighbouring digits, lane 0 the highest ones.
            const u32 share = DIGITS / 32;
            u32 top = DIGITS - 1 - lane * share, mine = 0;
            for (u32 i = 0; i < share; i++) mine += counts[top - i];
            u32 above = mine;
            for (u32 step = 1; step < 32; step *= 2) {
                u32 higher = __shfl_up_sync(0xffffffffu, above, step);
                if (lane >= step) above += higher;
            }
            u32 all = __shfl_sync(0xffffffffu, above, 31);
            above -= mine;
            if (all < wanted) {
                if (lane == 0) found[0] = KVASIR_NONE;
            } else if (above < wanted && above + mine >= wanted) {
                u32 digit = top;
                while (above + counts[digit] < wanted) above += counts[digit--];
                found[0] = digit, found[1] = above, found[2] = counts[digit];
            }
        }
        __syncthreads();
        if (found[0] == KVASIR_NONE) {
            bound = 0; // there are not as many
            break;
        }
        prefix = prefix << DIGIT_BITS | found[0];
        wanted -= found[1];
        if (found[2] == wanted || shift == 0) {
            bound = prefix << shift > bound ? prefix << shift : bound;
            break;
        }
    }
    __syncthreads();
    if (thread == 0) found[3] = 0;
    if (thread < KVASIR_SHORTLIST) ranks[thread] = 0;
    __syncthreads();
    for (u32 i = thread; i < args.vocab; i += threads) {
        f32 value = logits[i];
        if (value == -INFINITY) continue;
        u64 rank = rank_of(value, i);
        if (rank >= bound) ranks[atomicAdd(&found[3], 1u)] = rank;
    }
    sort_descending(ranks, KVASIR_SHORTLIST);
    if (thread < KVASIR_SHORTLIST) {
        u64 rank = ranks[thread], to = (u64)row * KVASIR_SHORTLIST + thread;
        u32 token = (1u << TOKEN_BITS) - 1 - (u32)(rank & ((1u << TOKEN_BITS) - 1));
        args.tokens[to] = rank == 0 ? KVASIR_NONE : token;
        args.values[to] = rank == 0 ? -INFINITY : logits[token];
    }
}
KVASIR_EXPORT(shortlist, shortlist_args);

// SplitMix64's last step, as `kvasir_types::mix`.
KVASIR_DEVICE u64 mixed(u64 z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// -ln(-ln(u)) of the 52 bits that the host draws for a token: u = (bits + 1/2) / 2^52. Near 1 it is 1 - u that has the digits.
KVASIR_DEVICE f32 gumbel(u64 noise, u32 token) {
    const f32 unit = 1.0f / (f32)(1ull << 52);
    u64 bits = mixed(noise + 0x9e3779b97f4a7c15ull * ((u64)token + 1)) >> 12;
    f32 t = bits >> 51 ? -log1pf(-((f32)((1ull << 52) - bits) - 0.5f) * unit) : -logf(((f32)bits + 0.5f) * unit);
    return -logf(t);
}

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) perturb(const perturb_args args) {
    u32 row = blockIdx.x, i = blockIdx.y * KVASIR_ROW_THREADS + threadIdx.x;
    if (i >= args.vocab) return;
    u64 at = (u64)row * args.ld + i;
    f32 value = args.logits[at], scale = args.scale[row];
    args.out[at] = scale == 0.0f ? value : value * scale + gumbel(args.noise[row], i);
}
KVASIR_EXPORT(perturb, perturb_args);

extern "C" __global__ void __launch_bounds__(KVASIR_SHORTLIST_THREADS) pick(const pick_args args) {
    KVASIR_SHARED(f32[KVASIR_SHORTLIST_THREADS / 32], room);
    u32 row = blockIdx.x;
    const f32 *logits = args.logits + (u64)row * args.ld;
    f32 max = -INFINITY;
    for (u32 i = threadIdx.x; i < args.vocab; i += KVASIR_SHORTLIST_THREADS) max = fmaxf(max, logits[i]);
    max = warp_max(max);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = max;
    if (threadIdx.x < KVASIR_SHORTLIST) {
        u64 at = (u64)row * KVASIR_SHORTLIST + threadIdx.x;
        u32 token = args.tokens[at];
        args.values[at] = token == KVASIR_NONE ? -INFINITY : logits[token];
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 warp = 0; warp < KVASIR_SHORTLIST_THREADS / 32; warp++) max = fmaxf(max, room[warp]);
    args.max[row] = max;
}
KVASIR_EXPORT(pick, pick_args);
