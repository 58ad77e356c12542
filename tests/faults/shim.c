/*
 * shim.c - calls of libc that fail on demand, put before libc by LD_PRELOAD: for whole processes, Python among them
 *
 * fault_arm("pwrite", 3, ENOSPC, "out") makes the third pwrite from now on fail, of those on files whose path has "out" in it; with
 * the errno 0 it does half of what it was asked for, and with a negative count all from that one on fail. With the number of a
 * signal, negative, in place of the errno that signal comes, and the call goes on. Allocations and threads fail only for fastqcow's
 * modules. A "clock" goes a second further at each look. fault_calls() tells how many such calls there were.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static _Atomic(const char *) armed; /* the name of the call; NULL: none */
static char name[32], where[256];
static atomic_long calls;
static long nth;
static int error;

void fault_arm(const char *call, long at, int with, const char *path)
{
    atomic_store(&armed, NULL);
    snprintf(name, sizeof(name), "%s", call);
    snprintf(where, sizeof(where), "%s", path);
    nth = at;
    error = with;
    atomic_store(&calls, 0);
    atomic_store(&armed, name);
}

long fault_calls(void)
{
    atomic_store(&armed, NULL);
    return atomic_load(&calls);
}

static int is_on(int fd)
{
    char link[64], path[4096];
    ssize_t n;

    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    n = readlink(link, path, sizeof(path) - 1);
    if (n < 0)
        return 0;
    path[n] = '\0';
    return strstr(path, where) != NULL;
}

static int is_ours(const void *caller)
{
    Dl_info found;

    return dladdr(caller, &found) && found.dli_fname && strstr(found.dli_fname, "fastqcow/_");
}

static int is_armed(const char *call)
{
    const char *now = atomic_load(&armed);

    return now && strcmp(now, call) == 0;
}

static int strikes(void)
{
    const long n = atomic_fetch_add(&calls, 1) + 1;
    const int now = nth < 0 ? n >= -nth : n == nth;

    if (now && error < 0) {
        raise(-error);
        return 0;
    }
    if (now)
        errno = error;
    return now;
}

#define STRIKES_FD(call, fd) (is_armed(call) && is_on(fd) && strikes())
#define STRIKES_OURS(call) (is_armed(call) && is_ours(__builtin_return_address(0)) && strikes())
#define NEXT(type, symbol, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, symbol))

#define READ_OR_WRITE(symbol, call, buffer)                                                \
    ssize_t symbol(int fd, buffer buf, size_t nbytes, off64_t off)                         \
    {                                                                                      \
        if (STRIKES_FD(call, fd)) {                                                        \
            if (error)                                                                     \
                return -1;                                                                 \
            nbytes = (nbytes + 1) / 2;                                                     \
        }                                                                                  \
        return NEXT(ssize_t, #symbol, int, buffer, size_t, off64_t)(fd, buf, nbytes, off); \
    }
READ_OR_WRITE(pread64, "pread", void *)
READ_OR_WRITE(pread, "pread", void *)
READ_OR_WRITE(pwrite64, "pwrite", const void *)
READ_OR_WRITE(pwrite, "pwrite", const void *)

int close(int fd)
{
    if (STRIKES_FD("close", fd)) { /* as on NFS: it is closed, and what was written is lost */
        NEXT(int, "close", int)(fd);
        errno = error;
        return -1;
    }
    return NEXT(int, "close", int)(fd);
}

int ftruncate64(int fd, off64_t nbytes)
{
    return STRIKES_FD("ftruncate", fd) ? -1 : NEXT(int, "ftruncate64", int, off64_t)(fd, nbytes);
}

int posix_fallocate64(int fd, off64_t off, off64_t nbytes)
{
    return STRIKES_FD("fallocate", fd) ? error : NEXT(int, "posix_fallocate64", int, off64_t, off64_t)(fd, off, nbytes);
}

ssize_t copy_file_range(int from, off64_t *from_off, int to, off64_t *to_off, size_t nbytes, unsigned flags)
{
    if (STRIKES_FD("copy_file_range", to))
        return -1;
    return NEXT(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned)(from, from_off, to, to_off, nbytes,
                                                                                              flags);
}

int rename(const char *from, const char *to)
{
    return is_armed("rename") && strstr(to, where) && strikes() ? -1 : NEXT(int, "rename", const char *, const char *)(from, to);
}

int fsync(int fd)
{
    return STRIKES_FD("fsync", fd) ? -1 : NEXT(int, "fsync", int)(fd);
}

int fdatasync(int fd)
{
    return STRIKES_FD("fsync", fd) ? -1 : NEXT(int, "fdatasync", int)(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    const int ret = (int)syscall(SYS_clock_gettime, clock, now); /* sanitizers ask for the time before there is a dlsym */

    if (is_armed("clock")) {
        strikes();
        now->tv_sec += atomic_load(&calls);
    }
    return ret;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg)
{
    if (STRIKES_OURS("pthread_create"))
        return error;
    return NEXT(int, "pthread_create", pthread_t *, const pthread_attr_t *, void *(*)(void *), void *)(thread, attr, fn, arg);
}

/* dlsym allocates, so libc's own names are used. */
void *__libc_malloc(size_t nbytes);
void *__libc_calloc(size_t count, size_t nbytes);
void *__libc_realloc(void *old, size_t nbytes);
void *__libc_memalign(size_t alignment, size_t nbytes);

void *malloc(size_t nbytes)
{
    return STRIKES_OURS("memory") ? NULL : __libc_malloc(nbytes);
}

void *calloc(size_t count, size_t nbytes)
{
    return STRIKES_OURS("memory") ? NULL : __libc_calloc(count, nbytes);
}

void *realloc(void *old, size_t nbytes)
{
    return STRIKES_OURS("memory") ? NULL : __libc_realloc(old, nbytes);
}

void *aligned_alloc(size_t alignment, size_t nbytes)
{
    return STRIKES_OURS("memory") ? NULL : __libc_memalign(alignment, nbytes);
}
