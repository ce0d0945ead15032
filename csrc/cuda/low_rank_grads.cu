// Gradients of the factors of a low-rank side path; see dschat_kernels/ops/lora_linear.py. float32 throughout: x and dy
// are widened as they are read, which is once for eight of the rank in either kernel.
#include "cuda/low_rank_grads.h"

#include "cuda/column_sum.cuh"
#include "cuda/gemm.cuh"

namespace dschat::cuda {
namespace {

constexpr int kRanks = 8;         // of the rank at a time
constexpr int kWarps = 8, kWarpRows = 2;
constexpr int kOuterRows = 256;   // rows of a partial sum
constexpr int kOuterThreads = 128;

template <typename T> struct Matrix {
  const T* data;
  int64_t stride, columns;
  int width;  // of accesses

  __device__ __forceinline__ const T* row(int64_t i) const { return data + i * stride; }
};

template <typename T> Matrix<T> matrix(const void* data, int64_t stride, int64_t columns) {
  return {static_cast<const T*>(data), stride, columns, access_width({data}, {stride * int64_t(sizeof(T))})};
}

// Where 16 bytes of a row of a slice of m lie: a lane has two of them beside 16 bits, and eight lanes' first ones, like
// their second ones, are in different banks.
__device__ __forceinline__ int piece_place(int piece) { return piece ^ (piece >> 3 & 1); }

// out[row, r] = scale * x[row] . m[r]. A warp has kWarpRows rows; a lane adds up every 32nd group of columns. The block
// has the columns of all its lanes' groups of kRanks rows of m in shared memory, and the next ones on their way.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp, sizeof(T) == 4 ? 4 : 3)
    project(Matrix<T> x, int64_t rows, Operand<float> m, int64_t rank, float scale, float* out) {
  constexpr int slice = kWarp * kGroup<T>, pieces = slice / 4;
  DSCHAT_SHARED(uint4, memory, kStages * kRanks * pieces);
  float* shared = reinterpret_cast<float*>(memory);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t row0 = (int64_t(blockIdx.x) * kWarps + int64_t(threadIdx.x) / kWarp) * kWarpRows;
  const int columns = int(x.columns);
  const T* own[kWarpRows];
  bool there[kWarpRows];
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    there[i] = row0 + i < rows;
    own[i] = x.row(there[i] ? row0 + i : 0);
  }
  for (int64_t r0 = 0; r0 < rank; r0 += kRanks) {
    float sum[kWarpRows][kRanks] = {};
    const auto load = [&](int64_t s) {
      float* stage = shared + s % kStages * kRanks * slice;
      for (int i = int(threadIdx.x); i < kRanks * pieces; i += kWarps * kWarp) {
        const int r = i / pieces, piece = i % pieces;
        copy_piece(reinterpret_cast<unsigned char*>(stage + r * slice + piece_place(piece) * 4), m,
                   r0 + r < rank ? r0 + r : -1, s * slice + piece * 4);
      }
    };
    each_slice((x.columns + slice - 1) / slice, load, [&](int64_t s) {
      const float* stage = shared + s % kStages * kRanks * slice;
      const int begin = int(s) * slice + lane * kGroup<T>;
      if (begin >= columns) return;
      float left[kWarpRows][kGroup<T>];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i)
        load_group(own[i] + begin, there[i] ? columns - begin : 0, x.width, left[i]);
#pragma unroll
      for (int part = 0; part < kGroup<T> / 4; ++part)
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          float right[4];
          load_as<uint4>(stage + r * slice + piece_place(lane * (kGroup<T> / 4) + part) * 4, right);
#pragma unroll
          for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[i][r] = fmaf(left[i][part * 4 + c], right[c], sum[i][r]);
        }
    });
    float result = 0.0f;  // lane i kRanks + r writes that row's sum
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        const float total = warp_sum(sum[i][r]) * scale;
        if (lane == i * kRanks + r) result = total;
      }
    const int64_t row = row0 + lane / kRanks, r = r0 + lane % kRanks;
    if (lane < kWarpRows * kRanks && row < rows && r < rank) out[row * rank + r] = result;
    __syncthreads();  // nobody multiplies the last slices
  }
}

// partial[block, r, column] = sum over the block's rows, in order, of inner[row, r] * x[row, column].
template <typename T>
__global__ void __launch_bounds__(kOuterThreads)
    outer(Matrix<T> x, int64_t rows, const float* inner, int64_t rank, float* partial) {
  DSCHAT_SHARED(float, factors, kOuterRows * kRanks);
  const int64_t row0 = int64_t(blockIdx.x) * kOuterRows, r0 = int64_t(blockIdx.z) * kRanks;
  const int64_t column = int64_t(blockIdx.y) * kOuterThreads + threadIdx.x;
  const int count = int(min(int64_t(kOuterRows), rows - row0)), ranks = int(min(int64_t(kRanks), rank - r0));
  for (int i = int(threadIdx.x); i < count * kRanks; i += kOuterThreads)
    factors[i] = i % kRanks < ranks ? inner[(row0 + i / kRanks) * rank + r0 + i % kRanks] : 0.0f;
  __syncthreads();
  if (column >= x.columns) return;
  float sum[kRanks] = {};
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float v = to_float(x.row(row0 + i)[column]);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) sum[r] = fmaf(factors[i * kRanks + r], v, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kRanks; ++r)
    if (r < ranks) partial[(blockIdx.x * rank + r0 + r) * x.columns + column] = sum[r];
}

// out[rank, columns] = sum over rows of inner[row, r] * x[row].
template <typename T>
void outer_sums(const Matrix<T>& x, int64_t rows, const float* inner, int64_t rank, float* partial, float* out,
                void* stream) {
  const int64_t blocks = ceil_div(rows, kOuterRows), sums = rank * x.columns;
  if (sums == 0) return;
  if (blocks)
    DSCHAT_LAUNCH(outer<T>,
                  dim3(unsigned(blocks), unsigned(ceil_div(x.columns, kOuterThreads)), unsigned(ceil_div(rank, kRanks))),
                  dim3(kOuterThreads), 0, stream, x, rows, inner, rank, partial);
  DSCHAT_LAUNCH(total_sums, dim3(unsigned(ceil_div(sums, kColumnThreads))), dim3(kColumnThreads), 0, stream, partial, out,
                blocks, sums);
}

template <typename T>
void inner_products(const Matrix<T>& x, int64_t rows, const float* m, int64_t rank, float scale, float* out,
                    void* stream) {
  if (rows == 0) return;
  DSCHAT_LAUNCH(project<T>, dim3(unsigned(ceil_div(rows, kWarps * kWarpRows))), dim3(kWarps * kWarp), 0, stream, x, rows,
                operand<float>(m, x.columns, x.columns), rank, scale, out);
}

}  // namespace

// a [rank, k], b_t [rank, n]. inner [2, tokens, rank]: scale dy B, which the gradient of x needs too, and scale x A^T.
// partial is scratch of ceil(tokens / kOuterRows) * rank * max(n, k) numbers.
extern "C" int launch_low_rank_grads(int type, const void* x, int64_t x_stride, const void* dy, int64_t dy_stride,
                                     int64_t tokens, int64_t n, int64_t k, int64_t rank, const float* a,
                                     const float* b_t, float scale, float* inner, float* da, float* db_t,
                                     float* partial, void* stream) {
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    const Matrix<T> of_x = matrix<T>(x, x_stride, k), of_dy = matrix<T>(dy, dy_stride, n);
    float* second = inner + tokens * rank;
    inner_products(of_dy, tokens, b_t, rank, scale, inner, stream);
    inner_products(of_x, tokens, a, rank, scale, second, stream);
    outer_sums(of_x, tokens, inner, rank, partial, da, stream);
    outer_sums(of_dy, tokens, second, rank, partial, db_t, stream);
  }));
}

}  // namespace dschat::cuda
