// RMSNorm; the formula and the rounding orders are in dschat_kernels/ops/rms_norm.py. One block a row.
#include "cuda/column_sum.cuh"
#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace dschat::cuda {
namespace {

// y = round(n scale), where n is rounded to T first if `round_first` (llama).
template <typename T, typename Y>
__global__ void __launch_bounds__(256)
    forward(const T* x, const T* residual, const float* scale, Y* y, T* residual_out, float* rstd_out, int64_t columns,
            int64_t x_stride, float eps, bool round_first, int width, bool cached) {
  DSCHAT_DYNAMIC_SHARED(memory);
  DSCHAT_SHARED(float, scratch, kWarp);
  const int64_t row = blockIdx.x, at = row * columns;
  const RowReader<T> rows{x + row * x_stride, residual ? residual + at : nullptr, residual_out + at,
                          cached ? reinterpret_cast<T*>(memory) : nullptr, columns, width};
  float sum = 0.0f;
  each_group<T>(columns, [&](int64_t begin) {
    float h[kGroup<T>];
    rows.first(begin, h);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) sum = fmaf(h[i], h[i], sum);  // zeros behind the end
  });
  const float rstd = 1.0f / sqrtf(block_sum(sum, scratch) / float(columns) + eps);
  each_group<T>(columns, [&](int64_t begin) {
    float h[kGroup<T>], factor[kGroup<T>];
    rows.again(begin, h);
    load_group(scale + begin, columns - begin, width, factor);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) {
      const float n = h[i] * rstd;
      h[i] = (round_first ? rounded<T>(n) : n) * factor[i];
    }
    store_group(y + at + begin, columns - begin, width, h);
  });
  if (threadIdx.x == 0) rstd_out[row] = rstd;
}

// With g = dy scale and n = h rstd:  dx = rstd (g - n mean(g n)) + d_residual_out
template <typename T, typename Y>
__global__ void __launch_bounds__(256)
    backward(const Y* dy, const T* d_residual_out, const T* h, const float* scale, const float* rstd_in, T* dx,
             int64_t columns, int width) {
  DSCHAT_SHARED(float, scratch, kWarp);
  const int64_t row = blockIdx.x, at = row * columns;
  const float rstd = rstd_in[row];
  const auto load = [&](int64_t begin, float (&g)[kGroup<T>], float (&n)[kGroup<T>]) {
    load_group(dy + at + begin, columns - begin, width, g);
    load_group(h + at + begin, columns - begin, width, n);
    float factor[kGroup<T>];
    load_group(scale + begin, columns - begin, width, factor);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) {
      n[i] *= rstd;
      g[i] *= factor[i];
    }
  };
  float product = 0.0f;
  each_group<T>(columns, [&](int64_t begin) {
    float g[kGroup<T>], n[kGroup<T>];
    load(begin, g, n);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) product = fmaf(g[i], n[i], product);
  });
  const float mean_gn = block_sum(product, scratch) / float(columns);
  each_group<T>(columns, [&](int64_t begin) {
    float g[kGroup<T>], n[kGroup<T>], extra[kGroup<T>] = {};
    load(begin, g, n);
    if (d_residual_out) load_group(d_residual_out + at + begin, columns - begin, width, extra);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) g[i] = fmaf(rstd, g[i] - n[i] * mean_gn, extra[i]);
    store_group(dx + at + begin, columns - begin, width, g);
  });
}

template <typename T, typename Y> struct ScaleTerm {
  const Y* dy;
  const T* h;
  const float* rstd;
  int64_t columns;
  bool round_first;
  __device__ float operator()(int64_t row, int64_t column) const {
    const int64_t at = row * columns + column;
    const float n = to_float(h[at]) * rstd[row];
    return to_float(dy[at]) * (round_first ? rounded<T>(n) : n);
  }
};

// f(T(), Y()): the result has the dtype of x, or is float32, or x is float32 and the weight was not.
template <typename F> bool dispatch_pair(int x_type, int y_type, F&& f) {
  bool known = true;
  return dispatch(x_type, [&](auto t) {
    if (x_type == y_type) f(t, t);
    else if (DType(y_type) == DType::f32) f(t, float());
    else known = false;
  }) && known;
}

}  // namespace

extern "C" int launch_rms_norm(int x_type, int y_type, const void* x, const void* residual, const float* scale, void* y,
                               void* residual_out, float* rstd, int64_t rows, int64_t hidden, int64_t x_stride, float eps,
                               int rounding, void* stream) {
  if (rows == 0) return launched();
  return launched(dispatch_pair(x_type, y_type, [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    const int64_t step = int64_t(sizeof(T)), y_step = int64_t(sizeof(Y));
    const int width =
        access_width({x, residual, y, residual_out, scale}, {hidden * step, hidden * y_step, x_stride * step});
    const size_t cache = row_cache_bytes<T>(hidden);
    DSCHAT_LAUNCH((forward<T, Y>), dim3(unsigned(rows)), dim3(row_threads<T>(hidden)), cache, stream,
                  static_cast<const T*>(x), static_cast<const T*>(residual), scale, static_cast<Y*>(y),
                  static_cast<T*>(residual_out), rstd, hidden, x_stride, eps, rounding == 0, width, cache != 0);
  }));
}

extern "C" int launch_rms_norm_backward(int x_type, int y_type, const void* dy, const void* d_residual_out, const void* h,
                                        const float* scale, const float* rstd, void* dx, float* dscale, float* partial,
                                        int64_t rows, int64_t hidden, int rounding, void* stream) {
  return launched(dispatch_pair(x_type, y_type, [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    const auto* grad = static_cast<const Y*>(dy);
    const auto* input = static_cast<const T*>(h);
    const int width =
        access_width({dy, d_residual_out, h, dx, scale}, {hidden * int64_t(sizeof(T)), hidden * int64_t(sizeof(Y))});
    if (rows)
      DSCHAT_LAUNCH((backward<T, Y>), dim3(unsigned(rows)), dim3(row_threads<T>(hidden)), 0, stream, grad,
                    static_cast<const T*>(d_residual_out), input, scale, rstd, static_cast<T*>(dx), hidden,
                    width);
    if (dscale)
      column_sums(ScaleTerm<T, Y>{grad, input, rstd, hidden, rounding == 0}, partial, dscale, rows, hidden, stream);
  }));
}

}  // namespace dschat::cuda
