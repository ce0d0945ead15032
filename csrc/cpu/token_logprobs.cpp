#include "token_logprobs.h"

#include "dispatch.h"
#include "pack_dense.h"
#include "token_logprobs_rows.h"

namespace dschat {
namespace {

template <typename T> void run(const Team& team, DType dtype, const TokenLogprobsArgs& a) {
  const T* hidden = static_cast<const T*>(a.hidden);
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t chunks = chunks_of(a.V);
  const float inv_temperature = inverse_temperature(a.temperature);

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
      pack_rows(weight + first * a.H, a.H, count, a.H, 0, panels_of(count), panels);
      packed = c;
    }
    float* logits = static_cast<float*>(scratch(kScratchLogprobs, size_t(group * kVocabChunk) * sizeof(float)));
    multiply_panels(dtype, dtype, hidden, a.hidden_stride, a.H, panels, r0, r1, 0, panels_of(count),
                    LogitRows(logits, r0));
    for (int64_t r = r0; r < r1; ++r) {
      float* row = logits + (r - r0) * kVocabChunk;
      finish_logits(a, first, count, row);
      keep_partial(a, r, c, row, chunk_logsumexp(row, count, inv_temperature));
    }
  }
  team.barrier();

  const Range rows = team.range(a.T);
  for (int64_t r = rows.begin; r < rows.end; ++r) fold_partials(a, r);
}

}  // namespace

int64_t token_logprobs_partials(int64_t T, int64_t V) { return T * (3 * chunks_of(V) + 1); }

void token_logprobs(const Team& team, DType dtype, const TokenLogprobsArgs& args) {
  dispatch(dtype, [&](auto t) { run<decltype(t)>(team, dtype, args); });
}

}  // namespace dschat
