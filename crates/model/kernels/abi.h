/* What kernels take and how they are launched: the seam between CUDA C++ and the host.
 *
 * Plain C with fixed widths, so that `src/cuda/abi.rs` can mirror it field by field. A kernel is
 * `extern "C" __global__ void NAME(const NAME_args args)` with its struct by value; every pointer is device memory.
 *
 * Words used below:
 *   planes   activations as products take them: bf16 matrices `hi` = bf16(x) and `lo` = bf16(x - hi), rows of `ld` elements,
 *            `ld` a multiple of KVASIR_K_UNIT, and elements beyond the row's width are ZERO (whoever writes planes writes
 *            those too). Fast products use `hi` alone; where a `lo` pointer is null it is not written.
 *   weights  row-major, `ld` elements a row, `ld` a multiple of KVASIR_K_UNIT, padded with zero bits by who uploads them;
 *            the base is aligned to 16 bytes. All five dtypes.
 *   grid     said as (x, y, z); a block is one-dimensional. ceil(a / b) rounds up.
 *
 * Pointers are 16-byte aligned unless said otherwise. "null" is 0.
 */
#ifndef KVASIR_ABI_H
#define KVASIR_ABI_H

#include "types.h"

/* Element types of weights and of cached keys and values. */
#define KVASIR_BF16 0
#define KVASIR_F16 1
#define KVASIR_F32 2
#define KVASIR_E4M3 3
#define KVASIR_I8 4

/* Arithmetic. */
#define KVASIR_EXACT 0
#define KVASIR_FAST 1

/* Activations of an MLP. */
#define KVASIR_SILU 0
#define KVASIR_GELU_TANH 1

/* The inputs' width of every product is padded to a multiple of this, and cut in so many slices. Slice s of u units holds
 * the units u*s/8 .. u*(s+1)/8 (integer division). */
#define KVASIR_K_UNIT 64
#define KVASIR_K_SLICES 8

/* Attention: positions of a part (sums begin anew) and of a tile (one softmax step). */
#define KVASIR_PART 256
#define KVASIR_TILE 64

/* No slot, no block, no row. */
#define KVASIR_NO_SLOT 0xffffffffffffffffull
#define KVASIR_NONE 0xffffffffu

/* Where the keys and values of one layer are: the arena, and the layer's place in a block. Key of KV head h at slot s of
 * block b: arena + b*block_bytes + keys + (h*block_size + s)*k_dim*sizeof(dtype); values likewise. */
typedef struct {
    uint8_t *arena;
    uint64_t block_bytes;
    uint64_t keys;   /* bytes from the block's beginning */
    uint64_t values; /* the same; unused where v_dim is 0 */
    uint32_t block_size;
    uint32_t kv_heads;
    uint32_t k_dim;
    uint32_t v_dim; /* 0: values are the first elements of keys */
    uint32_t dtype;
    uint32_t pad;
} kvasir_kv;

/* ---- rows.cu: block KVASIR_ROW_THREADS, no dynamic shared memory ---------------------------------------------------- */
#define KVASIR_ROW_THREADS 256

/* x[r] = weight[token[r]] * row scale * scale. Grid (rows). */
typedef struct {
    const void *weight;       /* [vocab][ld] of dtype */
    const float *row_scale;   /* [vocab] or null */
    const uint32_t *tokens;   /* [rows] */
    float *x;                 /* [rows][width] */
    uint32_t rows, width, ld, dtype;
    float scale;
    uint32_t pad;
} embed_args;

/* x += post_norm(change); planes = norm(x). Any of the two may be missing. Grid (rows).
 * rms norm: v * (1 / sqrt(mean(v*v) + eps)) * weight, weights with their offset added already. */
typedef struct {
    float *x;                  /* [rows][ld_x]: written only where there is a change */
    const float *change;       /* [rows][ld_change] or null */
    const float *post_weight;  /* [width] or null: the change is added as it is */
    const float *weight;       /* [width] or null: no planes */
    uint16_t *hi, *lo;         /* [rows][ld] */
    uint32_t rows, width, ld_x, ld_change, ld;
    float eps, post_eps;
    uint32_t pad;
} rms_norm_args;

/* planes = activation(src[.., 0..width]) * src[.., width..2*width]. Grid (rows, ceil(ld / KVASIR_ROW_THREADS)).
 * Names: gate_exact, gate_fast. */
typedef struct {
    const float *src; /* [rows][ld_src], gate beside up */
    uint16_t *hi, *lo; /* [rows][ld] */
    uint32_t rows, width, ld_src, ld, activation, pad;
} gate_args;

/* planes = src. Grid (rows, ceil(ld / KVASIR_ROW_THREADS)). */
typedef struct {
    const float *src; /* [rows][ld_src] */
    uint16_t *hi, *lo; /* [rows][ld] */
    uint32_t rows, width, ld_src, ld;
} split_args;

/* y = cap * tanh(y / cap), in place. Grid (ceil(count / KVASIR_ROW_THREADS)). */
typedef struct {
    float *y;
    uint64_t count;
    float cap;
    uint32_t pad;
} soft_cap_args;

/* to[r] = from[row_of[r]]. Rows of `bytes` bytes, a multiple of 4, `from_stride` and `to_stride` bytes apart (multiples of 4).
 * `to` must not overlap `from`. Grid (rows). */
typedef struct {
    const void *from;
    void *to;
    const uint32_t *row_of; /* [rows] */
    uint64_t bytes, from_stride, to_stride;
    uint32_t rows, pad;
} gather_rows_args;

/* What ranks have gathered, rank by rank, as whole rows: to[r] = from[0][r] ‖ from[1][r] ‖ …, then zeros up to `to_stride`. Rows
 * of a rank are `bytes` bytes, `from_stride` apart; all of these are multiples of 2. Grid (rows, ranks). */
typedef struct {
    const uint8_t *from; /* [ranks][rows][from_stride] */
    uint8_t *to;         /* [rows][to_stride] */
    uint64_t bytes, from_stride, to_stride;
    uint32_t rows, pad;
} side_by_side_args;

/* y = y * scale + bias, for products that cuBLASLt made. Grid (rows, ceil(width / KVASIR_ROW_THREADS)). */
typedef struct {
    float *y;           /* [rows][ld] */
    const float *scale; /* [width] or null */
    const float *bias;  /* [width] or null */
    uint32_t rows, width, ld, pad;
} scale_bias_args;

/* to = from as bf16 (or f16 where `to_f16`), multiplied by the scale where one is given, for cuBLASLt.
 * Grid (rows, ceil(ld / KVASIR_ROW_THREADS)); writes all `ld` columns. */
typedef struct {
    const void *from;   /* [rows][ld] of dtype */
    const float *scale; /* null or [rows] */
    uint16_t *to;       /* [rows][ld] */
    uint32_t rows, ld, dtype, pad, to_f16, pad2;
} widen_args;

/* ---- rope.cu: block KVASIR_ROW_THREADS, no dynamic shared memory ---------------------------------------------------- */

/* cos/sin[r][i] of angle f32(positions[r]) * frequency[i], computed in f64, times magnitude. Once per step and rotation.
 * Grid (rows). */
typedef struct {
    const uint32_t *positions; /* [rows] */
    const float *frequencies;  /* [half] */
    float *cos, *sin;          /* [rows][half] */
    uint32_t rows, half;
    float magnitude;
    uint32_t pad;
} rotations_args;

/* Queries and keys normalised (where there is a norm) and rotated, halves being pairs; queries to q_out, keys and values into
 * the cache, in whose dtype f16 and e4m3 saturate. A warp a head: grid (rows, ceil((q_heads + 2*kv_heads) / 8)) where
 * kv_heads is that of this call: 0 where only queries are wanted (q_heads is 0 where only keys and values are). */
typedef struct {
    kvasir_kv kv;
    const float *src;      /* [rows][ld_src] */
    const float *q_norm;   /* [dim] or null */
    const float *k_norm;   /* [dim] or null */
    const float *cos, *sin; /* [..][dim / 2] */
    const uint32_t *rotation_of; /* row of cos and sin of each row, or null: its own */
    const uint64_t *slots; /* [rows]: block * block_size + slot, or KVASIR_NO_SLOT */
    float *q_out;          /* [rows][q_heads][dim] */
    uint32_t rows, ld_src, q_at, k_at, v_at; /* columns of src */
    uint32_t q_heads, kv_heads, dim;
    float q_eps, k_eps;
} heads_args;

/* Latent attention: key = norm(src[..rank]) beside rotated src[rank..rank+rope] (neighbours being pairs), into the cache
 * (KV head 0, k_dim = rank + rope). Grid (rows). */
typedef struct {
    kvasir_kv kv;
    const float *src;       /* [rows][ld_src] */
    const float *norm;      /* [rank] */
    const float *cos, *sin; /* [..][rope / 2] */
    const uint32_t *rotation_of;
    const uint64_t *slots;
    uint32_t rows, ld_src, rank, rope;
    float eps;
    uint32_t pad;
} latent_keys_args;

/* Latent attention: of each head's nope beside rope, planes of nope ([rows][heads][nope_ld], zeros beyond nope), and the
 * rotated part to q_out[row][head][rank ..]. A warp a head: grid (rows, ceil(heads / 8)). */
typedef struct {
    const float *src;       /* [rows][ld_src]: [heads][nope + rope] */
    const float *cos, *sin; /* [..][rope / 2] */
    const uint32_t *rotation_of;
    uint16_t *hi, *lo;
    float *q_out;           /* [rows][heads][rank + rope] */
    uint32_t rows, ld_src, heads, nope, rope, rank, nope_ld, pad;
} latent_queries_args;

/* ---- linear.cu -------------------------------------------------------------------------------------------------------
 * out[r][n] = (sum over k of x[r][k] * w[n][k]) * scale + bias[n]. All of them give the same bits for a row.
 *
 * Names: linear_{narrow8,wide64,wide128}_{bf16,f16,f32,e4m3,i8}_{exact,fast}; there is no wide128 of f32. The number is tokens
 * of a tile. (Which fits when is the host's to say: up to 8 tokens narrow, from some 96 on wide128.)
 *
 *   narrow  block KVASIR_NARROW_THREADS, no dynamic shared memory,
 *           grid (ceil(n / KVASIR_NARROW_ROWS), y, batch): y tiles of tokens side by side, each block takes every y-th:
 *           ceil(rows / tile), or 1 with groups
 *   wide    block KVASIR_WIDE_THREADS, dynamic shared memory KVASIR_WIDE_SHARED(bytes of a weight, planes (exact 2, fast 1),
 *           tile), grid (y as above, ceil(n / KVASIR_WIDE_ROWS), batch * splits). splits 1, or KVASIR_K_SLICES: then each slice
 *           has blocks of its own and goes to `partials`, and linear_sum must follow; not with groups, and with batch 1 only.
 */
#define KVASIR_NARROW_THREADS 256
#define KVASIR_NARROW_ROWS 16
#define KVASIR_WIDE_THREADS 256
#define KVASIR_WIDE_ROWS 128
/* Steps of KVASIR_K_UNIT columns in flight. */
#define KVASIR_WIDE_STAGES(weight_bytes) ((weight_bytes) == 4 ? 2 : 3)
#define KVASIR_WIDE_SHARED(weight_bytes, planes, tile)                                                                          \
    (KVASIR_WIDE_STAGES(weight_bytes) * KVASIR_K_UNIT * (KVASIR_WIDE_ROWS * (weight_bytes) + (tile) * 2 * (planes)))

/* Weights that share a scale, where it is not a row's. */
#define KVASIR_SCALE_ROWS 16
#define KVASIR_SCALE_COLS 128

/* Rows that go through one of several matrices. */
typedef struct {
    uint32_t matrix, first, count, pad;
} kvasir_group;

typedef struct {
    const void *w;              /* [matrices][n][ld_w], matrices w_stride elements apart */
    const float *scale;         /* null or [matrices][n]; with scale_blocks see below */
    const float *bias;          /* [n] or null; with several matrices null */
    const uint16_t *x_hi, *x_lo; /* [..][ld_x]; of batch b at + b * x_stride */
    const uint32_t *x_rows;     /* row of x of each row, or null: its own */
    const kvasir_group *groups; /* null, or [batch]: which rows go through which matrix; count 0: nothing to do */
    float *out;                 /* [rows][ld_out]; of batch b at + b * out_stride */
    float *partials;            /* [KVASIR_K_SLICES][rows][n]; used where splits > 1 */
    uint64_t w_stride, x_stride, out_stride, scale_stride; /* elements; x and out strides count only without groups */
    uint32_t rows, n, k, ld_w, ld_x, ld_out; /* k padded: multiple of KVASIR_K_UNIT */
    uint32_t splits;
    uint32_t scale_blocks; /* 0, or ceil(k / KVASIR_SCALE_COLS): then weights of one byte have a scale for each block of
                            * KVASIR_SCALE_ROWS rows and KVASIR_SCALE_COLS columns, [matrices][ceil(n / KVASIR_SCALE_ROWS)][scale_blocks]
                            * pairs of the scale and its quotient by the next block's (of the last block of a row: 1) */
} linear_args;

/* linear_sum: adds the slices of `partials` in order, then scale (per row of w, or none) and bias. Takes linear_args.
 * Block KVASIR_ROW_THREADS, grid (ceil(n / KVASIR_ROW_THREADS), rows). */

/* ---- attention.cu, attend_any.cu -------------------------------------------------------------------------------------
 * Rows of a unit: its tokens × query heads that share a KV head, token by token. A token at position p sees 0..=p, or the
 * last `window` of those. Parts are numbered by position / KVASIR_PART; a row's first part is that of the first position it
 * sees.
 *
 * Names: attend_decode_{f16,bf16,e4m3}_{32,64,128,256}_{exact,fast}    one part per block → partials, then attend_merge
 *        attend_prompt_{…same…}                                           all parts in one block → planes
 *        attend_any_{bf16,f16,f32,e4m3}                                   any shape; both ways (parts > 0, or 0)
 * decode and prompt give the same bits. any has an order of its own: a model uses it always or never.
 *
 *   decode   block KVASIR_ATTEND_THREADS, grid (units, kv_heads, parts), units of ≤ KVASIR_DECODE_ROWS rows,
 *            shared KVASIR_DECODE_SHARED
 *   prompt   block KVASIR_ATTEND_THREADS, grid (units, kv_heads), units of ≤ KVASIR_PROMPT_ROWS(dim) rows,
 *            shared KVASIR_PROMPT_SHARED. `parts` in the arguments is 0.
 *   any      block KVASIR_ANY_THREADS, grid (units, kv_heads, parts or 1), units of ≤ KVASIR_ANY_ROWS rows,
 *            shared KVASIR_ANY_SHARED(k_dim, v_dim)
 */
#define KVASIR_ATTEND_THREADS 128
#define KVASIR_DECODE_ROWS 16
#define KVASIR_PROMPT_ROWS(dim) ((dim) == 256 ? 32 : 64)
#define KVASIR_DECODE_STAGES 2
/* Bytes of the ring, of tiles widened from e4m3, of queries, weights, totals, what warps tell each other, and where a part's rows
 * lie. terms: exact 2, fast 1; bytes: of a cached element. */
#define KVASIR_ATTEND_SHARED(dim, bytes, terms, rows, stages, totals)                                                           \
    (2 * KVASIR_TILE * (dim) * ((stages) * (bytes) + ((bytes) == 1 ? 2 : 0)) + (rows) * (dim) * 2 * (terms) +                   \
     (rows) * (KVASIR_TILE + 8) * 2 * (terms) + (totals) * (rows) * (dim) * 4 + 4 * (rows) * 4 + 2 * KVASIR_PART * 8)
#define KVASIR_DECODE_SHARED(dim, bytes, terms)                                                                                 \
    KVASIR_ATTEND_SHARED(dim, bytes, terms, KVASIR_DECODE_ROWS, KVASIR_DECODE_STAGES, 0)
#define KVASIR_PROMPT_SHARED(dim, bytes, terms) KVASIR_ATTEND_SHARED(dim, bytes, terms, KVASIR_PROMPT_ROWS(dim), 1, 1)
#define KVASIR_ANY_THREADS 256
#define KVASIR_ANY_ROWS 16
/* v_dim: of the values, also where they are part of the keys. */
#define KVASIR_ANY_SHARED(k_dim, v_dim) (4 * KVASIR_ANY_ROWS * ((k_dim) + KVASIR_TILE + 8 + 2 * (v_dim)))

/* Neighbouring tokens of one sequence, and query heads of a group (counted inside it). tokens 0: nothing to do. */
typedef struct {
    uint32_t row;      /* of the first token */
    uint32_t tokens;
    uint32_t position; /* of the first token */
    uint32_t table;    /* where in `tables` its sequence's blocks begin */
    uint32_t head, heads;
} kvasir_unit;

typedef struct {
    kvasir_kv kv;
    const float *q;          /* [rows][heads][k_dim], rotated */
    const kvasir_unit *units;
    const uint32_t *tables;  /* block ids */
    float *partial_sums;     /* [rows][heads][parts][v_dim] */
    float *partial_max;      /* [rows][heads][parts][2]: largest score, sum of weights */
    uint16_t *hi, *lo;       /* planes: [rows][ld]; head h of a row at h * head_ld */
    float scale;
    float soft_cap;          /* 0: none */
    uint32_t window;         /* 0: none */
    uint32_t heads;          /* query heads in all */
    uint32_t group;          /* query heads of a KV head */
    uint32_t v_dim;          /* of a value (kv.v_dim, or the latent's rank) */
    uint32_t parts;          /* of the partials' room per row; 0: no partials, write planes */
    uint32_t ld, head_ld, pad;
} attend_args;

/* attend_merge: parts of each listed row in ascending order → planes. Takes merge_args. Block KVASIR_ROW_THREADS, grid (rows,
 * heads). */
typedef struct {
    const float *partial_sums, *partial_max;
    const uint32_t *rows;      /* which rows; KVASIR_NONE: nothing to do */
    const uint32_t *positions; /* [..] by row */
    uint16_t *hi, *lo;
    uint32_t count;            /* of `rows` */
    uint32_t window, heads, v_dim, parts, ld, head_ld;
    uint32_t fast;             /* KVASIR_EXACT or KVASIR_FAST, as the kernels before; KVASIR_EXACT after attend_any */
} merge_args;

/* ---- experts.cu: block KVASIR_ROW_THREADS, no dynamic shared memory unless said -------------------------- */
#define KVASIR_SOFTMAX 0
#define KVASIR_SIGMOID 1
#define KVASIR_MAX_EXPERTS 4096
#define KVASIR_MAX_TOP_K 64

/* Which experts each row goes to: ascending by expert, with weights. Grid (rows), dynamic shared memory 12 * experts bytes.
 * Semantics of cpu/mlp.rs `choose`. */
typedef struct {
    const float *scores;     /* [rows][ld] as the router gave them */
    const float *correction; /* [experts] or null */
    uint32_t *experts_out;   /* [rows][top_k] */
    float *weights_out;      /* [rows][top_k] */
    uint32_t rows, ld, experts, top_k, scoring;
    uint32_t groups, groups_kept, groups_best; /* groups 0: none */
    uint32_t normalise;
    float scale;
} route_args;

/* Sorts the rows by expert. Grid (1), block KVASIR_GROUP_THREADS, dynamic shared memory 8 * experts bytes. */
#define KVASIR_GROUP_THREADS 1024
typedef struct {
    const uint32_t *chosen; /* [rows][top_k] */
    kvasir_group *groups;   /* [max_groups]: experts that have rows, ascending; the others count 0. matrix = expert */
    uint32_t *row_of;       /* [rows * top_k]: which row each sorted place is */
    uint32_t *place_of;     /* [rows][top_k]: where each is in that order */
    uint32_t rows, top_k, experts;
    uint32_t max_groups;    /* at least min(experts, rows * top_k) */
} group_args;

/* out[r] = sum over its experts, ascending, of weight * change[place], then + shared. Grid (rows, ceil(width / 256)). */
typedef struct {
    const float *change;      /* [rows * top_k][ld_change] */
    const float *weights;     /* [rows][top_k] */
    const uint32_t *place_of; /* [rows][top_k] */
    const float *shared;      /* [rows][ld_shared] or null */
    float *out;               /* [rows][ld_out] */
    uint32_t rows, top_k, width, ld_change, ld_shared, ld_out;
} combine_args;

/* ---- blocks.cu: block KVASIR_ROW_THREADS ------------------------------------------------------------------------------ */

/* Whole blocks, pairs independent of one another. Grid (pairs, y): y thread blocks share a pair. */
typedef struct {
    uint8_t *arena;
    const uint32_t *pairs; /* [pairs][2]: from, to */
    uint64_t block_bytes;
    uint32_t count, pad;
} copy_blocks_args;

/* Neighbouring slots of a block. */
typedef struct {
    uint32_t block, slot, count, pad;
} kvasir_run;

/* Keys and values of one layer of these slots to another arena, which may have more heads in a block. Grid (runs, kv_heads). */
typedef struct {
    kvasir_kv kv, to;
    const kvasir_run *runs;
    uint32_t count, pad;
} mirror_args;

/* A part of each listed block (the whole of it, or a layer) to or from one piece of memory, side by side. Grid (blocks, y).
 * Names: gather_blocks (arena → packed), scatter_blocks (packed → arena). */
typedef struct {
    uint8_t *arena;
    uint8_t *packed;       /* [count][bytes] */
    const uint32_t *blocks; /* [count] */
    uint64_t block_bytes, at, bytes; /* at: from the block's beginning */
    uint32_t count, pad;
} move_blocks_args;

/* ---- sample.cu --------------------------------------------------------------------------------------------------------- */

/* For each row of logits, soft-capped already: bias added (a token at most once a row), then what the bitmap forbids taken out; then the largest value, the
 * logarithm of the sum of exponentials, and the KVASIR_SHORTLIST largest by value, the lower token first on a tie (missing
 * ones: token KVASIR_NONE, minus infinity). Grid (rows), block KVASIR_SHORTLIST_THREADS. Logits are changed in place by bias
 * and mask. */
#define KVASIR_SHORTLIST 256
#define KVASIR_SHORTLIST_THREADS 1024
typedef struct {
    float *logits;              /* [rows][ld] */
    const uint32_t *allowed;    /* null, or bitmaps: of row r at allowed_at[r] words; bit set: allowed */
    const uint32_t *allowed_at; /* [rows]; KVASIR_NONE: everything is */
    const uint32_t *bias_tokens; /* null, or pairs of row r at bias_at[r] .. bias_at[r + 1] */
    const float *bias_values;
    const uint32_t *bias_at;    /* [rows + 1] */
    uint32_t *tokens;           /* [rows][KVASIR_SHORTLIST] */
    float *values;              /* [rows][KVASIR_SHORTLIST] */
    float *summary;             /* [rows][2]: largest value, log-sum-exp */
    uint32_t rows, vocab, ld, pad;
} shortlist_args;

/* out = logits * scale[row] + noise, the noise of a token a standard Gumbel value made of noise[row] and the token, to some
 * 1e-5; rows of scale 0 as they are. Grid (rows, ceil(vocab / KVASIR_ROW_THREADS)). */
typedef struct {
    const float *logits;   /* [rows][ld] */
    const uint64_t *noise; /* [rows] */
    const float *scale;    /* [rows] */
    float *out;            /* [rows][ld] */
    uint32_t rows, vocab, ld, pad;
} perturb_args;

/* Of each row of logits, those of the listed tokens (minus infinity for KVASIR_NONE), and the largest of all. Grid (rows),
 * block KVASIR_SHORTLIST_THREADS. */
typedef struct {
    const float *logits;    /* [rows][ld] */
    const uint32_t *tokens; /* [rows][KVASIR_SHORTLIST] */
    float *values;          /* [rows][KVASIR_SHORTLIST] */
    float *max;             /* [rows] */
    uint32_t rows, vocab, ld, pad;
} pick_args;

/* ---- all: sizes of the structs, in this order, to be compared when a module is loaded ------------------------------------
 * `kvasir_abi_sizes` is a __device__ const uint32_t[KVASIR_ABI_STRUCTS]. */
#define KVASIR_ABI_SIZES                                                                                                        \
    {sizeof(kvasir_kv), sizeof(kvasir_group), sizeof(kvasir_unit), sizeof(kvasir_run), sizeof(embed_args), sizeof(rms_norm_args),    \
     sizeof(gate_args), sizeof(split_args), sizeof(soft_cap_args), sizeof(gather_rows_args), sizeof(scale_bias_args),            \
     sizeof(widen_args), sizeof(rotations_args), sizeof(heads_args), sizeof(latent_keys_args), sizeof(latent_queries_args),      \
     sizeof(linear_args), sizeof(attend_args), sizeof(merge_args), sizeof(route_args), sizeof(group_args), sizeof(combine_args), \
     sizeof(copy_blocks_args), sizeof(mirror_args), sizeof(move_blocks_args), sizeof(shortlist_args), sizeof(side_by_side_args), \
     sizeof(perturb_args), sizeof(pick_args)}
#define KVASIR_ABI_STRUCTS 29

#endif
