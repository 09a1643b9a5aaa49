# What runs inside QEMU: the agent. control_area.CODE holds it as bytes; tools/assemble-agent prints them from this file,
# and a test compares the two. agent.py says what it is for, control_area.py has the layout of the data.
#
# The thread's registers: rbx the data, r12 a counter, r13 the entry of the table, r14 the result that it must have.
# Every number below that is no system call is an offset of control_area.py.

        .intel_syntax noprefix
        .set PARAMETERS, 0x800
        .set OFFER, 0x10
        .set STATE, 0x1c
        .set COUNT, 0x20
        .set DONE, 0x24
        .set TID, 0x28
        .set ANSWER_BYTE, 0x30
        .set SIGMASK, 0x38
        .set EXPECTED_SOCKET, 0xa0
        .set PID, 0xb0
        .set RECEIVED, 0x190
        .set PIECES, 0x200
        .set STAT, 0x400
        .set STACK_TOP, 0x2000
        .set TABLE, 0x2000
        .set SLOTS, 0x1a000
        .set LAST_SLOT, 0x3ff
        .set FRAME_BYTES, 0x1f000
        .set PAGE_BYTES, 0x2f000
        .set CHUNK, 0x10000

        .text
start:
stub:   # runs once, on the thread that was borrowed
        mov     rdi, [rip + start + PARAMETERS]
        mov     rsi, [rip + start + PARAMETERS + 8]
        mov     r8, [rip + start + PARAMETERS + 16]
        mov     eax, 9                                  # mmap the data, shared, at its place
        mov     edx, 3
        mov     r10d, 0x100001
        mov     r9d, 0x1000
        syscall
        mov     rbx, [rip + start + PARAMETERS]
        cmp     rax, rbx
        jne     leave
        mov     eax, 14                                 # block every signal: the thread inherits that
        mov     edi, 2
        lea     rsi, [rip + start + PARAMETERS + 0xb0]
        lea     rdx, [rbx + SIGMASK]
        mov     r10d, 8
        syscall
        mov     eax, 56                                 # clone the thread
        mov     edi, 0x3d0f00
        lea     rsi, [rbx + STACK_TOP]
        lea     rdx, [rbx + TID]
        mov     r10, rdx
        xor     r8d, r8d
        syscall
        test    rax, rax
        je      idle
        mov     [rbx + TID], rax
        mov     eax, 14
        mov     edi, 2
        lea     rsi, [rbx + SIGMASK]
        xor     edx, edx
        mov     r10d, 8
        syscall
leave:  # give the borrowed thread its registers back
        push    [rip + start + PARAMETERS + 0x20]
        popfq
        mov     rax, [rip + start + PARAMETERS + 0x28]
        mov     rbx, [rip + start + PARAMETERS + 0x30]
        mov     rcx, [rip + start + PARAMETERS + 0x38]
        mov     rdx, [rip + start + PARAMETERS + 0x40]
        mov     rsi, [rip + start + PARAMETERS + 0x48]
        mov     rdi, [rip + start + PARAMETERS + 0x50]
        mov     rbp, [rip + start + PARAMETERS + 0x58]
        mov     r8, [rip + start + PARAMETERS + 0x60]
        mov     r9, [rip + start + PARAMETERS + 0x68]
        mov     r10, [rip + start + PARAMETERS + 0x70]
        mov     r11, [rip + start + PARAMETERS + 0x78]
        mov     r12, [rip + start + PARAMETERS + 0x80]
        mov     r13, [rip + start + PARAMETERS + 0x88]
        mov     r14, [rip + start + PARAMETERS + 0x90]
        mov     r15, [rip + start + PARAMETERS + 0x98]
        mov     rsp, [rip + start + PARAMETERS + 0xa0]
        jmp     [rip + start + PARAMETERS + 0xa8]

idle:   # sleep until a socket is offered
        cmp     dword ptr [rbx + OFFER], -1
        jne     adopt
        mov     eax, 202                                # futex wait
        lea     rdi, [rbx + OFFER]
        xor     esi, esi
        mov     edx, 0xffffffff
        xor     r10d, r10d
        syscall
        jmp     idle

adopt:  # take a copy of the socket, make sure that it is that socket
        mov     eax, 72                                 # fcntl F_DUPFD_CLOEXEC
        mov     edi, [rbx + OFFER]
        mov     esi, 0x406
        mov     edx, 3
        syscall
        mov     dword ptr [rbx + OFFER], 0xffffffff
        test    eax, eax
        js      idle
        mov     [rbx + SLOTS], eax
        mov     edi, eax
        mov     eax, 5                                  # fstat
        lea     rsi, [rbx + STAT]
        syscall
        mov     rax, [rbx + STAT]
        cmp     rax, [rbx + EXPECTED_SOCKET]
        jne     hangup
        mov     rax, [rbx + STAT + 8]
        cmp     rax, [rbx + EXPECTED_SOCKET + 8]
        jne     hangup

answer: # tell memshr that it is done
        mov     eax, 44                                 # sendto, MSG_NOSIGNAL
        mov     edi, [rbx + SLOTS]
        lea     rsi, [rbx + ANSWER_BYTE]
        mov     edx, 1
        mov     r10d, 0x4000
        xor     r8d, r8d
        xor     r9d, r9d
        syscall

receive: # wait for a table
        xor     eax, eax                                # read
        mov     edi, [rbx + SLOTS]
        lea     rsi, [rbx + ANSWER_BYTE]
        mov     edx, 1
        syscall
        cmp     rax, 1
        je      posted
        cmp     rax, -4                                 # -EINTR
        je      receive

hangup: # memshr is gone: close everything that we had for it
        mov     r12d, LAST_SLOT
1:      mov     edi, [rbx + r12 * 4 + SLOTS]
        test    edi, edi
        js      2f
        mov     eax, 3                                  # close
        syscall
2:      mov     dword ptr [rbx + r12 * 4 + SLOTS], 0xffffffff
        dec     r12d
        jns     1b
        jmp     idle

posted: # claim the table, unless it was withdrawn
        mov     eax, 1
        mov     ecx, 2
        lock cmpxchg [rbx + STATE], ecx
        jne     receive
        xor     r12d, r12d
        mov     [rbx + DONE], r12d
        lea     r13, [rbx + TABLE]
next:   cmp     r12d, [rbx + COUNT]
        jae     finished
        mov     r14, [r13 + 56]
        call    entry
        cmp     rax, r14
        jne     finished
        inc     r12d
        mov     [rbx + DONE], r12d
        add     r13, 64
        jmp     next
finished:
        mov     dword ptr [rbx + STATE], 4
        jmp     answer

entry:  # one system call of a table; one with bit 16 only if the page holds what the frame holds
        bt      dword ptr [r13], 16
        jnc     1f
        call    compare
        test    eax, eax
        jne     2f
1:      bt      dword ptr [r13], 19                     # a descriptor that is closed is nobody's to close any more
        jnc     3f
        mov     eax, [r13 + 8]
        mov     ecx, 0xffffffff
        call    note
3:      movzx   eax, word ptr [r13]
        mov     rdi, [r13 + 8]
        mov     rsi, [r13 + 16]
        mov     rdx, [r13 + 24]
        mov     r10, [r13 + 32]
        mov     r8, [r13 + 40]
        mov     r9, [r13 + 48]
        syscall
2:      mov     [r13 + 56], rax
        bt      dword ptr [r13], 17                     # a descriptor that it made is ours to close from now on
        jnc     5f
        test    rax, rax
        js      5f
        mov     ecx, eax
        bt      dword ptr [r13], 18
        jnc     4f
        mov     ecx, [rbx + RECEIVED]                   # the one that a message brought
4:      mov     eax, 0xffffffff
        call    note
        mov     rax, [r13 + 56]
5:      ret

note:   # the first slot that holds eax gets ecx
        xor     edx, edx
1:      cmp     [rbx + rdx * 4 + SLOTS], eax
        je      2f
        inc     edx
        cmp     edx, LAST_SLOT
        jbe     1b
        ret
2:      mov     [rbx + rdx * 4 + SLOTS], ecx
        ret

compare: # 0: the bytes at an mmap's address are those of its file; 1: they are not, or one could not be read
        mov     rbp, [r13 + 8]
        mov     r15, [r13 + 16]
        mov     r8, [r13 + 48]
1:      mov     edx, CHUNK
        cmp     r15, rdx
        cmovb   rdx, r15
        mov     eax, 17                                 # pread64: what the frames hold
        mov     edi, [r13 + 40]
        lea     rsi, [rbx + FRAME_BYTES]
        mov     r10, r8
        syscall
        cmp     rax, rdx
        jne     2f
        mov     [rbx + PIECES + 8], rdx
        mov     [rbx + PIECES + 24], rdx
        lea     rax, [rbx + PAGE_BYTES]
        mov     [rbx + PIECES], rax
        mov     [rbx + PIECES + 16], rbp
        push    r8
        mov     eax, 310                                # process_vm_readv of ourselves: a hole gives an error, no signal
        mov     edi, [rbx + PID]
        lea     rsi, [rbx + PIECES]
        mov     edx, 1
        lea     r10, [rbx + PIECES + 16]
        mov     r8d, 1
        xor     r9d, r9d
        syscall
        pop     r8
        mov     rcx, [rbx + PIECES + 8]
        cmp     rax, rcx
        jne     2f
        add     rbp, rcx
        add     r8, rcx
        sub     r15, rcx
        shr     rcx, 3
        lea     rsi, [rbx + FRAME_BYTES]
        lea     rdi, [rbx + PAGE_BYTES]
        repe cmpsq
        jne     2f
        test    r15, r15
        jne     1b
        xor     eax, eax
        ret
2:      mov     eax, 1
        ret
