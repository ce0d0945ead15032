// One token a row from logits, with its log-probability. SPMD: every thread of the team calls with the same arguments;
// no barrier at the end.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace dschat {

struct SampleOptions {
  float temperature;  // 0: greedy
  int64_t top_k;      // 0: off
  double top_p;       // 1: off
  double min_p;       // 0: off
  uint64_t seed;
};

// What sample() writes instead of a token where a row allows none.
constexpr int64_t kSampleNotFinite = -1;  // a NaN or +inf among the logits (or logit / temperature overflows)
constexpr int64_t kSampleAllMasked = -2;  // nothing but -inf

//   z        = logit * (1 / temperature)                                   logits [rows, vocab] of T, logits_stride apart
//   kept     = all;  z >= the top_k-th largest z (ties stay)
//              -> the fewest in order of falling z (ties: rising index) whose softmax over what top_k kept reaches top_p
//              -> exp(z - max z) >= min_p;  never empty
//   token    = the first kept index, in order of index, at which the running sum of exp(z - max z) exceeds u times the
//              sum of all kept;  u = philox_uniform(seed, streams[row], positions[row])
//   log_prob = z[token] - logsumexp(z) over the whole row, by the rule of logsumexp.h
//
// temperature 0: the largest logit (ties: lowest index) and its log-prob at temperature 1; streams and positions are
// not read and may be null. tokens int64 [rows], log_probs float32 [rows].
void sample(const Team& team, DType type, const void* logits, int64_t rows, int64_t vocab, int64_t logits_stride,
            const SampleOptions& options, const int64_t* streams, const int64_t* positions, int64_t* tokens,
            float* log_probs);

}  // namespace dschat
