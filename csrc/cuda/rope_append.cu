// Rotary embedding of q and k and the write of k and v into the paged cache; see dschat_kernels/ops/rope_append.py.
// One thread an element of a head, so that neighbours read neighbours.
#include "cuda/kv_cache.cuh"
#include "cuda/launch.h"

namespace dschat::cuda {
namespace {

constexpr int kThreads = 128;

struct Rotation {
  const float *cos, *sin;  // [positions, rotary_dim / 2], or null: nothing is rotated
  int64_t rotary_dim;
  bool interleaved;
  float sign;  // -1 rotates back
};

// Element d of the rotated head; products and sum are rounded separately, as the unfused formula does.
template <typename T>
__device__ __forceinline__ T rotated(const T* head, int64_t d, int64_t position, const Rotation& r) {
  if (!r.cos || d >= r.rotary_dim) return head[d];
  const int64_t half = r.rotary_dim / 2;
  const int64_t i = r.interleaved ? d / 2 : d % half, first = r.interleaved ? 2 * i : i;
  const bool second = d != first;
  const float x1 = to_float(head[first]), x2 = to_float(head[r.interleaved ? first + 1 : first + half]);
  const float c = r.cos[position * half + i], s = r.sin[position * half + i] * r.sign;
  return from_float<T>(second ? x2 * c + x1 * s : x1 * c - x2 * s);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rotate_all(const T* x, int64_t x_stride, T* y, int64_t y_stride, Rotation rotation, const int32_t* positions,
               int64_t tokens, int64_t heads, int64_t dim) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t token = at / (heads * dim), head = at / dim % heads, d = at % dim;
  if (token >= tokens) return;
  y[token * y_stride + head * dim + d] =
      rotated(x + token * x_stride + head * dim, d, positions[token], rotation);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    append_all(const T* k, int64_t k_stride, const T* v, int64_t v_stride, Rotation rotation, const int32_t* positions,
               const int32_t* slots, const int32_t* block_table, int64_t table_stride, T* k_cache, T* v_cache,
               int64_t tokens, int64_t heads, int64_t dim) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t token = at / (heads * dim), head = at / dim % heads, d = at % dim;
  if (token >= tokens) return;
  const int64_t position = positions[token], place = position % kPage;
  const int64_t page = block_table[slots[token] * table_stride + position / kPage];
  T* key = k_cache + k_page_offset(page, head, heads, dim) + place / kLanes * dim * kLanes + place % kLanes;
  key[d * kLanes] = rotated(k + token * k_stride + head * dim, d, position, rotation);
  v_cache[v_page_offset(page, head, heads, dim) + place * padded_head_dim(dim) + d] =
      v[token * v_stride + head * dim + d];
}

unsigned blocks_for(int64_t elements) { return unsigned(ceil_div(elements, kThreads)); }

}  // namespace

extern "C" int launch_rope(int type, const void* x, int64_t x_stride, void* y, int64_t y_stride, const float* cos,
                           const float* sin, const int32_t* positions, int64_t tokens, int64_t heads, int64_t head_dim,
                           int64_t rotary_dim, int style, float sign, void* stream) {
  if (tokens == 0) return launched();
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    DSCHAT_LAUNCH(rotate_all<T>, dim3(blocks_for(tokens * heads * head_dim)), dim3(kThreads), 0, stream,
                  static_cast<const T*>(x), x_stride, static_cast<T*>(y), y_stride,
                  (Rotation{cos, sin, rotary_dim, style == 1, sign}), positions, tokens, heads, head_dim);
  }));
}

// q null: only the cache is written.
extern "C" int launch_rope_append(int type, const void* q, int64_t q_stride, const void* k, int64_t k_stride,
                                  const void* v, int64_t v_stride, void* q_out, int64_t q_out_stride, const float* cos,
                                  const float* sin, const int32_t* positions, const int32_t* slots,
                                  const int32_t* block_table, int64_t table_stride, void* k_cache, void* v_cache,
                                  int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                  int64_t rotary_dim, int style, void* stream) {
  if (tokens == 0) return launched();
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    const Rotation rotation{cos, sin, rotary_dim, style == 1, 1.0f};
    if (q)
      DSCHAT_LAUNCH(rotate_all<T>, dim3(blocks_for(tokens * q_heads * head_dim)), dim3(kThreads), 0, stream,
                    static_cast<const T*>(q), q_stride, static_cast<T*>(q_out), q_out_stride, rotation, positions,
                    tokens, q_heads, head_dim);
    DSCHAT_LAUNCH(append_all<T>, dim3(blocks_for(tokens * kv_heads * head_dim)), dim3(kThreads), 0, stream,
                  static_cast<const T*>(k), k_stride, static_cast<const T*>(v), v_stride, rotation, positions, slots,
                  block_table, table_stride, static_cast<T*>(k_cache), static_cast<T*>(v_cache), tokens, kv_heads,
                  head_dim);
  }));
}

}  // namespace dschat::cuda
