// Gradient of token_logprobs (token_logprobs.h) for one block of the vocabulary, with the logits computed anew:
//
//   p = exp(z - lse)
//   dz = dlogprob (1[v = target] - p) - dentropy p (z - lse + entropy)
//   dlogit = dz * inverse_temperature * (1 - tanh^2)                                  the last factor with a softcap
//   dhidden += dlogit W                    float32 sums; dlogit is rounded to the dtype of the weight before
//
// The gradient of the weight, dlogit^T hidden, is the caller's.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace dschat {

struct TokenLogprobsBackwardArgs {
  const void* hidden = nullptr;  // [T, H], hidden_stride elements from row to row
  int64_t hidden_stride = 0;
  const void* weight = nullptr;      // [count, H] contiguous: the block's rows, same dtype
  const float* bias = nullptr;       // [count] of the block, or null
  const int64_t* targets = nullptr;  // [T], of the whole vocabulary
  int64_t T = 0, H = 0, first = 0, count = 0;  // the block is [first, first + count) of the vocabulary
  const float* dlogprob = nullptr;             // [T]
  const float* dentropy = nullptr;             // [T] or null
  const float* lse = nullptr;                  // [T]
  const float* entropy = nullptr;              // [T] where dentropy is given
  float temperature = 1.0f;
  float softcap = 0.0f;      // 0: none
  void* dlogits = nullptr;   // [T, dlogits_stride], dtype; columns up to a multiple of 32 past count are written
  int64_t dlogits_stride = 0;
  float* dhidden = nullptr;  // [T, H], added to; null: not wanted
  void* panels = nullptr;    // token_logprobs_backward_panels values of dtype, shared by the team
};

int64_t token_logprobs_backward_panels(DType dtype, int64_t H, int64_t count);

// SPMD; two barriers inside, none at the end.
void token_logprobs_backward(const Team& team, DType dtype, const TokenLogprobsBackwardArgs& args);

}  // namespace dschat
