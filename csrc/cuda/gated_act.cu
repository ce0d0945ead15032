// y = act(gate + gate_bias) * (up + up_bias); see dschat_kernels/ops/gated_act.py.
#include "cuda/activation.cuh"
#include "cuda/column_sum.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/launch.h"

namespace dschat::cuda {
namespace {

template <typename T> struct Inputs {
  const T *gate, *up;
  const float *gate_bias, *up_bias;
  int64_t gate_stride, up_stride;
};

template <typename T>
__device__ __forceinline__ void load_inputs(const Inputs<T>& in, int64_t row, int64_t column, int64_t n, int width,
                                            float (&g)[kGroup<T>], float (&u)[kGroup<T>]) {
  load_group(in.gate + row * in.gate_stride + column, n, width, g);
  load_group(in.up + row * in.up_stride + column, n, width, u);
  if (in.gate_bias) add_vector(in.gate_bias + column, n, width, g);
  if (in.up_bias) add_vector(in.up_bias + column, n, width, u);
}

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    forward(Activation a, Inputs<T> in, T* y, int64_t rows, int64_t columns, int width) {
  int64_t row, column;
  if (!own_group<T>(rows, columns, row, column)) return;
  float g[kGroup<T>], u[kGroup<T>];
  load_inputs(in, row, column, columns - column, width, g, u);
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) g[i] = activate(a, g[i]) * u[i];
  store_group(y + row * columns + column, columns - column, width, g);
}

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    backward(Activation a, const T* dy, Inputs<T> in, T* dgate, T* dup, int64_t rows, int64_t columns,
             int64_t grad_stride, int width) {
  int64_t row, column;
  if (!own_group<T>(rows, columns, row, column)) return;
  const int64_t n = columns - column;
  float d[kGroup<T>], g[kGroup<T>], u[kGroup<T>];
  load_group(dy + row * columns + column, n, width, d);
  load_inputs(in, row, column, n, width, g, u);
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) {
    const float grad_gate = d[i] * u[i] * activate_grad(a, g[i]);
    u[i] = d[i] * activate(a, g[i]);
    g[i] = grad_gate;
  }
  store_group(dgate + row * grad_stride + column, n, width, g);
  store_group(dup + row * grad_stride + column, n, width, u);
}

template <typename T, bool kGate> struct BiasTerm {
  Activation a;
  const T* dy;
  Inputs<T> in;
  int64_t columns;
  __device__ float operator()(int64_t row, int64_t column) const {
    const float d = to_float(dy[row * columns + column]);
    const float g = to_float(in.gate[row * in.gate_stride + column]) + (in.gate_bias ? in.gate_bias[column] : 0.0f);
    const float u = to_float(in.up[row * in.up_stride + column]) + (in.up_bias ? in.up_bias[column] : 0.0f);
    return kGate ? d * u * activate_grad(a, g) : d * activate(a, g);
  }
};

}  // namespace

extern "C" int launch_gated_act(int type, int activation, const void* gate, const void* up, const float* gate_bias,
                                const float* up_bias, void* y, int64_t rows, int64_t columns, int64_t gate_stride,
                                int64_t up_stride, void* stream) {
  if (rows * columns == 0) return launched();
  return launched(known_activation(activation) && dispatch(type, [&](auto t) {
    using T = decltype(t);
    const int64_t step = int64_t(sizeof(T));
    const int width = access_width({gate, up, y, gate_bias, up_bias}, {columns * step, gate_stride * step, up_stride * step});
    const Inputs<T> in{static_cast<const T*>(gate), static_cast<const T*>(up), gate_bias, up_bias, gate_stride, up_stride};
    DSCHAT_LAUNCH(forward<T>, dim3(Groups<T>{rows, columns}.blocks()), dim3(kElementThreads), 0, stream,
                  Activation(activation), in, static_cast<T*>(y), rows, columns, width);
  }));
}

extern "C" int launch_gated_act_backward(int type, int activation, const void* dy, const void* gate, const void* up,
                                         const float* gate_bias, const float* up_bias, void* dgate, void* dup,
                                         float* dgate_bias, float* dup_bias, float* partial, int64_t rows,
                                         int64_t columns, int64_t gate_stride, int64_t up_stride, int64_t grad_stride,
                                         void* stream) {
  return launched(known_activation(activation) && dispatch(type, [&](auto t) {
    using T = decltype(t);
    const int64_t step = int64_t(sizeof(T));
    const int width = access_width({dy, gate, up, dgate, dup, gate_bias, up_bias},
                                   {columns * step, gate_stride * step, up_stride * step, grad_stride * step});
    const Inputs<T> in{static_cast<const T*>(gate), static_cast<const T*>(up), gate_bias, up_bias, gate_stride, up_stride};
    const Activation a = Activation(activation);
    const auto* grad = static_cast<const T*>(dy);
    if (rows * columns)
      DSCHAT_LAUNCH(backward<T>, dim3(Groups<T>{rows, columns}.blocks()), dim3(kElementThreads), 0, stream, a, grad, in,
                    static_cast<T*>(dgate), static_cast<T*>(dup), rows, columns, grad_stride, width);
    if (dgate_bias)
      column_sums(BiasTerm<T, true>{a, grad, in, columns}, partial, dgate_bias, rows, columns, stream);
    if (dup_bias) column_sums(BiasTerm<T, false>{a, grad, in, columns}, partial, dup_bias, rows, columns, stream);
  }));
}

}  // namespace dschat::cuda
