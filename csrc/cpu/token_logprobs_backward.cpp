#include "token_logprobs_backward.h"

#include "dispatch.h"
#include "logsumexp.h"
#include "pack_dense.h"

namespace dschat {
namespace {

constexpr float kNothing = std::numeric_limits<float>::min();  // probabilities below are 0

// From logits to their gradient, a vector of columns at a time.
template <typename T> struct LogitGradients final : TileSink {
  const TokenLogprobsBackwardArgs& a;
  const float inv_temperature;

  explicit LogitGradients(const TokenLogprobsBackwardArgs& args)
      : a(args), inv_temperature(inverse_temperature(args.temperature)) {}

  template <bool kEntropy> DSCHAT_INLINE Vec gradient(int64_t row, int64_t column, Vec logit) const {
    if (a.bias) logit = logit + load(a.bias + column, int(std::min<int64_t>(kLanes, a.count - column)));
    Vec slope = set1(inv_temperature);
    if (a.softcap > 0.0f) {
      const Vec cap = set1(a.softcap), t = tanh(logit / cap);
      logit = cap * t;
      slope = slope * (set1(1.0f) - t * t);
    }
    const Vec log_p = logit * set1(inv_temperature) - set1(a.lse[row]);
    const Vec p = exp(log_p);
    Vec pull = set1(a.dlogprob[row]);
    if (kEntropy) pull = pull + set1(a.dentropy[row]) * (log_p + set1(a.entropy[row]));
    const Vec dz = zero() - p * pull;
    return select_lt(p, set1(kNothing), zero(), dz) * slope;  // 0 where log p is -inf, NaN where it is NaN
  }

  // The target's own entry: d z + dlogprob, times its slope.
  void add_target(int64_t row, int64_t column, float logit) const {
    if (a.bias) logit = logit + a.bias[column];
    float slope = inv_temperature;
    if (a.softcap > 0.0f) {
      float lanes[kLanes];
      to_array(tanh(set1(logit / a.softcap)), lanes);
      slope = slope * (1.0f - lanes[0] * lanes[0]);
      logit = a.softcap * lanes[0];
    }
    const float log_p = logit * inv_temperature - a.lse[row], p = exp_scalar(log_p);
    float dz = a.dlogprob[row];
    if (!(p < kNothing)) dz = dz - p * (a.dlogprob[row] + (a.dentropy ? a.dentropy[row] * (log_p + a.entropy[row]) : 0.0f));
    static_cast<T*>(a.dlogits)[row * a.dlogits_stride + column] = from_float<T>(dz * slope);
  }

  template <bool kEntropy> void write_with(const float* sums, int64_t row, int rows, int64_t panel, int panels) const {
    for (int r = 0; r < rows; ++r, sums += panels * kPanel) {
      T* out = static_cast<T*>(a.dlogits) + (row + r) * a.dlogits_stride + panel * kPanel;
      for (int64_t i = 0; i < panels * kPanel; i += kLanes)
        if (panel * kPanel + i < a.count)
          store(out + i, gradient<kEntropy>(row + r, panel * kPanel + i, load(sums + i)));
      const int64_t target = a.targets[row + r] - a.first - panel * kPanel;
      if (target >= 0 && target < panels * kPanel && target + panel * kPanel < a.count)
        add_target(row + r, panel * kPanel + target, sums[target]);
    }
  }

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    if (a.dentropy) write_with<true>(sums, row, rows, panel, panels);
    else write_with<false>(sums, row, rows, panel, panels);
  }
};

// out[row][column] += sums
struct AddRows final : TileSink {
  float* out;
  const int64_t columns;

  AddRows(float* sums, int64_t n) : out(sums), columns(n) {}

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    for (int r = 0; r < rows; ++r, sums += panels * kPanel)
      for (int64_t i = 0; i < panels * kPanel; i += kLanes) {
        const int64_t column = panel * kPanel + i;
        if (column >= columns) break;
        float* at = out + (row + r) * columns + column;
        const int count = int(std::min<int64_t>(kLanes, columns - column));
        store(at, load(at, count) + load(sums + i, count), count);
      }
  }
};

template <typename T> void run(const Team& team, DType dtype, const TokenLogprobsBackwardArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  T* forward = static_cast<T*>(a.panels);
  T* backward = forward + panels_of(a.count) * panel_depth(forward, a.H) * kPanel;
  Range mine = team.range(panels_of(a.count));
  pack_rows(weight, a.H, a.count, a.H, mine.begin, mine.end, forward);
  if (a.dhidden) {
    mine = team.range(panels_of(a.H));
    pack_columns(weight, a.H, a.count, a.H, mine.begin, mine.end, backward);
  }
  team.barrier();

  Share s = share_of(team, a.T, panels_of(a.count));
  multiply_panels(dtype, dtype, a.hidden, a.hidden_stride, a.H, forward, s.r0, s.r1, s.p0, s.p1, LogitGradients<T>(a));
  if (!a.dhidden) return;
  team.barrier();

  s = share_of(team, a.T, panels_of(a.H));
  multiply_panels(dtype, dtype, a.dlogits, a.dlogits_stride, a.count, backward, s.r0, s.r1, s.p0, s.p1,
                  AddRows(a.dhidden, a.H));
}

template <typename T> int64_t panel_values(int64_t H, int64_t count) {
  const T* none = nullptr;
  return (panels_of(count) * panel_depth(none, H) + panels_of(H) * panel_depth(none, count)) * kPanel;
}

}  // namespace

int64_t token_logprobs_backward_panels(DType dtype, int64_t H, int64_t count) {
  return dtype == DType::f32 ? panel_values<float>(H, count) : panel_values<bf16>(H, count);
}

void token_logprobs_backward(const Team& team, DType dtype, const TokenLogprobsBackwardArgs& args) {
  if (args.T == 0 || args.count == 0) return;
  dispatch(dtype, [&](auto t) { run<decltype(t)>(team, dtype, args); });
}

}  // namespace dschat
