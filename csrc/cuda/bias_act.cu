// y = act(x + bias); the formulas are in dschat_kernels/ops/bias_act.py.
#include "cuda/activation.cuh"
#include "cuda/column_sum.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/launch.h"

namespace dschat::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    forward(Activation a, const T* x, const float* bias, T* y, int64_t rows, int64_t columns, int64_t x_stride,
            int width) {
  int64_t row, column;
  if (!own_group<T>(rows, columns, row, column)) return;
  const int64_t n = columns - column;
  float v[kGroup<T>];
  load_group(x + row * x_stride + column, n, width, v);
  if (bias) add_vector(bias + column, n, width, v);
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) v[i] = activate(a, v[i]);
  store_group(y + row * columns + column, n, width, v);
}

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    backward(Activation a, const T* dy, const T* x, const float* bias, T* dx, int64_t rows, int64_t columns,
             int64_t x_stride, int width) {
  int64_t row, column;
  if (!own_group<T>(rows, columns, row, column)) return;
  const int64_t n = columns - column, at = row * columns + column;
  float v[kGroup<T>], g[kGroup<T>];
  load_group(x + row * x_stride + column, n, width, v);
  load_group(dy + at, n, width, g);
  if (bias) add_vector(bias + column, n, width, v);
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) g[i] *= activate_grad(a, v[i]);
  store_group(dx + at, n, width, g);
}

template <typename T> struct BiasTerm {
  Activation a;
  const T *dy, *x;
  const float* bias;
  int64_t columns, x_stride;
  __device__ float operator()(int64_t row, int64_t column) const {
    const float v = to_float(x[row * x_stride + column]) + (bias ? bias[column] : 0.0f);
    return to_float(dy[row * columns + column]) * activate_grad(a, v);
  }
};

}  // namespace

extern "C" int launch_bias_act(int type, int activation, const void* x, const float* bias, void* y, int64_t rows,
                               int64_t columns, int64_t x_stride, void* stream) {
  if (rows * columns == 0) return launched();
  return launched(known_activation(activation) && dispatch(type, [&](auto t) {
    using T = decltype(t);
    const int64_t step = int64_t(sizeof(T));
    const int width = access_width({x, y, bias}, {columns * step, x_stride * step});
    DSCHAT_LAUNCH(forward<T>, dim3(Groups<T>{rows, columns}.blocks()), dim3(kElementThreads), 0, stream,
                  Activation(activation), static_cast<const T*>(x), bias, static_cast<T*>(y), rows, columns, x_stride,
                  width);
  }));
}

extern "C" int launch_bias_act_backward(int type, int activation, const void* dy, const void* x, const float* bias,
                                        void* dx, float* dbias, float* partial, int64_t rows, int64_t columns,
                                        int64_t x_stride, void* stream) {
  return launched(known_activation(activation) && dispatch(type, [&](auto t) {
    using T = decltype(t);
    const int64_t step = int64_t(sizeof(T));
    const int width = access_width({dy, x, dx, bias}, {columns * step, x_stride * step});
    const auto *grad = static_cast<const T*>(dy), *input = static_cast<const T*>(x);
    if (rows * columns)
      DSCHAT_LAUNCH(backward<T>, dim3(Groups<T>{rows, columns}.blocks()), dim3(kElementThreads), 0, stream,
                    Activation(activation), grad, input, bias, static_cast<T*>(dx), rows, columns, x_stride, width);
    if (dbias)
      column_sums(BiasTerm<T>{Activation(activation), grad, input, bias, columns, x_stride}, partial, dbias, rows,
                  columns, stream);
  }));
}

}  // namespace dschat::cuda
