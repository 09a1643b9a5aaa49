/*
 * checker PAGES SEED REWRITES STATUS: rewrites and checks its own memory without pause.
 *
 * Every page holds a pattern that its number names; what each page must hold is kept beside it, never read back from
 * it. Pattern 0 is all zeros, 1 to COMMON are the same in every guest, the rest belong to one page of one guest. A
 * round checks every page, then rewrites REWRITES of them: half get a new pattern, half have one word changed, the
 * rest of the page checked, and the word put back.
 *
 * A page that is wrong is a line `MISMATCH checker ...` on standard output. After each round the file STATUS has a
 * line of NAME=NUMBER pairs. The first store into each page that is rewritten is timed; SIGUSR1 forgets those times.
 */
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <x86intrin.h>

#include "pattern.h"

#define OCTAVE 8 /* buckets of the histogram for each power of two */

static volatile sig_atomic_t forget;
static uint64_t histogram[64 * OCTAVE], writes, longest;

static void record(uint64_t ticks)
{
    unsigned power = 63 - __builtin_clzll(ticks | OCTAVE);

    histogram[power * OCTAVE + (ticks >> (power - 3)) % OCTAVE]++;
    writes++;
    if (ticks > longest)
        longest = ticks;
}

/* Upper end of the bucket below which `share` of all writes lie. */
static uint64_t quantile(double share)
{
    uint64_t seen = 0;

    for (unsigned bucket = 0; bucket < 64 * OCTAVE; bucket++) {
        seen += histogram[bucket];
        if (seen && seen >= share * writes)
            return (uint64_t)(bucket % OCTAVE + OCTAVE + 1) << (bucket / OCTAVE - 3);
    }
    return 0;
}

static void timed_store(volatile uint64_t *place, uint64_t value)
{
    uint64_t before = __rdtsc();

    *place = value;
    record(__rdtsc() - before);
}

static uint64_t choose_pattern(uint64_t dice, uint64_t unique)
{
    switch (dice % 16) {
    case 0:
    case 1:
        return 0;
    case 2:
    case 3:
    case 4:
    case 5:
        return unique;
    default:
        return 1 + (dice >> 8) % COMMON;
    }
}

static void on_forget(int signal)
{
    (void)signal;
    forget = 1;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void report(const char *path, uint64_t round, uint64_t pages, double ns_a_tick)
{
    char line[256];

    snprintf(line, sizeof line,
             "round=%llu pages=%llu mismatches=%llu writes=%llu median_ns=%.0f p99_ns=%.0f longest_ns=%.0f\n",
             (unsigned long long)round, (unsigned long long)pages, (unsigned long long)mismatches,
             (unsigned long long)writes, quantile(0.5) * ns_a_tick, quantile(0.99) * ns_a_tick, longest * ns_a_tick);
    replace_file(path, line);
}

int main(int argc, char **argv)
{
    uint64_t pages, seed, rewrites, dice, first_tick, first_ns, *patterns;
    uint64_t(*memory)[WORDS];

    if (argc != 5) {
        fprintf(stderr, "usage: checker PAGES SEED REWRITES STATUS\n");
        return 2;
    }
    pages = strtoull(argv[1], NULL, 0);
    seed = strtoull(argv[2], NULL, 0);
    rewrites = strtoull(argv[3], NULL, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGUSR1, on_forget);
    memory = mmap(NULL, pages * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    patterns = calloc(pages, sizeof *patterns);
    if (memory == MAP_FAILED || !patterns) {
        perror("checker: memory");
        return 1;
    }
    for (uint64_t page = 0; page < pages; page++) {
        patterns[page] = choose_pattern(mix(page), seed << 32 | page << 8);
        for (uint64_t word = 0; word < WORDS; word++)
            memory[page][word] = word_of(patterns[page], word);
    }

    dice = seed;
    first_tick = __rdtsc();
    first_ns = now_ns();
    for (uint64_t round = 1;; round++) {
        for (uint64_t page = 0; page < pages; page++)
            check("checker", memory[page], page, patterns[page], WORDS);
        for (uint64_t write = 0; write < rewrites; write++) {
            uint64_t page, word;

            dice = mix(dice);
            page = (dice >> 32) % pages;
            word = (dice >> 16) % WORDS;
            if (write % 2) {
                timed_store(&memory[page][word], ~dice);
                check("checker", memory[page], page, patterns[page], word);
                memory[page][word] = word_of(patterns[page], word);
            } else {
                patterns[page] = choose_pattern(mix(dice), seed << 32 | page << 8 | (1 + round % 255));
                timed_store(&memory[page][0], word_of(patterns[page], 0));
                for (word = 1; word < WORDS; word++)
                    memory[page][word] = word_of(patterns[page], word);
            }
        }
        if (forget) {
            forget = 0;
            longest = writes = 0;
            for (unsigned bucket = 0; bucket < 64 * OCTAVE; bucket++)
                histogram[bucket] = 0;
        }
        report(argv[4], round, pages, (double)(now_ns() - first_ns) / (__rdtsc() - first_tick));
    }
}
