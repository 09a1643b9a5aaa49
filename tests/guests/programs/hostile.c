/*
 * A hostile QEMU: a process that answers QMP well enough for memshr to take it for a guest, and then does what a QEMU
 * that was broken out into could do to memshr, to other guests, or to root. guests/hostile.py builds and starts it.
 *
 *     qemu-system-x86_64 -name NAME -m MIB -qmp unix:PATH,... -mode MODE [-answers FILE] [-report FILE]
 *                        [-canary PROGRAM] [-pages FILE] [-state N] [-done N] [-tid N]
 *
 * The file of pages is what its memory has from RAM_START_GFN on.
 *
 * MODE is ACTION or ACTION@WHEN. WHEN: start (at once), agent (memshr's code is mapped here), uffd (a userfaultfd is
 * among our descriptors), pool (a frame pool is mapped here). It goes on doing ACTION until it ends.
 *
 * FILE of answers: a line is "COMMAND<tab>KIND<tab>PAYLOAD" (kinds: see answer_as). COMMAND is QMP's name,
 * "greeting", or "hmp:" and the beginning of a line of the human monitor.
 *
 * The report has a line for each fact that a test needs: "ram ADDRESS BYTES", "memfd DEVICE INODE" for each memory file
 * of our own, "acted" when ACTION was first done, "stole" when a descriptor of memshr's could be used to write.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096UL
#define MIB (1UL << 20)
#define RAM_START_GFN 0x400UL  /* where the pages lie that tests write */
#define LAYOUT_BYTES (2UL << 40)
#define MANY_MAPPINGS 60000
#define MOST_DESCRIPTORS 256
#define ENDLESS_EVENTS (1L << 60)
#ifndef F_SEAL_SHRINK
#define F_SEAL_SHRINK 2
#endif

static const char *mode = "honest", *when = "start", *canary = "", *name = "";
static uint8_t *ram;
static size_t ram_bytes, layout_bytes;
static long state_at = -1, done_at = -1, tid_at = -1;
static int report_file = -1;
static int serving = -1, listening = -1;
static char *answers;

static struct { int number; char name[64]; } added[MOST_DESCRIPTORS];  /* what memshr may take back */
static int added_count;
static int kept[MOST_DESCRIPTORS];  /* our own copies of all that we were ever handed */
static volatile int kept_count;
static int payload = -1;  /* a program text of our own, in a memory file */
static int forged = -1;   /* a pool of our own */

static bool is(const char *action) { return strcmp(mode, action) == 0; }

static void die(const char *what)
{
    perror(what);
    _exit(111);
}

static void report(const char *format, ...)
{
    char line[256];
    va_list list;
    va_start(list, format);
    int length = vsnprintf(line, sizeof line, format, list);
    va_end(list);
    if (report_file >= 0 && write(report_file, line, length) != length)
        die("report");
}

static void acted(void)
{
    static volatile int once;
    if (!__sync_lock_test_and_set(&once, 1))
        report("acted\n");
}

static int memory_file(const char *title, unsigned flags)
{
    struct stat status;
    int file = memfd_create(title, flags);
    if (file < 0 || fstat(file, &status))
        die("memfd_create");
    report("memfd %lu %lu\n", (unsigned long)status.st_dev, (unsigned long)status.st_ino);
    return file;
}

/* -- what can be seen of ourselves --------------------------------------------------------------------------------- */

struct range { uintptr_t start, end; };

/* The mappings whose line has this text and these permissions ("" is any); returns how many. */
static int find_mappings(const char *text, const char *permissions, struct range *found, int most)
{
    int count = 0;
    char line[1024], rights[8];
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && count < most && fgets(line, sizeof line, maps)) {
        struct range range;
        if (sscanf(line, "%lx-%lx %7s", &range.start, &range.end, rights) != 3 || !strstr(line, text))
            continue;
        if (*permissions && strncmp(rights, permissions, strlen(permissions)))
            continue;
        found[count++] = range;
    }
    if (maps)
        fclose(maps);
    return count;
}

/* Our descriptors whose link starts with this text; returns how many. */
static int find_descriptors(const char *text, int *found, int most)
{
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    while (folder && count < most && (entry = readdir(folder))) {
        char link[256];
        ssize_t length = readlinkat(dirfd(folder), entry->d_name, link, sizeof link - 1);
        if (length < 0)
            continue;
        link[length] = 0;
        if (!strncmp(link, text, strlen(text)))
            found[count++] = atoi(entry->d_name);
    }
    if (folder)
        closedir(folder);
    return count;
}

static void wait_for(const char *what)
{
    struct range range;
    int number;
    for (;; usleep(300)) {
        if (!strcmp(what, "start"))
            return;
        if (!strcmp(what, "agent") && find_mappings("/memfd:memshr", "r-x", &range, 1))
            return;
        if (!strcmp(what, "uffd") && find_descriptors("anon_inode:[userfaultfd]", &number, 1))
            return;
        if (!strcmp(what, "pool") && find_mappings("/memfd:memshr-pool:", "", &range, 1))
            return;
    }
}

/* -- what a broken QEMU does --------------------------------------------------------------------------------------- */

/* A page of code: nothing until near its end, and then this. */
static void write_sled(uint8_t *page, const uint8_t *last, size_t length)
{
    memset(page, 0x90, PAGE);
    memcpy(page + PAGE - length, last, length);
}

static const uint8_t EXIT_THREAD[] = {0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05};
static const uint8_t EXIT_42[] = {0xb8, 231, 0, 0, 0, 0xbf, 42, 0, 0, 0, 0x0f, 0x05};
static const uint8_t PAUSE_FOR_EVER[] = {0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7};

/* Whatever runs in memshr's code here runs this from now on. */
static void replace_agent(const uint8_t *code, size_t length)
{
    struct range found[8];
    int count = find_mappings("/memfd:memshr", "r-x", found, 8);
    for (int i = 0; i < count; i++) {
        uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        write_sled(page, code, length);
        for (uintptr_t at = found[i].start; at < found[i].end; at += PAGE) {
            uint8_t *copy = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            memcpy(copy, page, PAGE);
            mremap(copy, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at);
        }
        acted();
    }
}

static void forge_word(long offset, uint32_t value)
{
    struct range found[8];
    int count = find_mappings("/memfd:memshr", "rw-s", found, 8);
    for (int i = 0; i < count; i++)
        if (offset >= 0 && found[i].start + offset + 4 <= found[i].end) {
            *(volatile uint32_t *)(found[i].start + offset) = value;
            acted();
        }
}

/* Fill all of the control area's data; a negative value: with random bytes. */
static void scribble(int with)
{
    struct range found[8];
    int count = find_mappings("/memfd:memshr", "rw-s", found, 8);
    for (int i = 0; i < count; i++) {
        for (uintptr_t at = found[i].start; at < found[i].end; at += sizeof(uint32_t))
            *(volatile uint32_t *)at = with < 0 ? (uint32_t)random() : (uint32_t)with * 0x01010101u;
        acted();
    }
}

static int trap = -1;

static int make_userfaultfd(void)
{
    int device[4], made = -1;
    if (find_descriptors("/dev/userfaultfd", device, 4))
        made = ioctl(device[0], USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (made < 0)
        made = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    if (made < 0 || ioctl(made, UFFDIO_API, &api))
        return -1;
    return made;
}

/* Whoever reads these pages without us waits for ever: now they are there, now they are not. */
static void trap_readers(uint8_t *start, size_t bytes, bool take_from_memshr)
{
    static uint8_t contents[PAGE];
    if (trap < 0) {
        int theirs[8];
        if (take_from_memshr) {
            int count = find_descriptors("anon_inode:[userfaultfd]", theirs, 8);
            for (int i = 0; i < count; i++) {
                struct uffdio_range range = {(uintptr_t)start, bytes};
                ioctl(theirs[i], UFFDIO_UNREGISTER, &range);
            }
        }
        if ((trap = make_userfaultfd()) < 0)
            return;
    }
    struct uffdio_register asked = {{(uintptr_t)start, bytes}, UFFDIO_REGISTER_MODE_MISSING, 0};
    static bool registered, caught;
    struct uffd_msg fault;
    if (!registered && ioctl(trap, UFFDIO_REGISTER, &asked))
        return;
    registered = true;
    acted();
    /* there for whoever asks whether they are there, gone for whoever reads them then; until the first is caught */
    for (int phase = 0; phase < 2 && !caught; phase++) {
        for (size_t at = 0; at < bytes; at += PAGE) {
            struct uffdio_copy copy = {(uintptr_t)start + at, (uintptr_t)contents, PAGE, 0, 0};
            memcpy(contents, &at, sizeof at);
            if (phase)
                madvise(start + at, PAGE, MADV_DONTNEED);
            else
                ioctl(trap, UFFDIO_COPY, &copy);
        }
        for (int look = 0; look < 8 && !caught; look++, usleep(300))
            if (read(trap, &fault, sizeof fault) == (ssize_t)sizeof fault) {
                caught = true;
                report("caught\n");
            }
    }
}

/* Other contents whenever somebody looks a second time, written past memshr's own protection. */
static void flip(uint8_t *start, size_t pages)
{
    int theirs[8];
    int count = find_descriptors("anon_inode:[userfaultfd]", theirs, 8);
    if (count)
        acted();
    for (int round = 0; round < 64; round++)
        for (size_t page = 0; page < pages; page++)
            for (int i = 0; i < count; i++) {
                struct uffdio_range range = {(uintptr_t)start + page * PAGE, PAGE};
                struct uffdio_writeprotect open = {range, 0}, shut = {range, UFFDIO_WRITEPROTECT_MODE_WP};
                if (ioctl(theirs[i], UFFDIO_WRITEPROTECT, &open))
                    continue;
                start[page * PAGE + 8] ^= 0xff;
                ioctl(theirs[i], UFFDIO_WRITEPROTECT, &shut);
            }
    usleep(100);
}

/* A file of ours where a frame is mapped. */
static void map_over_frames(void)
{
    struct range found[64];
    int count = find_mappings("/memfd:memshr-pool:", "rw-p", found, 64);
    for (int i = 0; i < count; i++) {
        size_t bytes = found[i].end - found[i].start;
        int file = memory_file("memshr-pool:crew", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (ftruncate(file, bytes))
            die("ftruncate");
        uint8_t *beside = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        memset(beside, 0xe1, bytes);
        munmap(beside, bytes);
        mmap((void *)found[i].start, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0);
        close(file);
        acted();
    }
    sleep(1);
}

/* A file of ours that looks like the pool of a group, over RAM of ours. */
static void forge_pool(const char *group)
{
    if (forged < 0) {
        char title[64];
        snprintf(title, sizeof title, "memshr-pool:%s", group);
        forged = memory_file(title, MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (ftruncate(forged, 256 * PAGE) || fchmod(forged, 0400))
            die("ftruncate");
        uint8_t *beside = mmap(NULL, 256 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, forged, 0);
        memset(beside, 0xe2, 256 * PAGE);
        fcntl(forged, F_ADD_SEALS, F_SEAL_SHRINK);
        syscall(SYS_fsetxattr, forged, "trusted.memshr", group, strlen(group), 0);
        syscall(SYS_fsetxattr, forged, "user.memshr", group, strlen(group), 0);
    }
    mmap(ram + 0x900 * PAGE, 256 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, forged, 0);
    acted();
}

/* At one place, in turn: the pool that we have, and a file of ours that is called like the pool of others. */
static void swap_pools(void)
{
    uint8_t *place = ram + 0x900 * PAGE;
    int pools[8], count;
    forge_pool("crew");
    count = find_descriptors("/memfd:memshr-pool", pools, 8);
    for (int round = 0; round < 200; round++)
        for (int i = 0; i < count; i++) {
            if (pools[i] == forged)
                continue;
            mmap(place, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, pools[i], 0);
            mmap(place, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, forged, 0);
        }
}

/* Write to whatever we were handed, however we get at it: also opened anew, with another mode. */
static void write_to_pools(void)
{
    int numbers[MOST_DESCRIPTORS], count = find_descriptors("/memfd:memshr-pool", numbers, MOST_DESCRIPTORS);
    for (int i = 0; i < count; i++) {
        char path[64], junk[PAGE];
        struct stat status;
        memset(junk, 0xe3, sizeof junk);
        snprintf(path, sizeof path, "/proc/self/fd/%d", numbers[i]);
        fchmod(numbers[i], 0600);
        int file = open(path, O_RDWR | O_CLOEXEC);
        if (file < 0)
            file = dup(numbers[i]);
        for (off_t at = 0; !fstat(file, &status) && at < status.st_size; at += PAGE)
            if (pwrite(file, junk, PAGE, at) == (ssize_t)PAGE) {
                report("stole\n");
                break;
            }
        close(file);
        acted();
    }
}

static void truncate_all(void)
{
    for (int i = 0; i < kept_count; i++)
        if (ftruncate(kept[i], 0))
            continue;  /* sealed, or no file */
    if (kept_count)
        acted();
}

static void overwrite_all(void)
{
    static uint8_t junk[16 * PAGE];
    for (size_t i = 0; i < sizeof junk; i++)
        junk[i] = random();
    for (int i = 0; i < kept_count; i++)
        if (pwrite(kept[i], junk, sizeof junk, PAGE) < 0)
            continue;
    if (kept_count)
        acted();
}

/* Take what somebody sends to us, descriptors too: they stay in our table. */
static void steal(int from)
{
    char words[4096], control[CMSG_SPACE(sizeof(int) * 8)];
    struct iovec piece = {words, sizeof words};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    recvmsg(from, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
}

static void disturb_sockets(void)
{
    static char words[4096];
    for (int i = 0; i < kept_count; i++) {
        int kind;
        socklen_t length = sizeof kind;
        if (getsockopt(kept[i], SOL_SOCKET, SO_TYPE, &kind, &length))
            continue;
        memset(words, 1, sizeof words);
        if (is("wire-flood"))
            send(kept[i], words, sizeof words, MSG_DONTWAIT | MSG_NOSIGNAL);
        else if (is("wire-steal"))
            steal(kept[i]);
        else
            shutdown(kept[i], SHUT_RDWR);
        acted();
    }
}

static void close_userfaultfds(void)
{
    int numbers[8], count = find_descriptors("anon_inode:[userfaultfd]", numbers, 8);
    for (int i = 0; i < count; i++) {
        struct uffdio_range range = {(uintptr_t)ram, ram_bytes};
        if (is("uffd-unregister"))
            ioctl(numbers[i], UFFDIO_UNREGISTER, &range);
        else
            close(numbers[i]);
        acted();
    }
}

static bool agent_is_gone(void)
{
    static bool seen;
    int threads = 0;
    DIR *folder = opendir("/proc/self/task");
    while (folder && readdir(folder))
        threads++;
    if (folder)
        closedir(folder);
    threads -= 2;  /* . and .. */
    seen |= threads > 2;
    return seen && threads == 2;
}

static void *attack(void *nothing)
{
    uint8_t *pages = ram + RAM_START_GFN * PAGE;
    wait_for(when);
    for (;;) {
        if (is("agent-dies"))
            replace_agent(EXIT_THREAD, sizeof EXIT_THREAD);
        else if (is("agent-hangs"))
            replace_agent(PAUSE_FOR_EVER, sizeof PAUSE_FOR_EVER);
        else if (is("state-under-way")) {
            replace_agent(PAUSE_FOR_EVER, sizeof PAUSE_FOR_EVER);
            forge_word(state_at, 2);
        } else if (is("state-done"))
            forge_word(state_at, 4);
        else if (is("done-nonsense"))
            forge_word(done_at, 0xfffffff0);
        else if (is("tid-forged"))
            forge_word(tid_at, gettid());
        else if (is("scribble-ff"))
            scribble(0xff);
        else if (is("scribble-02"))
            scribble(0x02);
        else if (is("scribble-random"))
            scribble(-1);
        else if (is("truncated"))
            truncate_all();
        else if (is("overwritten"))
            overwrite_all();
        else if (is("wire-flood") || is("wire-steal") || is("wire-shut"))
            disturb_sockets();
        else if (is("uffd-unregister") || is("uffd-closed"))
            close_userfaultfds();
        else if (is("flip"))
            flip(pages, 128);
        else if (is("trap-own"))
            trap_readers(pages, 128 * PAGE, false);
        else if (is("trap-theirs"))
            trap_readers(pages, 128 * PAGE, true);
        else if (is("own-frame"))
            map_over_frames();
        else if (is("forged-pool")) {
            forge_pool("crew");
            pause();
        } else if (is("forged-pool-race")) {
            forge_pool("crew");
            mmap(ram + 0x900 * PAGE, 256 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        } else if (is("pool-swap"))
            swap_pools();
        else if (is("pool-write"))
            write_to_pools();
        else if (is("ram-unmapped")) {
            munmap(pages + 16 * PAGE, 16 * PAGE);
            acted();
        } else if (is("ram-shared")) {
            mmap(pages + 16 * PAGE, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            acted();
        } else if (is("ram-discarded")) {
            madvise(pages, 128 * PAGE, MADV_DONTNEED);
            acted();
        } else if (is("exec-at-detach")) {
            static struct range place;
            if (!place.start && !find_mappings("/memfd:memshr", "r-x", &place, 1))
                place.start = 0;
            if (place.start && agent_is_gone()) {
                char start[32], bytes[32];
                snprintf(start, sizeof start, "%lu", place.start);
                snprintf(bytes, sizeof bytes, "%lu", PAGE);
                report("guarded %s\n", start);
                acted();
                execl(canary, "canary", start, bytes, (char *)NULL);
                die("execl");
            }
            continue;
        } else
            return nothing;
        if (!is("flip") && !is("forged-pool-race"))
            usleep(200);
    }
}

/* Turn into another program while memshr believes us to be a QEMU that has taken its descriptor, as ``number``. The
   child, which has inherited the connection, goes on answering for us. */
static void turn_into_canary(int number)
{
    static bool turned;
    if (turned)
        return;
    turned = true;
    pid_t parent = getpid();
    pid_t child = fork();
    if (child) {
        if (is("exec-kept"))
            fcntl(number, F_SETFD, 0);
        else
            dup2(payload, number);
        acted();
        execl(canary, "canary", (char *)NULL);
        die("execl");
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int tries = 0; tries < 5000; tries++, usleep(1000)) {
        char path[64], link[512];
        snprintf(path, sizeof path, "/proc/%d/exe", parent);
        ssize_t length = readlink(path, link, sizeof link - 1);
        link[length < 0 ? 0 : length] = 0;
        /* whose program we may not read has changed users: it is the canary */
        if (length < 0 || !strcmp(link, canary))
            break;
    }
    close(number);
}

/* -- QMP ----------------------------------------------------------------------------------------------------------- */

static bool say(const char *text, size_t length)
{
    while (length) {
        ssize_t sent = send(serving, text, length, MSG_NOSIGNAL);
        if (sent < 0)
            return false;
        text += sent;
        length -= sent;
    }
    return true;
}

static bool hung_up(void)
{
    struct pollfd look = {serving, POLLRDHUP, 0};
    return poll(&look, 1, 0) > 0 && look.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

/* The value of a member of the object that starts at ``text``, as it stands; its length in ``length``. NULL: none. */
static const char *member(const char *text, const char *key, size_t *length)
{
    int depth = 0;
    bool wanted = false;
    for (const char *at = text; *at; at++) {
        if (*at == '"') {
            const char *end = at + 1;
            while (*end && *end != '"')
                end += *end == '\\' && end[1] ? 2 : 1;
            if (!*end)
                return NULL;
            if (depth == 1 && (size_t)(end - at - 1) == strlen(key) && !strncmp(at + 1, key, strlen(key)))
                wanted = true;
            at = end;
        } else if (*at == ':' && depth == 1 && wanted) {
            for (at++; *at == ' '; at++)
                ;
            const char *end = at;
            int inside = 0;
            bool quoted = false;
            for (; *end; end++) {
                if (quoted) {
                    if (*end == '\\' && end[1])
                        end++;
                    else if (*end == '"')
                        quoted = false;
                    continue;
                }
                if (*end == '"')
                    quoted = true;
                else if (*end == '{' || *end == '[')
                    inside++;
                else if ((*end == '}' || *end == ']') && inside-- == 0)
                    break;
                else if (*end == ',' && inside == 0)
                    break;
            }
            *length = end - at;
            return at;
        } else if (*at == ',') {
            wanted = false;
        } else if (*at == '{' || *at == '[') {
            depth++;
        } else if (*at == '}' || *at == ']') {
            depth--;
        }
    }
    return NULL;
}

/* A member that is a string, or empty. */
static void member_text(const char *text, const char *key, char *out, size_t room)
{
    size_t length;
    const char *value = member(text, key, &length);
    *out = 0;
    if (value && length >= 2 && length - 2 < room && *value == '"') {
        memcpy(out, value + 1, length - 2);
        out[length - 2] = 0;
    }
}

static void trickle(void)
{
    while (say(" ", 1) && !hung_up())
        usleep(100000);
}

static void flood(long events)
{
    static const char event[] = "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"RTC_CHANGE\", "
                                "\"data\": {\"offset\": 0, \"qom-path\": \"/machine/unattached/device[1]\"}}\r\n";
    while (events-- && say(event, sizeof event - 1))
        ;
}

/* What the file of answers wants instead of this answer; false: nothing. ``id`` is ``, "id": ...`` or empty. */
static bool answer_as(const char *command, const char *ordinary, const char *id)
{
    size_t length = strlen(command);
    for (const char *line = answers; line && *line;) {
        const char *end = strchr(line, '\n');
        const char *tab = strchr(line, '\t');
        size_t width = tab ? (size_t)(tab - line) : 0;
        /* "hmp:info mtree -f" is meant by "hmp:info mtree" */
        if (!end || !tab || tab > end || width > length || strncmp(line, command, width)
            || (strncmp(command, "hmp:", 4) && width != length)) {
            line = end ? end + 1 : NULL;
            continue;
        }
        char kind[32] = "";
        const char *payload_at = memchr(tab + 1, '\t', end - tab - 1);
        size_t kind_length = payload_at ? (size_t)(payload_at - tab - 1) : 0;
        if (!payload_at || kind_length >= sizeof kind)
            die("answers");
        memcpy(kind, tab + 1, kind_length);
        payload_at++;
        size_t payload_length = end - payload_at;
        acted();
        if (!strcmp(kind, "raw")) {
            say(payload_at, payload_length);
            say("\r\n", 2);
        } else if (!strcmp(kind, "return") || !strcmp(kind, "error")) {
            say("{\"", 2);
            say(kind, strlen(kind));
            say("\": ", 3);
            say(payload_at, payload_length);
            say(id, strlen(id));
            say("}\r\n", 3);
        } else if (!strcmp(kind, "huge")) {
            static char filler[1 << 16];
            memset(filler, 'a', sizeof filler);
            say("{\"return\": \"", 12);
            for (long left = atol(payload_at) << 20; left > 0 && say(filler, sizeof filler); left -= sizeof filler)
                ;
            say("\"", 1);
            say(id, strlen(id));
            say("}\r\n", 3);
        } else if (!strcmp(kind, "endless")) {
            static char filler[1 << 16];
            memset(filler, 'a', sizeof filler);
            say("{\"return\": \"", 12);
            while (say(filler, sizeof filler))
                ;
        } else if (!strcmp(kind, "trickle")) {
            trickle();
        } else if (!strcmp(kind, "events")) {
            long events = atol(payload_at);
            flood(events ? events : ENDLESS_EVENTS);
            say(ordinary, strlen(ordinary));
        } else if (!strcmp(kind, "silent")) {
            while (!hung_up())
                usleep(20000);
        } else if (!strcmp(kind, "late")) {
            sleep(atoi(payload_at));
            say(ordinary, strlen(ordinary));
        } else if (!strcmp(kind, "twice")) {
            say(ordinary, strlen(ordinary));
            say(ordinary, strlen(ordinary));
        } else if (!strcmp(kind, "wrong-id")) {
            static const char other[] =
                "{\"return\": {\"status\": \"evil\", \"running\": true}, \"id\": \"of somebody else\"}\r\n";
            say(other, sizeof other - 1);
            say(ordinary, strlen(ordinary));
        } else if (!strcmp(kind, "hangup")) {
            shutdown(serving, SHUT_RDWR);
        } else {
            die(kind);
        }
        return true;
    }
    return false;
}

static void keep(int number)
{
    if (kept_count < MOST_DESCRIPTORS && !is("honest")) {
        kept[kept_count] = fcntl(number, F_DUPFD_CLOEXEC, 200);
        kept_count++;
    }
}

/* Close what was handed over under this name (NULL: under no name); returns how many that were. */
static int take_back(const char *which)
{
    int closed = 0, left = 0;
    for (int i = 0; i < added_count; i++)
        if (which ? !strcmp(added[i].name, which) && *which : !*added[i].name) {
            close(added[i].number);
            closed++;
        } else {
            added[left++] = added[i];
        }
    added_count = left;
    return closed;
}

/* Modes that strike when a descriptor has been handed over, before memshr is told so. */
static void on_descriptor(int number)
{
    if (is("exec-own-file") || is("exec-kept") || is("exec-other"))
        turn_into_canary(number);
    else if (is("number-of-own-file")) {
        dup2(payload, number);
        acted();
    }
}

static void after_descriptor(void)
{
    if (is("dies")) {
        acted();
        _exit(0);
    }
    if (is("stops")) {
        acted();
        kill(getpid(), SIGSTOP);
    }
}

static void serve_request(const char *request, int handed)
{
    char command[64], id[512] = "", line[512] = "", value[8192], ordinary[9000], key[600];
    size_t length = 0;
    const char *at = member(request, "id", &length);
    if (at && length < sizeof id - 16)
        snprintf(id, sizeof id, ", \"id\": %.*s", (int)length, at);
    member_text(request, "execute", command, sizeof command);
    const char *arguments = member(request, "arguments", &length);
    if (!arguments)
        arguments = "{}";
    const char *refusal = NULL;
    strcpy(value, "{}");
    snprintf(key, sizeof key, "%s", command);
    bool took = false;

    if (!strcmp(command, "query-status")) {
        strcpy(value, "{\"status\": \"running\", \"singlestep\": false, \"running\": true}");
    } else if (!strcmp(command, "query-version")) {
        strcpy(value, "{\"qemu\": {\"micro\": 19, \"minor\": 2, \"major\": 7}, \"package\": \"Debian\"}");
    } else if (!strcmp(command, "query-name")) {
        snprintf(value, sizeof value, "{\"name\": \"hostile\"}");
    } else if (!strcmp(command, "query-memdev") || !strcmp(command, "query-memory-devices")
               || !strcmp(command, "qom-list") || !strcmp(command, "query-named-block-nodes")
               || !strcmp(command, "query-block") || !strcmp(command, "query-fdsets")
               || !strcmp(command, "query-iothreads") || !strcmp(command, "query-block-jobs")
               || !strcmp(command, "query-jobs") || !strcmp(command, "x-query-virtio")) {
        strcpy(value, "[]");
    } else if (!strcmp(command, "query-cpus-fast")) {
        snprintf(value, sizeof value, "[{\"cpu-index\": 0, \"thread-id\": %d, \"qom-path\": \"/machine/unattached/"
                 "device[0]\", \"target\": \"x86_64\"}]", getpid());
    } else if (!strcmp(command, "query-sev") || !strcmp(command, "query-balloon")) {
        refusal = "it is not here";
    } else if (!strcmp(command, "qom-get")) {
        char path[128], property[128];
        member_text(arguments, "path", path, sizeof path);
        member_text(arguments, "property", property, sizeof property);
        snprintf(key, sizeof key, "qom-get:%s", property);
        if (!strcmp(property, "confidential-guest-support"))
            strcpy(value, "\"\"");
        else
            refusal = "Property not found";
    } else if (!strcmp(command, "human-monitor-command")) {
        member_text(arguments, "command-line", line, sizeof line);
        snprintf(key, sizeof key, "hmp:%s", line);
        if (!strncmp(line, "info mtree", 10)) {
            snprintf(value, sizeof value, "\"FlatView #0\\r\\n AS \\\"memory\\\", root: system\\r\\n AS \\\"cpu-memory-0\\\","
                     " root: system\\r\\n Root memory region: system\\r\\n  0000000000000000-%016lx (prio 0, ram):"
                     " pc.ram\\r\\n\\r\\n\"", layout_bytes - 1);
        } else if (!strncmp(line, "gpa2hva ", 8)) {
            unsigned long gpa = strtoul(line + 8, NULL, 0);
            snprintf(value, sizeof value, "\"Host virtual address for 0x%lx (pc.ram) is 0x%lx\\r\\n\"", gpa,
                     (uintptr_t)ram + gpa);
        } else {
            strcpy(value, "\"\"");
        }
    } else if (!strcmp(command, "add-fd")) {
        if (handed < 0) {
            refusal = "No file descriptor supplied via SCM_RIGHTS";
        } else {
            keep(handed);
            took = true;
            added[added_count].number = handed;
            added[added_count++].name[0] = 0;
            on_descriptor(handed);
            snprintf(value, sizeof value, "{\"fdset-id\": 1835233651, \"fd\": %d}", handed);
        }
    } else if (!strcmp(command, "getfd")) {
        char wanted[64];
        member_text(arguments, "fdname", wanted, sizeof wanted);
        if (handed < 0) {
            refusal = "No file descriptor supplied via SCM_RIGHTS";
        } else {
            take_back(wanted);
            keep(handed);
            took = true;
            added[added_count].number = handed;
            strcpy(added[added_count++].name, wanted);
            on_descriptor(handed);
        }
    } else if (!strcmp(command, "remove-fd")) {
        if (!take_back(NULL))
            refusal = "File descriptor named 'fdset-id:1835233651' not found";
    } else if (!strcmp(command, "closefd")) {
        char wanted[64];
        member_text(arguments, "fdname", wanted, sizeof wanted);
        if (!take_back(wanted))
            refusal = "File descriptor named 'memshr' not found";
    } else if (strcmp(command, "qmp_capabilities") && strcmp(command, "query-migrate") && strcmp(command, "stop")
               && strcmp(command, "cont") && strcmp(command, "transaction")) {
        refusal = "The command has not been found";
    }
    if (refusal)
        snprintf(ordinary, sizeof ordinary, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"%s\"}%s}\r\n", refusal, id);
    else
        snprintf(ordinary, sizeof ordinary, "{\"return\": %s%s}\r\n", value, id);
    if (!answer_as(key, ordinary, id) && !answer_as(command, ordinary, id))
        say(ordinary, strlen(ordinary));
    if (took)
        after_descriptor();
}

static void serve_one(void)
{
    static char buffer[1 << 20];
    size_t filled = 0;
    int handed = -1;
    const char *greeting = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 19, \"minor\": 2, \"major\": 7}, \"package\": "
                           "\"Debian\"}, \"capabilities\": [\"oob\"]}}\r\n";
    if (!answer_as("greeting", greeting, ""))
        say(greeting, strlen(greeting));
    for (;;) {
        char control[CMSG_SPACE(sizeof(int) * 8)];
        struct iovec piece = {buffer + filled, sizeof buffer - 1 - filled};
        struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control,
                                 .msg_controllen = sizeof control};
        ssize_t got = recvmsg(serving, &message, MSG_CMSG_CLOEXEC);
        if (got <= 0 || filled + got >= sizeof buffer - 1)
            return;
        for (struct cmsghdr *each = CMSG_FIRSTHDR(&message); each; each = CMSG_NXTHDR(&message, each))
            if (each->cmsg_type == SCM_RIGHTS)
                memcpy(&handed, CMSG_DATA(each), sizeof handed);
        filled += got;
        buffer[filled] = 0;
        char *end;
        while ((end = strchr(buffer, '\n'))) {
            *end = 0;
            serve_request(buffer, handed);
            handed = -1;
            filled -= end + 1 - buffer;
            memmove(buffer, end + 1, filled + 1);
        }
    }
}

static void *serve(void *nothing)
{
    for (;;) {
        serving = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
        if (serving < 0)
            continue;
        serve_one();
        close(serving);
        take_back(NULL);  /* as QEMU does with descriptors that nobody uses when the last client has hung up */
    }
    return nothing;
}

/* -- the beginning ------------------------------------------------------------------------------------------------- */

static void listen_at(const char *option)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = option + strlen("unix:");
    size_t length = strcspn(path, ",");
    if (length >= sizeof address.sun_path)
        die("path");
    memcpy(address.sun_path, path, length);
    listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, 16))
        die(address.sun_path);
}

static char *read_file(const char *path, size_t *bytes)
{
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status))
        die(path);
    char *text = calloc(1, status.st_size + 1);
    for (ssize_t at = 0, got; at < status.st_size; at += got)
        if ((got = read(file, text + at, status.st_size - at)) <= 0)
            die(path);
    close(file);
    *bytes = status.st_size;
    return text;
}

static void make_many_mappings(const char *report_path)
{
    /* A file whose path is nearly as long as the kernel lets a path be. */
    char folder[4096], title[241];
    snprintf(folder, sizeof folder, "%s", report_path);
    *strrchr(folder, '/') = 0;
    memset(title, 'x', sizeof title - 1);
    title[sizeof title - 1] = 0;
    int at = open(folder, O_PATH | O_DIRECTORY);
    for (int depth = 0; depth < 15; depth++) {
        int below;
        if (mkdirat(at, title, 0755) || (below = openat(at, title, O_PATH | O_DIRECTORY)) < 0)
            die("mkdirat");
        close(at);
        at = below;
    }
    int file = openat(at, title, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0 || ftruncate(file, PAGE))
        die("openat");
    for (int i = 0; i < MANY_MAPPINGS; i++)
        if (mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, file, 0) == MAP_FAILED)
            break;
    close(at);
    close(file);
    acted();
}

int main(int count, char **arguments)
{
    const char *socket_option = NULL, *pages_path = NULL, *report_path = "";
    bool nowhere = false;
    ram_bytes = 16 * MIB;
    for (int i = 1; i + 1 < count; i++) {
        const char *option = arguments[i], *given = arguments[i + 1];
        if (!strcmp(option, "-report")) {
            report_path = given;
            report_file = open(given, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        }
        else if (!strcmp(option, "-mode")) {
            char *at = strchr(arguments[i + 1], '@');
            mode = given;
            if (at) {
                *at = 0;  /* /proc/PID/cmdline shows only the action then, which nobody reads */
                when = at + 1;
            }
        } else if (!strcmp(option, "-qmp"))
            socket_option = given;
        else if (!strcmp(option, "-answers"))
            answers = read_file(given, &(size_t){0});
        else if (!strcmp(option, "-canary"))
            canary = given;
        else if (!strcmp(option, "-pages"))
            pages_path = given;
        else if (!strcmp(option, "-listen"))
            nowhere = !strcmp(given, "no");
        else if (!strcmp(option, "-name"))
            name = given;
        else if (!strcmp(option, "-m"))
            ram_bytes = strtoul(given, NULL, 10) * MIB;
        else if (!strcmp(option, "-state"))
            state_at = atol(given);
        else if (!strcmp(option, "-done"))
            done_at = atol(given);
        else if (!strcmp(option, "-tid"))
            tid_at = atol(given);
    }
    layout_bytes = is("huge-layout") ? LAYOUT_BYTES : ram_bytes;
    uint8_t *area = mmap(NULL, layout_bytes + 2 * MIB, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED)
        die("mmap");
    ram = (uint8_t *)(((uintptr_t)area + 2 * MIB - 1) & ~(2 * MIB - 1));
    madvise(ram, layout_bytes, MADV_MERGEABLE);
    /* small pages, as most of a guest's that shares: a missing page is one page */
    madvise(ram, layout_bytes, MADV_NOHUGEPAGE);
    if (pages_path) {
        size_t bytes;
        char *pages = read_file(pages_path, &bytes);
        memcpy(ram + RAM_START_GFN * PAGE, pages, bytes);
        free(pages);
    }
    if (is("huge-layout"))
        acted();

    payload = memory_file("payload", MFD_CLOEXEC);
    for (int page = 0; page < 20; page++) {
        uint8_t code[PAGE];
        write_sled(code, EXIT_42, sizeof EXIT_42);
        if (write(payload, code, PAGE) != (ssize_t)PAGE)
            die("payload");
    }
    if (is("many-mappings"))
        make_many_mappings(report_path);
    if (socket_option && !nowhere)
        listen_at(socket_option);
    report("ram %lu %lu\n", (uintptr_t)ram, ram_bytes);

    pthread_t thread;
    if (!is("honest") && pthread_create(&thread, NULL, attack, NULL))
        die("pthread_create");
    if (nowhere) {
        report("ready\n");
        for (;;)
            pause();
    }
    if (is("vfork") || is("leader-exits")) {
        if (pthread_create(&thread, NULL, serve, NULL))
            die("pthread_create");
        report("ready\n");
        acted();
        if (is("leader-exits"))
            syscall(SYS_exit, 0);
        if (!vfork()) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
    }
    report("ready\n");
    serve(NULL);
}
