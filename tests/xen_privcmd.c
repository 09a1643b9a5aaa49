/*
 * A stand-in for Linux's /dev/xen/privcmd, preloaded under the real libxenctrl: it writes down every hypercall that
 * the library makes, decoded with the library's own headers, and answers it with something plausible. No Xen is
 * involved; it shows what would reach one.
 */
#define _GNU_SOURCE
#define __XEN_TOOLS__ 1
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xenctrl.h>
#include <xen/memory.h>
#include <xen/sys/privcmd.h>

#define PAGES 16 /* of RAM that every domain has */
static int device = -1;

static void say(const char *format, ...)
{
    FILE *log = fopen(getenv("PRIVCMD_LOG"), "a");
    va_list arguments;
    va_start(arguments, format);
    vfprintf(log, format, arguments);
    va_end(arguments);
    fputc('\n', log);
    fclose(log);
}

static int open_device(const char *path)
{
    if (strcmp(path, "/dev/xen/privcmd"))
        return -2;
    device = memfd_create("privcmd", MFD_CLOEXEC);
    return ftruncate(device, 1 << 26) ? -1 : device;
}

int open(const char *path, int flags, ...)
{
    int (*next)(const char *, int, int) = dlsym(RTLD_NEXT, "open");
    int mode = 0, fd = open_device(path);
    va_list arguments;
    va_start(arguments, flags);
    if (flags & (O_CREAT | O_TMPFILE))
        mode = va_arg(arguments, int);
    va_end(arguments);
    return fd == -2 ? next(path, flags, mode) : fd;
}

int open64(const char *path, int flags, ...)
{
    int (*next)(const char *, int, int) = dlsym(RTLD_NEXT, "open64");
    int mode = 0, fd = open_device(path);
    va_list arguments;
    va_start(arguments, flags);
    if (flags & (O_CREAT | O_TMPFILE))
        mode = va_arg(arguments, int);
    va_end(arguments);
    return fd == -2 ? next(path, flags, mode) : fd;
}

static long xen_version(int command, char *text)
{
    if (command == XENVER_version)
        return XEN_MAJOR << 16 | XEN_MINOR;
    if (command == XENVER_extraversion)
        strcpy(text, ".99");
    if (command == XENVER_capabilities)
        strcpy(text, "hvm-3.0-x86_64 ");
    return 0;
}

static long sysctl(struct xen_sysctl *op)
{
    struct xen_sysctl_getdomaininfolist *list = &op->u.getdomaininfolist;
    if (op->interface_version != XEN_SYSCTL_INTERFACE_VERSION)
        return -EACCES;
    if (op->cmd == XEN_SYSCTL_readconsole) {
        op->u.readconsole.count = 0;
        return 0;
    }
    if (op->cmd == XEN_SYSCTL_availheap) {
        op->u.availheap.avail_bytes = 1 << 30;
        return 0;
    }
    if (op->cmd != XEN_SYSCTL_getdomaininfolist)
        return -ENOSYS;
    list->num_domains = 0;
    for (int domid = list->first_domain; domid < 4 && list->num_domains < list->max_domains; domid++) {
        xen_domctl_getdomaininfo_t info = { .domain = domid };
        info.flags = domid ? XEN_DOMINF_hvm_guest | XEN_DOMINF_hap | XEN_DOMINF_paused : 0;
        info.tot_pages = domid == 3 ? 0 : domid ? PAGES - 1 : 1000;
        info.shr_pages = domid == 3 ? 0 : domid ? 1 : 0;
        info.max_pages = 64 + domid;
        list->buffer.p[list->num_domains++] = info;
    }
    return 0;
}

static long domctl(struct xen_domctl *op)
{
    if (op->interface_version != XEN_DOMCTL_INTERFACE_VERSION)
        return -EACCES;
    switch (op->cmd) {
    case XEN_DOMCTL_mem_sharing_op:
        say("control dom=%u enable=%u", op->domain, op->u.mem_sharing_op.u.enable);
        return op->domain > 3 ? -ESRCH : 0;
    case XEN_DOMCTL_pausedomain:
        say("pause dom=%u", op->domain);
        return 0;
    case XEN_DOMCTL_unpausedomain:
        say("unpause dom=%u", op->domain);
        return 0;
    case XEN_DOMCTL_destroydomain:
        say("destroy dom=%u", op->domain);
        return 0;
    case XEN_DOMCTL_max_vcpus:
        say("max_vcpus dom=%u max=%u", op->domain, op->u.max_vcpus.max);
        return 0;
    case XEN_DOMCTL_max_mem:
        say("max_mem dom=%u max_memkb=%lu", op->domain, (unsigned long)op->u.max_mem.max_memkb);
        return 0;
    case XEN_DOMCTL_createdomain:
        say("create flags=%#x vcpus=%u evtchn=%u grants=%d,%d emulation=%#x ssidref=%u iommu=%u",
            op->u.createdomain.flags, op->u.createdomain.max_vcpus, op->u.createdomain.max_evtchn_port,
            op->u.createdomain.max_grant_frames, op->u.createdomain.max_maptrack_frames,
            op->u.createdomain.arch.emulation_flags, op->u.createdomain.ssidref, op->u.createdomain.iommu_opts);
#if XEN_MINOR >= 16
        say("grant_opts=%u vmtrace_size=%u misc=%#x", op->u.createdomain.grant_opts, op->u.createdomain.vmtrace_size,
            op->u.createdomain.arch.misc_flags);
#endif
        op->domain = 2;
        return 0;
    case XEN_DOMCTL_shadow_op:
        say("shadow_op dom=%u op=%u mb=%u", op->domain, op->u.shadow_op.op, op->u.shadow_op.mb);
        return 0;
#ifdef XEN_DOMCTL_set_paging_mempool_size
    case XEN_DOMCTL_set_paging_mempool_size:
        say("mempool dom=%u size=%lu", op->domain, (unsigned long)op->u.paging_mempool.size);
        return 0;
#endif
    }
    return -ENOSYS;
}

static long sharing_op(xen_mem_sharing_op_t *op)
{
    switch (op->op) {
    case XENMEM_sharing_op_nominate_gfn:
        say("nominate dom=%u gfn=%#lx", op->domain, (unsigned long)op->u.nominate.u.gfn);
        if (op->u.nominate.u.gfn == 7)
            return -E2BIG;
        op->u.nominate.handle = 0x100000000 + op->u.nominate.u.gfn;
        return 0;
    case XENMEM_sharing_op_nominate_gref:
        say("nominate_gref dom=%u ref=%u", op->domain, op->u.nominate.u.grant_ref);
        op->u.nominate.handle = 5;
        return 0;
    case XENMEM_sharing_op_share:
        say("share sdom=%u sgfn=%#lx sh=%#lx cdom=%u cgfn=%#lx ch=%#lx", op->domain,
            (unsigned long)op->u.share.source_gfn, (unsigned long)op->u.share.source_handle,
            op->u.share.client_domain, (unsigned long)op->u.share.client_gfn,
            (unsigned long)op->u.share.client_handle);
        if (op->u.share.source_handle < 2)
            return XENMEM_SHARING_OP_S_HANDLE_INVALID;
        return op->u.share.client_handle < 2 ? XENMEM_SHARING_OP_C_HANDLE_INVALID : 0;
    case XENMEM_sharing_op_add_physmap:
        say("add_physmap sdom=%u sgfn=%#lx sh=%#lx cdom=%u cgfn=%#lx", op->domain,
            (unsigned long)op->u.share.source_gfn, (unsigned long)op->u.share.source_handle,
            op->u.share.client_domain, (unsigned long)op->u.share.client_gfn);
        return 0;
    case XENMEM_sharing_op_range_share:
        say("range sdom=%u cdom=%u first=%#lx last=%#lx", op->domain, op->u.range.client_domain,
            (unsigned long)op->u.range.first_gfn, (unsigned long)op->u.range.last_gfn);
        return 0;
    case XENMEM_sharing_op_fork:
        say("fork child=%u parent=%u flags=%#x", op->domain, op->u.fork.parent_domain, op->u.fork.flags);
        return 0;
    case XENMEM_sharing_op_fork_reset:
        say("fork_reset child=%u flags=%#x", op->domain, op->u.fork.flags);
        return 0;
    case XENMEM_sharing_op_debug_gfn:
        if (!op->domain) /* how memshr finds out that sharing is built in */
            return -EPERM;
        say("debug_gfn dom=%u gfn=%#lx", op->domain, (unsigned long)op->u.debug.u.gfn);
        return op->u.debug.u.gfn == 9 ? -EINVAL : op->u.debug.u.gfn ? 1 : 2;
    case XENMEM_sharing_op_debug_gref:
        say("debug_gref dom=%u ref=%u", op->domain, op->u.debug.u.gref);
        return 1;
    case XENMEM_sharing_op_audit:
        say("audit");
        return 0;
    }
    return -ENOSYS;
}

static long memory_op(int command, void *argument)
{
    struct xen_memory_reservation *reservation = argument;
    struct xen_pod_target *target = argument;
    switch (command) {
    case XENMEM_sharing_op:
        return sharing_op(argument);
    case XENMEM_get_sharing_freed_pages:
        return 1;
    case XENMEM_get_sharing_shared_pages:
        return 1;
    case XENMEM_maximum_gpfn:
        return *(domid_t *)argument > 3 ? -ESRCH : PAGES + 3;
    case XENMEM_get_pod_target:
        target->tot_pages = PAGES;
        target->pod_cache_pages = 0;
        target->pod_entries = 0;
        return 0;
    case XENMEM_populate_physmap:
        say("populate dom=%u extents=%lu order=%u first=%#lx", reservation->domid,
            (unsigned long)reservation->nr_extents, reservation->extent_order,
            (unsigned long)reservation->extent_start.p[0]);
        return reservation->nr_extents;
    }
    return -ENOSYS;
}

static long hypercall(unsigned long op, unsigned long first, unsigned long second)
{
    multicall_entry_t *calls = (void *)first;
    switch (op) {
    case __HYPERVISOR_xen_version:
        return xen_version(first, (char *)second);
    case __HYPERVISOR_sysctl:
        return sysctl((void *)first);
    case __HYPERVISOR_domctl:
        return domctl((void *)first);
    case __HYPERVISOR_memory_op:
        return memory_op(first, (void *)second);
    case __HYPERVISOR_multicall: /* how libxencall gets a result that is wider than ioctl's */
        for (unsigned long i = 0; i < second; i++)
            calls[i].result = hypercall(calls[i].op, calls[i].args[0], calls[i].args[1]);
        return 0;
    }
    return -ENOSYS;
}

static long map(int fd, privcmd_mmapbatch_v2_t *batch)
{
    say("map dom=%u pages=%u first=%#lx", batch->dom, batch->num, (unsigned long)batch->arr[0]);
    for (unsigned i = 0; i < batch->num; i++) {
        uint64_t gfn = batch->arr[i];
        batch->err[i] = gfn < PAGES ? 0 : -EINVAL;
        if (pwrite(fd, &gfn, sizeof gfn, (off_t)i << 12) != sizeof gfn)
            return -EIO;
    }
    return 0;
}

int ioctl(int fd, unsigned long request, ...)
{
    int (*next)(int, unsigned long, void *) = dlsym(RTLD_NEXT, "ioctl");
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    long answer = -ENOTTY;
    if (request == IOCTL_PRIVCMD_HYPERCALL)
        answer = hypercall(((privcmd_hypercall_t *)argument)->op, ((privcmd_hypercall_t *)argument)->arg[0],
                           ((privcmd_hypercall_t *)argument)->arg[1]);
    else if (request == IOCTL_PRIVCMD_MMAPBATCH_V2)
        answer = map(fd, argument);
    else if (fd != device)
        return next(fd, request, argument);
    if (answer < 0) {
        errno = -answer;
        return -1;
    }
    return answer;
}
