#include "cuda_emulation/checker.h"

#ifdef DSCHAT_EMULATION_CHECK

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cuda_emulation/runtime.h"

namespace emulation::checker {
namespace {

// When, and by whom. Epochs count the block's barriers, clocks the thread's __syncwarps.
struct Event {
  int32_t block = -1, thread = -1;
  uint32_t epoch = 0, clock = 0;
};

struct Byte {
  Event write, read;      // the last of each in this launch; block -1: none
  const void* writer = nullptr;  // code of `write`
  bool several = false;   // more threads than `read` have read since the last write or barrier
  bool strangers = false; // ... of other warps or blocks
  bool was_read = false, was_written = false;  // in this launch
  bool initialised = false;
  bool owned = true;
};

struct Buffer {
  uintptr_t begin;
  std::string name;
  bool read_only;
  std::vector<Byte> bytes;
};

struct Access {
  const void* code;
  uint32_t occurrence;
  int thread;
  uintptr_t address;
  uint32_t bytes;
  bool shared, write;
};

std::vector<Buffer> buffers;
std::vector<Byte> shared_bytes;
size_t shared_used = 0;  // end of the last variable of the block
uintptr_t shared_begin = 0;
uint32_t epoch = 0;
uint32_t clocks[kMaxThreads][kWarp];  // what each thread knows of the clocks of its warp
std::vector<Access> trace;
std::map<std::tuple<const void*, int>, uint32_t> occurrences;
std::vector<std::pair<std::string, Traffic>> launches;  // since reset_traffic()

int block_number() {
  return int(block_index.x + grid_size.x * (block_index.y + grid_size.y * block_index.z));
}

// Whether the event happened before what the present thread does now.
bool ordered(const Event& e, bool global) {
  const int self = thread_number();
  if (global && e.block != block_number()) return false;  // nothing orders the blocks of a launch
  if (e.thread == self || e.epoch != epoch) return true;
  return e.thread / kWarp == self / kWarp && clocks[self][e.thread % kWarp] >= e.clock;
}

// Translated PTX says the line in place of an address.
bool is_ptx_line(const void* code) { return reinterpret_cast<uintptr_t>(code) < 1u << 24; }

// Whether the last write is another lane's of the same instruction: Triton lets all lanes that have a value store it, and
// the hardware lets one of them. In source it is a race, as nothing says that the values are the same.
bool same_store(const Byte& b, const void* code) {
  return is_ptx_line(code) && b.writer == code && b.write.block == block_number() && b.write.epoch == epoch &&
         b.write.thread / kWarp == thread_number() / kWarp;
}

// Of several readers only the last is known by name: all of the warp must be behind its clock.
bool all_ordered(const Byte& b, bool global) {
  if (!ordered(b.read, global)) return false;
  if (!b.several || b.read.epoch != epoch) return true;
  if (b.strangers || b.read.thread / kWarp != thread_number() / kWarp) return false;
  const uint32_t* known = clocks[thread_number()];
  return std::all_of(known, known + kWarp, [&](uint32_t c) { return c >= b.read.clock; });
}

std::string place(const void* code) {
  Dl_info info;
  char text[64];
  if (is_ptx_line(code)) return "line " + std::to_string(reinterpret_cast<uintptr_t>(code)) + " of the PTX";
  if (!dladdr(code, &info)) return "?";
  std::snprintf(text, sizeof(text), "code +0x%zx", size_t(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)));
  return text;
}

// One byte; false if an error was reported.
bool check_byte(Byte& b, int kind, bool global, const std::string& name, size_t offset, const void* code) {
  const Event now{block_number(), thread_number(), epoch, clocks[thread_number()][lane()]};
  const char* what = kind == kWrite ? "write to" : "read of";
  const bool one_store = kind == kWrite && same_store(b, code);
  if (b.write.block >= 0 && !one_store && !ordered(b.write, global)) {
    fail("race: %s %s+%zu and a write by thread %d of block %d, which nothing orders (%s)", what, name.c_str(), offset,
         b.write.thread, b.write.block, place(code).c_str());
    return false;
  }
  if (kind == kWrite) {
    if (b.read.block >= 0 && !all_ordered(b, global)) {
      fail("race: write to %s+%zu and a read by thread %d of block %d, which nothing orders (%s)", name.c_str(), offset,
           b.read.thread, b.read.block, place(code).c_str());
      return false;
    }
    b.write = now;
    b.writer = code;
    b.read = {};
    b.several = b.strangers = false;
    b.initialised = true;
    return true;
  }
  if (!b.initialised) {
    fail("uninitialised: read of %s+%zu, which nobody has written (%s)", name.c_str(), offset, place(code).c_str());
    b.initialised = true;
    return false;
  }
  const bool earlier = b.read.block >= 0 && (b.read.block != now.block || b.read.epoch == epoch);
  const bool another = earlier && (b.read.block != now.block || b.read.thread != now.thread);
  b.strangers = earlier && (b.strangers || b.read.block != now.block || b.read.thread / kWarp != now.thread / kWarp);
  b.several = earlier && (b.several || another);
  const uint32_t clock = b.several ? std::max(b.read.clock, now.clock) : now.clock;
  b.read = now;
  b.read.clock = clock;
  return true;
}

bool in_image(uintptr_t a) {
  static const std::vector<std::pair<uintptr_t, uintptr_t>> segments = [] {
    std::vector<std::pair<uintptr_t, uintptr_t>> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          for (int k = 0; k < info->dlpi_phnum; ++k) {
            const auto& h = info->dlpi_phdr[k];
            if (h.p_type == PT_LOAD)
              static_cast<decltype(found)*>(out)->push_back({info->dlpi_addr + h.p_vaddr, info->dlpi_addr + h.p_vaddr + h.p_memsz});
          }
          return 0;
        },
        &found);
    return found;
  }();
  return std::any_of(segments.begin(), segments.end(), [&](auto& s) { return a >= s.first && a < s.second; });
}

// The stack of the thread that launched: arguments of the kernel lie there.
uintptr_t host_stack = 0;
size_t host_stack_bytes = 0;

void find_host_stack() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &host_stack_bytes);
  pthread_attr_destroy(&attributes);
  host_stack = reinterpret_cast<uintptr_t>(begin);
}

void note(const void* code, uintptr_t address, size_t bytes, bool shared, bool write) {
  const uint32_t occurrence = occurrences[{code, thread_number()}]++;
  trace.push_back({code, occurrence, thread_number(), address, uint32_t(bytes), shared, write});
}

// One warp instruction: its lanes' accesses.
void count_request(const std::vector<const Access*>& lanes, Traffic& total) {
  const uint32_t bytes = lanes[0]->bytes;
  if (!lanes[0]->shared) {
    std::set<uintptr_t> sectors, used;
    for (const Access* a : lanes)
      for (uintptr_t p = a->address; p < a->address + a->bytes; ++p) {
        sectors.insert(p / 32);
        used.insert(p);
      }
    ++total.requests;
    total.sectors += sectors.size();
    total.used_bytes += used.size();
    return;
  }
  // 128 bytes go out at a time: 8-byte accesses in two halves, 16-byte accesses in four quarters.
  const size_t group = bytes > 4 ? size_t(128 / bytes) : size_t(kWarp);
  std::map<size_t, std::map<uintptr_t, std::set<uintptr_t>>> groups;  // words by bank
  for (const Access* a : lanes) {
    auto& words = groups[size_t(a->thread % kWarp) / group];
    for (uintptr_t w = a->address / 4; w <= (a->address + bytes - 1) / 4; ++w) words[w % 32].insert(w);
  }
  size_t passes = 0;
  for (const auto& words : groups) {
    size_t worst = 0;
    for (const auto& bank : words.second) worst = std::max(worst, bank.second.size());
    passes += worst;
  }
  const uint64_t mean = (passes + groups.size() - 1) / groups.size();  // 1 where nothing conflicts
  ++total.shared_requests;
  total.shared_passes += mean;
  total.worst_passes = std::max(total.worst_passes, mean);
}

void out_of_bounds(uintptr_t a, size_t bytes, int kind, const void* code) {
  const Buffer* near = nullptr;
  int64_t best = 0;
  for (const Buffer& b : buffers) {
    const int64_t before = int64_t(b.begin - a), after = int64_t(a - b.begin) - int64_t(b.bytes.size());
    const int64_t distance = std::max<int64_t>({before, after, 0});
    if (!near || distance < best) near = &b, best = distance;
  }
  stop("out of bounds: %zu-byte %s at %s%+lld, a buffer of %zu bytes (%s)", bytes, kind == kWrite ? "write" : "read",
       near ? near->name.c_str() : "?", near ? (long long)(a - near->begin) : 0ll, near ? near->bytes.size() : size_t(0),
       place(code).c_str());
}

}  // namespace

void start_launch(const char* name) {
  find_host_stack();
  launches.push_back({name, {}});
  for (Buffer& b : buffers)
    for (Byte& byte : b.bytes) {
      const bool initialised = byte.initialised;
      byte = {};
      byte.initialised = initialised;
    }
}

void start_block(const char* shared, size_t bytes) {
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  Byte foreign;
  foreign.owned = false;
  shared_bytes.resize(bytes, foreign);
  std::fill(shared_bytes.begin(), shared_bytes.begin() + std::ptrdiff_t(shared_used), foreign);
  shared_used = 0;
  epoch = 0;
  for (auto& known : clocks) std::fill(std::begin(known), std::end(known), 0u);
  for (int t = 0; t < kMaxThreads; ++t) clocks[t][t % kWarp] = 1;
}

void end_block() {
  std::map<std::tuple<const void*, uint32_t, int>, std::vector<const Access*>> requests;
  for (const Access& a : trace) requests[{a.code, a.occurrence, a.thread / kWarp}].push_back(&a);
  Traffic& total = launches.back().second;
  for (const auto& r : requests) count_request(r.second, total);
  for (const bool write : {false, true}) {
    std::vector<uintptr_t> bytes;
    for (const Access& a : trace)
      for (uintptr_t p = a.address; !a.shared && a.write == write && p < a.address + a.bytes; ++p) bytes.push_back(p);
    std::sort(bytes.begin(), bytes.end());
    total.moved_bytes += uint64_t(std::unique(bytes.begin(), bytes.end()) - bytes.begin());
  }
  trace.clear();
  occurrences.clear();
}

void own_shared(size_t offset, size_t bytes) {
  for (size_t i = offset; i < offset + bytes; ++i) shared_bytes[i].owned = true;
  shared_used = std::max(shared_used, offset + bytes);
}

void next_epoch() { ++epoch; }

void join_lanes(int warp, unsigned mask) {
  uint32_t newest[kWarp] = {};
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1)
      for (int k = 0; k < kWarp; ++k) newest[k] = std::max(newest[k], clocks[warp * kWarp + l][k]);
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    std::copy(newest, newest + kWarp, clocks[warp * kWarp + l]);
    ++clocks[warp * kWarp + l][l];
  }
}

void access(const void* address, size_t bytes, int kind, const void* code) {
  if (!running()) return;
  const auto a = reinterpret_cast<uintptr_t>(address);
  if (on_thread_stack(address)) return;
  if (a - shared_begin < shared_bytes.size()) {
    note(code, a, bytes, true, kind == kWrite);
    for (size_t i = a - shared_begin; i < a - shared_begin + bytes; ++i) {
      if (i >= shared_bytes.size() || !shared_bytes[i].owned)
        stop("out of bounds: %zu-byte %s of shared memory at offset %zu, where no variable lies (%s)", bytes,
             kind == kWrite ? "write" : "read", size_t(a - shared_begin), place(code).c_str());
      if (!check_byte(shared_bytes[i], kind, false, "shared memory", i, code)) return;
    }
    return;
  }
  for (Buffer& b : buffers) {
    if (a < b.begin || a + bytes > b.begin + b.bytes.size()) continue;
    note(code, a, bytes, false, kind == kWrite);
    Traffic& total = launches.back().second;
    (kind == kWrite ? total.bytes_written : total.bytes_read) += bytes;
    if (kind == kWrite && b.read_only) {
      stop("read-only: write to %s+%zu (%s)", b.name.c_str(), size_t(a - b.begin), place(code).c_str());
    }
    for (size_t i = a - b.begin; i < a - b.begin + bytes; ++i) {
      bool& before = kind == kWrite ? b.bytes[i].was_written : b.bytes[i].was_read;
      total.once_bytes += !before;
      before = true;
      if (!check_byte(b.bytes[i], kind, true, b.name, i, code)) return;
    }
    return;
  }
  if (a - host_stack < host_stack_bytes || in_image(a)) return;
  out_of_bounds(a, bytes, kind, code);
}

void add_buffer(const void* address, size_t bytes, const char* name, bool initialised, bool read_only) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  auto found = std::find_if(buffers.begin(), buffers.end(),
                            [&](const Buffer& b) { return b.begin == begin && b.bytes.size() == bytes; });
  if (found == buffers.end()) found = buffers.insert(found, {begin, name, read_only, std::vector<Byte>(bytes)});
  found->read_only = read_only;
  if (initialised)
    for (Byte& byte : found->bytes) byte.initialised = true;
}

void reset() {
  buffers.clear();
  reset_traffic();
}

void reset_traffic() { launches.clear(); }

std::vector<std::pair<std::string, Traffic>> traffic_by_launch() { return launches; }

Traffic traffic() {
  Traffic total;
  for (const auto& launch : launches) {
    const Traffic& t = launch.second;
    total.bytes_read += t.bytes_read;
    total.bytes_written += t.bytes_written;
    total.requests += t.requests;
    total.sectors += t.sectors;
    total.used_bytes += t.used_bytes;
    total.once_bytes += t.once_bytes;
    total.moved_bytes += t.moved_bytes;
    total.shared_requests += t.shared_requests;
    total.shared_passes += t.shared_passes;
    total.worst_passes = std::max(total.worst_passes, t.worst_passes);
  }
  return total;
}

}  // namespace emulation::checker

// -------------------------------------------------------------------- what -fsanitize=thread,alignment,bounds calls

namespace checker = emulation::checker;

extern "C" {

#define DSCHAT_CODE __builtin_return_address(0)
#define DSCHAT_ACCESS(n)                                                                                        \
  void __tsan_read##n(void* p) { checker::access(p, n, checker::kRead, DSCHAT_CODE); }                          \
  void __tsan_write##n(void* p) { checker::access(p, n, checker::kWrite, DSCHAT_CODE); }                        \
  void __tsan_unaligned_read##n(void* p) { checker::access(p, n, checker::kRead, DSCHAT_CODE); }                \
  void __tsan_unaligned_write##n(void* p) { checker::access(p, n, checker::kWrite, DSCHAT_CODE); }
DSCHAT_ACCESS(1)
DSCHAT_ACCESS(2)
DSCHAT_ACCESS(4)
DSCHAT_ACCESS(8)
DSCHAT_ACCESS(16)
void __tsan_read_range(void* p, size_t n) { checker::access(p, n, checker::kRead, DSCHAT_CODE); }
void __tsan_write_range(void* p, size_t n) { checker::access(p, n, checker::kWrite, DSCHAT_CODE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// The layouts are those of the sanitizer's interface: a place in the source, the type, log2 of its alignment.
struct SourcePlace {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourcePlace place;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t p) {
  emulation::stop("misaligned: an address that is no multiple of %d at line %u of %s", 1 << data->log_alignment,
                  data->place.line, data->place.file);
  (void)p;
}
void __ubsan_handle_out_of_bounds(SourcePlace* place, uintptr_t index) {
  emulation::stop("out of bounds: index %zd at line %u of %s", ssize_t(index), place->line, place->file);
}

}  // extern "C"

#endif
