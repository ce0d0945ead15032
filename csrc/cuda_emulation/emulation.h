// The CUDA C++ that csrc/cuda is written in, for a host compiler: types, built-in variables, intrinsics and launches.
// Only what the kernels use is here; csrc/cuda/device.cuh includes it in place of the toolkit's headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_emulation/float16.h"
#include "cuda_emulation/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define blockDim ::emulation::block_size
#define gridDim ::emulation::grid_size

#ifdef DSCHAT_EMULATION_COMPILED
// Only the launchers are the host compiler's: the kernels that run are those that nvcc compiled.
#include "cuda_emulation/ptx_launch.h"
#define DSCHAT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::emulation::ptx::launch(kernel, grid, block, shared_bytes, __VA_ARGS__)
#else
#define DSCHAT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::emulation::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); }, ::emulation::name_of<kernel>())
#endif
#define DSCHAT_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(::emulation::dynamic_shared())
// An array in shared memory, of trivial elements.
#define DSCHAT_SHARED(type, name, count)       \
  static const char name##_key = 0;            \
  type* name = static_cast<type*>(::emulation::static_shared(&name##_key, sizeof(type) * (count)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  operator emulation::Index() const { return {x, y, z}; }
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;
inline cudaError_t cudaGetLastError() { return emulation::take_error() ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorInvalidValue ? "invalid argument" : emulation::error_text();
}

// ------------------------------------------------------------------------------------------------- block and warp

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::barrier(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulation::sync_warp(mask, line); }

namespace emulation {

template <typename T> struct ShuffleArguments {
  T in, out;
  int source;
};

template <typename T> T shuffle(unsigned mask, T value, int source, const char* name, int line) {
  ShuffleArguments<T> x{value, value, source};
  collective(mask, name, line, &x, [](void** arguments, unsigned m) {
    for (int l = 0; l < kWarp; ++l) {
      if (!(m >> l & 1)) continue;
      auto& self = *static_cast<ShuffleArguments<T>*>(arguments[l]);
      if (m >> self.source & 1) self.out = static_cast<ShuffleArguments<T>*>(arguments[self.source])->in;
      else fail("shuffle: lane %d reads lane %d, which is not in the mask %08x", l, self.source, m);
    }
  });
  return x.out;
}

struct VoteArguments {
  bool in;
  unsigned out;
};

}  // namespace emulation

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, source & 31, "__shfl_sync", line);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int with, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, (emulation::lane() ^ with) & 31, "__shfl_xor_sync", line);
}
// Lanes without a lane so far below them keep their own value.
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
  const int self = emulation::lane(), source = self - int(by);
  return emulation::shuffle(mask, value, source < 0 ? self : source, "__shfl_up_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  emulation::VoteArguments x{predicate != 0, 0};
  emulation::collective(mask, "__ballot_sync", line, &x, [](void** arguments, unsigned m) {
    unsigned votes = 0;
    for (int l = 0; l < emulation::kWarp; ++l)
      if (m >> l & 1) votes |= unsigned(static_cast<emulation::VoteArguments*>(arguments[l])->in) << l;
    for (int l = 0; l < emulation::kWarp; ++l)
      if (m >> l & 1) static_cast<emulation::VoteArguments*>(arguments[l])->out = votes;
  });
  return x.out;
}

// ----------------------------------------------------------------------------------------------------- arithmetic

inline uint32_t __float_as_uint(float x) { return emulation::float_bits(x); }
inline float __uint_as_float(uint32_t u) { return emulation::bits_float(u); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
