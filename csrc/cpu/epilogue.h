// What linear and lora_linear do with finished sums: scale of int8 weights, bias, rounding, activation or gate, residual, store.
#pragma once

#include <algorithm>

#include "linear.h"

namespace dschat {

// Everything an epilogue needs; T is the dtype of x, y and the residual.
template <typename T> struct Output final : TileSink {
  const PackedMatrix w;
  const LinearEpilogue e;
  void* y;
  int64_t y_stride;

  Output(const PackedMatrix& matrix, const LinearEpilogue& epilogue, void* out, int64_t stride)
      : w(matrix), e(epilogue), y(out), y_stride(stride) {}

  // One vector of finished columns [column, column + 16) of a row.
  template <Activation A> DSCHAT_INLINE void finish(int64_t row, int64_t column, Vec v) const {
    const int count = int(std::min<int64_t>(kLanes, w.n - column));
    if (count == kLanes) finish_lanes<A>(row, column, v, [](const auto* p) { return load(p); },
                                         [](auto* p, Vec x) { store(p, x); });
    else if (count > 0) finish_lanes<A>(row, column, v, [=](const auto* p) { return load(p, count); },
                                        [=](auto* p, Vec x) { store(p, x, count); });
  }

  template <Activation A, typename Load, typename Store>
  DSCHAT_INLINE void finish_lanes(int64_t row, int64_t column, Vec v, Load&& get, Store&& put) const {
    if (e.float_output) return put(static_cast<float*>(y) + row * y_stride + column, v);
    T* to = static_cast<T*>(y) + row * y_stride + column;
    if (A != Activation::none && !w.gated) v = activate<A>(round_to<T>(v));
    if (e.residual) v = get(static_cast<const T*>(e.residual) + row * e.residual_stride + column) + round_to<T>(v);
    put(to, v);
  }

  template <Activation A> void write_with(const float* sums, int64_t row, int rows, int64_t panel, int panels) const {
    const Output here = *this;  // its fields stay in registers: what is stored through y cannot change them
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p, sums += kPanel) here.template write_panel<A>(sums, row + r, panel + p);
  }

  // The sums of half a panel with their scales and bias.
  DSCHAT_INLINE Vec complete(const float* sums, int64_t panel, int64_t half) const {
    Vec v = load(sums + half * kLanes);
    if (w.scales) v = v * load(w.scales + panel * kPanel + half * kLanes);
    if (w.bias) v = v + load(w.bias + panel * kPanel + half * kLanes);
    return v;
  }

  template <Activation A> DSCHAT_INLINE void write_panel(const float* sums, int64_t row, int64_t panel) const {
    const Vec lo = complete(sums, panel, 0), hi = complete(sums, panel, 1);
    if (w.gated) {
      finish<A>(row, panel * kLanes, activate<A>(round_to<T>(lo)) * round_to<T>(hi));
    } else {
      finish<A>(row, panel * kPanel, lo);
      finish<A>(row, panel * kPanel + kLanes, hi);
    }
  }

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    switch (e.activation) {
      case Activation::none: return write_with<Activation::none>(sums, row, rows, panel, panels);
      case Activation::gelu: return write_with<Activation::gelu>(sums, row, rows, panel, panels);
      case Activation::gelu_tanh: return write_with<Activation::gelu_tanh>(sums, row, rows, panel, panels);
      case Activation::relu: return write_with<Activation::relu>(sums, row, rows, panel, panels);
      case Activation::silu: return write_with<Activation::silu>(sums, row, rows, panel, panels);
      case Activation::quick_gelu: return write_with<Activation::quick_gelu>(sums, row, rows, panel, panels);
    }
  }
};

}  // namespace dschat
