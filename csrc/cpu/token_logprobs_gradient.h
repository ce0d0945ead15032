// token_logprobs (token_logprobs.h) that also leaves its gradient with respect to the hidden states, where the head has none:
//
//   gradient[t] = (slope_target (1 - p_target) W_target - sum over v != target of p_v slope_v W_v) * inverse_temperature
//   slope_v     = 1 - (logit_v / softcap)^2                                                              1 without a softcap
//
// The sum is taken chunk by chunk while a chunk's logits are there, with exp(z - m_c) rounded to the dtype of the weight, and
// scaled whenever the maximum so far rises: two products with the head instead of the three of a forward and a backward that
// computes the logits anew. The target stays out of the sum: 1 - p would lose to the rounding of p where p is near 1.
// logprob, lse, entropy and gap have the bits of token_logprobs.
#pragma once

#include "token_logprobs.h"

namespace dschat {

struct TokenLogprobsGradientArgs : TokenLogprobsArgs {  // lse is needed
  float* gradient = nullptr;                            // [T, H]
  void* panels = nullptr;                               // token_logprobs_gradient_panels values of dtype, shared by the team
};

int64_t token_logprobs_gradient_panels(DType dtype, int64_t H);
int64_t token_logprobs_gradient_partials(int64_t T, int64_t V);  // floats of `partials`

// SPMD; two barriers a chunk inside, none at the end. Threads share the rows.
void token_logprobs_gradient(const Team& team, DType dtype, const TokenLogprobsGradientArgs& args);

}  // namespace dschat
