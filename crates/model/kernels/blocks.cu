// Bytes on their way: blocks of the cache within the arena, to the arena that others see, and packed for a transfer; and what
// ranks have gathered.
#include "kv.cuh"

// Copies as wide as both sides are aligned; `thread` of `threads` does its share.
KVASIR_DEVICE void copy_bytes(u8 *to, const u8 *from, u64 bytes, u64 thread, u64 threads) {
    u64 odd = (u64)to | (u64)from | bytes;
    if (odd % 16 == 0) {
        for (u64 i = thread; i < bytes / 16; i += threads) store16(to + 16 * i, load16(from + 16 * i));
    } else if (odd % 4 == 0) {
        for (u64 i = thread; i < bytes / 4; i += threads) ((u32 *)to)[i] = ((const u32 *)from)[i];
    } else {
        for (u64 i = thread; i < bytes; i += threads) to[i] = from[i];
    }
}

KVASIR_DEVICE u64 thread_in_row_of_grid() { return (u64)blockIdx.y * blockDim.x + threadIdx.x; }
KVASIR_DEVICE u64 threads_in_row_of_grid() { return (u64)gridDim.y * blockDim.x; }

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) copy_blocks(const copy_blocks_args args) {
    const u8 *from = args.arena + args.pairs[2 * blockIdx.x] * args.block_bytes;
    u8 *to = args.arena + args.pairs[2 * blockIdx.x + 1] * args.block_bytes;
    copy_bytes(to, from, args.block_bytes, thread_in_row_of_grid(), threads_in_row_of_grid());
}
KVASIR_EXPORT(copy_blocks, copy_blocks_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) mirror(const mirror_args args) {
    kvasir_run run = args.runs[blockIdx.x];
    u32 head = blockIdx.y, element = bytes_of(args.kv.dtype);
    const u8 *keys = key_at(args.kv, run.block, run.slot, head);
    copy_bytes(key_at(args.to, run.block, run.slot, head), keys, (u64)run.count * args.kv.k_dim * element, threadIdx.x, blockDim.x);
    if (args.kv.v_dim == 0) return;
    const u8 *values = value_at(args.kv, run.block, run.slot, head);
    copy_bytes(value_at(args.to, run.block, run.slot, head), values, (u64)run.count * args.kv.v_dim * element, threadIdx.x, blockDim.x);
}
KVASIR_EXPORT(mirror, mirror_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) gather_blocks(const move_blocks_args args) {
    const u8 *from = args.arena + args.blocks[blockIdx.x] * args.block_bytes + args.at;
    copy_bytes(args.packed + blockIdx.x * args.bytes, from, args.bytes, thread_in_row_of_grid(), threads_in_row_of_grid());
}
KVASIR_EXPORT(gather_blocks, move_blocks_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) scatter_blocks(const move_blocks_args args) {
    u8 *to = args.arena + args.blocks[blockIdx.x] * args.block_bytes + args.at;
    copy_bytes(to, args.packed + blockIdx.x * args.bytes, args.bytes, thread_in_row_of_grid(), threads_in_row_of_grid());
}
KVASIR_EXPORT(scatter_blocks, move_blocks_args);

extern "C" __global__ void __launch_bounds__(KVASIR_ROW_THREADS) side_by_side(const side_by_side_args args) {
    u64 row = blockIdx.x, rank = blockIdx.y, ranks = gridDim.y;
    const u8 *from = args.from + (rank * args.rows + row) * args.from_stride;
    u8 *whole = args.to + row * args.to_stride;
    copy_bytes(whole + rank * args.bytes, from, args.bytes, threadIdx.x, blockDim.x);
    if (rank + 1 < ranks) return;
    for (u64 i = ranks * args.bytes + threadIdx.x; i < args.to_stride; i += blockDim.x) whole[i] = 0;
}
KVASIR_EXPORT(side_by_side, side_by_side_args);
