// A hostile QEMU: it waits until somebody is at work on it, and executes another program then, which has other rights.
//
//   impostor PROGRAM ARGUMENT...
//
// The first line that it prints is the address of code that executes the program. Its second thread does so when
// something is read from standard input.

#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

static char **program;

static void execute(void) {
    execv(program[0], program);
    _exit(1);
}

static void *when_told(void *nothing) {
    char byte;
    if (read(0, &byte, 1) == 1)
        execute();
    return nothing;
}

int main(int argc, char **argv) {
    pthread_t thread;
    if (argc < 2)
        return 2;
    program = argv + 1;
    if (pthread_create(&thread, NULL, when_told, NULL))
        return 2;
    printf("%p\n", (void *)execute);
    fflush(stdout);
    for (;;)
        ppoll(NULL, 0, NULL, NULL);
}
