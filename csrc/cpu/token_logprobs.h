// Log-probabilities, entropies and gaps to the largest of given tokens from hidden states and the head, without a [T, V]
// tensor.
//
//   logit = sum_k hidden[k] * weight[v, k]  by fma over k = 0..H-1 in float32 (the order of linear()), + bias[v];
//   logit = softcap * tanh(logit / softcap);  z = logit * inverse_temperature(temperature);
//   then the chunk rule of logsumexp.h;  gap = max z - z[target], which is 0 where these are equal and nowhere else.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace dschat {

struct TokenLogprobsArgs {
  const void* hidden = nullptr;  // [T, H], hidden_stride elements from row to row
  int64_t hidden_stride = 0;
  const void* weight = nullptr;  // [V, H] contiguous, same dtype
  const float* bias = nullptr;   // [V] float32 or null
  const int64_t* targets = nullptr;  // [T], 0 <= target < V
  int64_t T = 0, H = 0, V = 0;
  float temperature = 1.0f;
  float softcap = 0.0f;  // 0: none
  float* logprob = nullptr;  // [T]
  float* lse = nullptr;      // [T] log of the sum of exp(z); null: not wanted
  float* entropy = nullptr;  // [T]; null: not wanted
  float* gap = nullptr;      // [T]; NaN where the log-prob is NaN
  float* partials = nullptr;  // token_logprobs_partials(T, V) floats, shared by the team
};

// Per row and vocabulary chunk: maximum, sum, weighted sum; and z of the target.
int64_t token_logprobs_partials(int64_t T, int64_t V);

// SPMD; one barrier inside, none at the end.
void token_logprobs(const Team& team, DType dtype, const TokenLogprobsArgs& args);

}  // namespace dschat
