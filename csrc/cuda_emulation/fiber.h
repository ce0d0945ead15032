// A flow of control with a stack of its own, resumed and left by hand. x86-64: a switch of a few instructions; elsewhere
// (or with DSCHAT_EMULATION_UCONTEXT) the ucontext of the C library.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(DSCHAT_EMULATION_UCONTEXT)
#define DSCHAT_EMULATION_UCONTEXT
#endif

#ifdef DSCHAT_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace emulation {

struct Context {
#ifdef DSCHAT_EMULATION_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
};

// Makes `context` begin at entry() on the given stack; entry must never return.
void prepare(Context& context, void* stack, size_t bytes, void (*entry)());

// Saves the present flow in `from` and goes on with `to`.
void switch_to(Context& from, Context& to);

}  // namespace emulation
