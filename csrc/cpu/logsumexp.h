// The one rule for log-probabilities over a vocabulary, shared by sample and token_logprobs so that the rollout and
// the training forward give the same bits for the same logits.
//
//   z          = logit * inverse_temperature                                   (float32)
//   chunk c    = entries [1024 c, 1024 c + 1024) of the vocabulary, whoever computes them and in whatever tile
//   m_c, l_c   = max z,  sum of exp(z - m_c)       16 lane sums in index order, then the tree of reduce_add
//   fold       = chunks from left to right:  m' = max(m, m_c),  l' = l exp(m - m') + l_c exp(m_c - m')
//   log p(t)   = z_t - (m + log l)
//
// -inf entries (masked tokens) weigh nothing. A NaN or +inf entry makes l NaN; a row of nothing but -inf has l = 0.
#pragma once

#include "simd.h"

namespace dschat {

constexpr int64_t kVocabChunk = 1024;

// Temperatures are given as they are and inverted here only, so that every user rounds alike.
inline float inverse_temperature(float temperature) { return 1.0f / temperature; }

// The vector exp for one number: library expf has other bits.
DSCHAT_INLINE float exp_scalar(float x) {
  float lanes[kLanes];
  to_array(exp(set1(x)), lanes);
  return lanes[0];
}

// Lanes beyond n (0 < n <= 16) hold -inf.
template <typename T> DSCHAT_INLINE Vec load_or_minus_inf(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i)
    lanes[i] = i < n ? to_float(p[i]) : -std::numeric_limits<float>::infinity();
  return load(lanes);
}

struct ChunkSum {
  float max;  // m_c; -inf when nothing in the chunk is allowed
  float sum;  // l_c
};

// One chunk: n <= kVocabChunk logits that start at a multiple of kVocabChunk in the vocabulary. each(i, e) receives the
// vectors exp(z - m_c) of the entries from i on; lanes past n are 0.
template <typename T, typename Each>
DSCHAT_INLINE ChunkSum chunk_logsumexp(const T* logits, int64_t n, float inv_temperature, Each&& each) {
  const float minus_inf = -std::numeric_limits<float>::infinity();
  const Vec scale = set1(inv_temperature);
  Vec m = set1(minus_inf);
  for (int64_t i = 0; i < n; i += kLanes) m = max(m, load_or_minus_inf(logits + i, n - i) * scale);
  const float chunk_max = reduce_max(m);
  // Against a maximum of -inf every difference would be NaN; against 0 masked entries give 0 and a NaN, which the
  // maximum may have skipped, still shows.
  const Vec pivot = set1(chunk_max == minus_inf ? 0.0f : chunk_max);
  Vec sum = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = exp(load_or_minus_inf(logits + i, n - i) * scale - pivot);
    each(i, e);
    sum = sum + e;
  }
  return {chunk_max, reduce_add(sum)};
}
template <typename T> inline ChunkSum chunk_logsumexp(const T* logits, int64_t n, float inv_temperature) {
  return chunk_logsumexp(logits, n, inv_temperature, [](int64_t, Vec) {});
}

struct LogSumExp {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;

  // Chunks must be folded from left to right.
  void fold(ChunkSum c) {
    if (c.sum == 0.0f) return;  // only masked entries
    const float m = max > c.max ? max : c.max;
    sum = sum * exp_scalar(max - m) + c.sum * exp_scalar(c.max - m);
    max = m;
  }
  float value() const { return max + std::log(sum); }
  float log_prob(float z) const { return z - value(); }
  bool has_nan() const { return !(sum == sum); }
  bool nothing_allowed() const { return sum == 0.0f; }
};

// A whole row of logits.
template <typename T> inline LogSumExp row_logsumexp(const T* logits, int64_t vocab, float inv_temperature) {
  LogSumExp total;
  for (int64_t c = 0; c < vocab; c += kVocabChunk)
    total.fold(chunk_logsumexp(logits + c, vocab - c < kVocabChunk ? vocab - c : kVocabChunk, inv_temperature));
  return total;
}

}  // namespace dschat
