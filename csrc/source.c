/*
 * source.c - where bytes come from: a descriptor, or a callback; one of a remote file takes several ranges at once
 *
 * Always pread, never mmap: a file that is cut while it is being read must end in an error, and a mapping would end in SIGBUS. All
 * reads are by position, so one descriptor serves every thread.
 */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct fq_source {
    int fd; /* -1: a callback */
    bool seek_holes;
    fq_read_fn read;
    fq_ranges_fn read_ranges; /* of a remote file, in place of `read` */
    void *opaque;
    bool is_file;
    uint64_t nbytes; /* when it was opened; a file may change its length */
};

fq_source *fq_source_fd(int fd, bool seek_holes)
{
    fq_source *s = calloc(1, sizeof(*s));
    struct stat st;

    if (!s)
        return NULL;
    s->fd = fd;
    s->seek_holes = seek_holes;
    s->is_file = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    if (s->is_file) {
        s->nbytes = (uint64_t)st.st_size;
    } else {
        /* A block device has no st_size. Its position is put back, as it may be somebody else's too. */
        const off_t before = lseek(fd, 0, SEEK_CUR), end = lseek(fd, 0, SEEK_END);

        s->nbytes = end > 0 ? (uint64_t)end : 0;
        if (before >= 0)
            lseek(fd, before, SEEK_SET);
    }
    return s;
}

fq_source *fq_source_callback(fq_read_fn read, void *opaque, uint64_t nbytes)
{
    fq_source *s = calloc(1, sizeof(*s));

    if (s) {
        s->fd = -1;
        s->read = read;
        s->opaque = opaque;
        s->nbytes = nbytes;
    }
    return s;
}

fq_source *fq_source_remote(fq_ranges_fn read, void *opaque, uint64_t nbytes)
{
    fq_source *s = fq_source_callback(NULL, opaque, nbytes);

    if (s)
        s->read_ranges = read;
    return s;
}

void fq_source_free(fq_source *s)
{
    free(s);
}

bool fq_source_ordered(const fq_source *s)
{
    return s->read != NULL;
}

bool fq_source_is_remote(const fq_source *s)
{
    return s->read_ranges != NULL;
}

uint64_t fq_source_size(const fq_source *s)
{
    struct stat st;

    return s->is_file && fstat(s->fd, &st) == 0 ? (uint64_t)st.st_size : s->nbytes;
}

uint64_t fq_source_once(const fq_source *s)
{
    const uint64_t now = fq_source_size(s);

    return now > s->nbytes ? now : s->nbytes;
}

fq_status fq_source_read_ranges(fq_source *s, const fq_request *request, fq_range *ranges, size_t count, fq_error *error)
{
    bool failed = s->read_ranges(s->opaque, request ? request->user : NULL, ranges, count) != 0;

    for (size_t i = 0; i < count && !failed; i++)
        failed = ranges[i].got > ranges[i].nbytes;
    return failed ? fq_fail(error, FQ_ERR_SOURCE, FQ_NOWHERE, ranges[0].host_off, FQ_NOWHERE) : FQ_OK;
}

static ptrdiff_t call_back(fq_source *s, const fq_request *request, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    void *user = request ? request->user : NULL;
    fq_range range = {host_off, nbytes, buf, 0};

    if (s->read)
        return s->read(s->opaque, user, buf, nbytes, host_off);
    return s->read_ranges(s->opaque, user, &range, 1) == 0 ? (ptrdiff_t)range.got : -1;
}

fq_status fq_source_read(fq_source *s, const fq_request *request, uint8_t *buf, size_t nbytes, uint64_t host_off, size_t *got,
                         fq_error *error)
{
    *got = 0;
    while (*got < nbytes) {
        const uint64_t at = host_off + *got;
        const size_t want = nbytes - *got < (1u << 30) ? nbytes - *got : 1u << 30;
        ptrdiff_t n;

        if (at > INT64_MAX - want) /* no file reaches that far */
            return FQ_OK;
        if (s->fd < 0) {
            n = call_back(s, request, buf + *got, want, at);
            if (n < 0 || (size_t)n > want)
                return fq_fail(error, FQ_ERR_SOURCE, FQ_NOWHERE, at, FQ_NOWHERE);
        } else {
            n = pread(s->fd, buf + *got, want, (off_t)at);
            if (n < 0 && errno == EINTR)
                continue;
            if (n < 0) {
                fq_fail(error, FQ_ERR_READ, FQ_NOWHERE, at, FQ_NOWHERE);
                error->sys_errno = errno;
                return FQ_ERR_READ;
            }
        }
        if (n == 0)
            return FQ_OK;
        *got += (size_t)n;
    }
    return FQ_OK;
}

bool fq_source_copy(const fq_source *s, uint64_t host_off, int fd, uint64_t off, uint64_t nbytes)
{
#ifdef __linux__
    off_t from = (off_t)host_off, to = (off_t)off;

    if (s->fd < 0 || host_off > INT64_MAX - nbytes)
        return false;
    while (nbytes > 0) {
        const ssize_t n = copy_file_range(s->fd, &from, fd, &to, (size_t)nbytes, 0);

        if (n <= 0 && !(n < 0 && errno == EINTR))
            return false;
        nbytes -= n > 0 ? (uint64_t)n : 0;
    }
    return true;
#else
    (void)s, (void)host_off, (void)fd, (void)off, (void)nbytes;
    return false;
#endif
}

uint64_t fq_source_run(const fq_source *s, uint64_t host_off, uint64_t nbytes, bool *hole)
{
    *hole = false;
#ifdef SEEK_DATA
    if (s->fd >= 0 && s->seek_holes && host_off <= INT64_MAX - nbytes) {
        const off_t data = lseek(s->fd, (off_t)host_off, SEEK_DATA);
        off_t end = -1;

        if (data < 0) {
            /* No data up to the end; which has to lie behind the run, or in its last sector, and where it was, or what was lost
               with a cut file would pass for a hole. */
            const uint64_t size = fq_source_size(s);

            *hole = errno == ENXIO && size >= s->nbytes && host_off + nbytes <= ((size + 511) & ~UINT64_C(511));
            return nbytes;
        }
        if ((uint64_t)data > host_off) {
            *hole = true;
            end = data;
        } else {
            end = lseek(s->fd, (off_t)host_off, SEEK_HOLE);
        }
        if (end > (off_t)host_off && (uint64_t)end - host_off < nbytes)
            return (uint64_t)end - host_off;
    }
#endif
    return nbytes;
}
