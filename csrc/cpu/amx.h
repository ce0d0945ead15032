// Intel AMX tiles for bfloat16 products: the eight tile registers behind a few functions.
//
// With DSCHAT_AMX_MODEL the registers are arrays and the instructions follow the pseudo-code of Intel's manual (float32
// pairs summed apart and then together, subnormals flushed): the same kernels, layouts and masks run on any machine, which
// is how they are tested where there is no AMX. The model's speed means nothing.
#pragma once

#if defined(__AMX_BF16__) || defined(DSCHAT_AMX_MODEL)
#define DSCHAT_AMX 1
#endif

#if defined(DSCHAT_AMX)

#include <cstdint>
#include <cstring>

#include "simd.h"

#if !defined(DSCHAT_AMX_MODEL)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dschat {

constexpr int kTileRows = 16;    // rows of a tile
constexpr int64_t kTileDepth = 32;  // values of k in a bfloat16 tile row

#if defined(DSCHAT_AMX_MODEL)

struct TileModel {
  alignas(64) unsigned char data[8][16][64];
};
inline TileModel& tile_model() {
  thread_local TileModel model;
  return model;
}
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? 0.0f * x : x; }

// Whole tiles of 16 rows by 64 bytes in all eight registers, until release.
struct TileScope {
  TileScope() {}
  ~TileScope() {}
};
template <int T> inline void tile_zero() { std::memset(tile_model().data[T], 0, sizeof(tile_model().data[T])); }
template <int T> inline void tile_load(const void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile_model().data[T][r], static_cast<const char*>(p) + r * stride_bytes, 64);
}
template <int T> inline void tile_store(void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(p) + r * stride_bytes, tile_model().data[T][r], 64);
}
template <int C, int A, int B> inline void tile_dot() {
  TileModel& t = tile_model();
  for (int m = 0; m < 16; ++m) {
    float sum[16], even[16] = {}, odd[16] = {};
    bf16 a[32], b[32];
    std::memcpy(sum, t.data[C][m], 64);
    std::memcpy(a, t.data[A][m], 64);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(b, t.data[B][k], 64);
      for (int n = 0; n < 16; ++n) {
        even[n] = flush(even[n] + flush(to_float(a[2 * k])) * flush(to_float(b[2 * n])));
        odd[n] = flush(odd[n] + flush(to_float(a[2 * k + 1])) * flush(to_float(b[2 * n + 1])));
      }
    }
    for (int n = 0; n < 16; ++n) sum[n] = flush(sum[n] + flush(even[n] + odd[n]));
    std::memcpy(t.data[C][m], sum, 64);
  }
}

#else

// Configures this thread's tiles; released at the end, so that the kernel need not save them at a context switch.
struct TileScope {
  TileScope() {
    // Linux gives a process the tile data on request (ARCH_REQ_XCOMP_PERM, feature 18); build.py checked that it does.
    static const long granted = syscall(SYS_arch_prctl, 0x1023, 18);
    (void)granted;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
};
// Written out: the compilers' intrinsics are macros that paste the register's number as text, so a template argument is none.
template <int T> DSCHAT_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> DSCHAT_INLINE void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int T> DSCHAT_INLINE void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int C, int A, int B> DSCHAT_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace dschat

#endif  // DSCHAT_AMX
