// Stacks to switch between, without the system's help.
#pragma once

// Saves what a call must keep on the stack, leaves the stack pointer at `*from` and goes on where `to` was left.
extern "C" void kvemu_switch(void **from, void *to);
// Goes on where a stack pointer was left; jumped to, with the stack pointer set.
extern "C" void kvemu_resume();

namespace kvemu {
// The stack pointer of a fiber that will begin with `entry`, which never returns; `top` is aligned to 16.
void *fresh_stack(unsigned char *top, void (*entry)());
} // namespace kvemu
