// y = epilogue(x W^T + b) with packed weights.
//
// Packed layout: panels of 32 output columns, zero-filled past n, laid out inside as gemm.h says. A gated panel holds 16
// gate columns as columns 0..15 and the matching 16 up columns as 16..31.
//
// Every output element is summed in one fixed order (gemm.h: multiply), so a row's bits do not depend on how many rows
// there are, on how the work is split, or on the blocking.
#pragma once

#include <cstdint>

#include "activation.h"
#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace dschat {

// How panels hold weights: in the dtype of x; as int8 with a float32 scale a column; or such panels for rows that are
// quantised too (gemm_int8.h).
enum class Weights : int { model = 0, int8 = 1, int8_dynamic = 2 };

struct PackedMatrix {
  const void* data;   // panels
  const float* bias;  // [panels * 32] in panel order, or null
  int64_t n;          // output features (of a gated pair: of the gated result)
  int64_t k;          // input features
  bool gated;
  Weights weights = Weights::model;
  const float* scales = nullptr;  // of int8 panels: [panels * 32] in panel order

  int64_t panels() const { return gated ? (n + 15) / 16 : (n + kPanel - 1) / kPanel; }
};

struct LinearEpilogue {
  Activation activation = Activation::none;  // of a gated matrix: applied to the gate
  const void* residual = nullptr;            // same dtype as x, added after the result was rounded
  int64_t residual_stride = 0;
  bool float_output = false;  // y is float32 and unrounded (logits)
};

// x [rows, k] (row stride in elements, dtype), y [rows, n].
void linear(const Team& team, DType dtype, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
            const LinearEpilogue& epilogue, void* y, int64_t y_stride);

// Low-rank update of a weight: W + scale * B A, A [rank, k], B [n, rank], both float32 and contiguous.
struct LowRank {
  const float* a;
  const float* b;
  int64_t rank;
  float scale;
};

// One dense matrix to be packed: W [n, k] with element strides (a transposed layout has stride_n = 1).
struct DenseMatrix {
  const void* data;
  int64_t n, k, stride_n, stride_k;
  const LowRank* updates;
  int num_updates;
};

// Writes panels for the rows of `parts` one below the other (q, k, v), or for the pair (gate, up) when gated.
// source: dtype of the weights; target: dtype of the panels. W + sum of updates is accumulated in float32 and
// rounded once to `target`.
//
// int8 panels have the layout that rows of dtype `target` meet. Each row of the float32 sum is quantised by itself
// (quantise.h), its scale goes to `scales` [panels * 32], which is null for other weights.
//
// panels: from a cache line on; they are written past the caches where the CPU has stores that do.
//
// digests: null, or the block digests of each part's weight as digest_buffers makes them of blocks of kDigestRows rows,
// taken while the rows are in the cache for packing; only where digests_while_packing holds.
void pack_linear(const Team& team, DType source, DType target, const DenseMatrix* parts, int num_parts, bool gated,
                 Weights weights, void* panels, float* scales, uint64_t* const* digests = nullptr);

// Whether rows are contiguous and no block of kDigestRows of them is cut by a panel's halves.
bool digests_while_packing(const DenseMatrix* parts, int num_parts, bool gated);

// The same sum as a plain row-major [n, k] matrix of dtype `target` (fuse_lora).
void fuse_lora(const Team& team, DType source, DType target, const DenseMatrix& w, void* out);

// 64-bit digests of buffers; changing any one 4-byte word always changes a buffer's. Blocks are hashed independently,
// so threads do not matter; finish_digest makes one digest of a buffer's blocks. Memory is read once.
struct DigestBuffer {
  const void* data;
  int64_t bytes, block;  // block: bytes, a multiple of 4 where there are several
  int64_t blocks() const { return (bytes + block - 1) / block; }
};
constexpr int64_t kDigestRows = 16;  // rows of a block where the buffer is a matrix: half a panel's
void digest_buffers(const Team& team, const DigestBuffer* buffers, int64_t count, uint64_t* block_digests);
uint64_t finish_digest(const uint64_t* block_digests, int64_t count);

}  // namespace dschat
