// attention(): every block folds all keys of its rows; see attention.cuh.
#include "cuda/attention.cuh"
#include "cuda/launch.h"

using namespace dschat::cuda;

extern "C" int launch_attention(int type, const void* q, int64_t q_stride, void* out, int64_t out_stride,
                                const void* k_cache, const void* v_cache, const int32_t* block_table,
                                int64_t table_stride, const int32_t* slots, const int32_t* cu_seqlens,
                                const int32_t* kv_lens, int64_t rows, int64_t tokens, int64_t q_heads, int64_t kv_heads,
                                int64_t head_dim, float scale, int64_t window, float softcap, const float* slopes,
                                void* stream) {
  if (tokens == 0) return launched();
  if (access_width({k_cache, v_cache}, {}) < 16) return launched(false);
  bool known = false;
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    const AttentionArgs<T> a{static_cast<const T*>(q), q_stride, static_cast<T*>(out), out_stride,
                             static_cast<const T*>(k_cache), static_cast<const T*>(v_cache), block_table, table_stride,
                             slots, cu_seqlens, kv_lens, int32_t(rows), int32_t(q_heads), int32_t(kv_heads),
                             int32_t(head_dim), scale, int32_t(window), softcap, slopes};
    known = dispatch_dim(head_dim, [&](auto dim) {
      constexpr int warps = AttentionWarp<T, dim.value, dim.value>::warps;
      const int64_t parts = ceil_div(head_dim, out_dim<dim.value, false>);
      launch_attention_tiles<T, dim.value, warps, false>(a, Partials{}, tokens, parts, stream);
    });
  });
  return launched(known);
}
