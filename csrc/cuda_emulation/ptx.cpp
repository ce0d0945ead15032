#include "cuda_emulation/ptx.h"

#include <dlfcn.h>

#include <map>

#include "cuda_emulation/checker.h"
#include "cuda_emulation/ptx_launch.h"

namespace emulation::ptx {
namespace {

struct Lane {
  uint32_t value, result;
  int source;
  Reduction reduction;
  bool is_signed;
};

uint32_t shuffle_bits(Shuffle kind, uint32_t value, uint32_t operand, uint32_t clamp, uint32_t mask, bool* inside) {
  // PTX ISA, shfl.sync: segments of lanes, and the last lane that a lane may read.
  const int self = lane(), segment = int(clamp >> 8 & 31), bound = int(clamp & 31), by = int(operand & 31);
  const int last = (self & segment) | (bound & ~segment), first = self & segment;
  int source = self;
  switch (kind) {
    case Shuffle::up: source = self - by, *inside = source >= last; break;
    case Shuffle::down: source = self + by, *inside = source <= last; break;
    case Shuffle::butterfly: source = self ^ by, *inside = source <= last; break;
    case Shuffle::index: source = first | (by & ~segment), *inside = source <= last; break;
  }
  Lane x{value, value, *inside ? source : self, Reduction::add, false};
  collective(mask, "shfl.sync", int(kind), &x, [](void** lanes, unsigned m) {
    for (int l = 0; l < kWarp; ++l) {
      if (!(m >> l & 1)) continue;
      Lane& self = *static_cast<Lane*>(lanes[l]);
      if (m >> self.source & 1) self.result = static_cast<Lane*>(lanes[self.source])->value;
      else fail("shfl.sync: lane %d reads lane %d, which is not in the mask %08x", l, self.source, m);
    }
  });
  return x.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  Lane x{predicate, 0, 0, Reduction::add, false};
  collective(mask, "vote.sync", 0, &x, [](void** lanes, unsigned m) {
    uint32_t votes = 0;
    for (int l = 0; l < kWarp; ++l)
      if (m >> l & 1) votes |= static_cast<Lane*>(lanes[l])->value << l;
    for (int l = 0; l < kWarp; ++l)
      if (m >> l & 1) static_cast<Lane*>(lanes[l])->result = votes;
  });
  return x.result;
}

uint32_t combined(Reduction kind, bool is_signed, uint32_t a, uint32_t b) {
  const bool less = is_signed ? int32_t(a) < int32_t(b) : a < b;
  switch (kind) {
    case Reduction::add: return a + b;
    case Reduction::min: return less ? a : b;
    case Reduction::max: return less ? b : a;
    case Reduction::bit_and: return a & b;
    case Reduction::bit_or: return a | b;
    default: return a ^ b;
  }
}

uint32_t reduce(Reduction kind, bool is_signed, uint32_t value, uint32_t mask) {
  Lane x{value, 0, 0, kind, is_signed};
  collective(mask, "redux.sync", int(kind), &x, [](void** lanes, unsigned m) {
    const int first = __builtin_ctz(m);
    Lane& leader = *static_cast<Lane*>(lanes[first]);
    uint32_t total = leader.value;
    for (int l = first + 1; l < kWarp; ++l)
      if (m >> l & 1) total = combined(leader.reduction, leader.is_signed, total, static_cast<Lane*>(lanes[l])->value);
    for (int l = 0; l < kWarp; ++l)
      if (m >> l & 1) static_cast<Lane*>(lanes[l])->result = total;
  });
  return x.result;
}

#ifdef DSCHAT_EMULATION_CHECK
void access(const void* address, size_t bytes, bool write, int line) {
  checker::access(address, bytes, write ? checker::kWrite : checker::kRead, reinterpret_cast<const void*>(intptr_t(line)));
}
#else
constexpr auto access = nullptr;
#endif

const Host host{
    &thread_index,
    &block_index,
    &block_size,
    &grid_size,
    lane,
    thread_number,
    stop,
    [] { emulation::barrier("PTX", 0); },
    [](unsigned mask) { sync_warp(mask, 0); },
    shuffle_bits,
    ballot,
    reduce,
    emulation::copy_async,
    emulation::copy_commit,
    emulation::copy_wait,
    emulation::mma,
    emulation::load_matrix,
    emulation::store_matrix,
    access,
};

const Kernel* library(const std::string& path) {
  static std::map<std::string, const Kernel*> known;
  const auto found = known.find(path);
  if (found != known.end()) return found->second;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const auto* kernel = handle ? static_cast<const Kernel*>(dlsym(handle, "dschat_ptx_kernel")) : nullptr;
  if (!kernel) fail("%s cannot be loaded: %s", path.c_str(), dlerror());
  else known[path] = kernel;
  return kernel;
}

Resolver resolve;
std::map<const void*, std::string> resolved;

}  // namespace

void launch_library(const std::string& path, Index grid, Index block, size_t dynamic_bytes,
                    const std::vector<unsigned char>& parameters) {
  const Kernel* kernel = library(path);
  if (!kernel) return;
  if (parameters.size() != kernel->parameter_bytes) {
    fail("%s takes %u bytes of parameters, not %zu", kernel->name, kernel->parameter_bytes, parameters.size());
    return;
  }
  const uint32_t shared_bytes = uint32_t(kernel->shared_bytes + dynamic_bytes);
  emulation::launch(grid, block, shared_bytes, [&] {
    kernel->run(host, parameters.data(), static_cast<char*>(dynamic_shared()), shared_bytes);
  });
}

void set_resolver(Resolver resolver) {
  resolve = std::move(resolver);
  resolved.clear();
}

void launch_function(const void* function, Index grid, Index block, size_t dynamic_bytes,
                     const std::vector<unsigned char>& parameters) {
  auto found = resolved.find(function);
  if (found == resolved.end()) {
    Dl_info info;
    if (!resolve || !dladdr(function, &info)) {
      fail("nobody knows the compiled code of a kernel");
      return;
    }
    const auto offset = uintptr_t(static_cast<const char*>(function) - static_cast<const char*>(info.dli_fbase));
    found = resolved.emplace(function, resolve(offset)).first;
  }
  launch_library(found->second, grid, block, dynamic_bytes, parameters);
}

}  // namespace emulation::ptx
