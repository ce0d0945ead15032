// Rotary embedding of q and k, and the write of k and v into the paged cache, in one pass over packed qkv.
#pragma once

#include <cstdint>

#include "kv_cache.h"
#include "parallel.h"

namespace dschat {

enum class RopeStyle : int {
  half = 0,         // pairs (i, i + rotary_dim / 2): Llama, NeoX
  interleaved = 1,  // pairs (2i, 2i + 1): GPT-J
};

struct RopeAppendArgs {
  // T tokens; the heads of a token are contiguous, *_stride is the distance of two tokens in elements, so q, k
  // and v may be slices of one packed [T, (Hq + 2 Hkv) * D] buffer.
  const void* q = nullptr;  // null: q is left alone
  int64_t q_stride = 0;
  const void* k = nullptr;  // null: nothing is written to the cache
  int64_t k_stride = 0;
  const void* v = nullptr;
  int64_t v_stride = 0;
  void* q_out = nullptr;  // may be q itself
  int64_t q_out_stride = 0;
  const float* cos = nullptr;  // [max_pos, rotary_dim / 2]; null: no rotation, q is copied and k written as it is
  const float* sin = nullptr;
  const int32_t* positions = nullptr;     // [T] position of the token in its sequence: rotary angle and cache place
  const int32_t* seq_of_token = nullptr;  // [T] row of block_table
  const int32_t* block_table = nullptr;   // [slots, block_table_stride]
  int64_t block_table_stride = 0;
  void* k_cache = nullptr;  // one layer, see kv_cache.h
  void* v_cache = nullptr;
  bool int8_cache = false;  // of a byte a number; else of the dtype of q, k and v
  int64_t T = 0, Hq = 0, Hkv = 0, D = 0;
  int64_t rotary_dim = 0;  // even, <= D; the other dimensions pass through
  RopeStyle style = RopeStyle::half;
};

// y1 = round(x1 * cos - x2 * sin), y2 = round(x2 * cos + x1 * sin): products and sum rounded separately in
// float32, which is what the unfused formula gives. Dtypes of q, k, v and q_out are the same. A quantised cache holds
// what would have been written.
// The pages of the tokens must be allocated and not shared. SPMD, no barrier at the end.
void rope_append(const Team& team, DType dtype, const RopeAppendArgs& args);

// The rotation alone: y[T, H, D] = rope(x), sign = -1 rotates back (the gradient). x may be y.
void rope(const Team& team, DType dtype, const void* x, int64_t x_stride, void* y, int64_t y_stride, const float* cos,
          const float* sin, const int32_t* positions, int64_t T, int64_t H, int64_t D, int64_t rotary_dim,
          RopeStyle style, float sign);

}  // namespace dschat
