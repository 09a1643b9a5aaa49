/*
 * What pages of test guests hold: each page one pattern, a number that decides every word of it. What a page must hold
 * is kept beside it and never read back from it.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define PAGE_SIZE 4096
#define WORDS (PAGE_SIZE / sizeof(uint64_t))
#define COMMON 63 /* patterns 1 to COMMON are to be found in every guest; 0 is all zeros */

static uint64_t mismatches;

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t word_of(uint64_t pattern, uint64_t word)
{
    return pattern ? (mix(pattern) * (word + 1)) ^ (word << 48) : 0;
}

/* Say so, in one line, if a page does not hold its pattern; the word `skip` is not looked at (WORDS: look at all). */
static void check(const char *who, const volatile uint64_t *page, uint64_t number, uint64_t pattern, uint64_t skip)
{
    for (uint64_t word = 0; word < WORDS; word++) {
        uint64_t found = page[word], wanted = word_of(pattern, word);

        if (word == skip || found == wanted)
            continue;
        if (mismatches++ < 20)
            printf("MISMATCH %s page=%llu word=%llu wanted=%llx found=%llx\n", who, (unsigned long long)number,
                   (unsigned long long)word, (unsigned long long)wanted, (unsigned long long)found);
        return;
    }
}

/* Let a file hold this text; a reader finds the old text or the new one, nothing between. */
static void replace_file(const char *path, const char *text)
{
    char beside[256];
    FILE *file;

    snprintf(beside, sizeof beside, "%s.new", path);
    file = fopen(beside, "w");
    if (!file || fputs(text, file) < 0 || fclose(file) || rename(beside, path)) {
        perror(beside);
        exit(1);
    }
}
