#include "cuda_emulation/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulation/checker.h"
#include "cuda_emulation/fiber.h"
#include "cuda_emulation/float16.h"

namespace emulation {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kMaxErrors = 8;
constexpr int kPoison = 0xff;

enum class State { ready, at_collective, at_barrier, done };

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

struct Thread {
  Context context;
  State state;
  Index index;
  int number;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

// A collective that some lanes have reached and others have not. Lanes of one warp may be in several at once, with
// disjoint masks; they are told apart by the lowest lane.
struct Rendezvous {
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  int line = 0;
  void* arguments[kWarp];
  void (*finish)(void**, unsigned) = nullptr;
};

struct Variable {
  const void* key;
  size_t offset, bytes;
};

// The one launch that runs.
struct Launch {
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  int threads = 0, done = 0, waiting = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  size_t dynamic_bytes = 0, static_bytes = 0;
  bool stopped = false;
};

Launch g;
Context scheduler;
Thread* current = nullptr;
std::vector<Thread> threads(kMaxThreads);
std::vector<Rendezvous> rendezvous(kMaxThreads);  // [warp * 32 + lowest lane]
std::vector<Variable> variables;
std::vector<std::string> errors;
std::string taken;
Order order = Order::ascending;
uint64_t order_seed = 0;
alignas(128) char shared[kMaxShared];  // dynamic from the front, static variables behind it
std::mutex one_at_a_time;

char* stacks() {
  static char* memory = [] {
    void* p = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    return static_cast<char*>(p);
  }();
  return memory;
}

void yield() { switch_to(current->context, scheduler); }

void record(const char* format, va_list arguments) {
  if (errors.size() >= kMaxErrors) return;
  char text[500];
  std::vsnprintf(text, sizeof(text), format, arguments);
  std::string message = text;
  if (current) {
    std::snprintf(text, sizeof(text), " [block %u,%u,%u thread %d]", block_index.x, block_index.y, block_index.z,
                  current->number);
    message += text;
  }
  errors.push_back(message);
}

void thread_main() {
  g.body(g.closure);
  if (!current->open.empty() || !current->committed.empty())
    fail("a thread ends with cp.async copies that it never waited for");
  current->state = State::done;
  for (;;) yield();
}

const char* state_name(State s) {
  switch (s) {
    case State::at_collective: return "in a warp collective";
    case State::at_barrier: return "at __syncthreads";
    case State::done: return "at its end";
    default: return "ready";
  }
}

void report_deadlock() {
  int collectives = 0, first = -1;
  for (int i = 0; i < g.threads; ++i) {
    if (threads[size_t(i)].state != State::at_collective) continue;
    ++collectives;
    if (first < 0) first = i;
  }
  std::string where;
  for (int slot = 0; slot < g.threads; ++slot) {
    const Rendezvous& r = rendezvous[size_t(slot)];
    if (!r.arrived || !where.empty()) continue;
    char text[200];
    const int missing = __builtin_ctz(r.mask & ~r.arrived), number = slot / kWarp * kWarp + missing;
    std::snprintf(text, sizeof(text), "; %s at line %d of warp %d waits for lane %d, which is %s", r.name, r.line,
                  slot / kWarp, missing,
                  number < g.threads ? state_name(threads[size_t(number)].state) : "beyond the block");
    where = text;
  }
  current = nullptr;
  fail("deadlock in block %u,%u,%u: %d threads at __syncthreads, %d in a warp collective, %d at their end%s",
       block_index.x, block_index.y, block_index.z, g.waiting, collectives, g.done, where.c_str());
}

void open_barrier() {
  g.waiting = 0;
  checker::next_epoch();
  for (int i = 0; i < g.threads; ++i)
    if (threads[size_t(i)].state == State::at_barrier) threads[size_t(i)].state = State::ready;
}

void start_threads() {
  for (int i = 0; i < g.threads; ++i) {
    Thread& t = threads[size_t(i)];
    t.state = State::ready;
    t.number = i;
    const unsigned n = unsigned(i);
    t.index = {n % block_size.x, n / block_size.x % block_size.y, n / (block_size.x * block_size.y)};
    t.open.clear();
    t.committed.clear();
    prepare(t.context, stacks() + kStack * size_t(i), kStack, thread_main);
  }
}

// False if the launch cannot go on.
bool run_block(std::vector<int>& turns, std::mt19937_64& random) {
  g.done = g.waiting = 0;
  variables.clear();
  g.static_bytes = 0;
  std::memset(shared, kPoison, sizeof(shared));
  checker::start_block(shared, sizeof(shared));
  checker::own_shared(0, g.dynamic_bytes);
  start_threads();
  while (g.done < g.threads) {
    if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
    bool progress = false;
    for (const int i : turns) {
      Thread& t = threads[size_t(i)];
      if (t.state != State::ready) continue;
      progress = true;
      current = &t;
      thread_index = t.index;
      switch_to(scheduler, t.context);
      current = nullptr;
      if (g.stopped) return false;
      g.done += t.state == State::done;
    }
    if (g.waiting && g.waiting == g.threads - g.done) {
      open_barrier();
      progress = true;
    }
    if (!progress) {
      report_deadlock();
      return false;
    }
  }
  checker::end_block();
  return true;
}

}  // namespace

int lane() { return current->number % kWarp; }
int thread_number() { return current->number; }
bool running() { return current != nullptr; }
bool on_thread_stack(const void* address) {
  return size_t(static_cast<const char*>(address) - stacks()) < kStack * kMaxThreads;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format, arguments);
  va_end(arguments);
}

void stop(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format, arguments);
  va_end(arguments);
  g.stopped = true;
  for (;;) yield();
}

void set_order(Order new_order, uint64_t seed) {
  order = new_order;
  order_seed = seed;
}

bool take_error() {
  taken.clear();
  for (const std::string& e : errors) taken += (taken.empty() ? "" : "\n") + e;
  errors.clear();
  return !taken.empty();
}

const char* error_text() { return taken.c_str(); }

void launch(Index grid, Index block, size_t shared_bytes, void (*body)(const void*), const void* closure,
            const char* name) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!errors.empty()) return;
  current = nullptr;
  g = {};
  g.body = body;
  g.closure = closure;
  g.dynamic_bytes = shared_bytes;
  block_size = block;
  grid_size = grid;
  const uint64_t count = uint64_t(block.x) * block.y * block.z;
  if (count < 1 || count > kMaxThreads || block.z > 64)
    fail("a block of %u x %u x %u threads: give 1 to 1024", block.x, block.y, block.z);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("a grid of %u x %u x %u blocks: give 1 to 2147483647 x 65535 x 65535", grid.x, grid.y, grid.z);
  if (shared_bytes > kMaxShared)
    fail("%zu bytes of dynamic shared memory: a block has %zu on every supported GPU", shared_bytes, kMaxShared);
  if (!errors.empty()) return;
  g.threads = int(count);
  std::vector<int> turns(size_t(g.threads));
  for (int i = 0; i < g.threads; ++i) turns[size_t(i)] = order == Order::descending ? g.threads - 1 - i : i;
  std::mt19937_64 random(order_seed);
  std::fill(rendezvous.begin(), rendezvous.end(), Rendezvous());
  checker::start_launch(name);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        if (!run_block(turns, random)) return;
      }
}

// ------------------------------------------------------------------------------------------------ shared memory

void* dynamic_shared() { return shared; }

void* static_shared(const void* key, size_t bytes) {
  for (const Variable& v : variables)
    if (v.key == key) return shared + v.offset;
  // Behind the dynamic part, with a gap that nothing owns, so that the checker sees an index that leaves a variable.
  constexpr size_t kGap = 64;
  const size_t begin = (g.dynamic_bytes + g.static_bytes + kGap + 127) / 128 * 128;
  if (begin + bytes > kMaxShared) stop("%zu bytes of shared memory do not fit beside what is in use", bytes);
  g.static_bytes = begin + bytes - g.dynamic_bytes;
  variables.push_back({key, begin, bytes});
  checker::own_shared(begin, bytes);
  return shared + begin;
}

// ---------------------------------------------------------------------------------------------------- rendezvous

void collective(unsigned mask, const char* name, int line, void* argument, void (*finish)(void**, unsigned)) {
  const int self = lane(), warp = current->number / kWarp;
  if (!(mask >> self & 1)) stop("%s at line %d: the calling lane %d is not in the mask %08x", name, line, self, mask);
  Rendezvous& r = rendezvous[size_t(warp * kWarp + __builtin_ctz(mask))];
  if (!r.arrived) {
    r.mask = mask;
    r.name = name;
    r.line = line;
    r.finish = finish;
  } else if (r.mask != mask || r.finish != finish || r.line != line) {
    stop("diverged warp: %s at line %d with mask %08x meets %s at line %d with mask %08x", name, line, mask, r.name,
         r.line, r.mask);
  }
  r.arguments[self] = argument;
  r.arrived |= 1u << self;
  if (r.arrived != mask) {
    current->state = State::at_collective;
    yield();
    return;
  }
  r.arrived = 0;
  void* arguments[kWarp];  // on a thread's stack, which the checking build leaves alone
  std::copy(std::begin(r.arguments), std::end(r.arguments), arguments);
  finish(arguments, mask);
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) threads[size_t(warp * kWarp + l)].state = State::ready;
}

void barrier(const char* file, int line) {
  if (!g.waiting) {
    g.barrier_file = file;
    g.barrier_line = line;
  } else if (g.barrier_line != line || std::strcmp(g.barrier_file, file)) {
    stop("diverged block: __syncthreads at line %d meets __syncthreads at line %d", line, g.barrier_line);
  }
  ++g.waiting;
  current->state = State::at_barrier;
  yield();
}

void sync_warp(unsigned mask, int line) {
  int nothing = 0;
  collective(mask, "__syncwarp", line, &nothing, [](void**, unsigned m) {
    checker::join_lanes(current->number / kWarp, m);
  });
}

// ----------------------------------------------------------------------------------------------- asynchronous copies

void copy_async(void* to, const void* from, int bytes, int valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16) stop("cp.async of %d bytes: give 4, 8 or 16", bytes);
  if (reinterpret_cast<uintptr_t>(to) % unsigned(bytes) || (valid && reinterpret_cast<uintptr_t>(from) % unsigned(bytes)))
    stop("cp.async of %d bytes: an address is not a multiple of %d", bytes, bytes);
  if (valid) checker::access(from, size_t(valid), checker::kRead, __builtin_return_address(0));
  current->open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, valid});
}

void copy_commit() {
  current->committed.push_back(std::move(current->open));
  current->open.clear();
}

void copy_wait(int pending) {
  auto& groups = current->committed;
  while (int(groups.size()) > pending) {
    for (const Copy& c : groups.front()) {
      checker::access(c.to, size_t(c.bytes), checker::kWrite, __builtin_return_address(0));
      if (c.valid) std::memcpy(c.to, c.from, size_t(c.valid));
      std::memset(c.to + c.valid, 0, size_t(c.bytes - c.valid));
    }
    groups.erase(groups.begin());
  }
}

// ----------------------------------------------------------------------------------------------- matrix instructions

namespace {

float element_value(uint32_t bits, Element type) {
  switch (type) {
    case Element::float16: return float16_value(uint16_t(bits));
    case Element::bfloat16: return bfloat16_value(uint16_t(bits));
    default: return bits_float(bits & 0xffffe000u);
  }
}

struct MmaArguments {
  Element type;
  int depth;
  float* d;
  const uint32_t *a, *b;
};

// A register holds 2 neighbours of 16 bits, or 1 of 32.
void finish_mma(void** arguments, unsigned) {
  static float a[16][16], b[16][8];
  const auto& any = *static_cast<MmaArguments*>(arguments[0]);
  const int packed = any.type == Element::tfloat32 ? 1 : 2, bits = 32 / packed, pieces = any.depth / (4 * packed);
  for (int l = 0; l < kWarp; ++l) {
    const auto& x = *static_cast<MmaArguments*>(arguments[l]);
    for (int piece = 0; piece < pieces; ++piece)
      for (int e = 0; e < packed; ++e) {
        const int k = l % 4 * packed + e + piece * 4 * packed;
        for (int half = 0; half < 2; ++half)
          a[l / 4 + half * 8][k] = element_value(x.a[piece * 2 + half] >> (bits * e), x.type);
        b[k][l / 4] = element_value(x.b[piece] >> (bits * e), x.type);
      }
  }
  for (int l = 0; l < kWarp; ++l) {
    const auto& x = *static_cast<MmaArguments*>(arguments[l]);
    for (int r = 0; r < 4; ++r) {
      const int i = l / 4 + r / 2 * 8, j = l % 4 * 2 + r % 2;
      float sum = 0.0f;
      for (int k = 0; k < x.depth; ++k) sum += a[i][k] * b[k][j];
      x.d[r] += sum;
    }
  }
}

struct MatrixArguments {
  uint32_t* registers;
  char* row;
  int count;
  bool transposed, storing;
};

void finish_matrix(void** arguments, unsigned) {
  for (int l = 0; l < kWarp; ++l) {
    const auto& x = *static_cast<MatrixArguments*>(arguments[l]);
    for (int m = 0; m < x.count; ++m) {
      uint16_t element[2] = {uint16_t(x.registers[m]), uint16_t(x.registers[m] >> 16)};
      for (int e = 0; e < 2; ++e) {
        const int row = x.transposed ? l % 4 * 2 + e : l / 4, column = x.transposed ? l / 4 : l % 4 * 2 + e;
        char* place = static_cast<MatrixArguments*>(arguments[m * 8 + row])->row + 2 * column;
        if (x.storing) std::memcpy(place, &element[e], 2);
        else std::memcpy(&element[e], place, 2);
      }
      x.registers[m] = element[0] | uint32_t(element[1]) << 16;
    }
  }
}

void move_matrix(uint32_t* registers, char* row, int count, bool transposed, bool storing, const void* code) {
  const char* name = storing ? "stmatrix" : "ldmatrix";
  if (lane() < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16) stop("%s: a row is not at a multiple of 16 bytes", name);
    if (row < shared || row + 16 > shared + sizeof(shared)) stop("%s: a row is not in shared memory", name);
    checker::access(row, 16, storing ? checker::kWrite : checker::kRead, code);
  }
  MatrixArguments x{registers, row, count, transposed, storing};
  collective(0xffffffffu, name, transposed, &x, finish_matrix);
}

}  // namespace

void mma(Element type, int depth, float* d, const uint32_t* a, const uint32_t* b) {
  MmaArguments x{type, depth, d, a, b};
  collective(0xffffffffu, "mma", depth, &x, finish_mma);
}

void load_matrix(uint32_t* registers, const void* row, int count, bool transposed) {
  move_matrix(registers, const_cast<char*>(static_cast<const char*>(row)), count, transposed, false,
              __builtin_return_address(0));
}

void store_matrix(const uint32_t* registers, void* row, int count, bool transposed) {
  uint32_t copy[4];
  std::copy(registers, registers + count, copy);
  move_matrix(copy, static_cast<char*>(row), count, transposed, true, __builtin_return_address(0));
}

}  // namespace emulation
