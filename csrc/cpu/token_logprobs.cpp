#include "token_logprobs.h"

#include "dispatch.h"
#include "logsumexp.h"
#include "pack_dense.h"

namespace dschat {
namespace {

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
float chunk_weighted(const float* logits, int64_t n, float inv_temperature, float m) {
  const Vec scale = set1(inv_temperature), pivot = set1(m), floor = set1(-100.0f);
  Vec sum = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec t = max(load_or_minus_inf(logits + i, n - i) * scale - pivot, floor);  // exp(-100) is 0: no 0 * inf
    sum = fma(exp(t), t, sum);
  }
  return reduce_add(sum);
}

template <typename T> void run(const Team& team, DType dtype, const TokenLogprobsArgs& a) {
  const T* hidden = static_cast<const T*>(a.hidden);
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t chunks = chunks_of(a.V);
  const float inv_temperature = inverse_temperature(a.temperature);
  float* target_z = a.partials + a.T * chunks * 3;

  // Work is a grid of chunks by row groups, chunk after chunk, so that a chunk is packed by one or two threads.
  const int64_t group = kGroupRows;
  const int64_t groups = (a.T + group - 1) / group;
  const Range share = team.range(chunks * groups);
  int64_t packed = -1;
  T* panels = nullptr;
  for (int64_t unit = share.begin; unit < share.end; ++unit) {
    const int64_t c = unit / groups, r0 = unit % groups * group, r1 = std::min(a.T, r0 + group);
    const int64_t first = c * kVocabChunk, count = std::min(kVocabChunk, a.V - first);
    if (packed != c) {
      panels = static_cast<T*>(scratch(kScratchPack, size_t(panel_depth(panels, a.H) * kVocabChunk) * sizeof(T)));
      pack_rows(weight + first * a.H, a.H, count, a.H, 0, (count + kPanel - 1) / kPanel, panels);
      packed = c;
    }
    float* logits = static_cast<float*>(scratch(kScratchLogprobs, size_t(group * kVocabChunk) * sizeof(float)));
    multiply_panels(dtype, dtype, hidden, a.hidden_stride, a.H, panels, r0, r1, 0, (count + kPanel - 1) / kPanel,
                    LogitRows(logits, r0));
    for (int64_t r = r0; r < r1; ++r) {
      float* row = logits + (r - r0) * kVocabChunk;
      if (a.bias)
        for (int64_t i = 0; i < count; ++i) row[i] = row[i] + a.bias[first + i];
      if (a.softcap > 0.0f) {
        const Vec cap = set1(a.softcap);
        for (int64_t i = 0; i < count; i += kLanes) store(row + i, cap * tanh(load(row + i) / cap));
      }
      const ChunkSum sum = chunk_logsumexp(row, count, inv_temperature);
      float* partial = a.partials + (r * chunks + c) * 3;
      partial[0] = sum.max;
      partial[1] = sum.sum;
      partial[2] = a.entropy && sum.sum != 0.0f ? chunk_weighted(row, count, inv_temperature, sum.max) : 0.0f;
      const int64_t target = a.targets[r] - first;
      if (target >= 0 && target < count) target_z[r] = row[target] * inv_temperature;
    }
  }
  team.barrier();

  const Range rows = team.range(a.T);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
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
    a.logprob[r] = total.log_prob(target_z[r]);
    if (a.lse) a.lse[r] = total.value();
    if (a.entropy) a.entropy[r] = std::log(total.sum) - weighted / total.sum;
  }
}

}  // namespace

int64_t token_logprobs_partials(int64_t T, int64_t V) { return T * (3 * chunks_of(V) + 1); }

void token_logprobs(const Team& team, DType dtype, const TokenLogprobsArgs& args) {
  dispatch(dtype, [&](auto t) { run<decltype(t)>(team, dtype, args); });
}

}  // namespace dschat
