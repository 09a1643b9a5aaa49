/* Waits for ever. If it ever does anything else, or has anything mapped but itself, somebody made it. */
#include <unistd.h>

int main(void)
{
    for (;;)
        pause();
}
