// What linear and lora_linear do with finished sums: scale of int8 weights, bias, rounding, activation or gate, residual, store.
#pragma once

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

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override;
};

extern template struct Output<float>;
extern template struct Output<bf16>;

}  // namespace dschat
