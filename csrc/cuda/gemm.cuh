// The matrix product under linear, lora_linear and token_logprobs: a block's tile of x W^T, both operands with k side by
// side. Every sum runs over k in one order, whatever the tile's height or the other rows, so a row's bits depend on
// nothing else: float32 by fmaf over 16 of k, whose sums are added in order; bfloat16 and float16 on tensor cores, 16 of
// k at a time. The weight is of x's type, or int8: integers, which every type holds exactly, widened on the way from
// shared memory to the instruction. So their sums are those of the same integers in x's type, bit for bit.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

constexpr int kGemmThreads = 128;
constexpr int kTileColumns = 64;
constexpr int kStages = 3;       // slices of k in shared memory: one is multiplied while the next two arrive
constexpr int kSliceBytes = 64;  // of a row of x in a slice; twice that beside int8, whose rows are shorter
constexpr int kSimpleSum = 16;     // of k in a sum of float32 products, before it is added to the others
constexpr int kPadBytes = 16;    // between rows in shared memory: 8 rows lie in 8 different groups of banks
constexpr int kSumPitch = kTileColumns + 8;  // floats from row to row of sums in shared memory; four rows fill its banks

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
    for (int i = 0; i < elements; ++i) reinterpret_cast<T*>(to)[i] = i < n ? source[i] : T();
  }
}

// An integer of int8, from the byte that holds it: 2^23 + 128 + it has it in the mantissa, and no conversion is needed,
// which would run at a quarter of the rate.
__device__ __forceinline__ float widened(uint32_t byte) {
  const uint32_t bits = 0x4b000000u | (byte ^ 0x80u);
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x - 8388736.0f;
}

// multiply(s) for every slice of k in order, in all threads; load(s) began its copies kStages - 1 slices earlier, into the
// place of slice s % kStages. No copy is under way when it returns, but other threads may still multiply.
template <typename Load, typename Multiply>
__device__ __forceinline__ void each_slice(int64_t slices, Load&& load, Multiply&& multiply) {
  for (int64_t s = 0; s < kStages - 1; ++s) {
    if (s < slices) load(s);
    copy_commit();
  }
  for (int64_t s = 0; s < slices; ++s) {
    copy_wait<kStages - 2>();
    __syncthreads();  // the slice is there for all, and nobody reads the one that is overwritten next
    if (s + kStages - 1 < slices) load(s + kStages - 1);
    copy_commit();
    multiply(s);
  }
  copy_wait<0>();
}

// A block's tile of 16 kHeight rows by 64 columns; kHeight is 1 or 4, W the type of the weight. A thread has its columns
// in pairs (c, c + 8).
template <typename T, int kHeight, typename W = T> struct GemmTile {
  static constexpr bool simple = sizeof(T) == 4;  // no tensor cores
  static constexpr bool integers = !std::is_same_v<W, T>;
  static constexpr int rows = 16 * kHeight;
  static constexpr int slice = kSliceBytes * (integers ? 2 : 1) / int(sizeof(T));
  static constexpr int x_pieces = slice * int(sizeof(T)) / 16, w_pieces = slice * int(sizeof(W)) / 16;
  static constexpr int x_pitch = 16 * x_pieces + kPadBytes, w_pitch = 16 * w_pieces + kPadBytes;
  static constexpr int stage_bytes = rows * x_pitch + kTileColumns * w_pitch;
  static constexpr int shared_bytes = kStages * stage_bytes;
  // A warp has `tall` times 16 rows: with integers all of them, so that each is widened by one warp.
  static constexpr int tall = integers ? kHeight : 1;
  static constexpr int warp_columns = kTileColumns * kHeight / tall / 4;
  static constexpr int across = warp_columns / 16;
  static constexpr int pairs = simple ? rows / 8 * 2 : tall * across * 4;

  float sum[pairs][2];

  // sum = x[x_row(i)] . w[w_row(c)] for rows i and columns c of the tile; negative rows count as zeros. All threads
  // call it, and may use `shared` for something else when it returns.
  template <typename XRow, typename WRow>
  __device__ void multiply_all(const Operand<T>& x, const Operand<W>& w, unsigned char* shared, XRow x_row, WRow w_row) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) sum[i][0] = sum[i][1] = 0.0f;
    const auto load = [&](int64_t s) {
      unsigned char* stage = shared + s % kStages * stage_bytes;
      for (int i = int(threadIdx.x); i < rows * x_pieces + kTileColumns * w_pieces; i += kGemmThreads) {
        if (const int j = i - rows * x_pieces; j < 0) {
          const int r = i / x_pieces, piece = i % x_pieces;
          copy_piece(stage + r * x_pitch + piece * 16, x, x_row(r), s * slice + piece * (16 / int(sizeof(T))));
        } else {
          const int c = j / w_pieces, piece = j % w_pieces;
          copy_piece(stage + rows * x_pitch + c * w_pitch + piece * 16, w, w_row(c),
                     s * slice + piece * (16 / int(sizeof(W))));
        }
      }
    };
    each_slice((x.k + slice - 1) / slice, load, [&](int64_t s) {
      const unsigned char* stage = shared + s % kStages * stage_bytes;
      if constexpr (simple) multiply_simple(stage, stage + rows * x_pitch);
      else multiply_matrices(stage, stage + rows * x_pitch);
    });
    __syncthreads();
  }

  // f(row, column, sum at column, sum at column + 8) for what this thread has of the tile.
  template <typename F> __device__ __forceinline__ void each_pair(F&& f) const {
    if constexpr (simple) {
      const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16, column = x % 8 + x / 8 * 16;
#pragma unroll
      for (int i = 0; i < pairs; ++i) f(y + i / 2 * 8, column + i % 2 * 32, sum[i][0], sum[i][1]);
    } else {
      const int lane = int(threadIdx.x) % kWarp;
      const int row = warp_row() + lane / 4, column = warp_column() + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < pairs; ++i)
        f(row + i / (4 * across) * 16 + i % 4 / 2 * 8, column + i / 4 % across * 16 + i % 2, sum[i][0], sum[i][1]);
    }
  }

  // Puts the sums into shared memory, kSumPitch from row to row. All threads call it, and read them when it returns.
  __device__ void spread(float* to) const {
    if constexpr (simple) {
      each_pair([=](int r, int c, float first, float second) {
        to[r * kSumPitch + c] = first;
        to[r * kSumPitch + c + 8] = second;
      });
    } else {
      const int lane = int(threadIdx.x) % kWarp;
      float* mine = to + (warp_row() + lane / 4) * kSumPitch + warp_column() + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < pairs; i += 2) {
        float* at = mine + (i / (4 * across) * 16 + i % 4 / 2 * 8) * kSumPitch + i / 4 % across * 16;
        store_as<uint2>(at, {sum[i][0], sum[i + 1][0]});
        store_as<uint2>(at + 8, {sum[i][1], sum[i + 1][1]});
      }
    }
    __syncthreads();
  }

 private:
  static __device__ __forceinline__ int warp_row() { return int(threadIdx.x) / kWarp % (kHeight / tall) * 16; }
  static __device__ __forceinline__ int warp_column() {
    return int(threadIdx.x) / kWarp / (kHeight / tall) * warp_columns;
  }

  __device__ __forceinline__ void multiply_simple(const unsigned char* x_slice, const unsigned char* w_slice) {
    constexpr int pitch = x_pitch / int(sizeof(T));
    const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
    const T* a = reinterpret_cast<const T*>(x_slice) + y * pitch;
    const unsigned char* w = w_slice + (x % 8 + x / 8 * 16) * w_pitch;
    const auto weight = [&](int column, int k) -> float {
      if constexpr (integers) return widened(w[column * w_pitch + k]);
      else return reinterpret_cast<const T*>(w + column * w_pitch)[k];
    };
#pragma unroll 1
    for (int begin = 0; begin < slice; begin += kSimpleSum) {
      float part[pairs][2] = {};  // short sums round less
      for (int k = begin; k < begin + kSimpleSum; ++k) {
        const float b[2][2] = {{weight(0, k), weight(8, k)}, {weight(32, k), weight(40, k)}};
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
          const float v = a[i / 2 * 8 * pitch + k];
          part[i][0] = fmaf(v, b[i % 2][0], part[i][0]);
          part[i][1] = fmaf(v, b[i % 2][1], part[i][1]);
        }
      }
#pragma unroll
      for (int i = 0; i < pairs; ++i) sum[i][0] += part[i][0], sum[i][1] += part[i][1];
    }
  }

  __device__ __forceinline__ void multiply_matrices(const unsigned char* x_slice, const unsigned char* w_slice) {
    const int lane = int(threadIdx.x) % kWarp;
    const unsigned char* x = x_slice + (warp_row() + lane % 16) * x_pitch + lane / 16 * 16;
    const unsigned char* w = w_slice + warp_column() * w_pitch;
#pragma unroll
    for (int k = 0; k < slice; k += 16) {
      uint32_t a[tall][4];
#pragma unroll
      for (int t = 0; t < tall; ++t) load_matrices(a[t], x + t * 16 * x_pitch + k * int(sizeof(T)));
#pragma unroll
      for (int j = 0; j < across; ++j) {
        uint32_t b[4];
        load_columns(b, w + j * 16 * w_pitch + k * int(sizeof(W)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t column[2] = {b[2 * half], b[2 * half + 1]};
#pragma unroll
          for (int t = 0; t < tall; ++t) {
            float d[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) d[r] = sum[(t * across + j) * 4 + r][half];
            multiply<T>(d, a[t], column);
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[(t * across + j) * 4 + r][half] = d[r];
          }
        }
      }
    }
  }

  // The operand of 16 columns and 16 of k, which begin at w.
  static __device__ __forceinline__ void load_columns(uint32_t (&b)[4], const unsigned char* w) {
    const int lane = int(threadIdx.x) % kWarp;
    if constexpr (integers) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned char* p = w + (i / 2 * 8 + lane / 4) * w_pitch + i % 2 * 8 + lane % 4 * 2;
        const uint32_t two = *reinterpret_cast<const uint16_t*>(p);
        b[i] = pack<T>(widened(two & 0xffu), widened(two >> 8));
      }
    } else {
      load_matrices(b, w + (lane % 8 + lane / 16 * 8) * w_pitch + lane / 8 % 2 * 16);
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
