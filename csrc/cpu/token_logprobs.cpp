#include "token_logprobs.h"

#include "dispatch.h"
#include "gemm.h"
#include "logsumexp.h"

namespace dschat {
namespace {

constexpr int64_t kGroupRows = 96;  // rows whose logits of one chunk (384 KiB) stay in L2

inline int64_t chunks_of(int64_t V) { return (V + kVocabChunk - 1) / kVocabChunk; }

DSCHAT_INLINE int64_t place_in_panel(const float*, int c) { return c; }
DSCHAT_INLINE int64_t place_in_panel(const bf16*, int c) { return c < kLanes ? 2 * c : 2 * (c - kLanes) + 1; }

// Vocabulary entries [first, first + count) as panels of linear.h; columns past count are zero.
template <typename T> void pack_chunk(const T* weight, int64_t H, int64_t first, int64_t count, T* panels) {
  constexpr int64_t kBlock = 64;  // columns of k interleaved at a time: 32 rows x 64 values stay in L1
  for (int64_t p = 0; p * kPanel < count; ++p, panels += H * kPanel)
    for (int64_t k0 = 0; k0 < H; k0 += kBlock) {
      const int64_t k1 = std::min(H, k0 + kBlock);
      for (int c = 0; c < kPanel; ++c) {
        const int64_t place = place_in_panel(panels, c), v = p * kPanel + c;
        const T* row = weight + (first + v) * H;
        if (v < count)
          for (int64_t k = k0; k < k1; ++k) panels[k * kPanel + place] = row[k];
        else
          for (int64_t k = k0; k < k1; ++k) panels[k * kPanel + place] = T{};
      }
    }
}

template <typename T, int MR, int NP>
void logits_tile(const float* a, const T* panels, int64_t H, float* logits) {
  alignas(64) float sums[MR * NP * kPanel];
  multiply<T, MR, NP>(a, panels, H, sums);
  for (int r = 0; r < MR; ++r)
    for (int i = 0; i < NP * kPanel; i += kLanes)
      store(logits + r * kVocabChunk + i, load(sums + r * NP * kPanel + i));
}

// MR rows (a: widen_rows) times the panels of `count` vocabulary entries; logits has rows of kVocabChunk.
template <typename T, int MR>
void logits_block(const float* a, const T* panels, int64_t H, int64_t count, float* logits) {
  constexpr int NP = panels_at_once<MR>();
  const int64_t n = (count + kPanel - 1) / kPanel;
  int64_t p = 0;
  for (; p + NP <= n; p += NP) logits_tile<T, MR, NP>(a, panels + p * H * kPanel, H, logits + p * kPanel);
  if constexpr (NP > 1)
    for (; p < n; ++p) logits_tile<T, MR, 1>(a, panels + p * H * kPanel, H, logits + p * kPanel);
}

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

template <typename T> void run(const Team& team, const TokenLogprobsArgs& a) {
  const T* hidden = static_cast<const T*>(a.hidden);
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t chunks = chunks_of(a.V);
  const float inv_temperature = inverse_temperature(a.temperature);
  float* target_z = a.partials + a.T * chunks * 3;

  // Work is a grid of chunks by row groups, chunk after chunk, so that a chunk is packed by one or two threads.
  const int64_t row_bytes = widened_size(1, a.H) * int64_t(sizeof(float));
  int64_t group = std::min<int64_t>(kGroupRows, (512 * 1024 / row_bytes) / kMaxRows * kMaxRows);
  group = std::max<int64_t>(group, kMaxRows);
  const int64_t groups = (a.T + group - 1) / group;
  const Range share = team.range(chunks * groups);
  int64_t packed = -1;
  T* panels = nullptr;
  for (int64_t unit = share.begin; unit < share.end; ++unit) {
    const int64_t c = unit / groups, r0 = unit % groups * group, r1 = std::min(a.T, r0 + group);
    const int64_t first = c * kVocabChunk, count = std::min(kVocabChunk, a.V - first);
    if (packed != c) {
      panels = static_cast<T*>(scratch(kScratchPack, size_t(a.H * kVocabChunk) * sizeof(T)));
      pack_chunk(weight, a.H, first, count, panels);
      packed = c;
    }
    float* wide = static_cast<float*>(scratch(kScratchGemm, size_t(widened_size(kMaxRows, a.H)) * sizeof(float)));
    float* logits = static_cast<float*>(scratch(kScratchLogprobs, size_t(group * kVocabChunk) * sizeof(float)));
    for (int64_t r = r0; r < r1;) {
      // Whole blocks, and the rest row by row: few sizes are worth compiling.
      const int rows = r1 - r >= kMaxRows ? kMaxRows : 1;
      widen_rows(hidden + r * a.hidden_stride, a.hidden_stride, rows, a.H, wide);
      float* to = logits + (r - r0) * kVocabChunk;
      if (rows == kMaxRows) logits_block<T, kMaxRows>(wide, panels, a.H, count, to);
      else logits_block<T, 1>(wide, panels, a.H, count, to);
      r += rows;
    }
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
      weighted = (before.sum == 0.0f ? 0.0f
                                     : (weighted + before.sum * (before.max - total.max)) * exp_scalar(before.max - total.max)) +
                 (partial[2] + partial[1] * shift) * exp_scalar(shift);
    }
    a.logprob[r] = total.log_prob(target_z[r]);
    if (a.lse) a.lse[r] = total.value();
    if (a.entropy) a.entropy[r] = std::log(total.sum) - weighted / total.sum;
  }
}

}  // namespace

int64_t token_logprobs_partials(int64_t T, int64_t V) { return T * (3 * chunks_of(V) + 1); }

void token_logprobs(const Team& team, DType dtype, const TokenLogprobsArgs& args) {
  dispatch(dtype, [&](auto t) { run<decltype(t)>(team, args); });
}

}  // namespace dschat
