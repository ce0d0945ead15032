// Runs the threads of a CUDA block on one CPU thread: each is a fiber, warps and barriers are real rendezvous.
//
// Blocks run one after the other. Shared memory is poisoned before every block (every byte 0xff: a NaN), a cp.async copy
// happens only at the wait that guarantees it, and threads take turns in one of three orders. What a GPU would punish
// by a hang or by garbage is reported as an error of the launch: collectives that diverge, threads that wait for ever,
// misaligned copies, too much shared memory. One launch at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

enum class Order : int { ascending = 0, descending = 1, random = 2 };

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 99 * 1024;  // what every GPU from sm_80 on gives a block

// ---- what a thread sees of itself

extern Index thread_index, block_index, block_size, grid_size;
int lane();
int thread_number();
bool running();                               // a kernel's thread calls
bool on_thread_stack(const void* address);    // of any thread of the block

// ---- launches

// Runs body(closure) in every thread of every block. After a launch that failed nothing runs until take_error(). `name`
// is what name_of says of the kernel.
void launch(Index grid, Index block, size_t shared_bytes, void (*body)(const void*), const void* closure,
            const char* name);

template <typename F> void launch(Index grid, Index block, size_t shared_bytes, const F& f, const char* name = "") {
  launch(grid, block, shared_bytes, [](const void* p) { (*static_cast<const F*>(p))(); }, &f, name);
}

// A text of the compiler's that has the kernel's name and template arguments.
template <auto kernel> const char* name_of() { return __PRETTY_FUNCTION__; }

void set_order(Order order, uint64_t seed);
bool take_error();         // whether a launch failed since the last call
const char* error_text();  // of the errors that were taken last, one a line

// Records an error of this launch; the first few are kept. `stop` leaves the launch before anything else runs.
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- shared memory

// The block's memory for one __shared__ variable, which `key` identifies; the same for all its threads.
void* static_shared(const void* key, size_t bytes);
void* dynamic_shared();

// ---- rendezvous

// Every lane of `mask` brings `argument`; the last one to come runs finish(arguments by lane, mask) for all.
void collective(unsigned mask, const char* name, int line, void* argument, void (*finish)(void**, unsigned));
void barrier(const char* file, int line);
void sync_warp(unsigned mask, int line);

// ---- asynchronous copies

void copy_async(void* shared, const void* global, int bytes, int valid);  // bytes beyond `valid` become 0
void copy_commit();
void copy_wait(int pending);

// ---- matrix instructions (layouts: PTX ISA, mma.m16n8k*, ldmatrix and stmatrix)

enum class Element : int { float16, bfloat16, tfloat32 };

// d[16 x 8] += a[16 x depth] b[depth x 8]; depth 8 or 16, tfloat32: 4 or 8.
void mma(Element type, int depth, float* d, const uint32_t* a, const uint32_t* b);
void load_matrix(uint32_t* registers, const void* row, int count, bool transposed);
void store_matrix(const uint32_t* registers, void* row, int count, bool transposed);

}  // namespace emulation
