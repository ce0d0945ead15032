// The one rule for log-probabilities over a vocabulary, shared by sample and token_logprobs, so that the rollout and the
// training forward give the same bits for the same logits.
//
//   z          = logit * inverse_temperature                                   (float32)
//   chunk c    = entries [256 c, 256 c + 256) of the vocabulary
//   m_c, l_c   = max z,  sum of exp(z - m_c)       lane l of a warp adds entries l, l + 32, ...; then warp_sum
//   fold       = chunks from left to right:  m' = max(m, m_c),  l' = l exp(m - m') + l_c exp(m_c - m')
//   log p(t)   = z_t - (m + log l)
//
// -inf entries (masked tokens) weigh nothing. A NaN or +inf entry makes l NaN; a row of nothing but -inf has l = 0.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

constexpr int kVocabChunk = 256;

inline float inverse_temperature(float temperature) { return 1.0f / temperature; }

struct ChunkSum {
  float max, sum;
  float weighted;  // sum of exp(z - m_c) (z - m_c), for the entropy
};

// One chunk of n entries z(i), by a whole warp; every lane gets the result.
template <typename Z> __device__ __forceinline__ ChunkSum chunk_logsumexp(int n, Z&& z) {
  const int lane = int(threadIdx.x) % kWarp;
  float values[kVocabChunk / kWarp], top = -kInfinity;
#pragma unroll
  for (int j = 0; j < kVocabChunk / kWarp; ++j) {
    const int i = lane + j * kWarp;
    values[j] = i < n ? z(i) : -kInfinity;
    top = fmaxf(top, values[j]);
  }
  top = warp_max(top);
  // Against a maximum of -inf every difference would be NaN; against 0 masked entries give 0 and a NaN, which the
  // maximum has skipped, still shows.
  const float pivot = top == -kInfinity ? 0.0f : top;
  float sum = 0.0f, weighted = 0.0f;
#pragma unroll
  for (int j = 0; j < kVocabChunk / kWarp; ++j) {
    const float weight = expf(values[j] - pivot);
    sum += weight;
    if (weight != 0.0f) weighted = fmaf(weight, values[j] - pivot, weighted);
  }
  return {top, warp_sum(sum), warp_sum(weighted)};
}

struct LogSumExp {
  float max = -kInfinity, sum = 0.0f;
  float weighted = 0.0f;  // sum of exp(z - max) (z - max)

  // Chunks must be folded from left to right.
  __device__ __forceinline__ void fold(const ChunkSum& c) {
    if (c.sum == 0.0f) return;  // only masked entries
    const float m = c.max > max ? c.max : max;
    const float old = expf(max - m), scale = expf(c.max - m);
    weighted = (sum == 0.0f ? 0.0f : old * fmaf(sum, max - m, weighted)) + scale * fmaf(c.sum, c.max - m, c.weighted);
    sum = sum * old + c.sum * scale;
    max = m;
  }
  __device__ __forceinline__ float value() const { return max + logf(sum); }
  __device__ __forceinline__ float log_prob(float z) const { return z - value(); }
  __device__ __forceinline__ float entropy() const { return logf(sum) - weighted / sum; }
  __device__ __forceinline__ bool has_nan() const { return !(sum == sum); }
  __device__ __forceinline__ bool nothing_allowed() const { return sum == 0.0f; }
};

}  // namespace dschat::cuda
