// Where cached keys and values lie, and how numbers become elements of the cache: as `cpu/kv.rs`, bit for bit.
#pragma once

#include "abi.h"
#include "common.cuh"

KVASIR_DEVICE u32 bytes_of(u32 dtype) { return dtype == KVASIR_F32 ? 4 : dtype == KVASIR_E4M3 ? 1 : 2; }

// The key, or the value, of KV head `head` at `slot` of a block. Where values are part of the keys they begin where keys do.
KVASIR_DEVICE u8 *key_at(const kvasir_kv &kv, u32 block, u32 slot, u32 head) {
    u64 row = (u64)head * kv.block_size + slot;
    return kv.arena + block * kv.block_bytes + kv.keys + row * kv.k_dim * bytes_of(kv.dtype);
}
KVASIR_DEVICE u8 *value_at(const kvasir_kv &kv, u32 block, u32 slot, u32 head) {
    if (kv.v_dim == 0) return key_at(kv, block, slot, head);
    u64 row = (u64)head * kv.block_size + slot;
    return kv.arena + block * kv.block_bytes + kv.values + row * kv.v_dim * bytes_of(kv.dtype);
}

// Writes element `i` of a key or value. In f16 and e4m3 what is beyond the range becomes the largest there is: an infinite key
// would make its whole row of attention NaN. A NaN stays one.
KVASIR_DEVICE void put_cached(u8 *row, u32 dtype, u32 i, f32 value) {
    switch (dtype) {
    case KVASIR_BF16: ((bf16 *)row)[i] = to_bf16(value); break;
    case KVASIR_F16: ((f16 *)row)[i] = to_f16(value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value); break;
    case KVASIR_F32: ((f32 *)row)[i] = value; break;
    default: ((e4m3 *)row)[i] = to_e4m3(value);
    }
}
