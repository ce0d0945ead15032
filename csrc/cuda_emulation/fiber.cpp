#include "cuda_emulation/fiber.h"

#include <cstdint>

namespace emulation {

#ifdef DSCHAT_EMULATION_UCONTEXT

void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

// Keeps what the calling convention says a function keeps: six registers and the stack.
extern "C" __attribute__((visibility("hidden"))) void dschat_emulation_switch(void** from, void* to);
asm(R"(.text
.globl dschat_emulation_switch
.hidden dschat_emulation_switch
.type dschat_emulation_switch, @function
dschat_emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size dschat_emulation_switch, .-dschat_emulation_switch
)");

void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  // At entry the stack pointer is 8 below a multiple of 16, as after a call.
  auto top = reinterpret_cast<uintptr_t>(stack) + bytes;
  void** sp = reinterpret_cast<void**>(top & ~uintptr_t(15));
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context.stack_pointer = sp;
}

void switch_to(Context& from, Context& to) { dschat_emulation_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace emulation
