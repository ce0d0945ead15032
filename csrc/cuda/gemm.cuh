// The matrix product under linear, lora_linear and token_logprobs: a block's tile of x W^T, both operands with k side by
// side. Every sum runs over k in one order, whatever the tile's height or the other rows, so a row's bits depend on
// nothing else: float32 by fmaf over 16 of k, whose sums are added in order; bfloat16 and float16 on tensor cores, 16 of
// k at a time.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

constexpr int kGemmThreads = 128;
constexpr int kTileColumns = 64;
constexpr int kStages = 3;       // slices of k in shared memory: one is multiplied while the next two arrive
constexpr int kSliceBytes = 64;  // of a row in a slice
constexpr int kPitch = 80;       // bytes from row to row: 8 rows lie in 8 different groups of banks

template <typename T> struct Operand {
  const T* data;
  int64_t stride;  // elements from row to row
  int64_t k;
  bool wide;  // rows begin at multiples of 16 bytes
};

// Copies a slice of a row, zero beyond k or where `row` is negative. Called for every 16 bytes by one thread.
template <typename T>
__device__ __forceinline__ void copy_piece(unsigned char* to, const Operand<T>& from, int64_t row, int64_t begin) {
  constexpr int elements = 16 / int(sizeof(T));
  int64_t n = row < 0 ? 0 : from.k - begin;
  n = n < 0 ? 0 : n > elements ? elements : n;
  const T* source = from.data + (n ? row * from.stride + begin : 0);
  if (from.wide) {
    copy_async(to, source, int(n) * int(sizeof(T)));
  } else {
#pragma unroll
    for (int i = 0; i < elements; ++i) reinterpret_cast<T*>(to)[i] = i < n ? source[i] : from_float<T>(0.0f);
  }
}

// A block's tile of 16 kHeight rows by 64 columns; kHeight is 1 or 4. A thread has its columns in pairs (c, c + 8).
template <typename T, int kHeight> struct GemmTile {
  static constexpr int rows = 16 * kHeight;
  static constexpr int slice = kSliceBytes / int(sizeof(T));
  static constexpr int stage_bytes = (rows + kTileColumns) * kPitch;
  static constexpr int shared_bytes = kStages * stage_bytes;
  static constexpr bool simple = sizeof(T) == 4;  // no tensor cores
  static constexpr int warp_columns = kTileColumns * kHeight / 4;  // of a warp's 16 rows
  static constexpr int pairs = simple ? rows / 8 * 2 : warp_columns / 16 * 4;

  float sum[pairs][2];

  // sum = x[x_row(i)] . w[w_row(c)] for rows i and columns c of the tile; negative rows count as zeros. All threads
  // call it, and may use `shared` for something else when it returns.
  template <typename XRow, typename WRow>
  __device__ void multiply_all(const Operand<T>& x, const Operand<T>& w, unsigned char* shared, XRow x_row, WRow w_row) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) sum[i][0] = sum[i][1] = 0.0f;
    const auto load = [&](int64_t s) {
      unsigned char* stage = shared + s % kStages * stage_bytes;
      constexpr int pieces = kSliceBytes / 16;
      for (int i = int(threadIdx.x); i < (rows + kTileColumns) * pieces; i += kGemmThreads) {
        const int r = i / pieces, piece = i % pieces;
        const int64_t begin = s * slice + piece * (16 / int(sizeof(T)));
        unsigned char* to = stage + r * kPitch + piece * 16;
        if (r < rows) copy_piece(to, x, x_row(r), begin);
        else copy_piece(to, w, w_row(r - rows), begin);
      }
    };
    const int64_t slices = (x.k + slice - 1) / slice;
    for (int64_t s = 0; s < kStages - 1; ++s) {
      if (s < slices) load(s);
      copy_commit();
    }
    for (int64_t s = 0; s < slices; ++s) {
      copy_wait<kStages - 2>();
      __syncthreads();  // the slice is there for all, and nobody reads the one that is overwritten next
      if (s + kStages - 1 < slices) load(s + kStages - 1);
      copy_commit();
      multiply_slice(shared + s % kStages * stage_bytes);
    }
    copy_wait<0>();
    __syncthreads();
  }

  // f(row, column, sum at column, sum at column + 8) for what this thread has of the tile.
  template <typename F> __device__ __forceinline__ void each_pair(F&& f) const {
    if constexpr (simple) {
      const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16, column = x % 8 + x / 8 * 16;
#pragma unroll
      for (int i = 0; i < pairs; ++i) f(y + i / 2 * 8, column + i % 2 * 32, sum[i][0], sum[i][1]);
    } else {
      const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
      const int row = warp % kHeight * 16 + lane / 4, column = warp / kHeight * warp_columns + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < pairs; ++i)
        f(row + i % 4 / 2 * 8, column + i / 4 * 16 + i % 2, sum[i][0], sum[i][1]);
    }
  }

 private:
  __device__ __forceinline__ void multiply_slice(const unsigned char* stage) {
    if constexpr (simple) multiply_simple(reinterpret_cast<const float*>(stage));
    else multiply_matrices(stage);
  }

  __device__ __forceinline__ void multiply_simple(const float* stage) {
    constexpr int pitch = kPitch / 4;
    const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
    const float* w = stage + (rows + x % 8 + x / 8 * 16) * pitch;
    float part[pairs][2] = {};  // short sums round less
    for (int k = 0; k < slice; ++k) {
      const float b[2][2] = {{w[k], w[8 * pitch + k]}, {w[32 * pitch + k], w[40 * pitch + k]}};
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        const float a = stage[(y + i / 2 * 8) * pitch + k];
        part[i][0] = fmaf(a, b[i % 2][0], part[i][0]);
        part[i][1] = fmaf(a, b[i % 2][1], part[i][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < pairs; ++i) sum[i][0] += part[i][0], sum[i][1] += part[i][1];
  }

  __device__ __forceinline__ void multiply_matrices(const unsigned char* stage) {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    const unsigned char* x = stage + (warp % kHeight * 16 + lane % 16) * kPitch + lane / 16 * 16;
    const unsigned char* w =
        stage + (rows + warp / kHeight * warp_columns + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kSliceBytes; k += 32) {  // bytes: 16 elements
      uint32_t a[4];
      load_matrices(a, x + k);
#pragma unroll
      for (int j = 0; j < warp_columns / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, w + j * 16 * kPitch + k);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float d[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) d[r] = sum[j * 4 + r][half];
          const uint32_t column[2] = {b[2 * half], b[2 * half + 1]};
          multiply<T>(d, a, column);
#pragma unroll
          for (int r = 0; r < 4; ++r) sum[j * 4 + r][half] = d[r];
        }
      }
    }
  }
};

template <typename T> Operand<T> operand(const void* data, int64_t stride, int64_t k) {
  const bool wide = access_width({data}, {stride * int64_t(sizeof(T))}) >= 16;
  return {static_cast<const T*>(data), stride, k, wide};
}

// f(std::integral_constant<int, kHeight>) for the tile that a number of rows fills best.
template <typename F> void dispatch_height(int64_t rows, F&& f) {
  if (rows <= 16) f(std::integral_constant<int, 1>());
  else f(std::integral_constant<int, 4>());
}

}  // namespace dschat::cuda
