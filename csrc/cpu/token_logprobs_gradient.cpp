#include "token_logprobs_gradient.h"

#include "dispatch.h"
#include "pack_dense.h"
#include "token_logprobs_rows.h"

namespace dschat {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// sum[row] = keep[row] sum[row] + gain[row] products; where keep is 0, whatever the sum holds.
struct ScaledSums final : TileSink {
  float* sum;
  const int64_t columns;
  const float *keep, *gain;

  ScaledSums(float* out, int64_t n, const float* before, const float* now)
      : sum(out), columns(n), keep(before), gain(now) {}

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    for (int r = 0; r < rows; ++r) {
      const float before = keep[row + r];
      const Vec k = set1(before), g = set1(gain[row + r]);
      for (int64_t i = 0; i < panels * kPanel; i += kLanes, sums += kLanes) {
        const int64_t column = panel * kPanel + i;
        if (column >= columns) continue;
        float* at = sum + (row + r) * columns + column;
        const int count = int(std::min<int64_t>(kLanes, columns - column));
        const Vec now = g * load(sums);
        store(at, before == 0.0f ? now : fma(k, load(at, count), now), count);
      }
    }
  }
};

// One chunk for the rows [r0, r1) of a group.
template <typename T> class ChunkOfRows {
 public:
  ChunkOfRows(DType dtype, const TokenLogprobsGradientArgs& args, int64_t chunk, const T* forward, const T* backward)
      : dtype_(dtype), a_(args), c_(chunk), first_(chunk * kVocabChunk), count_(std::min(kVocabChunk, args.V - first_)),
        forward_(forward), backward_(backward) {}

  // highest: [T] the maximum of each row's chunks so far.
  void run(int64_t r0, int64_t r1, float* highest) const {
    float* logits = static_cast<float*>(
        scratch(kScratchLogprobs, size_t(kGroupRows * kVocabChunk) * (sizeof(float) + sizeof(T))));
    T* weights = reinterpret_cast<T*>(logits + kGroupRows * kVocabChunk);
    float keep[kGroupRows], gain[kGroupRows];
    multiply_panels(dtype_, dtype_, a_.hidden, a_.hidden_stride, a_.H, forward_, r0, r1, 0, panels_of(count_),
                    LogitRows(logits, r0));
    for (int64_t r = r0; r < r1; ++r) {
      float* row = logits + (r - r0) * kVocabChunk;
      finish_logits(a_, first_, count_, row);
      const ChunkSum sum = weigh(row, r, weights + (r - r0) * kVocabChunk);
      keep_partial(a_, r, c_, row, sum);
      const float before = c_ == 0 ? kMinusInf : highest[r];
      const float now = highest[r] = std::max(before, sum.max);
      keep[r - r0] = before == kMinusInf ? 0.0f : exp_scalar(before - now);
      gain[r - r0] = sum.max == kMinusInf ? 1.0f : exp_scalar(sum.max - now);  // 1: of zeros, or of a NaN that shows
    }
    multiply_panels(dtype_, dtype_, weights, kVocabChunk, count_, backward_, 0, r1 - r0, 0, panels_of(a_.H),
                    ScaledSums(a_.gradient + r0 * a_.H, a_.H, keep, gain));
  }

 private:
  // exp(z - m_c) slope of a row's entries but the target's, in the dtype of the weight.
  ChunkSum weigh(const float* row, int64_t r, T* weights) const {
    const Vec one = set1(1.0f), cap = set1(a_.softcap);
    const bool capped = a_.softcap > 0.0f;
    const ChunkSum sum =
        chunk_logsumexp(row, count_, inverse_temperature(a_.temperature), [&](int64_t i, Vec e) {
          const Vec t = load(row + i) / cap;
          store(weights + i, capped ? e * (one - t * t) : e);
        });
    const int64_t target = a_.targets[r] - first_;
    if (target >= 0 && target < count_) weights[target] = from_float<T>(0.0f);
    return sum;
  }

  const DType dtype_;
  const TokenLogprobsGradientArgs& a_;
  const int64_t c_, first_, count_;
  const T *forward_, *backward_;
};

// From the scaled sum of a row to its gradient, in place.
template <typename T> void finish_row(const TokenLogprobsGradientArgs& a, int64_t r, float highest) {
  const float inv_temperature = inverse_temperature(a.temperature), z = a.partials[a.T * chunks_of(a.V) * 3 + r];
  float slope = inv_temperature;
  if (a.softcap > 0.0f) {
    const float t = z * a.temperature / a.softcap;
    slope = slope * (1.0f - t * t);
  }
  const Vec own = set1(slope * (1.0f - exp_scalar(a.logprob[r])));
  const Vec others = set1(inv_temperature * exp_scalar(highest - a.lse[r]));
  const T* target = static_cast<const T*>(a.weight) + a.targets[r] * a.H;
  float* gradient = a.gradient + r * a.H;
  for (int64_t i = 0; i < a.H; i += kLanes) {
    const int n = int(std::min<int64_t>(kLanes, a.H - i));
    store(gradient + i, own * load(target + i, n) - others * load(gradient + i, n), n);
  }
}

template <typename T> void run(const Team& team, DType dtype, const TokenLogprobsGradientArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  T* forward = static_cast<T*>(a.panels);
  T* backward = forward + panels_of(kVocabChunk) * panel_depth(forward, a.H) * kPanel;
  float* highest = a.partials + token_logprobs_partials(a.T, a.V);
  const Range rows = team.range(a.T);
  const int64_t groups = (rows.end - rows.begin + kGroupRows - 1) / kGroupRows;
  const auto cut = [&](int64_t g) { return rows.begin + (rows.end - rows.begin) * g / groups; };
  for (int64_t c = 0; c < chunks_of(a.V); ++c) {
    const int64_t first = c * kVocabChunk, count = std::min(kVocabChunk, a.V - first);
    Range mine = team.range(panels_of(count));
    pack_rows(weight + first * a.H, a.H, count, a.H, mine.begin, mine.end, forward);
    mine = team.range(panels_of(a.H));
    pack_columns(weight + first * a.H, a.H, count, a.H, mine.begin, mine.end, backward);
    team.barrier();
    const ChunkOfRows<T> chunk(dtype, a, c, forward, backward);
    for (int64_t g = 0; g < groups; ++g) chunk.run(cut(g), cut(g + 1), highest);
    team.barrier();
  }
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    fold_partials(a, r);
    finish_row<T>(a, r, highest[r]);
  }
}

template <typename T> int64_t panel_values(int64_t H) {
  const T* none = nullptr;
  return (panels_of(kVocabChunk) * panel_depth(none, H) + panels_of(H) * panel_depth(none, kVocabChunk)) * kPanel;
}

}  // namespace

int64_t token_logprobs_gradient_panels(DType dtype, int64_t H) {
  return dtype == DType::f32 ? panel_values<float>(H) : panel_values<bf16>(H);
}

// One more a row: the maximum of its chunks so far.
int64_t token_logprobs_gradient_partials(int64_t T, int64_t V) { return token_logprobs_partials(T, V) + T; }

void token_logprobs_gradient(const Team& team, DType dtype, const TokenLogprobsGradientArgs& args) {
  dispatch(dtype, [&](auto t) { run<decltype(t)>(team, dtype, args); });
}

}  // namespace dschat
