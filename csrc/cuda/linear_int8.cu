// linear over a weight of integers: y = epilogue(scale (x Q^T) + b); see dschat_kernels/ops/linear.py.
#include "cuda/linear_int8.h"

#include "cuda/linear.cuh"

using namespace dschat::cuda;

// `weights` is the number of packing.WEIGHTS.
extern "C" int launch_linear_int8(int type, const void* x, int64_t x_stride, int64_t rows, const void* weight,
                                  const float* bias, int64_t n, int64_t k, bool gated, int activation,
                                  const void* residual, int64_t residual_stride, bool float_output, void* y,
                                  int64_t y_stride, int weights, const float* scales, void* stream) {
  constexpr int kInt8 = 1;
  if (weights != kInt8) return launched(false);
  if (rows == 0 || n == 0) return launched();
  return launched(known_activation(activation) && dispatch(type, [&](auto t) {
    using T = decltype(t);
    const Epilogue<T, int8_t> epilogue{bias, static_cast<const T*>(residual), residual_stride, y, y_stride, n, gated,
                                       float_output, Activation(activation), nullptr, nullptr, 0, scales};
    launch_tiles(operand<T>(x, x_stride, k), rows, operand<int8_t>(weight, k, k), epilogue, stream);
  }));
}
