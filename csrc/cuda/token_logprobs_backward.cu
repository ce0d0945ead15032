// Gradients of log-probabilities and entropies; see dschat_kernels/ops/token_logprobs.py. For a block of the vocabulary
// the logits are computed anew, by the tile of the forward and so with its bits, and leave a thread block as their
// gradients, rounded to T. Those are multiplied with the block's rows of the head, and with the hidden states. A sum over
// the vocabulary or over the rows runs in one order, 16 at a time, wherever blocks begin: a row's gradient has the same
// bits in every batch.
#include "cuda/token_logprobs_backward.h"

#include "cuda/column_sum.cuh"
#include "cuda/gemm.cuh"
#include "cuda/logsumexp.cuh"

namespace dschat::cuda {
namespace {

constexpr int kHeight = 4;
constexpr int kRows = kRowBlock;  // of a tile; the sums of a bias' gradient within it are one partial sum
constexpr int kPitch = kTileColumns + 1;
static_assert(kRows == GemmTile<float, kHeight>::rows);

// What the rows' losses want of the logits; pointers to `bias` begin with the block of the vocabulary.
struct Loss {
  const float* bias;  // or null
  float inverse, softcap;
  const float *dlogprob, *dentropy, *lse, *entropy;  // dentropy and entropy: or null
  const int64_t* targets;
};

// A row's part of a loss, in shared memory: `kinds` arrays of kRows.
struct RowTerms {
  static constexpr int kinds = 6;
  float *dlogprob, *dentropy, *lse, *entropy, *scale;
  int* target;  // the tile's column, negative: in none of them

  __device__ __forceinline__ explicit RowTerms(float* shared)
      : dlogprob(shared), dentropy(shared + kRows), lse(shared + 2 * kRows), entropy(shared + 3 * kRows),
        scale(shared + 4 * kRows), target(reinterpret_cast<int*>(shared + 5 * kRows)) {}
};

__device__ __forceinline__ float logit_gradient(float logit, const Loss& loss, const RowTerms& row, int r, int c) {
  float slope = loss.inverse;
  if (loss.softcap != 0.0f) {
    const float t = tanhf(logit / loss.softcap);
    logit = loss.softcap * t;
    slope *= 1.0f - t * t;
  }
  const float log_p = logit * loss.inverse - row.lse[r], p = expf(log_p), g = row.dlogprob[r];
  float dz = 0.0f;
  if (p != 0.0f) dz = -p * fmaf(row.dentropy[r], log_p + row.entropy[r], g);  // log p may be -inf
  if (c == row.target[r]) dz += g;
  return dz * slope;
}

// Where a block's gradients go. scales: powers of two by which T holds them, one a row and one for all; null: 1.
template <typename T> struct LogitGradients {
  T* by_row;     // [rows, row_stride]
  T* by_column;  // [columns, column_stride], or null
  int64_t row_stride, column_stride;
  const float* scales;
  float* partial;  // [blocks of rows, columns], or null
};

template <typename T>
__global__ void __launch_bounds__(kGemmThreads)
    logit_gradients(Operand<T> hidden, int64_t rows, Operand<T> weight, int64_t columns, int64_t first, Loss loss,
                    LogitGradients<T> out) {
  DSCHAT_DYNAMIC_SHARED(memory);
  using Tile = GemmTile<T, kHeight>;
  float* tile = reinterpret_cast<float*>(memory);  // [kRows, kPitch]
  const RowTerms terms(tile + kRows * kPitch);
  static_assert(Tile::shared_bytes >= kRows * (kPitch + RowTerms::kinds) * 4);
  const int64_t row0 = int64_t(blockIdx.x) * kRows, column0 = int64_t(blockIdx.y) * kTileColumns;
  const int height = int(min(int64_t(kRows), rows - row0)), width = int(min(int64_t(kTileColumns), columns - column0));
  {
    Tile sums;
    sums.multiply_all(
        hidden, weight, memory, [=](int r) -> int64_t { return r < height ? row0 + r : -1; },
        [=](int c) -> int64_t { return c < width ? column0 + c : -1; });
    sums.each_pair([&](int r, int c, float a, float b) {
      tile[r * kPitch + c] = a;
      tile[r * kPitch + c + 8] = b;
    });
  }
  const int thread = int(threadIdx.x), across = thread % kTileColumns, down = thread / kTileColumns;
  constexpr int step = kGemmThreads / kTileColumns;
  if (thread < height) {
    const int64_t row = row0 + thread, target = loss.targets[row] - first - column0;
    terms.dlogprob[thread] = loss.dlogprob[row];
    terms.dentropy[thread] = loss.dentropy ? loss.dentropy[row] : 0.0f;
    terms.lse[thread] = loss.lse[row];
    terms.entropy[thread] = loss.dentropy ? loss.entropy[row] : 0.0f;
    terms.scale[thread] = out.scales ? out.scales[row] : 1.0f;
    terms.target[thread] = target >= 0 && target < kTileColumns ? int(target) : -1;
  }
  __syncthreads();
  if (across < width) {
    const float bias = loss.bias ? loss.bias[column0 + across] : 0.0f;
    for (int r = down; r < height; r += step) {
      float* at = tile + r * kPitch + across;
      *at = logit_gradient(*at + bias, loss, terms, r, across);
      out.by_row[(row0 + r) * out.row_stride + column0 + across] = from_float<T>(*at * terms.scale[r]);
    }
  }
  __syncthreads();
  if (out.by_column && across < height) {  // now a thread has a row
    const float scale = out.scales ? out.scales[rows] : 1.0f;
    for (int c = down; c < width; c += step)
      out.by_column[(column0 + c) * out.column_stride + row0 + across] =
          from_float<T>(tile[across * kPitch + c] * scale);
  }
  if (out.partial && thread < width) {
    float sum = 0.0f;
    for (int r = 0; r < height; ++r) sum += tile[r * kPitch + thread];
    out.partial[blockIdx.x * columns + column0 + thread] = sum;
  }
}

// A tile of a b, of kRows by kTileColumns: `a` has k side by side in its rows, and b's rows are k.
template <typename T> struct ProductTile {
  static constexpr bool simple = sizeof(T) == 4;  // no tensor cores
  static constexpr int slice = kSliceBytes / int(sizeof(T));
  static constexpr int a_pieces = kSliceBytes / 16, b_pieces = kTileColumns * int(sizeof(T)) / 16;
  static constexpr int a_pitch = kSliceBytes + kPadBytes, b_pitch = 16 * b_pieces + kPadBytes;
  static constexpr int stage_bytes = kRows * a_pitch + slice * b_pitch;
  static constexpr int shared_bytes = kStages * stage_bytes;
  static_assert(!simple || slice == kSimpleSum);

  // simple: rows 8 apart of 4 columns; else two by two of the 16 x 16 parts of a warp's 32 x 32.
  float sum[8][4];

  static constexpr int run = simple ? 4 : 2;  // neighbours of a row

  // Puts the sums into shared memory, kSumPitch from row to row, or takes them from there; all threads call it, and what
  // they do with `shared` before and after is up to them.
  __device__ __forceinline__ void spread(float* shared) const {
    each_run([&](int r, int c, int i, int j) {
      float own[run];
#pragma unroll
      for (int e = 0; e < run; ++e) own[e] = sum[i][j + e];
      store_as<Wide>(shared + r * kSumPitch + c, own);
    });
  }
  __device__ __forceinline__ void collect(const float* shared) {
    each_run([&](int r, int c, int i, int j) {
      float own[run];
      load_as<Wide>(shared + r * kSumPitch + c, own);
#pragma unroll
      for (int e = 0; e < run; ++e) sum[i][j + e] = own[e];
    });
  }

  // sum += a b; all threads call it. Rows of `a` from row0, `height` of them, and columns of b from column0 on.
  __device__ void multiply_all(const Operand<T>& a, int64_t row0, int height, const Operand<T>& b, int64_t column0,
                               unsigned char* shared) {
    const auto load = [&](int64_t s) {
      unsigned char* stage = shared + s % kStages * stage_bytes;
      for (int i = int(threadIdx.x); i < kRows * a_pieces + slice * b_pieces; i += kGemmThreads) {
        if (const int j = i - kRows * a_pieces; j < 0) {
          const int r = i / a_pieces, piece = i % a_pieces;
          copy_piece(stage + r * a_pitch + piece * 16, a, r < height ? row0 + r : -1,
                     s * slice + piece * (16 / int(sizeof(T))));
        } else {
          const int64_t k = s * slice + j / b_pieces;
          copy_piece(stage + kRows * a_pitch + j / b_pieces * b_pitch + j % b_pieces * 16, b, k < a.k ? k : -1,
                     column0 + j % b_pieces * (16 / int(sizeof(T))));
        }
      }
    };
    each_slice((a.k + slice - 1) / slice, load, [&](int64_t s) {
      const unsigned char* stage = shared + s % kStages * stage_bytes;
      if constexpr (simple) multiply_simple(stage, stage + kRows * a_pitch);
      else multiply_matrices(stage, stage + kRows * a_pitch);
    });
  }

 private:
  using Wide = std::conditional_t<simple, uint4, uint2>;  // a run

  // f(row, column, i, j): sum[i][j] and what follows in its run are this thread's of the tile.
  template <typename F> static __device__ __forceinline__ void each_run(F&& f) {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += run)
        if constexpr (simple) f(int(threadIdx.x) / 16 + 8 * i, int(threadIdx.x) % 16 * 4, i, j);
        else f(warp % 2 * 32 + i / 4 * 16 + j / 2 * 8 + lane / 4, warp / 2 * 32 + i % 4 * 8 + lane % 4 * 2, i, j);
  }

  __device__ __forceinline__ void multiply_simple(const unsigned char* a_slice, const unsigned char* b_slice) {
    const unsigned char* a = a_slice + int(threadIdx.x) / 16 * a_pitch;
    const unsigned char* b = b_slice + int(threadIdx.x) % 16 * 16;
    float part[8][4] = {};  // short sums round less
    for (int k = 0; k < slice; ++k) {
      float row[4];
      load_as<uint4>(reinterpret_cast<const float*>(b + k * b_pitch), row);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float v = reinterpret_cast<const float*>(a + i * 8 * a_pitch)[k];
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = fmaf(v, row[j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
  }

  __device__ __forceinline__ void multiply_matrices(const unsigned char* a_slice, const unsigned char* b_slice) {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    const unsigned char* a = a_slice + (warp % 2 * 32 + lane % 16) * a_pitch + lane / 16 * 16;
    const unsigned char* b = b_slice + lane % 16 * b_pitch + (warp / 2 * 32 + lane / 16 * 8) * int(sizeof(T));
#pragma unroll
    for (int k = 0; k < slice; k += 16) {
      uint32_t left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(left[i], a + i * 16 * a_pitch + k * int(sizeof(T)));
        load_matrices_transposed(right[i], b + k * b_pitch + i * 16 * int(sizeof(T)));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t column[2] = {right[i % 4 / 2][i % 2 * 2], right[i % 4 / 2][i % 2 * 2 + 1]};
        multiply<T>(sum[i], left[i / 4], column);
      }
    }
  }
};

// Sums go on from `begun` and end in `sums`, or finished, and divided by their rows' scales, in `out`.
template <typename T> struct ProductOutput {
  const float* begun;  // null: 0
  float* sums;         // null: finished
  T* out;
  const float* scales;  // null: 1
  int64_t scale_step;   // 0: one scale for all
};

template <typename T>
__global__ void __launch_bounds__(kGemmThreads)
    product_tiles(Operand<T> a, int64_t rows, Operand<T> b, ProductOutput<T> output) {
  DSCHAT_DYNAMIC_SHARED(memory);
  const int64_t row0 = int64_t(blockIdx.x) * kRows, column0 = int64_t(blockIdx.y) * kTileColumns, columns = b.k;
  const int height = int(min(int64_t(kRows), rows - row0)), width = int(min(int64_t(kTileColumns), columns - column0));
  using Tile = ProductTile<T>;
  static_assert(kRows * kSumPitch * 4 <= Tile::shared_bytes);
  float* sums = reinterpret_cast<float*>(memory);
  const int c = int(threadIdx.x) % kTileColumns, first = int(threadIdx.x) / kTileColumns;  // lanes have neighbours
  constexpr int step = kGemmThreads / kTileColumns;
  const auto place = [=](int r) { return (row0 + r) * columns + column0 + c; };
  Tile tile{};
  if (output.begun) {
    for (int r = first; r < kRows; r += step)
      sums[r * kSumPitch + c] = r < height && c < width ? output.begun[place(r)] : 0.0f;
    __syncthreads();
    tile.collect(sums);
    __syncthreads();
  }
  tile.multiply_all(a, row0, height, b, column0, memory);
  __syncthreads();  // nobody multiplies
  tile.spread(sums);
  __syncthreads();
  if (c >= width) return;
  for (int r = first; r < height; r += step) {
    const float sum = sums[r * kSumPitch + c];
    if (output.sums) output.sums[place(r)] = sum;
    else output.out[place(r)] = from_float<T>(output.scales ? sum / output.scales[(row0 + r) * output.scale_step] : sum);
  }
}

template <typename T>
void multiply_rows(const Operand<T>& a, int64_t rows, const Operand<T>& b, const ProductOutput<T>& output, void* stream) {
  if (rows == 0) return;
  DSCHAT_LAUNCH(product_tiles<T>, dim3(unsigned(ceil_div(rows, kRows)), unsigned(ceil_div(b.k, kTileColumns))),
                dim3(kGemmThreads), size_t(ProductTile<T>::shared_bytes), stream, a, rows, b, output);
}

int64_t padded(int64_t n) { return ceil_div(n, 8) * 8; }

template <typename T> struct Backward {
  Operand<T> hidden;
  int64_t rows;
  const T* weight;
  int64_t size, vocab;
  Loss loss;
  const float* scales;
  T *dlogits, *transposed;
  float *sums, *partial;
  T *dhidden, *dweight;
  float* dbias;

  // The part of `count` entries of the vocabulary from `first` on.
  void run(int64_t first, int64_t count, void* stream) const {
    const Operand<T> head = operand<T>(weight + first * size, size, size);
    const int64_t row_stride = padded(count), column_stride = padded(rows);
    Loss of_block = loss;
    if (loss.bias) of_block.bias += first;
    if (rows)
      DSCHAT_LAUNCH(logit_gradients<T>, dim3(unsigned(ceil_div(rows, kRows)), unsigned(ceil_div(count, kTileColumns))),
                    dim3(kGemmThreads), size_t(GemmTile<T, kHeight>::shared_bytes), stream, hidden, rows, head, count,
                    first, of_block,
                    LogitGradients<T>{dlogits, dweight ? transposed : nullptr, row_stride, column_stride, scales,
                                      dbias ? partial : nullptr});
    if (dhidden)
      multiply_rows(operand<T>(dlogits, row_stride, count), rows, head,
                    ProductOutput<T>{first ? sums : nullptr, first + count < vocab ? sums : nullptr, dhidden, scales, 1},
                    stream);
    if (dweight)
      multiply_rows(operand<T>(transposed, column_stride, rows), count, hidden,
                    ProductOutput<T>{nullptr, nullptr, dweight + first * size, scales ? scales + rows : nullptr, 0},
                    stream);
    if (dbias)
      DSCHAT_LAUNCH(total_sums, dim3(unsigned(ceil_div(count, kColumnThreads))), dim3(kColumnThreads), 0, stream, partial,
                    dbias + first, ceil_div(rows, kRows), count);
  }
};

}  // namespace

// Entries of the vocabulary are taken `block` at a time. Scratch, for the gradients that are wanted (others are null):
// dlogits [rows, padded(block)] and, for dweight, transposed [block, padded(rows)], padded to multiples of 8; sums
// [rows, size], for dhidden of a vocabulary of several blocks; partial [ceil(rows / kRowBlock), block], for dbias.
extern "C" int launch_token_logprobs_backward(int type, const void* hidden, int64_t hidden_stride, const void* weight,
                                              const float* bias, const int64_t* targets, int64_t rows, int64_t size,
                                              int64_t vocab, const float* dlogprob, const float* dentropy,
                                              const float* lse, const float* entropy, float temperature, float softcap,
                                              const float* scales, int64_t block, void* dlogits, void* transposed,
                                              float* sums, float* partial, void* dhidden, void* dweight, float* dbias,
                                              void* stream) {
  const Loss loss{bias, inverse_temperature(temperature), softcap, dlogprob, dentropy, lse, entropy, targets};
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    const Backward<T> backward{operand<T>(hidden, hidden_stride, size), rows, static_cast<const T*>(weight), size, vocab,
                               loss, scales, static_cast<T*>(dlogits), static_cast<T*>(transposed), sums, partial,
                               static_cast<T*>(dhidden), static_cast<T*>(dweight), dbias};
    for (int64_t first = 0; first < vocab; first += block)
      backward.run(first, vocab - first < block ? vocab - first : block, stream);
  }));
}

}  // namespace dschat::cuda
