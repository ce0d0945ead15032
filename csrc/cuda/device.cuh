// What every kernel is written with: element types, vector accesses, reductions over warps and blocks, asynchronous
// copies and the matrix instructions. This is the only file with inline PTX; for a host compiler (tests) the same
// names come from csrc/cuda_emulation. sm_80 and up.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#ifdef DSCHAT_EMULATE_CUDA
#include "cuda_emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DSCHAT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DSCHAT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define DSCHAT_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace dschat::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

// The numbers of dschat_kernels/ops/_common.py DTYPES.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
using bf16 = __nv_bfloat16;
using f16 = __half;

// f(T()) for the element type of that number; false if there is none.
template <typename F> bool dispatch(int type, F&& f) {
  switch (DType(type)) {
    case DType::f32: return f(float()), true;
    case DType::bf16: return f(bf16()), true;
    case DType::f16: return f(f16()), true;
  }
  return false;
}

// What a launcher returns: the error of the launch, or of an argument it has no kernel for.
inline int launched(bool known = true) { return int(known ? cudaGetLastError() : cudaErrorInvalidValue); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lets a kernel use more than 48 KiB of dynamic shared memory.
template <typename Kernel> void allow_shared(Kernel kernel, size_t bytes) {
#ifndef DSCHAT_EMULATE_CUDA
  if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
#else
  (void)kernel, (void)bytes;
#endif
}

// ------------------------------------------------------------------------------------------------------- elements

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// x as T holds it.
template <typename T> __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

// --------------------------------------------------------------------------------------------------- vector access

// Rows are read and written in groups of 16 bytes of their type, so that neighbours in a warp meet neighbours in memory.
// A group belongs to one thread whatever the access width, so the width changes no order of arithmetic; `width` (bytes:
// 16, 8, 4 or 2) is the widest that every address allows.
template <typename T> constexpr int kGroup = 16 / int(sizeof(T));

// The widest access for rows that begin at `pointers` (null: absent) and at multiples of `steps` bytes from them.
inline int access_width(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> steps) {
  uint64_t bits = 16;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  for (const int64_t s : steps) bits |= uint64_t(s);
  return int(bits & (~bits + 1));  // the lowest set bit
}

template <typename Wide, typename T, int G> __device__ __forceinline__ void load_as(const T* p, T (&out)[G]) {
  constexpr int count = int(sizeof(T)) * G / int(sizeof(Wide));
  Wide words[count];
#pragma unroll
  for (int i = 0; i < count; ++i) words[i] = reinterpret_cast<const Wide*>(p)[i];
  memcpy(out, words, sizeof(words));
}

template <typename Wide, typename T, int G> __device__ __forceinline__ void store_as(T* p, const T (&in)[G]) {
  constexpr int count = int(sizeof(T)) * G / int(sizeof(Wide));
  Wide words[count];
  memcpy(words, in, sizeof(words));
#pragma unroll
  for (int i = 0; i < count; ++i) reinterpret_cast<Wide*>(p)[i] = words[i];
}

// n >= G: a whole group; else n elements, and zeros behind them.
template <typename T, int G>
__device__ __forceinline__ void load_group(const T* p, int64_t n, int width, float (&out)[G]) {
  static_assert(sizeof(T) * G % 16 == 0, "a group is of 16-byte words");
  T values[G];
  if (n >= G && width >= 16) {
    load_as<uint4>(p, values);
  } else if (n >= G && width == 8) {
    load_as<uint2>(p, values);
  } else {
#pragma unroll
    for (int i = 0; i < G; ++i) values[i] = i < n ? p[i] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int i = 0; i < G; ++i) out[i] = to_float(values[i]);
}

template <typename T, int G>
__device__ __forceinline__ void store_group(T* p, int64_t n, int width, const float (&in)[G]) {
  static_assert(sizeof(T) * G % 16 == 0, "a group is of 16-byte words");
  T values[G];
#pragma unroll
  for (int i = 0; i < G; ++i) values[i] = from_float<T>(in[i]);
  if (n >= G && width >= 16) {
    store_as<uint4>(p, values);
  } else if (n >= G && width == 8) {
    store_as<uint2>(p, values);
  } else {
#pragma unroll
    for (int i = 0; i < G; ++i)
      if (i < n) p[i] = values[i];
  }
}

// x += n numbers of a float32 vector, and x *= them; what lies behind the end is of no use afterwards.
template <int G>
__device__ __forceinline__ void add_vector(const float* vector, int64_t n, int width, float (&x)[G]) {
  float v[G];
  load_group(vector, n, width, v);
#pragma unroll
  for (int i = 0; i < G; ++i) x[i] += v[i];
}

template <int G>
__device__ __forceinline__ void multiply_vector(const float* vector, int64_t n, int width, float (&x)[G]) {
  float v[G];
  load_group(vector, n, width, v);
#pragma unroll
  for (int i = 0; i < G; ++i) x[i] *= v[i];
}

// ------------------------------------------------------------------------------------------------------ reductions

// Every lane gets the same bits: at each step both partners add the same two numbers.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, by));
  return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

// The sum over a block of whole warps, in every thread; `scratch` holds 32 numbers and may be used again at once.
template <typename N> __device__ __forceinline__ N block_sum(N x, N* scratch) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? scratch[lane] : N(0));
  __syncthreads();
  return x;
}

// -------------------------------------------------------------------------------------------- asynchronous copies

// 16 bytes from global to shared memory, both at multiples of 16; only the first `valid` are read, the rest is zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid = 16) {
#ifdef DSCHAT_EMULATE_CUDA
  emulation::copy_async(to, from, 16, valid);
#else
  const unsigned address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(valid) : "memory");
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef DSCHAT_EMULATE_CUDA
  emulation::copy_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Until at most `pending` of this thread's groups are under way; other threads' copies need a barrier as well.
template <int pending> __device__ __forceinline__ void copy_wait() {
#ifdef DSCHAT_EMULATE_CUDA
  emulation::copy_wait(pending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------- matrix instructions

// d[16 x 8] += a[16 x 16] b[16 x 8], float32 sums. In lane l: a holds rows l/4 and l/4 + 8, columns 2 (l%4) + {0, 1}
// and 8 further; b rows 2 (l%4) + {0, 1} and 8 further, column l/4; d rows l/4, l/4 + 8, columns 2 (l%4) + {0, 1}.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef DSCHAT_EMULATE_CUDA
template <> inline void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(emulation::Element::bfloat16, 16, d, a, b);
}
template <> inline void multiply<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(emulation::Element::float16, 16, d, a, b);
}
#else
#define DSCHAT_MULTIPLY(type, name)                                                                                \
  template <>                                                                                                      \
  __device__ __forceinline__ void multiply<type>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                            \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"                                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
DSCHAT_MULTIPLY(bf16, "bf16")
DSCHAT_MULTIPLY(f16, "f16")
#undef DSCHAT_MULTIPLY
#endif

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 i + r gives the address of row r of matrix i, at a
// multiple of 16 bytes. Register i of lane l gets elements 2 (l%4) + {0, 1} of row l/4 of matrix i; transposed: of
// column l/4, rows 2 (l%4) + {0, 1}.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef DSCHAT_EMULATE_CUDA
  emulation::load_matrix(r, row, 4, false);
#else
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#ifdef DSCHAT_EMULATE_CUDA
  emulation::load_matrix(r, row, 4, true);
#else
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// Two elements in one register, the first in the low half.
template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

}  // namespace dschat::cuda
