// Products of fragments, m16n8k16: from the bits of 32 lanes to small matrices, and back.
//
// A device adds a step's sixteen products in an order and precision of its own; here they are added one by one, fused. What
// matters is that the result is a function of the operands alone.

#include "emulate.h"

namespace kvemu {
namespace {

typedef f32 Row __attribute__((vector_size(32)));

f32 bf16_to_f32(u16 bits) {
    u32 wide = (u32)bits << 16;
    f32 x;
    memcpy(&x, &wide, 4);
    return x;
}

template <f32 (*widen)(u16)> void mma(void **lanes) {
    alignas(64) u16 a_bits[16][16], b_bits[16][8];
    alignas(64) f32 a[16][16];
    Row b[16], d[16];
    for (int lane = 0; lane < 32; lane++) {
        const Mma &mine = *(const Mma *)lanes[lane];
        int row = lane / 4, pair = lane % 4 * 2;
        memcpy(&a_bits[row][pair], &mine.a[0], 4);
        memcpy(&a_bits[row + 8][pair], &mine.a[1], 4);
        memcpy(&a_bits[row][pair + 8], &mine.a[2], 4);
        memcpy(&a_bits[row + 8][pair + 8], &mine.a[3], 4);
        b_bits[pair][row] = (u16)mine.b[0], b_bits[pair + 1][row] = (u16)(mine.b[0] >> 16);
        b_bits[pair + 8][row] = (u16)mine.b[1], b_bits[pair + 9][row] = (u16)(mine.b[1] >> 16);
        memcpy((f32 *)&d[row] + pair, mine.d, 8);
        memcpy((f32 *)&d[row + 8] + pair, mine.d + 2, 8);
    }
    for (int i = 0; i < 256; i++) ((f32 *)a)[i] = widen(((u16 *)a_bits)[i]);
    for (int i = 0; i < 128; i++) ((f32 *)b)[i] = widen(((u16 *)b_bits)[i]);
    for (int row = 0; row < 16; row++) {
        Row sum = d[row];
        for (int k = 0; k < 16; k++) sum = a[row][k] * b[k] + sum;
        d[row] = sum;
    }
    for (int lane = 0; lane < 32; lane++) {
        const Mma &mine = *(const Mma *)lanes[lane];
        int row = lane / 4, pair = lane % 4 * 2;
        memcpy(mine.d, (f32 *)&d[row] + pair, 8);
        memcpy(mine.d + 2, (f32 *)&d[row + 8] + pair, 8);
    }
}

} // namespace

void mma_bf16(void **lanes, u32) { mma<bf16_to_f32>(lanes); }
void mma_f16(void **lanes, u32) { mma<f16_to_f32>(lanes); }

} // namespace kvemu
