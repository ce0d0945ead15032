// y = epilogue(x W^T + b) over a dense weight [n, k] (gated: [2 n, k], gate first); see dschat_kernels/ops/linear.py.
#include "cuda/linear.cuh"

#include "cuda/launch.h"

using namespace dschat::cuda;

extern "C" int launch_linear(int type, const void* x, int64_t x_stride, int64_t rows, const void* weight,
                             const float* bias, int64_t n, int64_t k, bool gated, int activation, const void* residual,
                             int64_t residual_stride, bool float_output, void* y, int64_t y_stride, void* stream) {
  if (rows == 0 || n == 0) return launched();
  return launched(known_activation(activation) && dispatch(type, [&](auto t) {
    using T = decltype(t);
    const Epilogue<T> epilogue{bias, static_cast<const T*>(residual), residual_stride, y, y_stride, n, gated,
                               float_output, Activation(activation), nullptr, nullptr, 0, nullptr};
    launch_tiles(operand<T>(x, x_stride, k), rows, operand<T>(weight, k, k), epilogue, stream);
  }));
}
