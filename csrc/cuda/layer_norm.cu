// LayerNorm; the formula is in dschat_kernels/ops/layer_norm.py. One block a row, which is read once from global memory.
#include "cuda/column_sum.cuh"
#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace dschat::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(256)
    forward(const T* x, const T* residual, const float* weight, const float* bias, T* y, T* residual_out, float* mean_out,
            float* rstd_out, int64_t columns, int64_t x_stride, float eps, int width, bool cached) {
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
    for (int i = 0; i < kGroup<T>; ++i) sum += h[i];  // zeros behind the end
  });
  const float mean = block_sum(sum, scratch) / float(columns);
  sum = 0.0f;
  float rest = 0.0f;  // of the rounded mean: the mean of (h - mean)
  each_group<T>(columns, [&](int64_t begin) {
    float h[kGroup<T>];
    rows.again(begin, h);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i)
      if (begin + i < columns) {
        sum = fmaf(h[i] - mean, h[i] - mean, sum);
        rest += h[i] - mean;
      }
  });
  rest = block_sum(rest, scratch) / float(columns);
  const float rstd = 1.0f / sqrtf(block_sum(sum, scratch) / float(columns) - rest * rest + eps);
  each_group<T>(columns, [&](int64_t begin) {
    float h[kGroup<T>], out[kGroup<T>];
    rows.again(begin, h);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) out[i] = ((h[i] - mean) - rest) * rstd;
    if (weight) multiply_vector(weight + begin, columns - begin, width, out);
    if (bias) add_vector(bias + begin, columns - begin, width, out);
    store_group(y + at + begin, columns - begin, width, out);
  });
  if (threadIdx.x == 0) {
    mean_out[row] = mean + rest;
    rstd_out[row] = rstd;
  }
}

// With g = dy weight and n = (h - mean) rstd:  dx = rstd (g - mean(g) - n mean(g n)) + d_residual_out
template <typename T>
__global__ void __launch_bounds__(256)
    backward(const T* dy, const T* d_residual_out, const T* h, const float* weight, const float* mean_in,
             const float* rstd_in, T* dx, int64_t columns, int width) {
  DSCHAT_SHARED(float, scratch, kWarp);
  const int64_t row = blockIdx.x, at = row * columns;
  const float mean = mean_in[row], rstd = rstd_in[row];
  const auto load = [&](int64_t begin, float (&g)[kGroup<T>], float (&n)[kGroup<T>]) {
    load_group(dy + at + begin, columns - begin, width, g);
    load_group(h + at + begin, columns - begin, width, n);
    if (weight) multiply_vector(weight + begin, columns - begin, width, g);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) n[i] = (n[i] - mean) * rstd;
  };
  float sum = 0.0f, product = 0.0f;
  each_group<T>(columns, [&](int64_t begin) {
    float g[kGroup<T>], n[kGroup<T>];
    load(begin, g, n);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) {  // g is zero behind the end
      sum += g[i];
      product = fmaf(g[i], n[i], product);
    }
  });
  const float mean_g = block_sum(sum, scratch) / float(columns);
  const float mean_gn = block_sum(product, scratch) / float(columns);
  each_group<T>(columns, [&](int64_t begin) {
    float g[kGroup<T>], n[kGroup<T>], extra[kGroup<T>] = {};
    load(begin, g, n);
    if (d_residual_out) load_group(d_residual_out + at + begin, columns - begin, width, extra);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) g[i] = fmaf(rstd, (g[i] - mean_g) - n[i] * mean_gn, extra[i]);
    store_group(dx + at + begin, columns - begin, width, g);
  });
}

template <typename T> struct WeightTerm {
  const T *dy, *h;
  const float *mean, *rstd;
  int64_t columns;
  __device__ float operator()(int64_t row, int64_t column) const {
    const int64_t at = row * columns + column;
    return to_float(dy[at]) * ((to_float(h[at]) - mean[row]) * rstd[row]);
  }
};

template <typename T> struct BiasTerm {
  const T* dy;
  int64_t columns;
  __device__ float operator()(int64_t row, int64_t column) const { return to_float(dy[row * columns + column]); }
};

}  // namespace

extern "C" int launch_layer_norm(int type, const void* x, const void* residual, const float* weight, const float* bias,
                                 void* y, void* residual_out, float* mean, float* rstd, int64_t rows, int64_t hidden,
                                 int64_t x_stride, float eps, void* stream) {
  if (rows == 0) return launched();
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    const int64_t step = int64_t(sizeof(T));
    const int width = access_width({x, residual, y, residual_out, weight, bias}, {hidden * step, x_stride * step});
    const size_t cache = row_cache_bytes<T>(hidden);
    DSCHAT_LAUNCH(forward<T>, dim3(unsigned(rows)), dim3(row_threads<T>(hidden)), cache, stream, static_cast<const T*>(x),
                  static_cast<const T*>(residual), weight, bias, static_cast<T*>(y), static_cast<T*>(residual_out), mean,
                  rstd, hidden, x_stride, eps, width, cache != 0);
  }));
}

extern "C" int launch_layer_norm_backward(int type, const void* dy, const void* d_residual_out, const void* h,
                                          const float* weight, const float* mean, const float* rstd, void* dx,
                                          float* dweight, float* dbias, float* partial, int64_t rows, int64_t hidden,
                                          void* stream) {
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    const auto *grad = static_cast<const T*>(dy), *input = static_cast<const T*>(h);
    const int width = access_width({dy, d_residual_out, h, dx, weight}, {hidden * int64_t(sizeof(T))});
    if (rows)
      DSCHAT_LAUNCH(backward<T>, dim3(unsigned(rows)), dim3(row_threads<T>(hidden)), 0, stream, grad,
                    static_cast<const T*>(d_residual_out), input, weight, mean, rstd, static_cast<T*>(dx), hidden, width);
    if (dweight)
      column_sums(WeightTerm<T>{grad, input, mean, rstd, hidden}, partial, dweight, rows, hidden, stream);
    if (dbias) column_sums(BiasTerm<T>{grad, hidden}, partial, dbias, rows, hidden, stream);
  }));
}

}  // namespace dschat::cuda
