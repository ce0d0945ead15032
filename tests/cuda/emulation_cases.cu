// Small kernels for the tests of csrc/cuda_emulation: correct ones, and ones with a planted bug.
#include <array>
#include <string>

#include "cuda/device.cuh"

namespace {

using namespace dschat::cuda;

// ------------------------------------------------------------------------------------------------------ correct

__global__ void who_am_i(int* out) {
  const int block = int(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  const int thread = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  out[block * threads + thread] = block * 10000 + thread;
}

// out[i] = sum of x over the block, through shared memory.
__global__ void block_total(const float* x, float* out) {
  DSCHAT_SHARED(float, scratch, kWarp);
  out[threadIdx.x] = block_sum(x[threadIdx.x], scratch);
}

__global__ void shuffles(int* out) {
  const int lane = int(threadIdx.x);
  out[lane] = __shfl_sync(kAllLanes, lane * 10, 5);
  out[32 + lane] = __shfl_xor_sync(kAllLanes, lane, 9);
  out[64 + lane] = __shfl_up_sync(kAllLanes, lane, 3u);
  out[96 + lane] = int(__ballot_sync(kAllLanes, lane % 3 == 0));
  // Both halves of the warp are in a collective of their own at the same time.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out[128 + lane] = __shfl_xor_sync(half, lane, 1);
}

// Rows reversed through asynchronous copies: 16 bytes a thread.
__global__ void copies(const float* x, float* out, int valid) {
  DSCHAT_SHARED(float, stage, 4 * 64);
  const int i = int(threadIdx.x);
  copy_async(stage + 4 * i, x + 4 * i, valid);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  for (int k = 0; k < 4; ++k) out[4 * i + k] = stage[4 * (63 - i) + k];
}

// d[16 x 8] = a[16 x 16] b[16 x 8], a row-major, b given as its transpose [8 x 16] (plain) or as itself (transposed).
template <typename T> __global__ void product(const T* a, const T* b, float* d, bool transposed) {
  DSCHAT_SHARED(T, stage, 16 * 16 + 16 * 8);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += kWarp) stage[i] = a[i];
  for (int i = lane; i < 128; i += kWarp) stage[256 + i] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[4];
  load_matrices(fa, stage + lane % 16 * 16 + lane / 16 * 8);
  if (transposed) load_matrices_transposed(fb, stage + 256 + lane % 16 * 8);
  else load_matrices(fb, stage + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sum[4] = {};
  const uint32_t first[2] = {fb[0], fb[1]};
  multiply<T>(sum, fa, first);
  for (int r = 0; r < 4; ++r) d[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[r];
}

// ---------------------------------------------------------------------------------------------- with a planted bug

__global__ void planted(int bug, const float* x, float* out, int n) {
  DSCHAT_DYNAMIC_SHARED(memory);
  DSCHAT_SHARED(float, stage, 256);
  auto* dynamic = reinterpret_cast<float*>(memory);
  const int i = int(threadIdx.x), last = int(blockDim.x) - 1;
  switch (bug) {
    case 0:  // some threads never come to the barrier
      if (i < 32) __syncthreads();
      else if (i % 32) out[i] = __shfl_sync(kAllLanes, x[i], 0);
      break;
    case 1:  // two different barriers
      if (i < 32) __syncthreads();
      else
        __syncthreads();
      break;
    case 2:  // a lane missing in a shuffle
      if (i % 32 != 7) out[i] = __shfl_sync(kAllLanes, x[i], 0);
      else __syncthreads();
      break;
    case 3:  // the caller is not in the mask
      out[i] = __shfl_sync(0xfu, x[i], 0);
      break;
    case 4:  // lanes of one warp in different collectives
      if (i % 2) out[i] = __shfl_sync(kAllLanes, x[i], 0);
      else out[i] = float(__ballot_sync(kAllLanes, 1));
      break;
    case 5:  // a shuffle from a lane that the mask leaves out
      if (i % 32 < 16) out[i] = __shfl_sync(0xffffu, x[i], 20);
      break;
    case 6:  // a copy that nobody waits for
      copy_async(stage + 4 * (i % 64), x);
      copy_commit();
      break;
    case 7:  // a misaligned copy
      if (i == 0) copy_async(stage + 1, x);
      break;
    case 8:  // the wait is one group too weak: the poison of shared memory is seen
      copy_async(stage + 4 * (i % 64), x + 4 * (i % 64));
      copy_commit();
      copy_wait<1>();
      out[i] = stage[4 * (i % 64)];
      copy_wait<0>();
      break;
    case 9:  // no barrier before the read of another thread's value
      stage[i] = x[i];
      out[i] = stage[last - i];
      break;
    case 10:  // no barrier before the next write: right in most orders
      stage[i] = x[i];
      __syncthreads();
      out[i] = stage[last - i];
      stage[i] = -1.0f;
      break;
    case 11:  // out of bounds of a tensor, read
      out[i] = x[i + n - last];
      break;
    case 12:  // out of bounds of a tensor, write
      out[i + 1] = x[i];
      break;
    case 13:  // out of bounds of a shared array
      stage[i == last ? 256 : i] = 1.0f;
      break;
    case 14:  // out of bounds of dynamic shared memory
      dynamic[i + 1] = 1.0f;
      break;
    case 15:  // uninitialised shared memory
      if (i) stage[i] = x[i];
      __syncthreads();
      out[i] = stage[i];
      break;
    case 16:  // a 16-byte access at a multiple of 4
      if (i == 0) *reinterpret_cast<uint4*>(out + 1) = *reinterpret_cast<const uint4*>(x);
      break;
    case 17:  // two blocks write one place
      if (i == 0) out[0] = x[blockIdx.x];
      break;
    case 18:  // lanes of a warp exchange through shared memory without __syncwarp
      if (i < 32) {
        stage[i] = x[i];
        out[i] = stage[i ^ 1];
      }
      break;
    case 19:  // a write into an input
      const_cast<float*>(x)[i] = 0.0f;
      break;
    case 20:  // uninitialised global memory
      if (i == 0) out[1] = out[0];
      break;
    case 22:  // a warp's loads lie in 32 sectors
      out[i] = x[i % 32 * 8];
      break;
    case 23:  // ... and in one sector more than they fill
      if (i < 32) out[i] = x[i + 1];
      break;
    case 24:  // two lanes a bank
    case 25:  // eight lanes a bank
      if (i < 32) {
        const int stride = bug == 24 ? 2 : 8;
        stage[i * stride] = x[i];
        __syncwarp();
        out[i] = stage[(i ^ 1) * stride];
      }
      break;
    case 26:  // 16-byte stores, two lanes of a quarter of a warp a bank, and 4-byte loads, eight lanes a bank
      if (i < 32) {
        auto* wide = reinterpret_cast<uint4*>(stage);
        wide[2 * i] = reinterpret_cast<const uint4*>(x)[i];
        __syncwarp();
        out[i] = float(wide[2 * (i ^ 1)].x);
      }
      break;
    case 27:  // one word for all lanes
      if (i < 32) {
        stage[i] = x[i];
        __syncwarp();
        out[i] = stage[0];
      }
      break;
    default:  // 21: no bug, everything that the bugs are about done right
      stage[i] = x[i];
      dynamic[i] = x[i];
      __syncthreads();
      out[i + blockIdx.x * blockDim.x] = stage[last - i] + dynamic[last - i];
      __syncthreads();
      stage[i] = 0.0f;
      if (i < 32) {
        dynamic[i] = x[i];
        __syncwarp();
        out[i + blockIdx.x * blockDim.x] += dynamic[i ^ 1] * 0.0f;
      }
  }
}

template <typename T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

std::string errors() { return emulation::take_error() ? emulation::error_text() : ""; }

}  // namespace

// What emulation_cases.cpp binds: launches, and the errors they left.
std::string run_who_am_i(std::array<unsigned, 3> grid, std::array<unsigned, 3> block, uintptr_t out) {
  DSCHAT_LAUNCH(who_am_i, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr, at<int>(out));
  return errors();
}

std::string run_block_total(unsigned threads, uintptr_t x, uintptr_t out) {
  DSCHAT_LAUNCH(block_total, dim3(1), dim3(threads), 0, nullptr, at<float>(x), at<float>(out));
  return errors();
}

std::string run_shuffles(uintptr_t out) {
  DSCHAT_LAUNCH(shuffles, dim3(1), dim3(32), 0, nullptr, at<int>(out));
  return errors();
}

std::string run_copies(uintptr_t x, uintptr_t out, int valid) {
  DSCHAT_LAUNCH(copies, dim3(1), dim3(64), 0, nullptr, at<float>(x), at<float>(out), valid);
  return errors();
}

std::string run_product(bool half, uintptr_t a, uintptr_t b, uintptr_t d, bool transposed) {
  if (half)
    DSCHAT_LAUNCH(product<f16>, dim3(1), dim3(32), 0, nullptr, at<f16>(a), at<f16>(b), at<float>(d), transposed);
  else
    DSCHAT_LAUNCH(product<bf16>, dim3(1), dim3(32), 0, nullptr, at<bf16>(a), at<bf16>(b), at<float>(d), transposed);
  return errors();
}

std::string run_planted(int bug, unsigned blocks, unsigned threads, size_t shared, uintptr_t x, uintptr_t out, int n) {
  DSCHAT_LAUNCH(planted, dim3(blocks), dim3(threads), shared, nullptr, bug, at<float>(x), at<float>(out), n);
  return errors();
}
