// Launches of kernels that were compiled to PTX and translated (see ptx.h), in place of the source's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda_emulation/runtime.h"

namespace emulation::ptx {

// A translated kernel's library, once. Failing, an error of the launch.
void launch_library(const std::string& path, Index grid, Index block, size_t dynamic_bytes,
                    const std::vector<unsigned char>& parameters);

// Says where the library of a kernel is, whose host function begins that far behind the module's first byte.
using Resolver = std::function<std::string(uintptr_t offset)>;
void set_resolver(Resolver resolver);
void launch_function(const void* function, Index grid, Index block, size_t dynamic_bytes,
                     const std::vector<unsigned char>& parameters);

template <typename T> void append(std::vector<unsigned char>& bytes, const T& value) {
  bytes.resize((bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T) + sizeof(T));
  std::memcpy(bytes.data() + bytes.size() - sizeof(T), &value, sizeof(T));
}

// kernel<<<grid, block, dynamic_bytes>>>(arguments...)
template <typename... P, typename... A>
void launch(void (*kernel)(P...), Index grid, Index block, size_t dynamic_bytes, const A&... arguments) {
  std::vector<unsigned char> parameters;
  (append<P>(parameters, static_cast<P>(arguments)), ...);
  launch_function(reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes, parameters);
}

}  // namespace emulation::ptx
