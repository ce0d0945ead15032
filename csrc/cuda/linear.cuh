// What linear, linear_int8 and lora_linear share: the kernel around a tile, and what happens to finished sums.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"

namespace dschat::cuda {

constexpr int kRowsAhead = 4;   // rows whose residuals a thread asks for before it uses the first
constexpr int kSideSlice = 8;   // of the rank in shared memory
constexpr int kSidePitch = kSideSlice + 1;

// See dschat_kernels/ops/linear.py for the roundings. `side_in` [rows, rank] and `side_weight` [n, rank] are the
// low-rank side path, added to the sums before the bias, never of a gated product; null: none. W is the type of the
// weight.
template <typename T, typename W = T> struct Epilogue {
  const float* bias;  // [n], gated: [2 n], gate first
  const T* residual;
  int64_t residual_stride;
  void* y;
  int64_t y_stride;
  int64_t n;
  bool gated, float_output;
  Activation activation;
  const float *side_in, *side_weight;
  int64_t rank;
  const float* scales;  // of integers, in the order of the bias

  // What makes z of the sums of a column of the weight, before anything is rounded.
  struct Column {
    float scale, bias;
    bool biased;
    __device__ __forceinline__ float operator()(float sum) const {
      if constexpr (!std::is_same_v<W, T>) sum *= scale;
      return biased ? sum + bias : sum;
    }
  };
  __device__ __forceinline__ Column column(int64_t c) const {
    return {std::is_same_v<W, T> ? 1.0f : scales[c], bias ? bias[c] : 0.0f, bias != nullptr};
  }

  __device__ __forceinline__ float residual_at(int64_t row, int64_t column) const {
    return residual ? to_float(residual[row * residual_stride + column]) : 0.0f;
  }
  __device__ __forceinline__ void store(int64_t row, int64_t column, float v, float residual_value) const {
    if (residual) v = residual_value + rounded<T>(v);
    static_cast<T*>(y)[row * y_stride + column] = from_float<T>(v);
  }
};

// What one thread writes of a tile whose sums lie in shared memory. A warp has 32 neighbours of a row; gated 16 of two
// rows, whose gates, and whose ups, lie in 32 different banks.
template <typename Tile, typename T, typename W>
__device__ void write_tile(const float* sums, int64_t row0, int64_t rows, int64_t column0, const Epilogue<T, W>& e) {
  const int t = int(threadIdx.x);
  const int c = e.gated ? t % 16 + t / 32 % 2 * 16 : t % kTileColumns, at = e.gated ? c / 8 * 16 + c % 8 : c;
  const int first = e.gated ? t / 16 % 2 + t / 64 * 2 : t / kTileColumns, step = e.gated ? 4 : 2;
  const int count = rows - row0 < Tile::rows ? int(rows - row0) : Tile::rows;
  const int64_t column = column0 + c;
  if (column >= e.n) return;
  const auto value = e.column(column), up = e.column(e.gated ? column + e.n : column);
  for (int begin = first; begin < count; begin += kRowsAhead * step) {
    float residual[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      const int r = begin + i * step;
      residual[i] = r < count ? e.residual_at(row0 + r, column) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      const int r = begin + i * step;
      if (r >= count) break;
      const float z = value(sums[r * kSumPitch + at]);
      if (e.float_output) {
        static_cast<float*>(e.y)[(row0 + r) * e.y_stride + column] = z;
        continue;
      }
      float v = e.gated || e.activation != Activation::none ? activate(e.activation, rounded<T>(z)) : z;
      if (e.gated) v *= rounded<T>(up(sums[r * kSumPitch + at + 8]));
      e.store(row0 + r, column, v, residual[i]);
    }
  }
}

// Adds the side path to the sums, a slice of the rank at a time, which lies in `shared` meanwhile. A thread owns the
// sums that it will write.
template <typename Tile, typename T, typename W>
__device__ void add_side_path(float* sums, float* shared, int64_t row0, int64_t rows, int64_t column0,
                              const Epilogue<T, W>& e) {
  const int c = int(threadIdx.x) % kTileColumns, first = int(threadIdx.x) / kTileColumns;
  float *input = shared, *weight = shared + Tile::rows * kSidePitch;
  for (int64_t begin = 0; begin < e.rank; begin += kSideSlice) {
    const int n = e.rank - begin < kSideSlice ? int(e.rank - begin) : kSideSlice;
    for (int i = int(threadIdx.x); i < (Tile::rows + kTileColumns) * kSideSlice; i += kGemmThreads) {
      const int line = i / kSideSlice, r = i % kSideSlice, w = line - Tile::rows;
      const int64_t from = w < 0 ? row0 + line : column0 + w, end = w < 0 ? rows : e.n;
      const float* source = w < 0 ? e.side_in : e.side_weight;
      shared[line * kSidePitch + r] = from < end && r < n ? source[from * e.rank + begin + r] : 0.0f;
    }
    __syncthreads();
    for (int r = first; r < Tile::rows; r += kGemmThreads / kTileColumns) {
      float sum = sums[r * kSumPitch + c];
      for (int i = 0; i < n; ++i) sum = fmaf(input[r * kSidePitch + i], weight[c * kSidePitch + i], sum);
      sums[r * kSumPitch + c] = sum;
    }
    __syncthreads();
  }
}

// A tile has 64 columns of the weight; gated: 8 of the gate, the same 8 of up, and so on.
template <typename T, int kHeight, typename W>
__global__ void __launch_bounds__(kGemmThreads)
    linear_tiles(Operand<T> x, int64_t rows, Operand<W> w, Epilogue<T, W> epilogue) {
  DSCHAT_DYNAMIC_SHARED(memory);
  using Tile = GemmTile<T, kHeight, W>;
  constexpr int sum_floats = Tile::rows * kSumPitch;
  static_assert((sum_floats + (Tile::rows + kTileColumns) * kSidePitch) * 4 <= Tile::shared_bytes);
  const int64_t row0 = int64_t(blockIdx.y) * Tile::rows, n = epilogue.n;
  const bool gated = epilogue.gated;
  const int64_t column0 = int64_t(blockIdx.x) * (gated ? kTileColumns / 2 : kTileColumns);
  float* sums = reinterpret_cast<float*>(memory);
  {
    Tile tile;
    tile.multiply_all(
        x, w, memory, [=](int r) -> int64_t { return row0 + r < rows ? row0 + r : -1; },
        [=](int c) -> int64_t {
          const int64_t column = column0 + (gated ? c / 16 * 8 + c % 8 : c);
          return column >= n ? -1 : gated && c % 16 >= 8 ? column + n : column;
        });
    tile.spread(sums);
  }
  if (epilogue.side_in) add_side_path<Tile>(sums, sums + sum_floats, row0, rows, column0, epilogue);
  write_tile<Tile>(sums, row0, rows, column0, epilogue);
}

template <typename T, typename W>
void launch_tiles(const Operand<T>& x, int64_t rows, const Operand<W>& w, const Epilogue<T, W>& epilogue, void* stream) {
  const int64_t across = ceil_div(epilogue.n, epilogue.gated ? kTileColumns / 2 : kTileColumns);
  dispatch_height(rows, [&](auto height) {
    using Tile = GemmTile<T, height.value, W>;
    constexpr auto kernel = linear_tiles<T, height.value, W>;
    // A grid has at most 65535 blocks in y: very many rows are cut.
    constexpr int64_t most = int64_t(65535) * Tile::rows;
    for (int64_t begin = 0; begin < rows; begin += most) {
      const int64_t count = rows - begin < most ? rows - begin : most;
      Operand<T> input = x;
      Epilogue<T, W> e = epilogue;
      input.data += begin * x.stride;
      if (e.residual) e.residual += begin * e.residual_stride;
      if (e.side_in) e.side_in += begin * e.rank;
      e.y = static_cast<char*>(e.y) + begin * e.y_stride * (e.float_output ? 4 : int64_t(sizeof(T)));
      DSCHAT_LAUNCH(kernel, dim3(unsigned(across), unsigned(ceil_div(count, Tile::rows))), dim3(kGemmThreads),
                    size_t(Tile::shared_bytes), stream, input, count, w, e);
    }
  });
}

}  // namespace dschat::cuda
