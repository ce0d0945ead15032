// Per-thread working memory that grows to the largest request and is reused by every kernel call.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace dschat {

// 64-byte aligned memory of at least `bytes`; valid until the same thread asks the same slot again.
// Slots keep kernels that call each other from sharing a buffer.
inline void* scratch(int slot, size_t bytes) {
  constexpr int kSlots = 8;
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[kSlots];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    std::free(b.data);
    b.data = nullptr;
    b.size = 0;
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(64, rounded);
    if (!b.data) throw std::bad_alloc();
    b.size = rounded;
  }
  return b.data;
}

// Who uses which slot.
enum ScratchSlot : int { kScratchGemm = 0, kScratchAttention = 1, kScratchLogprobs = 2, kScratchPack = 3, kScratchSample = 4, kScratchWiden = 5 };

}  // namespace dschat
