// The instructions of PTX that tests/cuda/ptx/translate.py does not write out as an operator, for translated kernels.
// A kernel is a library of its own; what it needs of the block it runs in comes through the table `host`.
//
// Registers are unsigned integers of their width. Not modelled: flushing of subnormals, and the last bits of the
// approximate instructions (ex2, lg2, rcp, rsqrt, tanh: here correctly rounded or libm's).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda_emulation/float16.h"
#include "cuda_emulation/runtime.h"

namespace emulation::ptx {

enum class Shuffle : int { up, down, butterfly, index };
enum class Reduction : int { add, min, max, bit_and, bit_or, bit_xor };

// What a translated kernel calls.
struct Host {
  const Index *thread, *block, *threads, *blocks;
  int (*lane)();
  int (*thread_number)();
  void (*stop)(const char* format, ...);
  void (*barrier)();
  void (*sync_warp)(unsigned mask);
  uint32_t (*shuffle)(Shuffle kind, uint32_t value, uint32_t operand, uint32_t clamp, uint32_t mask, bool* inside);
  uint32_t (*ballot)(uint32_t mask, bool predicate);
  uint32_t (*reduce)(Reduction kind, bool is_signed, uint32_t value, uint32_t mask);
  void (*copy_async)(void* shared, const void* global, int bytes, int valid);
  void (*copy_commit)();
  void (*copy_wait)(int pending);
  void (*mma)(Element type, int depth, float* d, const uint32_t* a, const uint32_t* b);
  void (*load_matrix)(uint32_t* registers, const void* row, int count, bool transposed);
  void (*store_matrix)(const uint32_t* registers, void* row, int count, bool transposed);
  void (*access)(const void* address, size_t bytes, bool write, int line);  // null but in the checking build
};

// What a library of a translated kernel offers under the name dschat_ptx_kernel.
struct Kernel {
  const char* name;
  void (*run)(const Host& host, const unsigned char* parameters, char* shared, uint32_t shared_bytes);
  uint32_t parameter_bytes;
  uint32_t shared_bytes;  // of its static variables; dynamic memory begins there
};

// ------------------------------------------------------------------------------------------------------- values

inline float as_f32(uint64_t bits) { return bits_float(uint32_t(bits)); }
inline double as_f64(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline float as_f16(uint64_t bits) { return float16_value(uint16_t(bits)); }
inline float as_bf16(uint64_t bits) { return bfloat16_value(uint16_t(bits)); }
inline uint32_t of_f32(float x) { return float_bits(x); }
inline uint64_t of_f64(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline uint16_t of_f16(float x) { return float16_bits(x); }
inline uint16_t of_bf16(float x) { return bfloat16_bits(x); }

// min and max return the operand that is a number, and tell the zeros apart; their .NaN forms a NaN if there is one.
template <typename F> F lesser(F a, F b) {
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit(a) ? a : b) : (a < b ? a : b);
}
template <typename F> F greater(F a, F b) {
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit(a) ? b : a) : (a < b ? b : a);
}
template <typename F> F lesser_nan(F a, F b) { return a != a ? a : b != b ? b : lesser(a, b); }
template <typename F> F greater_nan(F a, F b) { return a != a ? a : b != b ? b : greater(a, b); }
inline float saturated(float x) { return x != x ? 0.0f : std::fmin(std::fmax(x, 0.0f), 1.0f); }

// a b + c to the next float32 below; the sum of the exact product in float64 is exact enough for that.
inline float fma_down(float a, float b, float c) {
  const double exact = double(a) * b + c;
  const float near = float(exact);
  return double(near) > exact ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near;
}

// The nearest integer of a type; NaN is 0.
template <typename I> I to_integer(double x) {
  if (x != x) return 0;
  if (x <= double(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  if (x >= double(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
  return I(x);
}

template <typename I> I high_product(I a, I b) {
  if constexpr (sizeof(I) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<I>, __int128, unsigned __int128>;
    return I((Wide(a) * Wide(b)) >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<I>, int64_t, uint64_t>;
    return I((Wide(a) * Wide(b)) >> (8 * sizeof(I)));
  }
}

// As the hardware: all ones for x / 0, x for x % 0, and no trap for the one quotient that does not fit.
template <typename I> I quotient(I a, I b) {
  if (b == 0) return I(~I(0));
  if constexpr (std::is_signed_v<I>)
    if (b == -1) return I(0 - std::make_unsigned_t<I>(a));
  return I(a / b);
}
template <typename I> I remainder(I a, I b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<I>)
    if (b == -1) return 0;
  return I(a % b);
}

// Shifts by the width or more give 0, or the sign.
template <typename I> I shift_left(I x, uint32_t by) { return by >= 8 * sizeof(I) ? I(0) : I(std::make_unsigned_t<I>(x) << by); }
template <typename I> I shift_right(I x, uint32_t by) {
  constexpr uint32_t width = 8 * sizeof(I);
  if (by >= width) return std::is_signed_v<I> && x < 0 ? I(-1) : I(0);
  return I(x >> by);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) << by >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {
  return by >= 32 ? high : uint32_t((uint64_t(high) << 32 | low) >> by);
}

inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t byte = uint32_t(bytes >> (8 * (s & 7)) & 0xff);
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * i);
  }
  return r;
}

template <typename U> U low_bits(uint32_t count) { return count >= 8 * sizeof(U) ? U(~U(0)) : U((U(1) << count) - 1); }

template <typename I> I extract_bits(I x, uint32_t at, uint32_t count) {
  using U = std::make_unsigned_t<I>;
  at &= 255, count &= 255;
  constexpr uint32_t width = 8 * sizeof(I);
  if (!count) return 0;
  U field = U(shift_right(U(x), at) & low_bits<U>(count));
  if (std::is_signed_v<I> && count < width) {
    const uint32_t top = at + count - 1 < width ? at + count - 1 : width - 1;
    if (U(x) >> top & 1) field |= U(~low_bits<U>(at >= width ? 0 : top - at + 1));
  }
  return I(field);
}
template <typename U> U insert_bits(U field, U into, uint32_t at, uint32_t count) {
  at &= 255, count &= 255;
  if (!count || at >= 8 * sizeof(U)) return into;
  const U mask = U(low_bits<U>(count) << at);
  return U((into & ~mask) | (U(field << at) & mask));
}

// f of both halves of a register.
template <typename F> uint32_t both(F&& f, uint32_t a, uint32_t b = 0, uint32_t c = 0) {
  return uint32_t(f(uint16_t(a), uint16_t(b), uint16_t(c))) |
         uint32_t(f(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16))) << 16;
}

// ------------------------------------------------------------------------------------------------------- memory

// One thread's view of its block.
struct Thread {
  const Host& host;
  const unsigned char* parameters;
  char* shared;
  uint32_t shared_bytes;

  char* in_shared(uint32_t offset, uint32_t bytes) const {
    if (offset > shared_bytes || bytes > shared_bytes - offset)
      host.stop("out of bounds: %u bytes of shared memory at offset %u of %u", bytes, offset, shared_bytes);
    return shared + offset;
  }

  // Every access but those of parameters and local memory.
  char* checked(char* address, uint32_t bytes, bool write, int line) const {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
      host.stop("misaligned: %u-byte %s in line %d of the PTX", bytes, write ? "store" : "load", line);
    if (host.access) host.access(address, bytes, write, line);
    return address;
  }
};

template <typename T> T load(const void* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}
template <typename T> void store(void* address, T value) { std::memcpy(address, &value, sizeof(T)); }

}  // namespace emulation::ptx
