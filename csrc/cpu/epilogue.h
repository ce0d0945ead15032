// What linear and lora_linear do with finished sums: scale of int8 weights, bias, rounding, activation or gate, residual, store.
#pragma once

#include <algorithm>

#include "linear.h"

namespace dschat {

// Everything an epilogue needs; T is the dtype of x, y and the residual.
template <typename T> struct Output final : TileSink {
  const PackedMatrix& w;
  const LinearEpilogue e;
  void* y;
  int64_t y_stride;

  Output(const PackedMatrix& matrix, const LinearEpilogue& epilogue, void* out, int64_t stride)
      : w(matrix), e(epilogue), y(out), y_stride(stride) {}

  // One vector of finished columns [column, column + 16) of a row.
  template <Activation A> DSCHAT_INLINE void finish(int64_t row, int64_t column, Vec v) const {
    const int count = int(std::min<int64_t>(kLanes, w.n - column));
    if (count <= 0) return;
    if (e.float_output) {
      store(static_cast<float*>(y) + row * y_stride + column, v, count);
      return;
    }
    v = round_to<T>(v);
    if (A != Activation::none && !w.gated) v = round_to<T>(activate<A>(v));
    if (e.residual) v = load(static_cast<const T*>(e.residual) + row * e.residual_stride + column, count) + v;
    store(static_cast<T*>(y) + row * y_stride + column, v, count);
  }

  template <Activation A> void write_with(const float* sums, int64_t row, int rows, int64_t panel, int panels) const {
    for (int r = 0; r < rows; ++r) {
      for (int p = 0; p < panels; ++p, sums += kPanel) {
        Vec lo = load(sums), hi = load(sums + kLanes);
        if (w.scales) {
          lo = lo * load(w.scales + (panel + p) * kPanel);
          hi = hi * load(w.scales + (panel + p) * kPanel + kLanes);
        }
        if (w.bias) {
          lo = lo + load(w.bias + (panel + p) * kPanel);
          hi = hi + load(w.bias + (panel + p) * kPanel + kLanes);
        }
        if (w.gated) {
          finish<A>(row + r, (panel + p) * kLanes, activate<A>(round_to<T>(lo)) * round_to<T>(hi));
        } else {
          finish<A>(row + r, (panel + p) * kPanel, lo);
          finish<A>(row + r, (panel + p) * kPanel + kLanes, hi);
        }
      }
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
