/* hf_fusion.h: the C ABI of hf_fusion's kernels. C99, no torch, no Python.
 *
 * Every size is a 64-bit element count unless its name says bytes; every stride is in elements.
 * Buffers carry their length in bytes: a call whose shapes or strides reach past a buffer is
 * refused before anything is read or written. A call that does not return HFF_OK has left every
 * cache length as it was and, unless it is one of several steps (hff_model_io), has written no
 * output. hff_last_error() then holds one sentence with the offending name and value (per thread).
 * Struct sizes travel with the structs; a caller built against another layout gets HFF_INVALID.
 * Calls are thread-safe. Inputs are const; outputs must not overlap inputs, except where a struct
 * says so.
 */
#ifndef HF_FUSION_H
#define HF_FUSION_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HFF_ABI_VERSION 8
#define HFF_MAX_HEAD_DIM 256
#define HFF_MAX_THREADS 255
#define HFF_SAMPLED_ROWS 8

#if defined(_WIN32)
#define HFF_API __declspec(dllexport)
#else
#define HFF_API __attribute__((visibility("default")))
#endif

typedef int32_t hff_status;
enum {
  HFF_OK = 0,
  HFF_INVALID = 1,       /* a struct contradicts itself or its buffers */
  HFF_UNSUPPORTED = 2,   /* well-formed, but no kernel does it */
  HFF_OUT_OF_MEMORY = 3, /* scratch could not be allocated */
  HFF_OUT_OF_RANGE = 4,  /* a token id or a position outside its table, a cache without room */
  HFF_INTERNAL = 5
};

/* element type of weights, activations, cos/sin and cache of one call */
enum { HFF_F32 = 0, HFF_BF16 = 1, HFF_F16 = 2 };
enum {
  HFF_ACT_NONE = 0,
  HFF_ACT_GELU_ERF = 1,
  HFF_ACT_GELU_TANH = 2,
  HFF_ACT_RELU = 3,
  HFF_ACT_SILU = 4
};
enum { HFF_NORM_LAYER = 0, HFF_NORM_RMS = 1 };
/* PARALLEL:   y = mlp(norm2(x)) + attn(norm1(x)) + x
 * SEQUENTIAL: a = attn(norm1(x)) + x, y = mlp(norm2(a)) + a
 * POST_NORM:  a = norm1(attn(x) + x), y = norm2(mlp(a) + a) */
enum { HFF_RESIDUAL_PARALLEL = 0, HFF_RESIDUAL_SEQUENTIAL = 1, HFF_RESIDUAL_POST_NORM = 2 };
/* rows of the fused projection: per head q|k|v (GPT-NeoX), or all q heads, all k, all v */
enum { HFF_QKV_PER_HEAD = 0, HFF_QKV_STACKED = 1 };
/* What matrix kernels may do with fp32, as torch.set_float32_matmul_precision names it. HIGHEST:
 * fp32 products. HIGH: products of two bf16 parts where AMX makes them faster, relative error 2^-14
 * or less. MEDIUM: bf16 products where the CPU has them. Without effect on bf16 and fp16. */
enum { HFF_PRECISION_HIGHEST = 0, HFF_PRECISION_HIGH = 1, HFF_PRECISION_MEDIUM = 2 };
/* Where a call's buffers lie and its kernels run */
enum { HFF_DEVICE_CPU = 0, HFF_DEVICE_CUDA = 1 };
/* How a CUDA device runs a token through a whole model. TOKEN: one persistent kernel; CHAIN: three
 * kernels a layer. AUTO: TOKEN where it fits the device. */
enum { HFF_PLAN_AUTO = 0, HFF_PLAN_CHAIN = 1, HFF_PLAN_TOKEN = 2 };
/* ATTENTION: attn(norm1(x)); ATTENTION_UP: that, and act(up(norm2(.))); FULL: the whole layer */
enum { HFF_STAGE_ATTENTION = 0, HFF_STAGE_ATTENTION_UP = 1, HFF_STAGE_FULL = 2 };
/* Attention kernels. NAIVE: every score in memory; TILED: the scores of a block of queries,
 * products in tiles; FLASH: online softmax, no scores in memory */
enum { HFF_ATTEND_NAIVE = 0, HFF_ATTEND_TILED = 1, HFF_ATTEND_FLASH = 2 };
/* BOOL: uint8, nonzero = attend; INT64: nonzero = attend; ADDITIVE: dtype of the call, added to the
 * scaled score */
enum { HFF_MASK_NONE = 0, HFF_MASK_BOOL = 1, HFF_MASK_INT64 = 2, HFF_MASK_ADDITIVE = 3 };

typedef struct {
  const void* data;
  int64_t bytes;
} hff_input;

typedef struct {
  void* data;
  int64_t bytes;
} hff_output;

/* A matrix of y = W x + b, in torch.nn.Linear layout. */
typedef struct {
  hff_input weight;   /* (rows, cols), rows row_stride apart, elements of a row contiguous */
  hff_input bias;     /* (rows) or null */
  hff_input packed;   /* the weight as hff_pack wrote it; null: matrix kernels pack as they go */
  int64_t rows, cols, row_stride;
} hff_linear;

typedef struct {
  hff_input weight;   /* (hidden) */
  hff_input bias;     /* (hidden) or null */
  float eps;
  int32_t kind;       /* HFF_NORM_* */
} hff_norm;

/* Heads of one attention: q heads share k/v heads in groups of heads / kv_heads. */
typedef struct {
  int64_t heads, kv_heads, head_dim;
  int64_t rotary_dim; /* leading dims RoPE rotates, i with i + rotary_dim / 2; may be 0 */
  float scale;        /* of q.k */
  int32_t qkv_layout; /* HFF_QKV_* */
} hff_heads;

/* One transformer layer. qkv: (heads + 2 kv_heads) * head_dim rows, k and v null; or q's heads *
 * head_dim rows, and k and v kv_heads * head_dim each (STACKED). o: hidden rows, heads * head_dim
 * cols. */
typedef struct {
  hff_heads heads;
  int64_t hidden, mlp_width;
  int32_t residual, activation;
  hff_norm attention_norm, mlp_norm;
  hff_linear qkv, k, v, o, up, down;
} hff_block;

/* Keys and values of one layer: (batch, kv_heads, capacity, head_dim), both with these strides,
 * head_dim contiguous. *length tokens are present; a call appends `queries` more behind them and,
 * on success, adds to *length. */
typedef struct {
  hff_output keys, values;
  int64_t batch_stride, head_stride, token_stride, capacity;
  int64_t* length;
} hff_cache;

/* Element (b, i, j) says whether, or with what bias, query i of batch row b sees key j; strides may
 * be 0. A mask restricts further; causality is `causal` of hff_call. keys: the key extent, at least
 * length + queries; on CUDA, where that is known to the kernels alone, none past it is seen. */
typedef struct {
  hff_input data;
  int64_t batch_stride, query_stride, key_stride, keys;
  int32_t kind;       /* HFF_MASK_* */
  int32_t reserved;
} hff_mask;

/* What every forward call has. A row is (batch row, query): row = b * queries + i, or, with starts,
 * starts[b] + i. */
typedef struct {
  uint64_t struct_size;
  int32_t dtype;      /* HFF_F32, HFF_BF16, HFF_F16 */
  int32_t threads;    /* width of the thread team, caller included; 1 to HFF_MAX_THREADS */
  int64_t batch, queries;
  int32_t causal;     /* 1: query i sees keys 0 .. length + i; 0: all length + queries keys */
  int32_t precision;  /* HFF_PRECISION_* */
  hff_input starts;   /* int64 (batch + 1), contiguous, from 0 to the number of rows: sequences of
                       * starts[b + 1] - starts[b] rows, none longer than queries; without caches,
                       * mask and RoPE only. Null: all of `queries` rows */
  hff_input positions; /* int64 (batch, queries), strides below; unused where rotary_dim is 0. Null
                        * on CUDA: they count on from the length of the cache */
  int64_t position_batch_stride, position_query_stride;
  hff_input cos, sin; /* (rope_rows, rotary_dim), contiguous, as the rotary module gives them */
  int64_t rope_rows;
  hff_mask mask;
  int32_t device;     /* HFF_DEVICE_*. On CUDA every pointer of the call but those between structs
                       * is a device pointer, cache lengths included, and the call returns before
                       * its kernels have run. Ids, positions and lengths are then read by the
                       * kernels: one outside its table gives NaN in every output of its row, and a
                       * full cache in every output. */
  int32_t ordinal;    /* of the CUDA device */
  int32_t plan;       /* HFF_PLAN_* */
  int32_t reserved;
  void* stream;       /* CUDA: the cudaStream_t to run on; null: the legacy default stream */
  hff_output workspace; /* CUDA: hff_workspace_bytes of memory, all zero before its first use. Calls
                         * that share one must follow each other on a stream */
} hff_call;

/* x: (rows, hidden). attention_out: (rows, hidden), ATTENTION and ATTENTION_UP; with sequential
 * residual and ATTENTION_UP it holds attn + x. up_out: (rows, mlp_width), ATTENTION_UP. out: (rows,
 * hidden), FULL. All contiguous. */
typedef struct {
  uint64_t struct_size;
  hff_input x;
  hff_output attention_out, up_out, out;
  int32_t stage;      /* HFF_STAGE_* */
  int32_t reserved;
} hff_block_io;

typedef struct {
  uint64_t struct_size;
  int64_t hidden, vocab;
  hff_input embedding; /* (vocab, hidden) contiguous; null where the caller gives x */
  const hff_block* blocks;
  int64_t block_count;
  hff_norm final_norm; /* weight null: none */
  hff_linear head;    /* weight null: no head, hidden states only */
} hff_model;

/* How a token is drawn from logits. Probabilities are those of softmax(logits / temperature) in
 * fp32. Kept are the top_k largest, with all equals of the last of them, and of these, largest
 * first and of equals the first, the fewest whose probabilities add up to top_p of theirs. The
 * token is the first whose probability, with those of the kept before it in order of index, exceeds
 * the uniform. */
typedef struct {
  uint64_t struct_size;
  hff_input uniforms; /* fp64 (batch, steps) contiguous, each in [0, 1) */
  double top_p;       /* 0 to 1; 1: all, 0: the largest */
  int64_t top_k;      /* 0: all */
  float temperature;  /* a normal number above 0 */
  int32_t reserved;
} hff_sampling;

/* ids: int64 (batch, queries), strides below, or null with x: (rows, hidden) contiguous.
 * logits: (batch, keep, head.rows) contiguous, the last `keep` queries of each batch row; null
 * without a head, and with starts.
 * hidden: (rows, hidden) contiguous, after the final norm; may be null where logits is given. On
 * the CPU it may be the memory of x.
 * next: int64 (batch, steps) contiguous, the index of the largest logit of each batch row's last
 * query: the first NaN or, without one, the first of equals. May be null; on CUDA it may be the
 * memory of ids, on the CPU it needs logits.
 * sampling: null, or on the CPU how next is drawn instead. Logits with NaN or +Inf, or of -Inf
 * alone, are refused: HFF_INVALID.
 * steps: 0 and 1 are one. More, on the CPU only: decoding of `steps` tokens, with ids of one query,
 * a cache and next. The second step has the first of next for its ids and positions one further,
 * and so on; logits are the last step's. A mask covers the keys of all steps. Where a step fails or
 * no token can be drawn, cache lengths are as before; logits and next may have been written. */
typedef struct {
  uint64_t struct_size;
  hff_input ids;
  int64_t id_batch_stride, id_query_stride;
  hff_input x;
  hff_output logits, hidden, next;
  const hff_sampling* sampling;
  int64_t keep, steps;
} hff_model_io;

/* y = act(W x + b): x (rows, cols), out (rows, linear.rows), contiguous */
typedef struct {
  uint64_t struct_size;
  int32_t dtype, threads;
  int64_t rows;
  int32_t activation;
  int32_t precision;
  hff_input x;
  hff_output out;
} hff_linear_io;

/* out = norm(x): (rows, hidden) contiguous */
typedef struct {
  uint64_t struct_size;
  int32_t dtype, threads;
  int64_t rows, hidden;
  hff_input x;
  hff_output out;
} hff_norm_io;

/* A device as hff_describe_device finds it */
typedef struct {
  uint64_t struct_size;
  char name[64];
  int32_t arch;         /* 10 * compute capability: 900 is sm_90 */
  int32_t sms;
  int64_t shared_bytes; /* per block, opt-in */
  int32_t host_memory;  /* 1, in test builds: kernels run emulated on the host's memory */
  int32_t reserved;
} hff_device;

/* Elements between neighbours of a (batch, heads, tokens, head_dim) tensor whose head_dim is
 * contiguous; an input's may be 0 */
typedef struct {
  int64_t batch, head, token;
} hff_strides;

/* out = softmax(scale q k^T + mask) v: q, out (batch, heads, queries, head_dim), k, v (batch,
 * kv_heads, keys, head_dim), head h of q with head h / (heads / kv_heads) of k. A query that sees
 * nothing gives zeros. */
typedef struct {
  uint64_t struct_size;
  int32_t kernel;     /* HFF_ATTEND_* */
  int32_t dtype, threads;
  int32_t causal;     /* 1: query i sees keys 0 .. keys - queries + i; 0: all */
  int64_t batch, heads, kv_heads, head_dim, queries, keys;
  int64_t window;     /* with causal, not 0: of those keys, the last `window` */
  hff_input q, k, v;
  hff_output out;
  hff_strides q_strides, k_strides, v_strides, out_strides;
  hff_mask mask;      /* of as many keys as there are */
  int64_t mask_head_stride;
  float scale;
  int32_t device;     /* HFF_DEVICE_*, with ordinal and stream as in hff_call */
  int32_t ordinal;
  int32_t reserved;
  int64_t block_queries, block_keys; /* 0: as hff_plan_attend says */
  void* stream;
  hff_output workspace; /* CUDA: workspace_bytes of hff_plan_attend */
} hff_attend_io;

/* How a call would run. scratch_bytes: what the library takes for its duration beside the caller's
 * tensors, of all threads; workspace_bytes: what the caller must bring. */
typedef struct {
  uint64_t struct_size;
  int64_t block_queries, block_keys;
  int64_t scratch_bytes, workspace_bytes;
} hff_attend_plan;

/* A whole model: embedding, layers, final norm, head, for any number of rows. caches: block_count
 * of them, or null: then nothing is kept, and queries see the call's own keys. Few rows go through
 * row kernels, one pass over the weights as they lie; many through matrix kernels. */
HFF_API hff_status hff_model_forward(const hff_call*, const hff_model*, const hff_cache* caches,
                                     const hff_model_io*);
/* One layer; the cache may be null likewise. */
HFF_API hff_status hff_block_forward(const hff_call*, const hff_block*, const hff_cache*,
                                     const hff_block_io*);
HFF_API hff_status hff_linear_forward(const hff_linear*, const hff_linear_io*);
HFF_API hff_status hff_norm_forward(const hff_norm*, const hff_norm_io*);

HFF_API hff_status hff_attend(const hff_attend_io*);
HFF_API hff_status hff_plan_attend(const hff_attend_io*, hff_attend_plan* out);

/* Bytes of a weight packed for the matrix kernels of the chosen instruction set, 0 where the
 * arguments name none; and the packing, into 64-byte aligned memory. A call under another
 * instruction set or at a precision that needs other panels refuses what was packed. */
HFF_API int64_t hff_packed_bytes(int32_t dtype, int32_t precision, int64_t rows, int64_t cols);
HFF_API hff_status hff_pack(const hff_linear*, int32_t dtype, int32_t precision, int32_t threads,
                            const hff_output* packed);

/* A number that depends on one 64-byte line of every HFF_SAMPLED_ROWS-th row of `count` matrices,
 * with `phase` on others: a cheap look for changed weights. The phases from 0 to HFF_SAMPLED_ROWS
 * times the lines of the longest row see every element. 0 where a struct contradicts itself. */
HFF_API uint64_t hff_fingerprint(const hff_linear*, int64_t count, int32_t dtype, int64_t phase);

/* HFF_UNSUPPORTED, with the reason in hff_last_error(), where the build, the driver or the device
 * is absent or too old. */
HFF_API hff_status hff_describe_device(int32_t device, int32_t ordinal, hff_device* out);
/* Bytes of workspace that calls like this one need, on the device it names; 0 where
 * hff_last_error() says why it cannot run there. A single layer is a model of one block without
 * embedding or head. */
HFF_API int64_t hff_workspace_bytes(const hff_call*, const hff_model*);

HFF_API int32_t hff_abi_version(void);
/* sizeof the structs above in order of declaration, from hff_input (0) to hff_attend_plan (18); 0
 * past the end. */
HFF_API uint64_t hff_struct_size(int32_t index);
HFF_API const char* hff_last_error(void);
/* Bytes of scratch that the last call of this thread took, for all its threads. A call of few rows
 * keeps them for the next, one of many rows 1 MB of them at most, hff_attend 64 MB. */
HFF_API int64_t hff_scratch_bytes(void);

/* Instruction sets in rising order: "scalar", "avx2", "avx512", "avx512_bf16", "amx"; null past the
 * end. *reason: null where this build and CPU have it, else why not. */
HFF_API const char* hff_isa_name(int32_t index, const char** reason);
/* Chooses an instruction set for the process, until the next call of this. null: HF_FUSION_ISA if
 * set, else the best. */
HFF_API hff_status hff_select_isa(const char* name);
/* The chosen one. Where none is, chooses as hff_select_isa(null); null (see hff_last_error) where
 * that fails. */
HFF_API const char* hff_isa(void);

/* Runs calls on the threads of an OpenMP runtime that the process has loaded: its GOMP_parallel,
 * omp_get_thread_num and omp_get_num_threads. All null: on threads of the library's own, as before
 * the first call of this. To be called while no other call runs. */
HFF_API hff_status hff_use_openmp(void* parallel, void* thread_num, void* num_threads);

/* Asks the kernel to back [data, data + bytes) by huge pages in place. Returns the bytes now so
 * backed, 0 if none. */
HFF_API int64_t hff_huge_pages(const void* data, int64_t bytes);
/* How a line of weights is asked for. LINE: itself, non-temporally; AHEAD: one ahead, likewise;
 * TO_L2: one ahead, into L2 */
enum { HFF_PREFETCH_LINE = 0, HFF_PREFETCH_AHEAD = 1, HFF_PREFETCH_TO_L2 = 2 };
/* How row kernels ask memory for weights in calls of `rows` rows, 1 or 2, of dtype HFF_*: the
 * HFF_PREFETCH_* that the first 24 to 256 hff_model_forward over 24 MB of weights or more, on one
 * thread, have found to be the fastest here. -1 before, or where the arguments name none. */
HFF_API int32_t hff_prefetch(int32_t dtype, int64_t rows);
/* Seconds one pass over the buffer, in whole pieces of 256 KB, takes `threads` threads; the read
 * stream that decode is measured against. */
HFF_API double hff_read_stream(const void* data, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
