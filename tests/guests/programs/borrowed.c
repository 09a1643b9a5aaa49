// A process whose main thread waits in system calls, as that of QEMU does, and knows all that it has: whoever borrows
// the thread and gives anything back wrong is found out.
//
//   borrowed ppoll|poll|nanosleep [NUMBER [beside]]   goes round until its standard input ends; a line each round
//   borrowed long NUMBER                              sleeps for an hour
//   borrowed vfork                                    first hangs where no signal reaches it, until that end
//
// With NUMBER the file of that descriptor is mapped to be executed first; the first line says where. With "beside"
// memory of its own is close behind it.
//
// Before each call all registers that a system call keeps are given a known content: general, vector, floating-point
// control. Afterwards they are compared; so are the signal mask and the signal stack. A call gives EINTR only after a signal.

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct state {
    uint64_t general[13];      // rbx rbp rdi rsi rdx r8 r9 r10 r12 r13 r14 r15, flags
    unsigned char vector[512]; // ymm0 to ymm15
    uint32_t mxcsr;
    uint16_t control;
} __attribute__((aligned(64)));

long call_with(long number, struct state *given, struct state *found);

asm(".text\n"
    "call_with:\n"
    "  push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "  sub $24, %rsp\n"
    "  stmxcsr 16(%rsp)\n"
    "  fnstcw 20(%rsp)\n"
    "  mov %rdx, (%rsp)\n" // found
    "  mov %rdi, 8(%rsp)\n" // number
    "  mov %rsi, %rax\n"
    "  ldmxcsr 616(%rax)\n"
    "  fldcw 620(%rax)\n"
    "  .set i, 0\n"
    "  .altmacro\n"
    "  .macro load n\n vmovdqu 104+32*\\n(%rax), %ymm\\n\n .endm\n"
    "  .macro save n\n vmovdqu %ymm\\n, 104+32*\\n(%rcx)\n .endm\n"
    "  .rept 16\n load %i\n .set i, i+1\n .endr\n"
    "  mov (%rax), %rbx; mov 8(%rax), %rbp; mov 16(%rax), %rdi; mov 24(%rax), %rsi; mov 32(%rax), %rdx\n"
    "  mov 40(%rax), %r8; mov 48(%rax), %r9; mov 56(%rax), %r10; mov 64(%rax), %r12; mov 72(%rax), %r13\n"
    "  mov 80(%rax), %r14; mov 88(%rax), %r15\n"
    "  mov 8(%rsp), %rax\n"
    "  stc\n"
    "  syscall\n"
    "  mov (%rsp), %rcx\n"
    "  mov %rbx, (%rcx); mov %rbp, 8(%rcx); mov %rdi, 16(%rcx); mov %rsi, 24(%rcx); mov %rdx, 32(%rcx)\n"
    "  mov %r8, 40(%rcx); mov %r9, 48(%rcx); mov %r10, 56(%rcx); mov %r12, 64(%rcx); mov %r13, 72(%rcx)\n"
    "  mov %r14, 80(%rcx); mov %r15, 88(%rcx)\n"
    "  pushf\n"
    "  pop 96(%rcx)\n"
    "  .set i, 0\n"
    "  .rept 16\n save %i\n .set i, i+1\n .endr\n"
    "  stmxcsr 616(%rcx)\n"
    "  fnstcw 620(%rcx)\n"
    "  ldmxcsr 16(%rsp)\n"
    "  fldcw 20(%rsp)\n"
    "  add $24, %rsp\n"
    "  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
    "  vzeroupper\n"
    "  ret\n");

static int wrong(const char *what, long value) {
    printf("wrong %s %ld\n", what, value);
    fflush(stdout);
    return 1;
}

static volatile sig_atomic_t signals;

static void on_signal(int number) { signals += number != 0; }

int main(int argc, char **argv) {
    if (argc < 2)
        return 2;
    if (argc >= 3) {
        char *place = (char *)0x10000000000;
        printf("%p\n", mmap(place, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, atoi(argv[2]), 0));
        if (argc == 4 && mmap(place + 0x3000, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED)
            return 2;
        fflush(stdout);
    }
    if (!strcmp(argv[1], "vfork") && vfork() == 0) {
        static const char line[] = "hangs\n";
        char byte;
        if (write(1, line, sizeof line - 1) < 0)
            _exit(1);
        while (read(0, &byte, 1) > 0)
            ;
        _exit(0);
    }
    _Static_assert(sizeof(((struct state *)0)->general) == 104, "offset of the vectors");
    static unsigned char signal_stack[1 << 16];
    stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack}, stack_now;
    sigset_t mask, mask_now;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigaddset(&mask, SIGRTMIN + 3);
    signal(SIGUSR2, on_signal);
    if (sigaltstack(&stack, NULL) || sigprocmask(SIG_SETMASK, &mask, NULL))
        return 2;
    for (long round = 0;; round++) {
        static struct state given, found;
        struct pollfd input = {.fd = 0, .events = 0};
        struct timespec time = {.tv_nsec = 20 * 1000 * 1000}, rest;
        uint64_t other_mask = 0x5500; // of the ppoll only
        int before = signals;
        memset(&found, 0, sizeof found);
        for (unsigned i = 0; i < sizeof given.vector; i++)
            given.vector[i] = (unsigned char)(i * 7 + (unsigned)round);
        for (unsigned i = 0; i < 13; i++)
            given.general[i] = 0x1111111111111111u * (i + 1) + (uint64_t)round;
        given.mxcsr = 0x1fa0 + 0x4000; // rounds up, has seen an inexact result
        given.control = 0x0a7f;
        long number;
        if (!strcmp(argv[1], "ppoll")) {
            number = SYS_ppoll;
            given.general[2] = (uint64_t)&input, given.general[3] = 1, given.general[4] = (uint64_t)&time;
            given.general[7] = (uint64_t)&other_mask, given.general[5] = sizeof other_mask;
        } else if (!strcmp(argv[1], "poll")) {
            number = SYS_poll;
            given.general[2] = (uint64_t)&input, given.general[3] = 1, given.general[4] = 20;
        } else {
            number = SYS_nanosleep;
            if (!strcmp(argv[1], "long"))
                time.tv_sec = 3600;
            given.general[2] = (uint64_t)&time, given.general[3] = (uint64_t)&rest;
        }
        long result = call_with(number, &given, &found);
        for (unsigned i = 0; i < 12; i++)
            if (given.general[i] != found.general[i])
                return wrong("register", i);
        if (!(found.general[12] & 1))
            return wrong("flags", (long)found.general[12]);
        if (memcmp(given.vector, found.vector, sizeof given.vector))
            return wrong("vector", 0);
        if (given.mxcsr != found.mxcsr || given.control != found.control)
            return wrong("floating point control", found.mxcsr);
        if (sigprocmask(SIG_SETMASK, NULL, &mask_now) || memcmp(&mask, &mask_now, 8))
            return wrong("mask", *(long *)&mask_now);
        if (sigaltstack(NULL, &stack_now) || stack_now.ss_sp != stack.ss_sp || stack_now.ss_size != stack.ss_size)
            return wrong("signal stack", stack_now.ss_flags);
        if (result == 1) // our parent has hung up
            return 0;
        if (result != 0 && !(result == -EINTR && signals > before))
            return wrong("result", result);
        printf("round %ld signals %d\n", round, signals);
        fflush(stdout);
    }
}
