// Causal attention of packed query tokens over the paged cache: prefill, decode and any mixture of both.
//
// For query token i of row r, at position p = kv_lens[r] - q_len(r) + i, over keys j with p - window < j <= p:
//   s_j = dot(q, k_j) * scale;  s_j = softcap * tanh(s_j / softcap);  s_j += alibi_slope * (j - p)
//   or, of a negative slope:  s_j += scale * bf16(-alibi_slope * bf16(j))
//   out = sum_j softmax(s)_j v_j
// Order of the arithmetic (a row's bits depend on nothing else): dot by fma over d = 0..D-1; keys are cut into
// chunks of kChunk at absolute positions; per chunk the maximum m_c, p_j = exp(s_j - m_c), l_c by lanes (j mod 16)
// then the fixed tree, o_c by fma over the keys in order; chunks are folded from left to right:
//   m' = max(m, m_c),  l' = l exp(m - m') + l_c exp(m_c - m'),  o' = o exp(m - m') + o_c exp(m_c - m')
// and out = round(o / l).
// Over a quantised cache (int8 keys K_j and values V_j with scales) float32 queries take dot(q, K_j) * k_scale_j in place
// of dot(q, k_j), and (p_j * v_scale_j) and V_j in place of p_j and v_j; l_c sums p_j. bfloat16 queries do so in integers:
// q is rounded to 16 bits of its largest |q_d|, the (p_j * v_scale_j) of a chunk to 16 bits of their largest, which is
// far below the rounding of bfloat16; sums of products are exact.
#pragma once

#include <cstdint>

#include "kv_cache.h"
#include "parallel.h"

namespace dschat {

struct AttentionArgs {
  const void* q = nullptr;  // [T, Hq, D], q_stride elements from token to token
  int64_t q_stride = 0;
  void* out = nullptr;  // [T, Hq, D], same dtype
  int64_t out_stride = 0;
  const void* k_cache = nullptr;  // one layer, see kv_cache.h; already holds the keys of the query tokens
  const void* v_cache = nullptr;
  bool int8_cache = false;  // of a byte a number; else of the dtype of q
  const int32_t* block_table = nullptr;  // [slots, block_table_stride]
  int64_t block_table_stride = 0;
  const int32_t* slots = nullptr;       // [rows] row of block_table of each row; null: row r uses block_table[r]
  const int32_t* cu_seqlens = nullptr;  // [rows + 1] query tokens of row r: cu_seqlens[r] .. cu_seqlens[r + 1]
  const int32_t* kv_lens = nullptr;     // [rows] keys of row r, its own query tokens included
  int64_t rows = 0, Hq = 0, Hkv = 0, D = 0;
  float scale = 1.0f;
  int64_t window = 0;                   // keys seen, the token's own included; 0: all
  float softcap = 0.0f;                 // 0: none
  const float* alibi_slopes = nullptr;  // [Hq] or null
};

// Work is cut by cost (rows x keys) into one contiguous share a thread. SPMD, no barrier at the end.
void attention(const Team& team, DType dtype, const AttentionArgs& args);

}  // namespace dschat
