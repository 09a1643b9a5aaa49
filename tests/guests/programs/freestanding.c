/*
 * A guest without an operating system: a 32-bit multiboot kernel for `qemu -kernel`, small enough for KVM
 * implementations that run little else.
 *
 * It fills PAGES pages, each with one 32-bit value, then for ever checks them all, rewrites some, and writes one
 * character a round to the first serial port: `.` if every page held what it must, `X` if one did not. What each page
 * must hold is kept beside it. Two pages in eight hold zeros, four hold one of COMMON values that are the same in every
 * guest, two hold a value of their own. The last character of the kernel's command line is the seed of what is
 * rewritten, and of the values that no other guest has.
 */
#include <stdint.h>

#define PAGES 2048
#define WORDS 1024
#define COMMON 61
#define SERIAL_PORT 0x3f8

__asm__(".section .text\n"
        ".align 4\n"
        ".long 0x1badb002, 0, -0x1badb002\n" /* multiboot header: magic, no flags, checksum */
        ".globl _start\n"
        "_start:\n"
        "    mov $stack + 16384, %esp\n"
        "    push %ebx\n" /* the boot information, pushed as run()'s argument */
        "    call run\n");

uint8_t stack[16384] __attribute__((aligned(16)));
static uint32_t memory[PAGES][WORDS] __attribute__((aligned(4096)));
static uint32_t values[PAGES];

static void fill(uint32_t *page, uint32_t value)
{
    uint32_t words = WORDS;

    __asm__ volatile("rep stosl" : "+D"(page), "+c"(words) : "a"(value) : "memory");
}

/* Do `words` words from `place` on all hold `value`? */
static int holds(const uint32_t *place, uint32_t words, uint32_t value)
{
    uint8_t equal;

    /* With no words the flags stay as the compare of eax with itself leaves them: equal. */
    __asm__ volatile("cmp %%eax, %%eax\n\trepe scasl\n\tsete %2"
                     : "+D"(place), "+c"(words), "=q"(equal)
                     : "a"(value)
                     : "memory", "cc");
    return equal;
}

static void print(char character)
{
    __asm__ volatile("outb %0, %1" : : "a"(character), "Nd"((uint16_t)SERIAL_PORT));
}

static uint32_t step(uint32_t dice)
{
    dice ^= dice << 13;
    dice ^= dice >> 17;
    return dice ^ dice << 5;
}

static uint32_t choose_value(uint32_t dice, uint32_t unique)
{
    if (dice % 8 < 2)
        return 0;
    return dice % 8 < 6 ? 1 + (dice >> 8) % COMMON : unique;
}

void run(const uint32_t *boot_information)
{
    const char *command_line = (const char *)boot_information[4];
    uint32_t seed, dice = 1;

    while (command_line[1])
        command_line++;
    seed = (uint8_t)*command_line;

    for (uint32_t page = 0; page < PAGES; page++) {
        dice = step(dice);
        values[page] = choose_value(dice, seed << 24 | page << 8);
        fill(memory[page], values[page]);
    }
    dice = seed;
    for (uint32_t round = 0;; round++) {
        int good = 1;

        for (uint32_t page = 0; page < PAGES; page++)
            good &= holds(memory[page], WORDS, values[page]);
        for (uint32_t write = 0; write < PAGES / 32; write++) {
            uint32_t page, word;

            dice = step(dice);
            page = dice % PAGES;
            word = (dice >> 16) % WORDS;
            if (write % 2) {
                ((volatile uint32_t *)memory[page])[word] = ~values[page];
                good &= holds(memory[page], word, values[page]);
                good &= holds(memory[page] + word, 1, ~values[page]);
                good &= holds(memory[page] + word + 1, WORDS - word - 1, values[page]);
                memory[page][word] = values[page];
            } else {
                values[page] = choose_value(step(dice), seed << 24 | page << 8 | (1 + round % 255));
                fill(memory[page], values[page]);
            }
        }
        print(good ? '.' : 'X');
    }
}
