// What the checking build sees: every load and store of a kernel, in global and shared memory. Compiled with
// DSCHAT_EMULATION_CHECK, and kernels with -fsanitize=thread,alignment,bounds, whose calls end in checker.cpp and not in
// a sanitizer's library. In other builds nothing of this does anything.
//
// An error: a race (two accesses of which one writes, by threads that no barrier, no __syncwarp and no launch has
// ordered, whatever came out of it), an access outside of every known buffer or shared variable, a read of memory that
// nobody has written, a write to an input, an access that is not aligned to its type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace emulation::checker {

constexpr int kRead = 0, kWrite = 1;

// What the accesses of launches cost a GPU.
struct Traffic {
  uint64_t bytes_read = 0, bytes_written = 0;  // global memory, every lane's access counted
  // Warp instructions on global memory: the 32-byte sectors they touch, and the bytes in them that they use.
  uint64_t requests = 0, sectors = 0, used_bytes = 0;
  uint64_t once_bytes = 0;   // read and written, each byte once a launch
  uint64_t moved_bytes = 0;  // ... and once a block, whose cache keeps what it reads again
  // Warp instructions on shared memory, and the passes that bank conflicts make of them.
  uint64_t shared_requests = 0, shared_passes = 0, worst_passes = 0;
};

#ifdef DSCHAT_EMULATION_CHECK
void start_launch(const char* name);
void start_block(const char* shared, size_t bytes);
void end_block();
void own_shared(size_t offset, size_t bytes);
void next_epoch();
void join_lanes(int warp, unsigned mask);
void access(const void* address, size_t bytes, int kind, const void* code);

// Buffers that kernels may use; name and place appear in messages. Added again, a buffer keeps what kernels have written
// in it; `initialised`: others have written the rest.
void add_buffer(const void* address, size_t bytes, const char* name, bool initialised, bool read_only);
void reset();  // forgets buffers and traffic
void reset_traffic();
Traffic traffic();  // of all launches since reset() or reset_traffic()
std::vector<std::pair<std::string, Traffic>> traffic_by_launch();
#else
inline void start_launch(const char*) {}
inline void start_block(const char*, size_t) {}
inline void end_block() {}
inline void own_shared(size_t, size_t) {}
inline void next_epoch() {}
inline void join_lanes(int, unsigned) {}
inline void access(const void*, size_t, int, const void*) {}
#endif

}  // namespace emulation::checker
