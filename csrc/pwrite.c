/*
 * pwrite.c - bytes to a descriptor, whole or not at all, and what of them need not go there
 */
#include "internal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

bool fq_is_zero(const uint8_t *p, size_t nbytes)
{
    const size_t head = nbytes < 16 ? nbytes : 16;

    for (size_t i = 0; i < head; i++)
        if (p[i])
            return false;
    return nbytes == head || memcmp(p, p + head, nbytes - head) == 0;
}

fq_status fq_pwrite(int fd, const uint8_t *p, size_t nbytes, uint64_t off, size_t *done, fq_error *error)
{
    *done = 0;
    while (*done < nbytes) {
        const ssize_t n = pwrite(fd, p + *done, nbytes - *done, (off_t)(off + *done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            const int sys_errno = n < 0 ? errno : EIO;

            fq_fail(error, FQ_ERR_WRITE, off + *done, FQ_NOWHERE, FQ_NOWHERE);
            error->sys_errno = sys_errno;
            return FQ_ERR_WRITE;
        }
        *done += (size_t)n;
    }
    return FQ_OK;
}
