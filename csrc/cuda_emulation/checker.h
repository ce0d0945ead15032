// What the checking build sees: every load and store of a kernel, in global and shared memory. In other builds
// (without DSCHAT_EMULATION_CHECK) nothing of this does anything.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation::checker {

constexpr int kRead = 0, kWrite = 1;

#ifdef DSCHAT_EMULATION_CHECK
void start_launch();
void start_block(const char* shared, size_t bytes);
void own_shared(size_t offset, size_t bytes);
void next_epoch();
void join_lanes(int warp, unsigned mask);
void access(const void* address, size_t bytes, int kind, const void* code);
#else
inline void start_launch() {}
inline void start_block(const char*, size_t) {}
inline void own_shared(size_t, size_t) {}
inline void next_epoch() {}
inline void join_lanes(int, unsigned) {}
inline void access(const void*, size_t, int, const void*) {}
#endif

}  // namespace emulation::checker
