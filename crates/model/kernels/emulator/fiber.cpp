// Switching stacks, for x86_64 and aarch64.

#include "fiber.h"

#include <string.h>

namespace kvemu {

#if defined(__x86_64__)
asm(R"(
.text
.globl kvemu_switch
.hidden kvemu_switch
kvemu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
.globl kvemu_resume
.hidden kvemu_resume
kvemu_resume:
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
void *fresh_stack(unsigned char *top, void (*entry)()) {
    auto **sp = (void **)(top - 64);
    memset(sp, 0, 64);
    sp[6] = (void *)entry; // its caller's address would be at sp[7]: there is none
    return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl kvemu_switch
.hidden kvemu_switch
kvemu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
.globl kvemu_resume
.hidden kvemu_resume
kvemu_resume:
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
void *fresh_stack(unsigned char *top, void (*entry)()) {
    auto **sp = (void **)(top - 160);
    memset(sp, 0, 160);
    sp[11] = (void *)entry; // x30
    return sp;
}
#else
#error "fibers are written for x86_64 and aarch64"
#endif

} // namespace kvemu
