// A dense row-major matrix as panels of gemm.h without a change of its values: for products with a matrix that is used
// once or twice and so is not worth a pack of its own. (Packs with updates, parts and dtypes: pack_linear.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gemm.h"
#include "gemm_int8.h"

namespace dschat {

// Whether 4 bytes that lie side by side in a row of the matrix (one float32, two bfloat16 depths, four int8 ones) do so
// in a panel too: then panels are the matrix's words, transposed.
template <typename T>
constexpr bool kMovesWords = sizeof(T) == 4 || (kDepthPairs && sizeof(T) == 2) || std::is_same_v<T, q8_quad>;

// How panels are written: into the caches, or past them, for what is not read again soon (a fence must follow).
enum class Stores { cached, streaming };

inline void fence_stores() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

constexpr int64_t kWordBytes = 4;

#if defined(__AVX512F__)
// to[w * kPanel + i] = word w of row i, for 16 rows `stride` bytes apart and the words [0, 16); only the first `words`
// are read and written.
template <Stores how> inline void transpose_16_rows(const char* rows, int64_t stride, int words, uint32_t* to) {
  const __mmask16 present = __mmask16((1u << words) - 1);
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(present, rows + i * stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 g + j], lane q: word 4 q + j of the rows 4 g .. 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  }
  for (int w = 0; w < words; ++w) {
    if constexpr (how == Stores::streaming) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + w * kPanel), t[w]);
    else _mm512_storeu_si512(to + w * kPanel, t[w]);
  }
}
#endif

// to[w * kPanel + c] = word w of row c, for `columns` rows `stride` bytes apart and `words` words.
template <Stores how>
inline void transpose_words(const char* rows, int64_t stride, int64_t columns, int64_t words, uint32_t* to) {
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= columns; c += 16)
    for (int64_t w = 0; w < words; w += 16)
      transpose_16_rows<how>(rows + c * stride + w * kWordBytes, stride, int(std::min<int64_t>(16, words - w)),
                             to + w * kPanel + c);
#endif
  constexpr int64_t kBlock = 32;  // words interleaved at a time: those of 32 rows stay in L1
  for (int64_t w0 = 0; c < columns && w0 < words; w0 += kBlock)
    for (int64_t w = w0; w < std::min(words, w0 + kBlock); ++w)
      for (int64_t i = c; i < columns; ++i)
        std::memcpy(to + w * kPanel + i, rows + i * stride + w * kWordBytes, kWordBytes);
}

// Columns [c0, c0 + columns) of one panel: its output columns are the rows of w, `stride` values from row to row.
template <Stores how, typename T>
inline void pack_into_panel(const T* rows, int64_t stride, int64_t columns, int64_t depth, int64_t c0, T* out) {
  constexpr int64_t kBlock = 64;  // depths interleaved at a time: 32 rows x 64 values stay in L1
  int64_t k0 = 0;
  if constexpr (kMovesWords<T>) {
    const int64_t words = depth * int64_t(sizeof(T)) / kWordBytes;
    transpose_words<how>(reinterpret_cast<const char*>(rows), stride * int64_t(sizeof(T)), columns, words,
                         reinterpret_cast<uint32_t*>(out) + c0);
    k0 = words * kWordBytes / int64_t(sizeof(T));
  }
  for (; k0 < depth; k0 += kBlock)
    for (int64_t k = k0; k < std::min(depth, k0 + kBlock); ++k)
      for (int64_t c = 0; c < columns; ++c) out[panel_place(out, k, c0 + c)] = rows[c * stride + k];
}

// Panels [p0, p1) of x -> x W^T: output columns are the `count` rows of w [count, depth], `stride` values from row to
// row. Columns past count and depths past `depth` are zero.
template <typename T>
inline void pack_rows(const T* w, int64_t stride, int64_t count, int64_t depth, int64_t p0, int64_t p1, T* panels) {
  const int64_t padded = panel_depth(panels, depth);
  for (int64_t p = p0; p < p1; ++p) {
    T* out = panels + p * padded * kPanel;
    const int64_t columns = std::min(kPanel, count - p * kPanel);
    if (columns < kPanel || padded > depth) std::memset(static_cast<void*>(out), 0, size_t(padded * kPanel) * sizeof(T));
    pack_into_panel<Stores::cached>(w + p * kPanel * stride, stride, columns, depth, 0, out);
  }
}

// Panels [p0, p1) of x -> x W: output columns are the `width` columns of w [depth, width], depths are its rows.
template <typename T>
inline void pack_columns(const T* w, int64_t stride, int64_t depth, int64_t width, int64_t p0, int64_t p1, T* panels) {
  const int64_t padded = panel_depth(panels, depth);
  for (int64_t p = p0; p < p1; ++p) {
    T* out = panels + p * padded * kPanel;
    const int64_t columns = std::min(kPanel, width - p * kPanel);
    if (columns < kPanel || padded > depth) std::memset(static_cast<void*>(out), 0, size_t(padded * kPanel) * sizeof(T));
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = w + k * stride + p * kPanel;
      T* line = out + panel_place(out, k, 0);
      if (columns == kPanel) {
        const int64_t step = panel_place(out, 0, 1), half = panel_place(out, 0, kLanes);
        for (int64_t c = 0; c < kLanes; ++c) line[c * step] = row[c];
        for (int64_t c = 0; c < kLanes; ++c) line[half + c * step] = row[kLanes + c];
      } else {
        for (int64_t c = 0; c < columns; ++c) out[panel_place(out, k, c)] = row[c];
      }
    }
  }
}

}  // namespace dschat
