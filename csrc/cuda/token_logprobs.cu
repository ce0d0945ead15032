// Log-probabilities of given tokens from hidden states and the head; see dschat_kernels/ops/token_logprobs.py. A block
// has 16 or 64 rows and one chunk of the vocabulary, whose logits live in shared memory only; the chunks of a row are
// then folded in order. The logits have the bits of linear, the log-probabilities those of sample.
#include "cuda/gemm.cuh"
#include "cuda/launch.h"
#include "cuda/logsumexp.cuh"

namespace dschat::cuda {
namespace {

constexpr int kLogitPitch = kVocabChunk + 4;

struct Head {
  const float* bias;  // [vocab] or null
  int64_t vocab;
  float inverse, softcap;  // softcap 0: none

  __device__ __forceinline__ float z(float sum, int64_t v) const {
    float logit = bias ? sum + bias[v] : sum;
    if (softcap != 0.0f) logit = softcap * tanhf(logit / softcap);
    return logit * inverse;
  }
};

template <typename T, int kHeight> constexpr int shared_bytes() {
  return GemmTile<T, kHeight>::shared_bytes + GemmTile<T, kHeight>::rows * kLogitPitch * 4;
}

// The sums of all chunks: three arrays [chunks, rows], so that neighbouring rows lie next to each other.
struct ChunkSums {
  float *max, *sum, *weighted;
  int64_t rows;

  ChunkSums(float* scratch, int64_t chunks, int64_t rows)
      : max(scratch), sum(scratch + chunks * rows), weighted(scratch + 2 * chunks * rows), rows(rows) {}
  __device__ __forceinline__ ChunkSum load(int64_t chunk, int64_t row) const {
    const int64_t at = chunk * rows + row;
    return {max[at], sum[at], weighted[at]};
  }
  __device__ __forceinline__ void store(int64_t chunk, int64_t row, const ChunkSum& c) const {
    const int64_t at = chunk * rows + row;
    max[at] = c.max;
    sum[at] = c.sum;
    weighted[at] = c.weighted;
  }
};

// The sums of a block's rows over one chunk and, for the chunk that has the row's target, target_z[row].
template <typename T, int kHeight>
__global__ void __launch_bounds__(kGemmThreads, 2)
    chunk_sums(Operand<T> hidden, int64_t rows, Operand<T> weight, Head head, const int64_t* targets, ChunkSums chunks,
               float* target_z) {
  DSCHAT_DYNAMIC_SHARED(memory);
  using Tile = GemmTile<T, kHeight>;
  float* logits = reinterpret_cast<float*>(memory + Tile::shared_bytes);
  const int64_t row0 = int64_t(blockIdx.x) * Tile::rows, chunk0 = int64_t(blockIdx.y) * kVocabChunk;
  const int n = int(head.vocab - chunk0 < kVocabChunk ? head.vocab - chunk0 : kVocabChunk);
  for (int column0 = 0; column0 < n; column0 += kTileColumns) {
    Tile tile;
    tile.multiply_all(
        hidden, weight, memory, [=](int r) -> int64_t { return row0 + r < rows ? row0 + r : -1; },
        [=](int c) -> int64_t { return column0 + c < n ? chunk0 + column0 + c : -1; });
    tile.each_pair([&](int r, int c, float first, float second) {
      float* at = logits + r * kLogitPitch + column0 + c;
      if (column0 + c < n) at[0] = head.z(first, chunk0 + column0 + c);
      if (column0 + c + 8 < n) at[8] = head.z(second, chunk0 + column0 + c + 8);
    });
  }
  __syncthreads();
  ChunkSum* sums = reinterpret_cast<ChunkSum*>(memory);  // the products are done with it
  const int height = int(min(int64_t(Tile::rows), rows - row0)), thread = int(threadIdx.x);
  for (int r = thread / kWarp; r < height; r += kGemmThreads / kWarp) {
    const ChunkSum sum = chunk_logsumexp(n, [=](int i) { return logits[r * kLogitPitch + i]; });
    if (thread % kWarp == 0) sums[r] = sum;
  }
  __syncthreads();
  if (thread >= height) return;
  const int64_t row = row0 + thread, target = targets[row] - chunk0;
  chunks.store(blockIdx.y, row, sums[thread]);
  if (target >= 0 && target < n) target_z[row] = logits[thread * kLogitPitch + target];
}

// target_z becomes the gap of the largest z to it: 0 where they are equal and nowhere else, NaN where the log-prob is NaN.
__global__ void __launch_bounds__(kGemmThreads)
    fold_chunks(ChunkSums chunks, float* target_z, int64_t rows, int64_t count, float* logprob, float* lse,
                float* entropy) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  LogSumExp total;
#pragma unroll 4
  for (int64_t c = 0; c < count; ++c) total.fold(chunks.load(c, row));
  const float z = target_z[row];
  logprob[row] = total.log_prob(z);
  lse[row] = total.value();
  if (entropy) entropy[row] = total.entropy();
  target_z[row] = total.has_nan() ? total.sum : total.max - z;
}

}  // namespace

// scratch: rows * (3 ceil(vocab / kVocabChunk) + 1) numbers, of which the last `rows` are left as the gaps. (An argument of
// their own would change launch.h, see linear_int8.h.)
extern "C" int launch_token_logprobs(int type, const void* hidden, int64_t hidden_stride, const void* weight,
                                     const float* bias, const int64_t* targets, int64_t rows, int64_t size,
                                     int64_t vocab, float temperature, float softcap, float* logprob, float* lse,
                                     float* entropy, float* scratch, void* stream) {
  if (rows == 0) return launched();
  const int64_t count = ceil_div(vocab, kVocabChunk);
  const ChunkSums chunks(scratch, count, rows);
  float* target_z = scratch + rows * count * 3;
  const Head head{bias, vocab, inverse_temperature(temperature), softcap};
  return launched(count <= 65535 && dispatch(type, [&](auto t) {
    using T = decltype(t);
    dispatch_height(rows, [&](auto height) {
      constexpr auto kernel = chunk_sums<T, height.value>;
      constexpr size_t bytes = size_t(shared_bytes<T, height.value>());
      allow_shared(kernel, bytes);
      DSCHAT_LAUNCH(kernel, dim3(unsigned(ceil_div(rows, 16 * height.value)), unsigned(count)), dim3(kGemmThreads), bytes,
                    stream, operand<T>(hidden, hidden_stride, size), rows, operand<T>(weight, size, size), head, targets,
                    chunks, target_z);
    });
    DSCHAT_LAUNCH(fold_chunks, dim3(unsigned(ceil_div(rows, kGemmThreads))), dim3(kGemmThreads), 0, stream, chunks,
                  target_z, rows, count, logprob, lse, entropy);
  }));
}

}  // namespace dschat::cuda
