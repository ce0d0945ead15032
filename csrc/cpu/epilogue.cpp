#include "epilogue.h"

#include <algorithm>

namespace dschat {
namespace {

// The fields of an Output, which stay in registers: what is stored through y cannot change a local copy.
template <typename T> struct Writer {
  const PackedMatrix w;
  const LinearEpilogue e;
  void* y;
  int64_t y_stride;

  // One vector of columns [column, column + 16) of a row, after the activation.
  DSCHAT_INLINE void finish(int64_t row, int64_t column, Vec v) const {
    const int count = int(std::min<int64_t>(kLanes, w.n - column));
    if (count == kLanes) finish_lanes(row, column, v, [](const auto* p) { return load(p); },
                                      [](auto* p, Vec x) { store(p, x); });
    else if (count > 0) finish_lanes(row, column, v, [=](const auto* p) { return load(p, count); },
                                     [=](auto* p, Vec x) { store(p, x, count); });
  }

  template <typename Load, typename Store>
  DSCHAT_INLINE void finish_lanes(int64_t row, int64_t column, Vec v, Load&& get, Store&& put) const {
    if (e.float_output) return put(static_cast<float*>(y) + row * y_stride + column, v);
    T* to = static_cast<T*>(y) + row * y_stride + column;
    if (e.residual) v = get(static_cast<const T*>(e.residual) + row * e.residual_stride + column) + round_to<T>(v);
    put(to, v);
  }

  // The sums of half a panel with their scales and bias.
  DSCHAT_INLINE Vec complete(const float* sums, int64_t panel, int64_t half) const {
    Vec v = load(sums + half * kLanes);
    if (w.scales) v = v * load(w.scales + panel * kPanel + half * kLanes);
    if (w.bias) v = v + load(w.bias + panel * kPanel + half * kLanes);
    return v;
  }

  template <Activation A> DSCHAT_INLINE void write_panel(const float* sums, int64_t row, int64_t panel) const {
    Vec lo = complete(sums, panel, 0), hi = complete(sums, panel, 1);
    if (w.gated) return finish(row, panel * kLanes, activate<A>(round_to<T>(lo)) * round_to<T>(hi));
    if (A != Activation::none && !e.float_output) {
      lo = activate<A>(round_to<T>(lo));
      hi = activate<A>(round_to<T>(hi));
    }
    finish(row, panel * kPanel, lo);
    finish(row, panel * kPanel + kLanes, hi);
  }

  template <Activation A> void tile(const float* sums, int64_t row, int rows, int64_t panel, int panels) const {
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p, sums += kPanel) write_panel<A>(sums, row + r, panel + p);
  }
};

}  // namespace

template <typename T>
void Output<T>::write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const {
  const Writer<T> here{w, e, y, y_stride};
  switch (e.activation) {
    case Activation::none: return here.template tile<Activation::none>(sums, row, rows, panel, panels);
    case Activation::gelu: return here.template tile<Activation::gelu>(sums, row, rows, panel, panels);
    case Activation::gelu_tanh: return here.template tile<Activation::gelu_tanh>(sums, row, rows, panel, panels);
    case Activation::relu: return here.template tile<Activation::relu>(sums, row, rows, panel, panels);
    case Activation::silu: return here.template tile<Activation::silu>(sums, row, rows, panel, panels);
    case Activation::quick_gelu: return here.template tile<Activation::quick_gelu>(sums, row, rows, panel, panels);
  }
}

template struct Output<float>;
template struct Output<bf16>;

}  // namespace dschat
