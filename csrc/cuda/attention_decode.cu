// attention() with the keys split among blocks, for few query tokens over a long context; see attention.cuh. Lengths are
// read on the device and the grid depends on the shapes only, so that one CUDA graph serves a batch of any lengths.
#include "cuda/attention.cuh"
#include "cuda/launch.h"

using namespace dschat::cuda;

namespace {

// Blocks that keep any of today's GPUs busy.
constexpr int64_t kBlocks = 1024;

}  // namespace

// scratch: tokens * q_heads * table_stride * (head_dim + 2) numbers. num_splits 0: chosen here; it changes no bits.
extern "C" int launch_attention_decode(int type, const void* q, int64_t q_stride, void* out, int64_t out_stride,
                                       const void* k_cache, const void* v_cache, const int32_t* block_table,
                                       int64_t table_stride, const int32_t* slots, const int32_t* cu_seqlens,
                                       const int32_t* kv_lens, int64_t rows, int64_t tokens, int64_t q_heads,
                                       int64_t kv_heads, int64_t head_dim, float scale, int64_t window, float softcap,
                                       const float* slopes, int64_t num_splits, float* scratch, void* stream) {
  if (tokens == 0) return launched();
  if (access_width({k_cache, v_cache}, {}) < 16) return launched(false);
  bool known = false;
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    const AttentionArgs<T> a{static_cast<const T*>(q), q_stride, static_cast<T*>(out), out_stride,
                             static_cast<const T*>(k_cache), static_cast<const T*>(v_cache), block_table, table_stride,
                             slots, cu_seqlens, kv_lens, int32_t(rows), int32_t(q_heads), int32_t(kv_heads),
                             int32_t(head_dim), scale, int32_t(window), softcap, slopes};
    const Partials partials{scratch, scratch + 2 * tokens * q_heads * table_stride, table_stride};
    known = dispatch_dim(head_dim, [&](auto dim) {
      const int64_t blocks = slots_for(tokens, a.group(), rows, AttentionWarp<T, dim.value, dim.value>::rows) * kv_heads;
      int64_t splits = num_splits ? num_splits : ceil_div(kBlocks, blocks);
      splits = splits > table_stride ? table_stride : splits;
      launch_attention_tiles<T, dim.value, 1, true>(a, partials, tokens, splits < 1 ? 1 : splits, stream);
    });
    if (known)
      DSCHAT_LAUNCH(fold_partials<T>, dim3(unsigned(tokens), unsigned(ceil_div(q_heads, fold_heads(a.dim)))),
                    dim3(unsigned(fold_width(a.dim) * fold_heads(a.dim))), 0, stream, a, partials);
  });
  return launched(known);
}
