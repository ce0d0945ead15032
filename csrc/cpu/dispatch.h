// From a dtype known at run time to a template: dispatch(type, [&](auto t) { kernel<decltype(t)>(...); }).
#pragma once

#include "simd.h"

namespace dschat {

template <typename F> inline void dispatch(DType type, F&& f) {
  if (type == DType::bf16) f(bf16{});
  else f(float{});
}

}  // namespace dschat
