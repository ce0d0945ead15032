// Gradient of causal attention over packed sequences, the training form of attention.h.
//
// With P = softmax(s) and s as in attention.h, for every query token:
//   dV_j += P_j dO;  dP_j = dO . V_j;  ds_j = P_j (dP_j - sum_i P_i dP_i);  through the softcap: ds_j (1 - tanh^2)
//   dQ = scale sum_j ds_j K_j;  dK_j += scale ds_j Q
#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace dschat {

struct AttentionBackwardArgs {
  // [T, heads, D], contiguous heads; *_stride elements from token to token. dq, dk and dv have the dtype of q.
  const void *dout = nullptr, *q = nullptr, *k = nullptr, *v = nullptr;
  int64_t dout_stride = 0, q_stride = 0, k_stride = 0, v_stride = 0;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // contiguous
  const int32_t* cu_seqlens = nullptr;               // [rows + 1]
  int64_t rows = 0, Hq = 0, Hkv = 0, D = 0;
  float scale = 1.0f;
  int64_t window = 0;
  float softcap = 0.0f;
  const float* alibi_slopes = nullptr;
};

// One unit of work is one sequence and kv head, so no two threads add to the same gradient. All sums are float32,
// rounded once. Working memory of a thread: about 5 Dp + 2 * 48 floats a token of the longest sequence. SPMD, no
// barrier.
void attention_backward(const Team& team, DType dtype, const AttentionBackwardArgs& args);

}  // namespace dschat
