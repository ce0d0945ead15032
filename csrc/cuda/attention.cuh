// Causal attention of packed query tokens over the paged cache, for attention and attention_decode; the formula is in
// dschat_kernels/ops/attention.py.
//
// Order of the arithmetic (a row's bits depend on nothing else, not on the batch, on prefill or decode, or on splits):
// the keys are cut into tiles of one page (64) at absolute positions. A tile gives m_t = max s, p = round(exp(s - m_t))
// to the dtype, l_t = sum p and o_t = sum p v, all from zero; the tiles are folded from left to right:
//   m' = max(m, m_t),  l' = l exp(m - m') + l_t exp(m_t - m'),  o' = o exp(m - m') + o_t exp(m_t - m')
// and out = round(o / l). bfloat16 and float16 run on tensor cores, float32 by fmaf.
//
// A block has one kv head and a few rows, a row being one query head of one token: the heads that share a kv head lie
// next to each other, so that a decode step of grouped heads fills the rows of a matrix instruction.
#pragma once

#include "cuda/kv_cache.cuh"

namespace dschat::cuda {

template <typename T> struct AttentionArgs {
  const T* q;  // [tokens, q_heads, dim], q_stride elements from token to token
  int64_t q_stride;
  T* out;
  int64_t out_stride;
  const T *k_cache, *v_cache;  // one layer
  const int32_t* block_table;
  int64_t table_stride;        // pages a row of the table has
  const int32_t* slots;        // row of the table of each row; null: row r uses r
  const int32_t* cu_seqlens;   // [rows + 1]
  const int32_t* kv_lens;      // [rows]
  int32_t rows, q_heads, kv_heads, dim;
  float scale;
  int32_t window;              // keys seen, the token's own included; 0: all
  float softcap;               // 0: none
  const float* slopes;         // [q_heads] or null; see alibi()

  __host__ __device__ int32_t group() const { return q_heads / kv_heads; }

  // The score of key j for a query at position p; -inf if it is not seen.
  __device__ __forceinline__ float score(float dot, int32_t j, int32_t p, float slope) const {
    if (j > p || (window && j <= p - window)) return -kInfinity;
    float s = dot * scale;
    if (softcap != 0.0f) s = softcap * tanhf(s / softcap);
    return slopes ? s + alibi(slope, scale, j, p) : s;
  }
};

// The running softmax of one row.
struct Fold {
  float m = -kInfinity, l = 0.0f;

  struct Scales {
    float old, added;
  };
  // Takes up a tile's maximum and sum; o' = o * old + o_t * added.
  __device__ __forceinline__ Scales add(float m_t, float l_t) {
    if (l_t == 0.0f) return {1.0f, 0.0f};  // nothing of the tile is seen
    const float top = fmaxf(m, m_t), old = expf(m - top), added = expf(m_t - top);
    l = l * old + l_t * added;
    m = top;
    return {old, added};
  }
  // -0 would depend on how many tiles without a visible key were added.
  __device__ __forceinline__ float result(float o) const { return o / l + 0.0f; }
};

__device__ __forceinline__ float folded(float o, float o_t, const Fold::Scales& s) { return fmaf(o_t, s.added, o * s.old); }

// Partial results of attention_decode: for every token, query head and tile its m_t, l_t and o_t.
struct Partials {
  float* stats;   // [tokens, q_heads, tiles, 2]
  float* output;  // [tokens, q_heads, tiles, dim]
  int64_t tiles;

  __device__ __forceinline__ int64_t place(int64_t token_head, int64_t tile) const { return token_head * tiles + tile; }
};

// What one warp needs to know of its rows.
template <typename T> struct Queries {
  const AttentionArgs<T>& a;
  int32_t first_token, count;  // of the row of the batch
  int32_t past;                // keys before its first query token
  int32_t kv_head, base;       // base: the block's first row

  __device__ __forceinline__ bool valid(int32_t i) const { return base + i < count * a.group(); }
  __device__ __forceinline__ int32_t token(int32_t i) const { return first_token + (base + i) / a.group(); }
  __device__ __forceinline__ int32_t head(int32_t i) const { return kv_head * a.group() + (base + i) % a.group(); }
  // -1, which sees no key, behind the end.
  __device__ __forceinline__ int32_t position(int32_t i) const {
    return valid(i) ? past + (base + i) / a.group() : -1;
  }
  __device__ __forceinline__ float slope(int32_t i) const { return a.slopes && valid(i) ? a.slopes[head(i)] : 0.0f; }
  __device__ __forceinline__ const T* q(int32_t i) const { return a.q + token(i) * a.q_stride + int64_t(head(i)) * a.dim; }
  __device__ __forceinline__ T* out(int32_t i) const { return a.out + token(i) * a.out_stride + int64_t(head(i)) * a.dim; }
  __device__ __forceinline__ int64_t token_head(int32_t i) const { return int64_t(token(i)) * a.q_heads + head(i); }
};

// ---------------------------------------------------------------------------------------------- 16-bit: tensor cores

// 16 rows of a warp; kDim is the head size rounded up to what a kernel is compiled for, kOut the dimensions of the
// result that the warp computes, from d0 on.
template <typename T, int kDim, int kOut> struct AttentionWarp {
  static constexpr int rows = 16;
  static constexpr int warps = 4;
  static constexpr int pitch = kDim + 8;  // elements of a row of q and v: 8 rows lie in different banks
  static constexpr bool reload = false;   // k and v have a place each
  static constexpr int k_bytes = kPage * kDim * 2, v_bytes = kPage * pitch * 2;
  static constexpr int row_bytes = pitch * 2;  // of shared memory a row of the block, for q

  Fold fold[2];
  float o[kOut / 8][4] = {};
  int d0 = 0;
  float m_t[2], l_t[2];
  uint32_t p[kPage / 16][4];
  const T* q;

  // `memory` is the warp's own; zeros where there is no row or dimension.
  __device__ void load_queries(const Queries<T>& rows_, int first, unsigned char* memory) {
    T* to = reinterpret_cast<T*>(memory);
    q = to;
    const int lane = int(threadIdx.x) % kWarp;
    for (int i = lane; i < rows * kDim; i += kWarp) {
      const int r = i / kDim, d = i % kDim;
      to[r * pitch + d] = rows_.valid(first + r) && d < rows_.a.dim ? rows_.q(first + r)[d] : from_float<T>(0.0f);
    }
    __syncwarp();
  }

  // Elements of k from the tile's beginning: 16 bytes of 8 keys change places so that 8 dimensions lie in different
  // banks.
  static __device__ __forceinline__ int k_place(int group, int d, int half) {
    return (group * kDim + d) * kLanes + (half ^ (d >> 2 & 1)) * 8;
  }

  __device__ void scores(const T* k, int32_t key0, const Queries<T>& rows_, int first) {
    const int lane = int(threadIdx.x) % kWarp;
    float s[kPage / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t a[4];
      load_matrices(a, q + lane % 16 * pitch + d + lane / 16 * 8);
#pragma unroll
      for (int g = 0; g < kPage / 16; ++g) {
        uint32_t b[4];
        load_matrices_transposed(b, k + k_place(g, d + lane % 16, lane / 16));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        multiply<T>(s[2 * g], a, low);
        multiply<T>(s[2 * g + 1], a, high);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first + lane / 4 + 8 * h;
      const int32_t position = rows_.position(i);
      const float slope = rows_.slope(i);
      float top = -kInfinity;
#pragma unroll
      for (int j = 0; j < kPage / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][2 * h + e];
          x = rows_.a.score(x, key0 + j * 8 + lane % 4 * 2 + e, position, slope);
          top = fmaxf(top, x);
        }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float pivot = top == -kInfinity ? 0.0f : top;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPage / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][2 * h + e];
          x = rounded<T>(expf(x - pivot));
          sum += x;
        }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      m_t[h] = top;
      l_t[h] = sum;
    }
#pragma unroll
    for (int g = 0; g < kPage / 16; ++g)
#pragma unroll
      for (int r = 0; r < 4; ++r) p[g][r] = pack<T>(s[2 * g + r / 2][r % 2 * 2], s[2 * g + r / 2][r % 2 * 2 + 1]);
  }

  // f(o_t of two groups of 8 dimensions from 16 j on, j)
  template <typename F> __device__ __forceinline__ void each_output(const T* v, F&& f) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int j = 0; j < kOut / 16; ++j) {
      float low[4] = {}, high[4] = {};
#pragma unroll
      for (int g = 0; g < kPage / 16; ++g) {
        uint32_t b[4];
        load_matrices_transposed(b, v + (g * 16 + lane % 16) * pitch + d0 + j * 16 + lane / 16 * 8);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply<T>(low, p[g], first);
        multiply<T>(high, p[g], second);
      }
      f(low, high, j);
    }
  }

  __device__ void fold_values(const T* v) {
    const Fold::Scales scales[2] = {fold[0].add(m_t[0], l_t[0]), fold[1].add(m_t[1], l_t[1])};
    each_output(v, [&](const float (&low)[4], const float (&high)[4], int j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        o[2 * j][r] = folded(o[2 * j][r], low[r], scales[r / 2]);
        o[2 * j + 1][r] = folded(o[2 * j + 1][r], high[r], scales[r / 2]);
      }
    });
  }

  __device__ void store_partial(const T* v, const Queries<T>& rows_, int first, int64_t tile, const Partials& to) {
    const int lane = int(threadIdx.x) % kWarp, dim = rows_.a.dim;
    int64_t place[2];
    bool valid[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first + lane / 4 + 8 * h;
      valid[h] = rows_.valid(i);
      place[h] = valid[h] ? to.place(rows_.token_head(i), tile) : 0;
      if (valid[h] && lane % 4 == 0) {
        to.stats[2 * place[h]] = m_t[h];
        to.stats[2 * place[h] + 1] = l_t[h];
      }
    }
    each_output(v, [&](const float (&low)[4], const float (&high)[4], int j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (!valid[r / 2]) continue;
        const int d = d0 + j * 16 + lane % 4 * 2 + r % 2;
        float* row = to.output + place[r / 2] * dim;
        if (d < dim) row[d] = low[r];
        if (d + 8 < dim) row[d + 8] = high[r];
      }
    });
  }

  __device__ void store(const Queries<T>& rows_, int first) {
    const int lane = int(threadIdx.x) % kWarp, dim = rows_.a.dim;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first + lane / 4 + 8 * h;
      if (!rows_.valid(i)) continue;
      T* row = rows_.out(i);
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = d0 + j * 8 + lane % 4 * 2 + e;
          if (d < dim) row[d] = from_float<T>(fold[h].result(o[j][2 * h + e]));
        }
    }
  }
};

// --------------------------------------------------------------------------------------------------- float32: fmaf

// 8 rows of a warp: a lane has two keys, then every 32nd dimension.
template <int kDim, int kOut> struct AttentionWarp<float, kDim, kOut> {
  static constexpr int rows = 8;
  static constexpr int warps = kDim > 128 ? 2 : 4;
  static constexpr int pitch = kDim;
  static constexpr bool reload = true;  // v takes the place of k, which is too large to have both
  static constexpr int k_bytes = kPage * kDim * 4, v_bytes = 0;
  static constexpr int row_bytes = (kDim + kPage) * 4;  // q and p

  Fold fold[rows];
  float o[rows][kOut / kWarp] = {};
  int d0 = 0;
  float m_t[rows], l_t[rows];
  float *q, *p;

  __device__ void load_queries(const Queries<float>& rows_, int first, unsigned char* memory) {
    q = reinterpret_cast<float*>(memory);
    p = q + rows * kDim;
    const int lane = int(threadIdx.x) % kWarp;
    for (int i = lane; i < rows * kDim; i += kWarp) {
      const int r = i / kDim, d = i % kDim;
      q[i] = rows_.valid(first + r) && d < rows_.a.dim ? rows_.q(first + r)[d] : 0.0f;
    }
    __syncwarp();
  }

  static __device__ __forceinline__ int k_place(int group, int d, int quarter) {
    return (group * kDim + d) * kLanes + quarter * 4;
  }

  __device__ void scores(const float* k, int32_t key0, const Queries<float>& rows_, int first) {
    const int lane = int(threadIdx.x) % kWarp;
    const float* mine = k + lane / kLanes * kDim * kLanes + lane % kLanes;
    float s[rows][2] = {};
    for (int d = 0; d < rows_.a.dim; ++d) {
      const float k0 = mine[d * kLanes], k1 = mine[(2 * kDim + d) * kLanes];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        s[r][0] = fmaf(q[r * kDim + d], k0, s[r][0]);
        s[r][1] = fmaf(q[r * kDim + d], k1, s[r][1]);
      }
    }
    __syncwarp();  // nobody reads the p of the tile before
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int32_t position = rows_.position(first + r);
      const float slope = rows_.slope(first + r);
      const float s0 = rows_.a.score(s[r][0], key0 + lane, position, slope);
      const float s1 = rows_.a.score(s[r][1], key0 + lane + kWarp, position, slope);
      const float top = warp_max(fmaxf(s0, s1)), pivot = top == -kInfinity ? 0.0f : top;
      const float p0 = expf(s0 - pivot), p1 = expf(s1 - pivot);
      p[r * kPage + lane] = p0;
      p[r * kPage + lane + kWarp] = p1;
      m_t[r] = top;
      l_t[r] = warp_sum(p0 + p1);
    }
    __syncwarp();
  }

  // f(o_t of all rows for this lane's i-th dimension, i)
  template <typename F> __device__ __forceinline__ void each_output(const float* v, F&& f) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kOut / kWarp; ++i) {
      float sum[rows] = {};
      for (int key = 0; key < kPage; ++key) {
        const float x = v[key * pitch + d0 + lane + i * kWarp];
#pragma unroll
        for (int r = 0; r < rows; ++r) sum[r] = fmaf(p[r * kPage + key], x, sum[r]);
      }
      f(sum, i);
    }
  }

  __device__ void fold_values(const float* v) {
    Fold::Scales scales[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) scales[r] = fold[r].add(m_t[r], l_t[r]);
    each_output(v, [&](const float (&sum)[rows], int i) {
#pragma unroll
      for (int r = 0; r < rows; ++r) o[r][i] = folded(o[r][i], sum[r], scales[r]);
    });
  }

  __device__ void store_partial(const float* v, const Queries<float>& rows_, int first, int64_t tile,
                                const Partials& to) {
    const int lane = int(threadIdx.x) % kWarp, dim = rows_.a.dim;
#pragma unroll
    for (int r = 0; r < rows; ++r)
      if (rows_.valid(first + r) && lane < 2)
        to.stats[2 * to.place(rows_.token_head(first + r), tile) + lane] = lane ? l_t[r] : m_t[r];
    each_output(v, [&](const float (&sum)[rows], int i) {
      const int d = d0 + lane + i * kWarp;
#pragma unroll
      for (int r = 0; r < rows; ++r)
        if (d < dim && rows_.valid(first + r))
          to.output[to.place(rows_.token_head(first + r), tile) * dim + d] = sum[r];
    });
  }

  __device__ void store(const Queries<float>& rows_, int first) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (!rows_.valid(first + r)) continue;
      float* row = rows_.out(first + r);
#pragma unroll
      for (int i = 0; i < kOut / kWarp; ++i)
        if (d0 + lane + i * kWarp < rows_.a.dim) row[d0 + lane + i * kWarp] = fold[r].result(o[r][i]);
    }
  }
};

// ---------------------------------------------------------------------------------------------------- the kernels

// The keys [begin, end) that a block's queries see.
struct KeyRange {
  int32_t begin, end;
};

template <typename T> __device__ __forceinline__ KeyRange seen_keys(const AttentionArgs<T>& a, int32_t low, int32_t high) {
  const int32_t begin = a.window ? low - a.window + 1 : 0;
  return {begin < 0 ? 0 : begin, high + 1};
}

template <typename T, int kDim>
__device__ void load_keys(const AttentionArgs<T>& a, int64_t page, int kv_head, T* to) {
  constexpr int piece = 16 / int(sizeof(T)), pieces = kLanes / piece;
  const T* from = a.k_cache + k_page_offset(page, kv_head, a.kv_heads, a.dim);
  for (int i = int(threadIdx.x); i < kPage / kLanes * kDim * pieces; i += int(blockDim.x)) {
    const int part = i % pieces, d = i / pieces % kDim, group = i / pieces / kDim;
    const bool there = d < a.dim;
    copy_async(to + AttentionWarp<T, kDim, kDim>::k_place(group, d, part),
               there ? from + (group * a.dim + d) * kLanes + part * piece : from, there ? 16 : 0);
  }
}

// Keys outside the range count as zeros: they have no weight, but may hold anything.
template <typename T, int kDim>
__device__ void load_values(const AttentionArgs<T>& a, int64_t page, int kv_head, int32_t key0, KeyRange range, T* to) {
  constexpr int piece = 16 / int(sizeof(T)), pieces = kDim / piece;
  const T* from = a.v_cache + v_page_offset(page, kv_head, a.kv_heads, a.dim);
  const int padded = int(padded_head_dim(a.dim));
  for (int i = int(threadIdx.x); i < kPage * pieces; i += int(blockDim.x)) {
    const int d = i % pieces * piece, key = i / pieces;
    const bool there = d < padded && key0 + key >= range.begin && key0 + key < range.end;
    copy_async(to + key * AttentionWarp<T, kDim, kDim>::pitch + d, there ? from + key * padded + d : from, there ? 16 : 0);
  }
}

// The row of the batch whose rows begin at or before `slot`; row r begins at slot cu_seqlens[r] * group / tile + r, which
// leaves it room for all its tiles.
template <typename T> __device__ int32_t find_row(const AttentionArgs<T>& a, int64_t slot, int tile) {
  int32_t low = 0, high = a.rows - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (int64_t(a.cu_seqlens[middle]) * a.group() / tile + middle <= slot) low = middle;
    else high = middle - 1;
  }
  return low;
}

inline int64_t slots_for(int64_t tokens, int64_t group, int64_t rows, int64_t tile) {
  return tokens * group / tile + rows;
}

// Dimensions of the result that a block folds: registers have no place for more.
template <int kDim, bool kPartial> constexpr int out_dim = !kPartial && kDim > 128 ? 128 : kDim;

// Grid: (tiles of rows, kv heads, z). kPartial: tiles of keys blockIdx.z, blockIdx.z + gridDim.z, ... go to `partials`;
// else all of them are folded into the result, whose dimensions are cut among blockIdx.z.
template <typename T, int kDim, int kWarps, bool kPartial>
__global__ void __launch_bounds__(kWarps* kWarp) attention_tiles(AttentionArgs<T> a, Partials partials) {
  DSCHAT_DYNAMIC_SHARED(memory);
  using Warp = AttentionWarp<T, kDim, out_dim<kDim, kPartial>>;
  constexpr int block_rows = Warp::rows * kWarps;
  const int64_t slot = blockIdx.x;
  const int32_t row = find_row(a, slot, block_rows);
  const int32_t begin = a.cu_seqlens[row], count = a.cu_seqlens[row + 1] - begin, kv_len = a.kv_lens[row];
  const int32_t base = int32_t(slot - (int64_t(begin) * a.group() / block_rows + row)) * block_rows;
  if (base >= count * a.group()) return;
  const int kv_head = int(blockIdx.y);
  const Queries<T> queries{a, begin, count, kv_len - count, kv_head, base};
  const int32_t last = min(base + block_rows, count * a.group()) - 1;
  const KeyRange range = seen_keys(a, queries.past + base / a.group(), queries.past + last / a.group());
  const int32_t* table = a.block_table + (a.slots ? a.slots[row] : row) * a.table_stride;

  T* k = reinterpret_cast<T*>(memory);
  T* v = reinterpret_cast<T*>(memory + (Warp::reload ? 0 : Warp::k_bytes));
  const int warp = int(threadIdx.x) / kWarp, first = warp * Warp::rows;
  Warp mine;
  mine.d0 = kPartial ? 0 : int(blockIdx.z) * out_dim<kDim, kPartial>;
  mine.load_queries(queries, first, memory + Warp::k_bytes + Warp::v_bytes + first * Warp::row_bytes);

  const int32_t step = kPartial ? int32_t(gridDim.z) : 1;
  for (int32_t tile = range.begin / kPage + (kPartial ? int32_t(blockIdx.z) : 0); tile * kPage < range.end; tile += step) {
    const int64_t page = table[tile];
    load_keys<T, kDim>(a, page, kv_head, k);
    copy_commit();
    if (!Warp::reload) load_values<T, kDim>(a, page, kv_head, tile * kPage, range, v);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    mine.scores(k, tile * kPage, queries, first);
    if (Warp::reload) {
      __syncthreads();
      load_values<T, kDim>(a, page, kv_head, tile * kPage, range, v);
      copy_commit();
    }
    copy_wait<0>();
    __syncthreads();
    if (kPartial) mine.store_partial(v, queries, first, tile, partials);
    else mine.fold_values(v);
    __syncthreads();
  }
  if (!kPartial) mine.store(queries, first);
}

// Folds the tiles of a token, in the order and with the arithmetic of fold_values. A thread has a dimension of a query
// head, and a block as many heads as kFoldThreads hold; one thread looks for the token's keys, and the tiles' maxima and
// sums, which all dimensions want, come to shared memory as neighbours.
constexpr int kFoldThreads = 128;
constexpr int kFoldTiles = 64;  // at a time

// Threads of a head: whole warps.
__host__ __device__ __forceinline__ int fold_width(int dim) { return (dim + kWarp - 1) / kWarp * kWarp; }
__host__ __device__ __forceinline__ int fold_heads(int dim) {
  return fold_width(dim) < kFoldThreads ? kFoldThreads / fold_width(dim) : 1;
}

template <typename T>
__global__ void __launch_bounds__(kMaxHeadDim) fold_partials(AttentionArgs<T> a, Partials partials) {
  DSCHAT_SHARED(float, stats, kFoldThreads / kWarp * kFoldTiles * 2);
  DSCHAT_SHARED(KeyRange, shared_range, 1);
  const int32_t token = int32_t(blockIdx.x);
  if (threadIdx.x == 0) {
    int32_t low = 0, high = a.rows - 1;  // the last row that begins at or before the token
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (a.cu_seqlens[middle] <= token) low = middle;
      else high = middle - 1;
    }
    const int32_t position = a.kv_lens[low] - a.cu_seqlens[low + 1] + token;
    shared_range[0] = seen_keys(a, position, position);
  }
  __syncthreads();
  const KeyRange range = shared_range[0];
  const int width = fold_width(a.dim), d = int(threadIdx.x) % width, mine = int(threadIdx.x) / width;
  const int32_t head = int32_t(blockIdx.y) * fold_heads(a.dim) + mine;
  const bool there = head < a.q_heads, summed = there && d < a.dim;
  const int64_t token_head = int64_t(token) * a.q_heads + head;
  float* own = stats + mine * kFoldTiles * 2;
  Fold fold;
  float o = 0.0f;
  const int32_t last = (range.end + kPage - 1) / kPage;
  for (int32_t first = range.begin / kPage; first < last; first += kFoldTiles) {
    const int64_t place = partials.place(token_head, first);
    const float* output = partials.output + place * a.dim + d;
    const int count = min(kFoldTiles, last - first);
    if (there)
      for (int i = d; i < 2 * count; i += width) own[i] = partials.stats[2 * place + i];
    __syncthreads();
    if (summed)
#pragma unroll 2
      for (int t = 0; t < count; ++t, output += a.dim)
        o = folded(o, *output, fold.add(own[2 * t], own[2 * t + 1]));
    __syncthreads();
  }
  if (summed)
    a.out[token * a.out_stride + int64_t(head) * a.dim + d] = from_float<T>(fold.result(o));
}

// f(std::integral_constant<int, kDim>) for a head size.
template <typename F> bool dispatch_dim(int64_t dim, F&& f) {
  if (dim <= 32) return f(std::integral_constant<int, 32>()), true;
  if (dim <= 64) return f(std::integral_constant<int, 64>()), true;
  if (dim <= 128) return f(std::integral_constant<int, 128>()), true;
  if (dim <= kMaxHeadDim) return f(std::integral_constant<int, 256>()), true;
  return false;
}

template <typename T, int kDim, int kWarps, bool kPartial>
void launch_attention_tiles(const AttentionArgs<T>& a, const Partials& partials, int64_t tokens, int64_t splits,
                            void* stream) {
  using Warp = AttentionWarp<T, kDim, out_dim<kDim, kPartial>>;
  constexpr int block_rows = Warp::rows * kWarps;
  constexpr size_t bytes = size_t(Warp::k_bytes + Warp::v_bytes + block_rows * Warp::row_bytes);
  constexpr auto kernel = attention_tiles<T, kDim, kWarps, kPartial>;
  allow_shared(kernel, bytes);
  const dim3 grid(unsigned(slots_for(tokens, a.group(), a.rows, block_rows)), unsigned(a.kv_heads), unsigned(splits));
  DSCHAT_LAUNCH(kernel, grid, dim3(kWarps * kWarp), bytes, stream, a, partials);
}

}  // namespace dschat::cuda
