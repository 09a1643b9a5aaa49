/*
 * reader DEVICE BLOCKS BUFFER_PAGES SEED STATUS: reads a drive past the page cache into its memory, without pause, and
 * checks what it read.
 * reader --make FILE BLOCKS: writes the contents that such a drive must have.
 *
 * Block b of the drive, of 4 KiB, holds pattern_of(b). Each read is of 1 to 32 blocks into a random place of the buffer;
 * before it the pages there must still hold what was read last, after it what the drive holds. Whatever moves pages
 * about while the drive's data is on its way into them is found out by one or the other, as `MISMATCH reader ...`.
 * A round is 256 reads and a check of the whole buffer.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pattern.h"

#define LONGEST_READ 32

/* Equal blocks in plenty, so that what was read can be shared: every eighth is zeros, every fourth one of a kind. */
static uint64_t pattern_of(uint64_t block)
{
    if (block % 8 == 0)
        return 0;
    return block % 4 == 1 ? 1000 + block : 1 + mix(block) % COMMON;
}

static int make(const char *path, uint64_t blocks)
{
    FILE *file = fopen(path, "w");
    uint64_t page[WORDS];

    for (uint64_t block = 0; file && block < blocks; block++) {
        for (uint64_t word = 0; word < WORDS; word++)
            page[word] = word_of(pattern_of(block), word);
        fwrite(page, sizeof page, 1, file);
    }
    if (!file || ferror(file) || fclose(file)) {
        perror(path);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    uint64_t blocks, pages, dice, *patterns;
    uint64_t(*buffer)[WORDS];
    int drive;

    if (argc == 4 && strcmp(argv[1], "--make") == 0)
        return make(argv[2], strtoull(argv[3], NULL, 0));
    if (argc != 6) {
        fprintf(stderr, "usage: reader DEVICE BLOCKS BUFFER_PAGES SEED STATUS\n");
        return 2;
    }
    blocks = strtoull(argv[2], NULL, 0);
    pages = strtoull(argv[3], NULL, 0);
    dice = strtoull(argv[4], NULL, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    drive = open(argv[1], O_RDONLY | O_DIRECT);
    buffer = mmap(NULL, pages * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    patterns = calloc(pages, sizeof *patterns);
    if (drive < 0 || buffer == MAP_FAILED || !patterns) {
        perror(argv[1]);
        return 1;
    }
    for (uint64_t round = 1;; round++) {
        char line[128];

        for (int read = 0; read < 256; read++) {
            uint64_t count, block, place;

            dice = mix(dice);
            count = 1 + dice % LONGEST_READ;
            block = (dice >> 8) % (blocks - count);
            place = (dice >> 32) % (pages - count);
            for (uint64_t page = place; page < place + count; page++)
                check("reader", buffer[page], page, patterns[page], WORDS);
            if (pread(drive, buffer[place], count * PAGE_SIZE, block * PAGE_SIZE) != (ssize_t)(count * PAGE_SIZE)) {
                printf("MISMATCH reader cannot read %llu blocks at %llu\n", (unsigned long long)count,
                       (unsigned long long)block);
                return 1;
            }
            for (uint64_t page = place; page < place + count; page++) {
                patterns[page] = pattern_of(block + page - place);
                check("reader", buffer[page], page, patterns[page], WORDS);
            }
        }
        for (uint64_t page = 0; page < pages; page++)
            check("reader", buffer[page], page, patterns[page], WORDS);
        snprintf(line, sizeof line, "round=%llu mismatches=%llu\n", (unsigned long long)round,
                 (unsigned long long)mismatches);
        replace_file(argv[5], line);
    }
}
