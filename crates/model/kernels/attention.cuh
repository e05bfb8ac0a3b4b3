// What all kernels of attention share: who sees what, how parts of a row become one, and where a row's result goes.
//
//     for each part of KVASIR_PART positions, counted from the sequence's beginning:
//         for each tile of KVASIR_TILE positions in it:
//             scores[row][j] = q[row] · k[j]
//             weights relative to the largest score so far; what was summed before is rescaled
//             sums[row]     += Σ_j weight[row][j] · v[j]
//     the parts of a row are merged in ascending order
//
// Parts and tiles start at multiples of their size of the POSITION, and a row never computes with a value it does not see. So
// a row's sums have one order, whatever chunk, batch or block of the grid it is in.
#pragma once

#include "kv.cuh"
#include "rows.cuh"

static const f32 LOWEST = -INFINITY;

template <bool exact> KVASIR_DEVICE f32 power(f32 x) { return exact ? expf(x) : fast_exp(x); }

// The first position that the token at `position` sees.
KVASIR_DEVICE u32 first_seen(u32 position, u32 window) { return window == 0 || position < window ? 0 : position + 1 - window; }

// A softmax that is under way: the largest score, and the sum of weights relative to it.
struct Running {
    f32 max, sum;
};

// Two of those over different positions become one, and by which factors their sums of values do. One that has seen nothing
// leaves the other as it is.
struct Merged {
    Running running;
    f32 mine, theirs;
};
template <bool exact> KVASIR_DEVICE Merged merge(Running mine, Running theirs) {
    if (theirs.sum == 0.0f) return {mine, 1.0f, 0.0f};
    if (mine.sum == 0.0f) return {theirs, 0.0f, 1.0f};
    f32 max = fmaxf(mine.max, theirs.max);
    f32 factor = power<exact>(mine.max - max), other = power<exact>(theirs.max - max);
    return {{max, __fmaf_rn(theirs.sum, other, __fmul_rn(mine.sum, factor))}, factor, other};
}
KVASIR_DEVICE f32 merged(const Merged &by, f32 mine, f32 theirs) {
    if (by.theirs == 0.0f) return mine;
    if (by.mine == 0.0f) return theirs;
    return __fmaf_rn(theirs, by.theirs, __fmul_rn(mine, by.mine));
}

// A unit's rows: which token and head each is.
struct UnitRow {
    u32 position, first; // what it sees: first..=position
    u64 place;           // row * heads + head
};
KVASIR_DEVICE UnitRow row_of_unit(const attend_args &args, const kvasir_unit &unit, u32 kv_head, u32 i) {
    u32 token = i / unit.heads, head = kv_head * args.group + unit.head + i % unit.heads;
    UnitRow row;
    row.position = unit.position + token;
    row.first = first_seen(row.position, args.window);
    row.place = (u64)(unit.row + token) * args.heads + head;
    return row;
}

// Where a row's sums over `part` go, in rows of the partials; KVASIR_NO_SLOT where it sees nothing of that part.
KVASIR_DEVICE u64 partial_at(const attend_args &args, const UnitRow &row, u32 part) {
    u32 first = row.first / KVASIR_PART;
    if (part < first || part > row.position / KVASIR_PART) return KVASIR_NO_SLOT;
    return row.place * args.parts + (part - first);
}

// Where a head's result begins in planes, and how many elements are its own to write, zeros beyond `v_dim`.
struct Place {
    u64 at;
    u32 width;
};
KVASIR_DEVICE Place place_of_head(u64 place, u32 heads, u32 ld, u32 head_ld) {
    u32 head = (u32)(place % heads);
    return {place / heads * ld + (u64)head * head_ld, head + 1 == heads ? ld - head * head_ld : head_ld};
}

// A score as the softmax takes it. As on the processor, tanh z = 1 - 2 / (exp(2 z) + 1), exact to a millionth of the cap; a
// division that may be off in the last place is as good there.
KVASIR_DEVICE f32 scored(f32 dot, f32 scale, f32 cap) {
    f32 score = dot * scale;
    if (cap == 0.0f) return score;
    return cap * (1.0f - fast_divide(2.0f, expf(2.0f * fast_divide(score, cap)) + 1.0f));
}
