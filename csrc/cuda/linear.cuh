// What linear, linear_int8 and lora_linear share: the kernel around a tile, and what happens to finished sums.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"

namespace dschat::cuda {

// See dschat_kernels/ops/linear.py for the roundings. `side_in` [rows, rank] and `side_weight` [n, rank] are the
// low-rank side path, added to the sums before the bias; null: none. W is the type of the weight.
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

  // Column c of the weight, of row `row`, before anything is rounded.
  __device__ __forceinline__ float finished(int64_t row, int64_t c, float sum) const {
    for (int64_t r = 0; r < (side_in ? rank : 0); ++r) sum = fmaf(side_in[row * rank + r], side_weight[c * rank + r], sum);
    if constexpr (!std::is_same_v<W, T>) sum *= scales[c];
    return bias ? sum + bias[c] : sum;
  }

  __device__ __forceinline__ void store(int64_t row, int64_t column, float v) const {
    if (residual) v = to_float(residual[row * residual_stride + column]) + rounded<T>(v);
    static_cast<T*>(y)[row * y_stride + column] = from_float<T>(v);
  }

  __device__ __forceinline__ void write(int64_t row, int64_t column, float sum) const {
    if (column >= n) return;
    const float z = finished(row, column, sum);
    if (float_output) static_cast<float*>(y)[row * y_stride + column] = z;
    else store(row, column, activation == Activation::none ? z : activate(activation, rounded<T>(z)));
  }

  __device__ __forceinline__ void write_gated(int64_t row, int64_t column, float gate, float up) const {
    if (column >= n) return;
    gate = rounded<T>(finished(row, column, gate));
    up = rounded<T>(finished(row, column + n, up));
    store(row, column, activate(activation, gate) * up);
  }
};

// A tile has 64 columns of the weight; gated: 8 of the gate, the same 8 of up, and so on, so that both meet in a thread.
template <typename T, int kHeight, typename W>
__global__ void __launch_bounds__(kGemmThreads)
    linear_tiles(Operand<T> x, int64_t rows, Operand<W> w, Epilogue<T, W> epilogue) {
  DSCHAT_DYNAMIC_SHARED(memory);
  using Tile = GemmTile<T, kHeight, W>;
  const int64_t row0 = int64_t(blockIdx.y) * Tile::rows, n = epilogue.n;
  const bool gated = epilogue.gated;
  const int64_t column0 = int64_t(blockIdx.x) * (gated ? kTileColumns / 2 : kTileColumns);
  const auto output = [=](int c) -> int64_t { return column0 + (gated ? c / 16 * 8 + c % 8 : c); };
  Tile tile;
  tile.multiply_all(
      x, w, memory, [=](int r) -> int64_t { return row0 + r < rows ? row0 + r : -1; },
      [=](int c) -> int64_t {
        const int64_t column = output(c);
        return column >= n ? -1 : gated && c % 16 >= 8 ? column + n : column;
      });
  tile.each_pair([&](int r, int c, float first, float second) {
    const int64_t row = row0 + r;
    if (row >= rows) return;
    if (gated) {
      epilogue.write_gated(row, output(c), first, second);
    } else {
      epilogue.write(row, output(c), first);
      epilogue.write(row, output(c + 8), second);
    }
  });
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
