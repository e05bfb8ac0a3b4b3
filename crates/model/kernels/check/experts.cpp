// Routed experts, and the few tokens that sampling looks at.
#include "check.h"

#include <algorithm>

namespace check {
namespace {

// The indices of the largest values, largest first, the lower one on a tie.
template <typename T> std::vector<u32> best(const std::vector<T> &values, u32 count) {
    std::vector<u32> order(values.size());
    for (u32 i = 0; i < order.size(); i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](u32 a, u32 b) { return values[a] > values[b]; });
    order.resize(std::min((size_t)count, order.size()));
    return order;
}

void routed(bool sigmoid, bool normalise, bool corrected, bool grouped) {
    u32 size = between(1, 9), count = grouped ? between(2, 8) : 1, experts = size * count, rows = between(1, 40);
    u32 kept = grouped ? between(1, count) : 0, of_group = between(1, 3), top_k = between(1, std::min((u32)KVASIR_MAX_TOP_K, grouped ? kept * size : experts));
    // Scores in steps, so that there are ties and no other close calls.
    Memory<f32> scores((size_t)rows * experts), correction(experts), weights(rows * top_k);
    Memory<u32> chosen(rows * top_k);
    for (u32 i = 0; i < rows * experts; i++) scores[i] = 0.25f * (f32)between(0, 12) - 1.5f;
    for (u32 i = 0; i < experts; i++) correction[i] = 0.125f * (f32)between(0, 3);
    route_args args = {scores,  corrected ? (f32 *)correction : nullptr, chosen, weights, rows, experts, experts, top_k,
                       sigmoid ? (u32)KVASIR_SIGMOID : (u32)KVASIR_SOFTMAX, grouped ? count : 0, kept, of_group, normalise, 2.5f};
    launch("route", {rows}, KVASIR_ROW_THREADS, 12 * experts, args);
    for (u32 r = 0; r < rows; r++) {
        std::vector<f32> share(experts), rank(experts), worth;
        f64 max = -INFINITY, sum = 0, of_chosen = 0;
        for (u32 i = 0; i < experts; i++) max = std::fmax(max, scores[r * experts + i]);
        for (u32 i = 0; i < experts; i++) sum += std::exp(scores[r * experts + i] - max);
        for (u32 i = 0; i < experts; i++) {
            f64 score = scores[r * experts + i];
            share[i] = (f32)(sigmoid ? 1 / (1 + std::exp(-score)) : std::exp(score - max) / sum);
            rank[i] = share[i] + (corrected ? correction[i] : 0);
        }
        for (u32 g = 0; grouped && g < count; g++) {
            std::vector<f32> members(rank.begin() + g * size, rank.begin() + (g + 1) * size);
            f32 total = 0;
            for (u32 i : best(members, of_group)) total += members[i];
            worth.push_back(total);
        }
        std::vector<u32> groups = best(worth, kept);
        for (u32 i = 0; grouped && i < experts; i++) {
            if (std::find(groups.begin(), groups.end(), i / size) == groups.end()) rank[i] = -INFINITY;
        }
        std::vector<u32> wanted = best(rank, top_k);
        for (u32 expert : wanted) of_chosen += share[expert];
        std::sort(wanted.begin(), wanted.end());
        for (u32 n = 0; n < top_k; n++) {
            require("route", chosen[r * top_k + n] == wanted[n]);
            record("route", off(weights[r * top_k + n], share[wanted[n]] / (normalise ? of_chosen : 1) * 2.5, 1e-6), 1e-4);
        }
    }

    u32 room = std::min(experts, rows * top_k) + 2, next = 0, width = between(1, 300);
    Memory<kvasir_group> groups(room);
    Memory<u32> row_of(rows * top_k), place_of(rows * top_k);
    launch("group", {1}, KVASIR_GROUP_THREADS, 8 * experts, group_args{chosen, groups, row_of, place_of, rows, top_k, experts, room});
    for (u32 i = 0; i < room; i++) {
        kvasir_group group = groups[i];
        if (group.count == 0) continue;
        require("group", group.first == next && (i == 0 || groups[i - 1].matrix < group.matrix));
        next += group.count;
        for (u32 place = group.first; place < next && place < rows * top_k; place++) {
            bool found = false;
            for (u32 n = 0; n < top_k && row_of[place] < rows; n++) {
                u32 at = row_of[place] * top_k + n;
                found = found || (place_of[at] == place && chosen[at] == group.matrix);
            }
            require("group", found);
        }
    }
    require("group", next == rows * top_k);

    Memory<f32> change((size_t)rows * top_k * width), shared((size_t)rows * width), out((size_t)rows * width);
    for (u32 i = 0; i < rows * top_k * width; i++) change[i] = gauss();
    for (u32 i = 0; i < rows * width; i++) shared[i] = gauss();
    combine_args combine = {change, weights, place_of, normalise ? (f32 *)shared : nullptr, out, rows, top_k, width, width, width, width};
    launch("combine", {rows, ceil(width, KVASIR_ROW_THREADS)}, KVASIR_ROW_THREADS, 0, combine);
    for (u32 i = 0; i < rows * width; i++) {
        f64 wanted = normalise ? shared[i] : 0;
        for (u32 n = 0; n < top_k; n++) {
            u32 at = i / width * top_k + n;
            wanted += (f64)weights[at] * change[(size_t)place_of[at] * width + i % width];
        }
        record("combine", off(out[i], wanted, 1), 1e-4);
    }
}

// How the logits of a case are spread.
enum Spread { NORMAL, EQUAL, RISING, FALLING, FEW_VALUES, NOTHING };

void listed(u32 vocab, Spread spread, bool dense_mask) {
    u32 rows = 3, ld = vocab + 5, words = ceil(vocab, 32);
    Memory<f32> logits((size_t)rows * ld), biases(8), values(rows * KVASIR_SHORTLIST), summary(rows * 2);
    Memory<u32> allowed(words), allowed_at(rows), bias_tokens(8), bias_at(rows + 1), tokens(rows * KVASIR_SHORTLIST);
    for (u32 i = 0; i < rows * ld; i++) {
        u32 token = i % ld;
        logits[i] = spread == NORMAL ? 4 * gauss() : spread == EQUAL ? 1.0f : spread == RISING ? (f32)token
                    : spread == FALLING ? -(f32)token : spread == FEW_VALUES ? (f32)between(0, 40) : token < vocab ? -INFINITY : 1.0f;
    }
    for (u32 i = 0; i < words; i++) allowed[i] = dense_mask ? (u32)(random()() & random()()) : i == 3 ? 0x80000001u : 0;
    allowed_at[0] = KVASIR_NONE, allowed_at[1] = 0, allowed_at[2] = KVASIR_NONE;
    bias_at[0] = 0, bias_at[1] = 2, bias_at[2] = 2, bias_at[3] = 5;
    for (u32 i = 0; i < 5; i++) bias_tokens[i] = (i * 37 + 5) % vocab, biases[i] = i % 2 == 0 ? -100.0f : 100.0f;
    std::vector<f32> before = logits.copy();
    shortlist_args args = {logits, allowed, allowed_at, bias_tokens, biases, bias_at, tokens, values, summary, rows, vocab, ld, 0};
    launch("shortlist", {rows}, KVASIR_SHORTLIST_THREADS, 0, args);
    for (u32 r = 0; r < rows; r++) {
        std::vector<f32> row(before.begin() + r * ld, before.begin() + r * ld + vocab);
        for (u32 i = bias_at[r]; i < bias_at[r + 1]; i++) row[bias_tokens[i]] += biases[i];
        for (u32 i = 0; allowed_at[r] != KVASIR_NONE && i < vocab; i++) {
            if ((allowed[i / 32] >> i % 32 & 1) == 0) row[i] = -INFINITY;
        }
        std::vector<u32> order = best(row, KVASIR_SHORTLIST);
        f64 max = row[order[0]], sum = 0;
        for (u32 i = 0; i < KVASIR_SHORTLIST; i++) {
            bool there = i < order.size() && row[order[i]] != -INFINITY;
            require("shortlist", tokens[r * KVASIR_SHORTLIST + i] == (there ? order[i] : KVASIR_NONE));
            require("shortlist", values[r * KVASIR_SHORTLIST + i] == (there ? row[order[i]] : -INFINITY));
        }
        require("shortlist", summary[2 * r] == (f32)max);
        for (f32 value : row) sum += max == -INFINITY ? 0 : std::exp(value - max);
        if (max == -INFINITY) require("shortlist", summary[2 * r + 1] == -INFINITY);
        else record("shortlist", off(summary[2 * r + 1], max + std::log(sum), 1), 1e-5);
    }
}

// Noise on logits, as the host makes it, in double precision; and the logits of what was listed.
void noisy(u32 vocab) {
    u32 rows = 3, ld = vocab + 3;
    Memory<f32> logits((size_t)rows * ld), out((size_t)rows * ld), scale(rows), values(rows * KVASIR_SHORTLIST), max(rows);
    Memory<u64> noise(rows);
    Memory<u32> tokens(rows * KVASIR_SHORTLIST);
    for (u32 i = 0; i < rows * ld; i++) logits[i] = i % 11 == 0 ? -INFINITY : 4 * gauss();
    for (u32 r = 0; r < rows; r++) noise[r] = random()(), scale[r] = r == 1 ? 0.0f : 0.5f + (f32)r;
    for (u32 i = 0; i < rows * KVASIR_SHORTLIST; i++) tokens[i] = i % 5 == 4 ? KVASIR_NONE : between(0, vocab - 1);
    launch("perturb", {rows, ceil(vocab, KVASIR_ROW_THREADS)}, KVASIR_ROW_THREADS, 0, perturb_args{logits, noise, scale, out, rows, vocab, ld, 0});
    launch("pick", {rows}, KVASIR_SHORTLIST_THREADS, 0, pick_args{logits, tokens, values, max, rows, vocab, ld, 0});
    for (u32 r = 0; r < rows; r++) {
        f32 largest = -INFINITY;
        for (u32 i = 0; i < vocab; i++) {
            f32 logit = logits[r * ld + i];
            largest = logit > largest ? logit : largest;
            u64 z = noise[r] + 0x9e3779b97f4a7c15ull * ((u64)i + 1);
            z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
            z = (z ^ z >> 27) * 0x94d049bb133111ebull;
            z = (z ^ z >> 31) >> 12;
            f64 gumbel = -std::log(-std::log(((f64)z + 0.5) / 4503599627370496.0));
            if (logit == -INFINITY || r == 1) require("perturb", out[r * ld + i] == logit);
            else record("perturb", off(out[r * ld + i], (f64)logit * scale[r] + gumbel, 1), 1e-5);
        }
        require("pick", max[r] == largest);
        for (u32 i = r * KVASIR_SHORTLIST; i < (r + 1) * KVASIR_SHORTLIST; i++) {
            require("pick", values[i] == (tokens[i] == KVASIR_NONE ? -INFINITY : (f32)logits[r * ld + tokens[i]]));
        }
    }
}

} // namespace

void experts(u32 rounds) {
    for (u32 round = 0; round < rounds; round++) routed(round / 2 % 2 == 1, round % 4 > 1, round % 3 == 0, round % 2 == 1);
}

void shortlist(u32 rounds) {
    const u32 vocabularies[] = {128, 256, 1000, 60000};
    for (u32 round = 0; round < rounds; round++) {
        listed(round < 4 ? vocabularies[round] : between(128, 40000), (Spread)(round % 6), round % 2 == 0);
        noisy(round < 4 ? vocabularies[round] : between(128, 40000));
    }
}

} // namespace check
