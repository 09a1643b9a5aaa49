/*
 * Waits for ever. If it ever does anything else, or has anything mapped but itself, somebody made it.
 *
 *     canary [ADDRESS BYTES]
 *
 * It has memory of its own at ADDRESS, so that somebody who takes away what was there before takes that.
 */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int count, char **arguments)
{
    if (count == 3)
        mmap((void *)strtoul(arguments[1], NULL, 10), strtoul(arguments[2], NULL, 10), PROT_READ,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (;;)
        pause();
}
