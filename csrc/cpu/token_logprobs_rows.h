// What both forwards of token_logprobs do with the logits of a chunk of the vocabulary.
#pragma once

#include "logsumexp.h"
#include "token_logprobs.h"

namespace dschat {

constexpr int64_t kGroupRows = 96;  // rows whose logits of one chunk (384 KiB) stay in L2

inline int64_t chunks_of(int64_t V) { return (V + kVocabChunk - 1) / kVocabChunk; }

// Keeps the logits of a row group and a chunk as rows of kVocabChunk.
struct LogitRows final : TileSink {
  float* logits;
  int64_t first_row;

  LogitRows(float* out, int64_t first) : logits(out), first_row(first) {}

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    for (int r = 0; r < rows; ++r)
      for (int64_t i = 0; i < panels * kPanel; i += kLanes, sums += kLanes)
        store(logits + (row + r - first_row) * kVocabChunk + panel * kPanel + i, load(sums));
  }
};

// Sum of exp(z - m) (z - m), the part of the entropy that a chunk adds.
inline float chunk_weighted(const float* logits, int64_t n, float inv_temperature, float m) {
  const Vec scale = set1(inv_temperature), pivot = set1(m), floor = set1(-100.0f);
  Vec sum = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec t = max(load_or_minus_inf(logits + i, n - i) * scale - pivot, floor);  // exp(-100) is 0: no 0 * inf
    sum = fma(exp(t), t, sum);
  }
  return reduce_add(sum);
}

// Bias and softcap of the products of a row with the entries [first, first + count), in place.
inline void finish_logits(const TokenLogprobsArgs& a, int64_t first, int64_t count, float* row) {
  if (a.bias)
    for (int64_t i = 0; i < count; ++i) row[i] = row[i] + a.bias[first + i];
  if (a.softcap > 0.0f) {
    const Vec cap = set1(a.softcap);
    for (int64_t i = 0; i < count; i += kLanes) store(row + i, cap * tanh(load(row + i) / cap));
  }
}

// A row's entry of `partials` for chunk c, and z of its target where that is in the chunk.
inline void keep_partial(const TokenLogprobsArgs& a, int64_t r, int64_t c, const float* row, ChunkSum sum) {
  const int64_t first = c * kVocabChunk, count = std::min(kVocabChunk, a.V - first), chunks = chunks_of(a.V);
  const float inv_temperature = inverse_temperature(a.temperature);
  float* partial = a.partials + (r * chunks + c) * 3;
  partial[0] = sum.max;
  partial[1] = sum.sum;
  partial[2] = a.entropy && sum.sum != 0.0f ? chunk_weighted(row, count, inv_temperature, sum.max) : 0.0f;
  const int64_t target = a.targets[r] - first;
  if (target >= 0 && target < count) a.partials[a.T * chunks * 3 + r] = row[target] * inv_temperature;
}

// Folds a row's partials and writes what is asked of it.
inline void fold_partials(const TokenLogprobsArgs& a, int64_t r) {
  const int64_t chunks = chunks_of(a.V);
  LogSumExp total;
  float weighted = 0.0f;  // sum of exp(z - max) (z - max)
  for (int64_t c = 0; c < chunks; ++c) {
    const float* partial = a.partials + (r * chunks + c) * 3;
    const LogSumExp before = total;
    total.fold({partial[0], partial[1]});
    if (!a.entropy || partial[1] == 0.0f) continue;
    const float shift = partial[0] - total.max;
    if (before.sum != 0.0f) {
      const float drop = before.max - total.max;
      weighted = (weighted + before.sum * drop) * exp_scalar(drop);
    }
    weighted = weighted + (partial[2] + partial[1] * shift) * exp_scalar(shift);
  }
  const float z = a.partials[a.T * chunks * 3 + r];
  a.logprob[r] = total.log_prob(z);
  a.gap[r] = total.has_nan() ? total.sum : total.max - z;
  if (a.lse) a.lse[r] = total.value();
  if (a.entropy) a.entropy[r] = std::log(total.sum) - weighted / total.sum;
}

}  // namespace dschat
