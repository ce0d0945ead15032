// Gradients of packed causal attention in 16 bits on tensor cores; the formulas are in attention_backward.cu. A block has
// kOwn rows of one side in shared memory, queries of a head or keys of a kv head, and goes over the tiles of the other
// side in order. Tiles begin at multiples of their size from a sequence's first token, so a row's sums are in one order
// whatever else is in the batch. Scores and dout . v are float32 sums; p and ds are rounded to T for the products that
// follow, whose sums are float32.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/kv_cache.cuh"

namespace dschat::cuda {

template <typename T> struct GradientArgs {
  const T *dout, *q, *k, *v;  // heads side by side, *_stride elements from token to token
  int64_t dout_stride, q_stride, k_stride, v_stride;
  T *dq, *dk, *dv;             // contiguous
  float* stats;                // [tokens, q_heads, 2]: log of the sum of exp(s), and the mean of dout . v under p
  const int32_t* cu_seqlens;
  int32_t rows, q_heads, kv_heads, dim;
  float scale;
  int32_t window;
  float softcap;
  const float* slopes;

  __device__ __forceinline__ int32_t group() const { return q_heads / kv_heads; }

  // The rows of a head, token by token.
  __device__ __forceinline__ Operand<T> queries(int32_t h) const { return head(q, q_stride, h); }
  __device__ __forceinline__ Operand<T> gradients(int32_t h) const { return head(dout, dout_stride, h); }
  __device__ __forceinline__ Operand<T> keys(int32_t kv) const { return head(k, k_stride, kv); }
  __device__ __forceinline__ Operand<T> values(int32_t kv) const { return head(v, v_stride, kv); }
  __device__ __forceinline__ Operand<T> head(const T* data, int64_t stride, int32_t h) const {
    const T* from = data + int64_t(h) * dim;
    const uint64_t bits = reinterpret_cast<uint64_t>(from) | uint64_t(stride * int64_t(sizeof(T)));
    return {from, stride, dim, bits % 16 == 0};
  }

  // The score of key j for query i of the sequence that begins at `first`, under head h, from their product; -inf if the
  // key is not seen. slope: its derivative by the product.
  __device__ __forceinline__ float score(float dot, int32_t i, int32_t j, int32_t first, int32_t h, float& slope) const {
    slope = scale;
    if (j > i || (window && j <= i - window)) return -kInfinity;
    float s = dot * scale;
    if (softcap != 0.0f) {
      const float t = tanhf(s / softcap);
      s = softcap * t;
      slope = scale * (1.0f - t * t);
    }
    return slopes ? s + alibi(slopes[h], scale, j - first, i - first) : s;
  }
};

// kDim: the head size rounded up to what a kernel is compiled for; kOut: the dimensions of the results that a block sums,
// as many as registers hold.
template <typename T, int kDim> struct GradientTile {
  static constexpr int warps = kDim > 128 ? 2 : 4;
  static constexpr int own = 16 * warps;             // rows of the block
  static constexpr int other = kDim > 64 ? 32 : 64;   // rows of a tile of the other side
  static constexpr int pitch = kDim + 8;             // elements: 8 rows lie in different banks
  static constexpr int groups = other / 16;
  static constexpr size_t shared_bytes = (2 * own + 2 * other) * pitch * sizeof(T) + other * 2 * sizeof(float);

  // Rows [row, row + rows) of a matrix into shared memory, zeros from `end` on and behind the head's size.
  static __device__ __forceinline__ void load(T* to, int rows, const Operand<T>& from, int32_t row, int32_t end) {
    constexpr int pieces = kDim / 8;
    for (int i = int(threadIdx.x); i < rows * pieces; i += int(blockDim.x)) {
      const int r = i / pieces, piece = i % pieces;
      copy_piece(reinterpret_cast<unsigned char*>(to + r * pitch + piece * 8), from, row + r < end ? row + r : -1,
                 piece * 8);
    }
  }

  // sum[j] of 16 rows of this warp by the columns 8 j .. 8 j + 7 = rows of `b`, over the head's dimensions.
  static __device__ __forceinline__ void products(float (&sum)[other / 8][4], const T* a, const T* b) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int j = 0; j < other / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) sum[j][r] = 0.0f;
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t rows[4];
      load_matrices(rows, a + lane % 16 * pitch + d + lane / 16 * 8);
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        uint32_t columns[4];
        load_matrices(columns, b + (g * 16 + lane % 8 + lane / 16 * 8) * pitch + d + lane / 8 % 2 * 8);
        const uint32_t low[2] = {columns[0], columns[1]}, high[2] = {columns[2], columns[3]};
        multiply<T>(sum[2 * g], rows, low);
        multiply<T>(sum[2 * g + 1], rows, high);
      }
    }
  }

  // out[16 rows, kOut] += round(weights)[16 rows, other] x rows of `b`, dimensions from d0 on.
  template <int kOut>
  static __device__ __forceinline__ void accumulate(float (&out)[kOut / 8][4], const float (&weights)[other / 8][4],
                                                    const T* b, int d0) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      uint32_t rows[4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        rows[r] = pack<T>(weights[2 * g + r / 2][r % 2 * 2], weights[2 * g + r / 2][r % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < kOut / 16; ++j) {
        uint32_t columns[4];
        load_matrices_transposed(columns, b + (g * 16 + lane % 16) * pitch + d0 + j * 16 + lane / 16 * 8);
        const uint32_t low[2] = {columns[0], columns[1]}, high[2] = {columns[2], columns[3]};
        multiply<T>(out[2 * j], rows, low);
        multiply<T>(out[2 * j + 1], rows, high);
      }
    }
  }

  // Writes a warp's 16 rows from `row` on, those before `end`; a row has `heads` heads of which this is `head`. They go
  // through `own_rows`, 16 rows in shared memory that no other warp reads, and leave as neighbours.
  template <int kOut>
  static __device__ __forceinline__ void store(const float (&sum)[kOut / 8][4], T* own_rows, T* to, int32_t row,
                                               int32_t end, int64_t heads, int64_t head, int dim, int d0) {
    const int lane = int(threadIdx.x) % kWarp;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kOut / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two = pack<T>(sum[j][2 * half], sum[j][2 * half + 1]);
        memcpy(own_rows + (lane / 4 + 8 * half) * pitch + j * 8 + lane % 4 * 2, &two, sizeof(two));
      }
    __syncwarp();
    for (int i = lane; i < 16 * kOut; i += kWarp) {
      const int r = i / kOut, d = i % kOut;
      if (row + r < end && d0 + d < dim)
        to[((row + r) * heads + head) * dim + d0 + d] = own_rows[r * pitch + d];
    }
  }
};

// The own rows of a block: `begin` and `end` of the sequence, and its first row, negative where there is none. Sequence
// r's blocks begin at slot cu_seqlens[r] / own + r, which leaves it room for all of them.
struct OwnRows {
  int32_t begin, end, first;
};
__device__ __forceinline__ OwnRows own_rows(const int32_t* cu_seqlens, int32_t rows, int64_t slot, int own) {
  int32_t low = 0, high = rows - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] / own + middle <= slot) low = middle;
    else high = middle - 1;
  }
  const int32_t begin = cu_seqlens[low], end = cu_seqlens[low + 1];
  const int32_t first = begin + int32_t(slot - (begin / own + low)) * own;
  return {begin, end, first < end ? first : -1};
}

// Grid: (slots, q heads, parts of the head's dimensions). First the rows' log-sum-exp and mean of dout . v, then dq.
template <typename T, int kDim, int kOut>
__global__ void __launch_bounds__(GradientTile<T, kDim>::warps* kWarp) query_tiles(GradientArgs<T> a) {
  DSCHAT_DYNAMIC_SHARED(memory);
  using Tile = GradientTile<T, kDim>;
  const OwnRows rows = own_rows(a.cu_seqlens, a.rows, blockIdx.x, Tile::own);
  if (rows.first < 0) return;
  const int32_t h = int32_t(blockIdx.y), kv = h / a.group();
  const int d0 = int(blockIdx.z) * kOut, warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  T* q = reinterpret_cast<T*>(memory);
  T *dout = q + Tile::own * Tile::pitch, *k = dout + Tile::own * Tile::pitch, *v = k + Tile::other * Tile::pitch;
  Tile::load(q, Tile::own, a.queries(h), rows.first, rows.end);
  Tile::load(dout, Tile::own, a.gradients(h), rows.first, rows.end);
  const int32_t first = rows.first + warp * 16;  // of this warp
  T *own_q = q + warp * 16 * Tile::pitch, *own_dout = dout + warp * 16 * Tile::pitch;
  const int32_t last = min(rows.first + Tile::own, rows.end) - 1;
  int32_t low = rows.begin;  // of the keys that are seen, at a tile's beginning
  if (a.window && rows.first - a.window + 1 > low) low += (rows.first - a.window + 1 - low) / Tile::other * Tile::other;

  float s[Tile::other / 8][4], dp[Tile::other / 8][4];
  // s and dout . v of the tile of keys from key0 on.
  const auto compute = [&](int32_t key0) {
    __syncthreads();  // nobody reads the tile before
    Tile::load(k, Tile::other, a.keys(kv), key0, rows.end);
    Tile::load(v, Tile::other, a.values(kv), key0, rows.end);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    Tile::products(s, own_q, k);
    Tile::products(dp, own_dout, v);
  };
  const auto query = [&](int half) { return first + lane / 4 + 8 * half; };
  const auto key = [&](int32_t key0, int j, int e) { return key0 + j * 8 + lane % 4 * 2 + e; };

  float m[2] = {-kInfinity, -kInfinity}, l[2] = {}, weighted[2] = {};
  for (int32_t key0 = low; key0 <= last; key0 += Tile::other) {
    compute(key0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -kInfinity, slope;
#pragma unroll
      for (int j = 0; j < Tile::other / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][2 * half + e];
          x = a.score(x, query(half), key(key0, j, e), rows.begin, h, slope);
          top = fmaxf(top, x);
        }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      if (top == -kInfinity) continue;
      float sum = 0.0f, products = 0.0f;
      const float most = fmaxf(m[half], top), old = expf(m[half] - most);
#pragma unroll
      for (int j = 0; j < Tile::other / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = expf(s[j][2 * half + e] - most);
          sum += p;
          products = fmaf(p, dp[j][2 * half + e], products);
        }
      m[half] = most;
      l[half] = l[half] * old + sum;
      weighted[half] = weighted[half] * old + products;
    }
  }
  float lse[2], mean[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += __shfl_xor_sync(kAllLanes, l[half], 1);
    l[half] += __shfl_xor_sync(kAllLanes, l[half], 2);
    weighted[half] += __shfl_xor_sync(kAllLanes, weighted[half], 1);
    weighted[half] += __shfl_xor_sync(kAllLanes, weighted[half], 2);
    lse[half] = m[half] + logf(l[half]);
    mean[half] = weighted[half] / l[half];
    if (lane % 4 == 0 && blockIdx.z == 0 && query(half) < rows.end) {
      float* stats = a.stats + 2 * (int64_t(query(half)) * a.q_heads + h);
      stats[0] = lse[half];
      stats[1] = mean[half];
    }
  }

  float dq[kOut / 8][4] = {};
  for (int32_t key0 = low; key0 <= last; key0 += Tile::other) {
    compute(key0);
#pragma unroll
    for (int j = 0; j < Tile::other / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float slope;
        const float x = a.score(s[j][r], query(r / 2), key(key0, j, r % 2), rows.begin, h, slope);
        s[j][r] = x == -kInfinity ? 0.0f : expf(x - lse[r / 2]) * (dp[j][r] - mean[r / 2]) * slope;
      }
    Tile::template accumulate<kOut>(dq, s, k, d0);
  }
  Tile::template store<kOut>(dq, own_q, a.dq, first, rows.end, a.q_heads, h, a.dim, d0);
}

// Grid: (slots, kv heads, parts of the head's dimensions). The stats are those of query_tiles.
template <typename T, int kDim, int kOut>
__global__ void __launch_bounds__(GradientTile<T, kDim>::warps* kWarp) key_tiles(GradientArgs<T> a) {
  DSCHAT_DYNAMIC_SHARED(memory);
  using Tile = GradientTile<T, kDim>;
  const OwnRows rows = own_rows(a.cu_seqlens, a.rows, blockIdx.x, Tile::own);
  if (rows.first < 0) return;
  const int32_t kv = int32_t(blockIdx.y);
  const int d0 = int(blockIdx.z) * kOut, warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  T* k = reinterpret_cast<T*>(memory);
  T *v = k + Tile::own * Tile::pitch, *q = v + Tile::own * Tile::pitch, *dout = q + Tile::other * Tile::pitch;
  float* stats = reinterpret_cast<float*>(dout + Tile::other * Tile::pitch);
  Tile::load(k, Tile::own, a.keys(kv), rows.first, rows.end);
  Tile::load(v, Tile::own, a.values(kv), rows.first, rows.end);
  const int32_t first = rows.first + warp * 16;
  T *own_k = k + warp * 16 * Tile::pitch, *own_v = v + warp * 16 * Tile::pitch;
  int32_t end = rows.end;  // of the queries that see one of the keys
  if (a.window && rows.first + Tile::own + a.window - 1 < end) end = rows.first + Tile::own + a.window - 1;
  const int32_t from = rows.begin + (rows.first - rows.begin) / Tile::other * Tile::other;

  float s[Tile::other / 8][4], dp[Tile::other / 8][4], dk[kOut / 8][4] = {}, dv[kOut / 8][4] = {};
  for (int32_t query0 = from; query0 < end; query0 += Tile::other)
    for (int32_t h = kv * a.group(); h < (kv + 1) * a.group(); ++h) {
      __syncthreads();
      Tile::load(q, Tile::other, a.queries(h), query0, rows.end);
      Tile::load(dout, Tile::other, a.gradients(h), query0, rows.end);
      for (int i = int(threadIdx.x); i < 2 * Tile::other; i += int(blockDim.x)) {
        const int32_t token = query0 + i / 2;
        stats[i] = token < rows.end ? a.stats[2 * (int64_t(token) * a.q_heads + h) + i % 2] : 0.0f;
      }
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      Tile::products(s, own_k, q);
      Tile::products(dp, own_v, dout);
#pragma unroll
      for (int j = 0; j < Tile::other / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int column = j * 8 + lane % 4 * 2 + r % 2;
          const int32_t i = query0 + column;
          float slope;
          const float x = a.score(s[j][r], i, first + lane / 4 + r / 2 * 8, rows.begin, h, slope);
          const float p = x == -kInfinity || i >= rows.end ? 0.0f : expf(x - stats[2 * column]);
          s[j][r] = p;
          dp[j][r] = p * (dp[j][r] - stats[2 * column + 1]) * slope;
        }
      Tile::template accumulate<kOut>(dv, s, dout, d0);
      Tile::template accumulate<kOut>(dk, dp, q, d0);
    }
  Tile::template store<kOut>(dk, own_k, a.dk, first, rows.end, a.kv_heads, kv, a.dim, d0);
  Tile::template store<kOut>(dv, own_v, a.dv, first, rows.end, a.kv_heads, kv, a.dim, d0);
}

template <typename T, int kDim> void launch_gradient_tiles(const GradientArgs<T>& a, int64_t tokens, void* stream) {
  using Tile = GradientTile<T, kDim>;
  constexpr int query_out = kDim > 128 ? 128 : kDim, key_out = kDim > 64 ? 64 : kDim;
  constexpr auto queries = query_tiles<T, kDim, query_out>;
  constexpr auto keys = key_tiles<T, kDim, key_out>;
  allow_shared(queries, Tile::shared_bytes);
  allow_shared(keys, Tile::shared_bytes);
  const unsigned slots = unsigned(tokens / Tile::own + a.rows);
  DSCHAT_LAUNCH(queries, dim3(slots, unsigned(a.q_heads), unsigned(ceil_div(a.dim, query_out))),
                dim3(Tile::warps * kWarp), Tile::shared_bytes, stream, a);
  DSCHAT_LAUNCH(keys, dim3(slots, unsigned(a.kv_heads), unsigned(ceil_div(a.dim, key_out))), dim3(Tile::warps * kWarp),
                Tile::shared_bytes, stream, a);
}

}  // namespace dschat::cuda
