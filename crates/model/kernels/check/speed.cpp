// How fast single kernels are, as shares of what plain copies reach in the same run: what no whole step can show.
#include "check.h"

#include <algorithm>
#include <chrono>
#include <functional>

namespace check {
namespace {

// Of some rounds the median, in seconds; each of as many calls that the time to start one does not count.
double median(bool quick, const std::function<void()> &call) {
    u32 calls = quick ? 1 : 20, rounds = quick ? 1 : 9;
    std::vector<double> times;
    for (u32 round = 0; round <= rounds; round++) { // the first does not count
        auto start = std::chrono::steady_clock::now();
        for (u32 i = 0; i < calls; i++) call();
        wait();
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls);
    }
    times.erase(times.begin());
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

struct Told {
    FILE *json;
    bool quick, first = true, right = true;
    void row(const std::string &what, double bytes, double seconds, double limit, double goal) {
        double share = bytes / seconds / limit;
        bool met = share >= goal || quick;
        right = right && met;
        printf("%-44s %8.1f GB/s, %.3f of copies (goal %.2f) %s\n", what.c_str(), bytes / seconds / 1e9, share, goal,
               quick ? "" : met ? "ok" : "SLOW");
        if (json == nullptr) return;
        fprintf(json, "%s{\"what\": \"%s\", \"bytes_per_second\": %.6g, \"of_copies\": %.6g, \"goal\": %.2f, \"met\": %s}",
                first ? "[" : ", ", what.c_str(), bytes / seconds, share, goal, quick ? "null" : met ? "true" : "false");
        first = false;
    }
};

// Keys and values of Llama-3.1-8B's dimensions in blocks of 16, one layer, in f16.
constexpr u32 HEADS = 32, KV_HEADS = 8, DIM = 128, BLOCK = 16;
constexpr u64 TOKEN_BYTES = 2 * KV_HEADS * DIM * 2, BLOCK_BYTES = BLOCK * TOKEN_BYTES;

kvasir_kv cache(u64 arena) {
    return {(u8 *)arena, BLOCK_BYTES, 0, BLOCK_BYTES / 2, BLOCK, KV_HEADS, DIM, DIM, KVASIR_F16, 0};
}

// The blocks of every sequence lie scattered, as they do after a while.
std::vector<u32> scattered(u32 blocks) {
    std::vector<u32> ids(blocks);
    for (u32 i = 0; i < blocks; i++) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), random());
    return ids;
}

// Attention of `batch` tokens that are written at once, each after `context` others: reads every key and value once.
void attention(Told &told, u32 batch, u32 context, double copies) {
    u32 per_sequence = ceil(context + 1, BLOCK), parts = ceil(context + 1, KVASIR_PART);
    u64 bytes = (u64)batch * per_sequence * BLOCK_BYTES;
    Device arena(bytes), q((u64)batch * HEADS * DIM * 4), hi((u64)batch * HEADS * DIM * 2);
    Device sums((u64)batch * HEADS * parts * DIM * 4), maxima((u64)batch * HEADS * parts * 8);
    arena.fill(0x11), q.fill(0); // small numbers; zeros
    std::vector<kvasir_unit> units;
    std::vector<u32> rows, positions;
    for (u32 i = 0; i < batch; i++) {
        units.push_back({i, 1, context, i * per_sequence, 0, HEADS / KV_HEADS});
        rows.push_back(i), positions.push_back(context);
    }
    Device unit(units), tables(scattered(batch * per_sequence)), listed(rows), position(positions);
    attend_args args = {};
    args.kv = cache(arena.at);
    args.q = (f32 *)q.at, args.units = (kvasir_unit *)unit.at, args.tables = (u32 *)tables.at;
    args.partial_sums = (f32 *)sums.at, args.partial_max = (f32 *)maxima.at, args.hi = (u16 *)hi.at;
    args.scale = 0.0883883f, args.heads = HEADS, args.group = HEADS / KV_HEADS, args.v_dim = DIM;
    args.parts = parts, args.ld = HEADS * DIM, args.head_ld = DIM;
    merge_args merge = {};
    merge.partial_sums = args.partial_sums, merge.partial_max = args.partial_max, merge.rows = (u32 *)listed.at;
    merge.positions = (u32 *)position.at, merge.hi = args.hi, merge.count = batch, merge.heads = HEADS, merge.v_dim = DIM;
    merge.parts = parts, merge.ld = args.ld, merge.head_ld = DIM, merge.fast = KVASIR_FAST;
    double seconds = median(told.quick, [&] {
        fire("attend_decode_f16_128_fast", {batch, KV_HEADS, parts}, KVASIR_ATTEND_THREADS, KVASIR_DECODE_SHARED(DIM, 2, 1), args);
        fire("attend_merge", {batch, HEADS}, KVASIR_ROW_THREADS, 0, merge);
    });
    told.row("attention, batch " + std::to_string(batch) + ", " + std::to_string(context) + " tokens",
             (double)batch * (context + 1) * TOKEN_BYTES, seconds, copies, 0.8);
}

// Keys and values of a layer to the arena that others see, beside a plain copy.
void mirror(Told &told, u32 tokens) {
    u32 blocks = tokens / BLOCK;
    u64 bytes = (u64)blocks * BLOCK_BYTES;
    Device arena(bytes);
    arena.fill(0x11);
    Shared host(bytes);
    std::vector<kvasir_run> runs;
    for (u32 block : scattered(blocks)) runs.push_back({block, 0, BLOCK});
    Device list(runs);
    mirror_args args = {};
    args.kv = cache(arena.at), args.to = cache(host.device), args.runs = (kvasir_run *)list.at, args.count = blocks;
    double plain = bytes / median(told.quick, [&] { host.download(arena.at, bytes); });
    double seconds = median(told.quick, [&] { fire("mirror", {blocks, KV_HEADS}, KVASIR_ROW_THREADS, 0, args); });
    told.row("blocks to the host, " + std::to_string(blocks), (double)bytes, seconds, plain, 0.8);
}

} // namespace

bool speed(bool quick, const char *json) {
    Told told = {json == nullptr ? nullptr : fopen(json, "w"), quick};
    if (json != nullptr && told.json == nullptr) {
        fprintf(stderr, "check: %s cannot be written\n", json);
        return false;
    }
    u64 bytes = quick ? 1 << 20 : 1 << 30;
    double copies; // both what is read and what is written
    {
        Device from(bytes), to(bytes);
        from.fill(1), to.fill(2);
        copies = 2 * bytes / median(quick, [&] { copy(to.at, from.at, bytes); });
    }
    printf("copies within the device %.0f GB/s\n", copies / 1e9);
    if (quick) {
        attention(told, 2, 300, copies), mirror(told, 256);
    } else {
        attention(told, 64, 2048, copies), attention(told, 1, 65536, copies), mirror(told, 65536);
    }
    if (told.json != nullptr) fprintf(told.json, "]\n"), fclose(told.json);
    return told.right;
}

} // namespace check
