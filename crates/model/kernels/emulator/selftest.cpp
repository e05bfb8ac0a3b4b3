// Tests of the emulated machine itself: that it computes what a device computes, and that it sees what a device would punish.
//
//   crates/model/kernels/emulator/build OUT_DIR && OUT_DIR/selftest

#include "../common.cuh"

#include <functional>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

#include "simt.h"

using kvemu::Kernel, kvemu::launch, kvemu::OK, kvemu::LAUNCH_FAILED, kvemu::ILLEGAL_ADDRESS, kvemu::MISALIGNED_ADDRESS;

namespace {

int failures = 0;
void check(bool holds, const char *what) {
    if (holds) return;
    printf("FAILED: %s\n", what);
    failures++;
}

struct Args { f32 *out; const f32 *in; u32 count, mode; };

template <typename Body> int run(const char *name, Body body, dim3 grid, dim3 block, u32 shared, Args args) {
    static Body *the_body;
    the_body = &body;
    Kernel kernel{name, sizeof(Args), [](const void *args) { (*the_body)(*(const Args *)args); }};
    return launch(kernel, grid, block, shared, &args);
}

u64 state = 88172645463325252ull;
u32 random_bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (u32)(state >> 16);
}
f32 random_float() { return (f32)((i32)(random_bits() % 2001) - 1000) / 500.0f; }

void products() {
    f32 a[16][16], b[16][8], c[16][8], out[16][8];
    for (auto &row : a) for (f32 &x : row) x = to_f32(to_bf16(random_float()));
    for (auto &row : b) for (f32 &x : row) x = to_f32(to_bf16(random_float()));
    for (auto &row : c) for (f32 &x : row) x = random_float();
    for (bool half : {false, true}) {
        auto pack = [half](f32 low, f32 high) { return half ? pack_f16(low, high) : pack_bf16(low, high); };
        int result = run("mma", [&](const Args &) {
            int lane = threadIdx.x, row = lane / 4, pair = lane % 4 * 2;
            u32 fa[4] = {pack(a[row][pair], a[row][pair + 1]), pack(a[row + 8][pair], a[row + 8][pair + 1]), pack(a[row][pair + 8], a[row][pair + 9]), pack(a[row + 8][pair + 8], a[row + 8][pair + 9])};
            u32 fb[2] = {pack(b[pair][row], b[pair + 1][row]), pack(b[pair + 8][row], b[pair + 9][row])};
            f32 d[4] = {c[row][pair], c[row][pair + 1], c[row + 8][pair], c[row + 8][pair + 1]};
            if (half) mma_f16(d, fa, fb);
            else mma_bf16(d, fa, fb);
            out[row][pair] = d[0], out[row][pair + 1] = d[1], out[row + 8][pair] = d[2], out[row + 8][pair + 1] = d[3];
        }, {1}, {32}, 0, {});
        check(result == OK, "mma runs");
        f64 worst = 0;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                f64 sum = c[i][j];
                for (int k = 0; k < 16; k++) sum += (f64)a[i][k] * b[k][j];
                worst = fmax(worst, fabs(sum - out[i][j]));
            }
        check(worst < 1e-5, "mma multiplies");
    }
}

void collectives() {
    std::vector<f32> out(128 * 8);
    int result = run("collectives", [](const Args &args) {
        u32 lane = threadIdx.x % 32;
        f32 *mine = args.out + threadIdx.x * 8;
        f32 x = (f32)threadIdx.x;
        mine[0] = __shfl_xor_sync(0xffffffffu, x, 5);
        mine[1] = __shfl_down_sync(0xffffffffu, x, 3);
        mine[2] = __shfl_up_sync(0xffffffffu, x, 3);
        mine[3] = __shfl_sync(0xffffffffu, x, 7, 8);
        mine[4] = (f32)__popc(__ballot_sync(0xffffffffu, lane % 3 == 0));
        mine[5] = warp_sum(x);
        mine[6] = quad_max(x);
        // Halves of a warp on their own ways.
        mine[7] = lane < 16 ? __shfl_sync(0x0000ffffu, x, 1) : __shfl_sync(0xffff0000u, x, 31);
    }, {1}, {128}, 0, {out.data(), nullptr, 0, 0});
    check(result == OK, "collectives run");
    bool right = true;
    for (u32 t = 0; t < 128; t++) {
        u32 lane = t % 32, warp = t - lane;
        f32 sum = 0;
        for (u32 i = 0; i < 32; i++) sum += (f32)(warp + i);
        f32 wanted[8] = {(f32)(warp + (lane ^ 5)), (f32)(lane + 3 < 32 ? t + 3 : t), (f32)(lane >= 3 ? t - 3 : t), (f32)(warp + lane / 8 * 8 + 7), 11, sum, (f32)(t | 3), (f32)(warp + (lane < 16 ? 1 : 31))};
        for (int i = 0; i < 8; i++) right &= out[t * 8 + i] == wanted[i];
    }
    check(right, "collectives give what a device gives");
}

void matrices() {
    bool right = true;
    int result = run("ldmatrix", [&](const Args &) {
        KVASIR_SHARED(u16[32][8], rows);
        for (int i = 0; i < 8; i++) rows[threadIdx.x][i] = (u16)(threadIdx.x * 8 + i);
        __syncwarp();
        u32 r[4], t[4];
        ldmatrix_x4(r, rows[threadIdx.x]);
        ldmatrix_x4_trans(t, rows[threadIdx.x]);
        u32 row = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
        for (u32 m = 0; m < 4; m++) {
            right &= r[m] == ((m * 8 + row) * 8 + pair | ((m * 8 + row) * 8 + pair + 1) << 16);
            right &= t[m] == ((m * 8 + pair) * 8 + row | ((m * 8 + pair + 1) * 8 + row) << 16);
        }
    }, {1}, {32}, 0, {});
    check(result == OK && right, "ldmatrix");
}

// A sum over a block through shared memory: right with its barrier; without, the poison is seen.
void barriers() {
    for (bool with : {true, false}) {
        std::vector<f32> out(6);
        int result = run("reduce", [with](const Args &args) {
            KVASIR_DYNAMIC_SHARED(raw);
            f32 *shared = (f32 *)raw;
            shared[threadIdx.x] = 1.0f;
            if (with) __syncthreads();
            f32 sum = 0;
            for (u32 i = 0; i < blockDim.x; i++) sum += shared[i];
            if (threadIdx.x == 0) args.out[blockIdx.x] = sum;
        }, {6}, {96}, 96 * 4, {out.data(), nullptr, 0, 0});
        check(result == OK, "reduce runs");
        for (f32 sum : out) check((sum == 96.0f) == with, with ? "a barrier is kept" : "a missing barrier shows");
    }
    f32 out = 0;
    check(run("named", [](const Args &args) {
        KVASIR_SHARED(f32[64], shared);
        if (threadIdx.x >= 64) return; // the third warp leaves
        shared[threadIdx.x] = 2.0f;
        named_barrier(1, 64);
        if (threadIdx.x == 0) {
            f32 sum = 0;
            for (f32 x : shared) sum += x;
            *args.out = sum;
        }
        __syncthreads();
    }, {1}, {96}, 0, {&out, nullptr, 0, 0}) == OK && out == 128.0f, "named barriers, and threads that have left");
}

void copies() {
    alignas(16) static f32 in[128];
    for (f32 &x : in) x = 3.0f;
    for (int waits : {1, 0}) {
        std::vector<f32> out(32);
        int result = run("cp.async", [waits](const Args &args) {
            KVASIR_SHARED(f32[2][128], tile);
            u32 at = threadIdx.x * 4;
            cp_async16(&tile[0][at], args.in + at);
            cp_async_commit();
            cp_async16_if(&tile[1][at], nullptr, false);
            cp_async_commit();
            if (waits) cp_async_wait<0>();
            else cp_async_wait<1>(); // the second is still under way
            args.out[threadIdx.x] = tile[0][at] + tile[1][at + 3];
        }, {1}, {32}, 0, {out.data(), in, 0, 0});
        check(result == OK, "cp.async runs");
        for (f32 x : out) check((x == 3.0f) == (waits == 1), "cp.async lands at the wait");
    }
}

// What a device would punish, with the error it would give.
void faults() {
    auto fails = [](int wanted, const char *what, auto body, u32 shared = 64, dim3 block = {64}) {
        int result = run(what, body, {2}, block, shared, {});
        if (result != wanted) printf("%s: %d\n", what, result);
        check(result == wanted, what);
    };
    fails(LAUNCH_FAILED, "a barrier that not all come to", [](const Args &) { if (threadIdx.x < 32) named_barrier(2, 64); else __syncthreads(); });
    fails(LAUNCH_FAILED, "a shuffle that not all lanes come to", [](const Args &) { if (threadIdx.x % 2) __shfl_sync(0xffffffffu, 1.0f, 0); });
    fails(LAUNCH_FAILED, "two collectives at once", [](const Args &) { if (threadIdx.x % 2) __syncwarp(); else warp_sum(1.0f); });
    fails(ILLEGAL_ADDRESS, "no address", [](const Args &args) { *(volatile f32 *)args.out = 1.0f; });
    fails(ILLEGAL_ADDRESS, "beyond dynamic shared memory", [](const Args &) { KVASIR_DYNAMIC_SHARED(s); s[64] = 1; });
    fails(ILLEGAL_ADDRESS, "far beyond dynamic shared memory", [](const Args &) { KVASIR_DYNAMIC_SHARED(s); ((volatile unsigned char *)s)[4096] = 1; });
    fails(MISALIGNED_ADDRESS, "a wide load that is not aligned", [](const Args &) { KVASIR_DYNAMIC_SHARED(s); load16(s + 8); });
    fails(LAUNCH_FAILED, "an assertion", [](const Args &) { KVASIR_ASSERT(threadIdx.x < 10); });
    fails(LAUNCH_FAILED, "a block that is no multiple of a warp", [](const Args &) {}, 0, {40});
    fails(OK, "nothing at all, after all that", [](const Args &) { __syncthreads(); });
}

void numbers() {
    bool right = true;
    for (u32 byte = 0; byte < 256; byte++) {
        e4m3 x{(u8)byte};
        u32 low, high, f16_low, f16_high;
        e4m3x4_to_bf16(byte | byte << 24, low, high);
        e4m3x4_to_f16(byte | byte << 24, f16_low, f16_high);
        right &= to_e4m3(to_f32(x)).bits == byte;
        if ((byte & 0x7f) == 0x7f) continue;
        right &= bits_of(low_bf16(low)) == bits_of(to_f32(x)) && bits_of(high_bf16(high)) == bits_of(to_f32(x));
        right &= bits_of(low_f16(f16_low)) == bits_of(to_f32(x)) && bits_of(high_f16(f16_high)) == bits_of(to_f32(x));
    }
    check(right, "e4m3 comes back");
    for (u32 i = 0; i < 65536; i++) {
        f16 h{(u16)i};
        bf16 b{(u16)i};
        if (to_f32(h) == to_f32(h)) right &= to_f16(to_f32(h)).bits == i;
        if (to_f32(b) == to_f32(b)) right &= to_bf16(to_f32(b)).bits == i;
    }
    check(right, "f16 and bf16 come back");
    check(to_bf16(float_of(0x3f808000)).bits == 0x3f80 && to_bf16(float_of(0x3f818000)).bits == 0x3f82, "ties go to even");
    check(to_f16(70000.0f).bits == 0x7c00 && to_e4m3(1e9f).bits == 0x7e && to_e4m3(-INFINITY).bits == 0xfe, "beyond the largest");
}

} // namespace

int main() {
    numbers();
    products();
    collectives();
    matrices();
    barriers();
    copies();
    fprintf(stderr, "-- faults, as wanted:\n");
    faults();
    printf(failures == 0 ? "all right\n" : "%d failures\n", failures);
    return failures != 0;
}
