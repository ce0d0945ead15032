// Gradients of packed causal attention; see dschat_kernels/ops/attention.py. With s the score, p = softmax(s) and
// D = sum over keys of p (dout . v):
//   dv_j = sum over queries of p dout        ds = p (dout . v - D) scale (1 - tanh^2 where there is a softcap)
//   dq_i = sum over keys of ds k             dk_j = sum over queries of ds q
// The weights are recomputed in float32. 16 bits go to tensor cores (attention_gradients.cuh). Here is float32: one warp
// has one query head of a token, then one kv head of a token, and goes over the other side 32 at a time in order, so that
// bits depend on the row only.
#include "cuda/attention_gradients.cuh"
#include "cuda/launch.h"

namespace dschat::cuda {
namespace {

using Args = GradientArgs<float>;

__device__ __forceinline__ float dot(const Operand<float>& a, int32_t i, const Operand<float>& b, int32_t j) {
  const float *x = a.data + i * a.stride, *y = b.data + j * b.stride;
  float sum = 0.0f;
  for (int d = 0; d < a.k; ++d) sum = fmaf(x[d], y[d], sum);
  return sum;
}

// First and one past the last token of the row that has the token.
struct Bounds {
  int32_t begin, end;
};
__device__ __forceinline__ Bounds row_of(const int32_t* cu_seqlens, int32_t rows, int32_t token) {
  int32_t low = 0, high = rows - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return {cu_seqlens[low], cu_seqlens[low + 1]};
}

__global__ void __launch_bounds__(kWarp) query_gradients(Args a) {
  DSCHAT_SHARED(float, weights, kWarp);
  const int32_t i = int32_t(blockIdx.x), h = int32_t(blockIdx.y), kv = h / a.group(), lane = int32_t(threadIdx.x);
  const Bounds row = row_of(a.cu_seqlens, a.rows, i);
  const Operand<float> q = a.queries(h), dout = a.gradients(h), k = a.keys(kv), v = a.values(kv);
  const int32_t first = a.window && i - a.window + 1 > row.begin ? i - a.window + 1 : row.begin;
  float m = -kInfinity, slope;
  for (int32_t j = first + lane; j <= i; j += kWarp) m = fmaxf(m, a.score(dot(q, i, k, j), i, j, row.begin, h, slope));
  m = warp_max(m);
  float l = 0.0f, weighted = 0.0f;
  for (int32_t j = first + lane; j <= i; j += kWarp) {
    const float p = expf(a.score(dot(q, i, k, j), i, j, row.begin, h, slope) - m);
    l += p;
    weighted = fmaf(p, dot(dout, i, v, j), weighted);
  }
  l = warp_sum(l);
  const float lse = m + logf(l), mean = warp_sum(weighted) / l;
  if (lane == 0) {
    float* stats = a.stats + 2 * (int64_t(i) * a.q_heads + h);
    stats[0] = lse;
    stats[1] = mean;
  }
  float sum[kMaxHeadDim / kWarp] = {};
  for (int32_t tile = first; tile <= i; tile += kWarp) {
    const int32_t j = tile + lane, n = min(kWarp, i + 1 - tile);
    float ds = 0.0f;
    if (j <= i) {
      const float s = a.score(dot(q, i, k, j), i, j, row.begin, h, slope);
      ds = expf(s - lse) * (dot(dout, i, v, j) - mean) * slope;
    }
    weights[lane] = ds;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kMaxHeadDim / kWarp; ++c) {
      const int d = lane + c * kWarp;
      if (d < a.dim)
        for (int32_t t = 0; t < n; ++t) sum[c] = fmaf(weights[t], k.data[(tile + t) * k.stride + d], sum[c]);
    }
    __syncwarp();
  }
  float* out = a.dq + (int64_t(i) * a.q_heads + h) * a.dim;
#pragma unroll
  for (int c = 0; c < kMaxHeadDim / kWarp; ++c)
    if (lane + c * kWarp < a.dim) out[lane + c * kWarp] = sum[c];
}

__global__ void __launch_bounds__(kWarp) key_gradients(Args a) {
  DSCHAT_SHARED(float, weights, 2 * kWarp);
  const int32_t j = int32_t(blockIdx.x), kv = int32_t(blockIdx.y), lane = int32_t(threadIdx.x), group = a.group();
  const Bounds row = row_of(a.cu_seqlens, a.rows, j);
  const int32_t end = a.window && j + a.window < row.end ? j + a.window : row.end;
  const Operand<float> k = a.keys(kv), v = a.values(kv);
  float dk[kMaxHeadDim / kWarp] = {}, dv[kMaxHeadDim / kWarp] = {};
  const int32_t count = (end - j) * group;  // query heads that see the key, token by token
  for (int32_t tile = 0; tile < count; tile += kWarp) {
    const int32_t n = min(kWarp, count - tile);
    float p = 0.0f, ds = 0.0f;
    if (lane < n) {
      const int32_t i = j + (tile + lane) / group, h = kv * group + (tile + lane) % group;
      const float* stats = a.stats + 2 * (int64_t(i) * a.q_heads + h);
      float slope;
      p = expf(a.score(dot(a.queries(h), i, k, j), i, j, row.begin, h, slope) - stats[0]);
      ds = p * (dot(a.gradients(h), i, v, j) - stats[1]) * slope;
    }
    weights[lane] = p;
    weights[kWarp + lane] = ds;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kMaxHeadDim / kWarp; ++c) {
      const int d = lane + c * kWarp;
      if (d >= a.dim) continue;
      for (int32_t t = 0; t < n; ++t) {
        const int32_t i = j + (tile + t) / group, h = kv * group + (tile + t) % group;
        dv[c] = fmaf(weights[t], a.dout[i * a.dout_stride + int64_t(h) * a.dim + d], dv[c]);
        dk[c] = fmaf(weights[kWarp + t], a.q[i * a.q_stride + int64_t(h) * a.dim + d], dk[c]);
      }
    }
    __syncwarp();
  }
  const int64_t at = (int64_t(j) * a.kv_heads + kv) * a.dim;
#pragma unroll
  for (int c = 0; c < kMaxHeadDim / kWarp; ++c) {
    const int d = lane + c * kWarp;
    if (d >= a.dim) continue;
    a.dk[at + d] = dk[c];
    a.dv[at + d] = dv[c];
  }
}

}  // namespace

// stats is scratch of tokens * q_heads * 2 numbers.
extern "C" int launch_attention_backward(int type, const void* dout, int64_t dout_stride, const void* q, int64_t q_stride,
                                         const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* dq,
                                         void* dk, void* dv, const int32_t* cu_seqlens, int64_t rows, int64_t q_heads,
                                         int64_t kv_heads, int64_t head_dim, float scale, int64_t window, float softcap,
                                         const float* slopes, int64_t tokens, float* stats, void* stream) {
  if (tokens == 0) return launched();
  return launched(head_dim <= kMaxHeadDim && dispatch(type, [&](auto t) {
    using T = decltype(t);
    const GradientArgs<T> a{static_cast<const T*>(dout), static_cast<const T*>(q), static_cast<const T*>(k),
                            static_cast<const T*>(v), dout_stride, q_stride, k_stride, v_stride, static_cast<T*>(dq),
                            static_cast<T*>(dk), static_cast<T*>(dv), stats, cu_seqlens, int32_t(rows), int32_t(q_heads),
                            int32_t(kv_heads), int32_t(head_dim), scale, int32_t(window), softcap, slopes};
    if constexpr (std::is_same_v<T, float>) {
      DSCHAT_LAUNCH(query_gradients, dim3(unsigned(tokens), unsigned(q_heads)), dim3(kWarp), 0, stream, a);
      DSCHAT_LAUNCH(key_gradients, dim3(unsigned(tokens), unsigned(kv_heads)), dim3(kWarp), 0, stream, a);
    } else if (head_dim <= 64) {
      launch_gradient_tiles<T, 64>(a, tokens, stream);
    } else if (head_dim <= 128) {
      launch_gradient_tiles<T, 128>(a, tokens, stream);
    } else {
      launch_gradient_tiles<T, 256>(a, tokens, stream);
    }
  }));
}

}  // namespace dschat::cuda
