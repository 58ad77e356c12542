# cython: freethreading_compatible = True
"""Sources and readers of the core as Python objects.

This floor checks arguments, takes buffers, lets go of the GIL and turns a status into an exception. What it holds on to keeps memory
safe: a Reader holds its source and its backing reader, and a call holds the Reader, so closing an image while another thread reads from
it lets that read finish; the last one out frees.
"""

cimport cython
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.pycapsule cimport PyCapsule_New
from libc.stddef cimport ptrdiff_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from fastqcow cimport _core
from fastqcow._core cimport (
    fq_cipher,
    fq_crypt,
    fq_error,
    fq_extent,
    fq_iovec,
    fq_range,
    fq_reader,
    fq_reader_options,
    fq_request,
    fq_source,
    fq_stats,
    fq_status,
    fq_target,
    fq_write_options,
    fq_written,
    uint8_t,
    uint32_t,
    uint64_t,
)

import os

from fastqcow import errors, locks

UNALLOCATED = <int>_core.FQ_UNALLOCATED
UNALLOCATED_ALLOC = <int>_core.FQ_UNALLOCATED_ALLOC
ZERO = <int>_core.FQ_ZERO
ZERO_ALLOC = <int>_core.FQ_ZERO_ALLOC
DATA = <int>_core.FQ_DATA
COMPRESSED = <int>_core.FQ_COMPRESSED

# Encoders, for _write.
LIBZ = PyCapsule_New(<void *>&_core.fq_encoder_libz, "fastqcow.encoder", NULL)
ZSTD = PyCapsule_New(<void *>&_core.fq_encoder_zstd, "fastqcow.encoder", NULL)

cdef enum:
    # Reads from here on look after signals and so can be interrupted; smaller ones take less than a tenth of a second. (Or a second,
    # of streams that are made to be slow, and then of one cluster of 2 MiB.)
    INTERRUPTIBLE_NBYTES = 1 << 20


cdef class Request:
    """One call of the core: what to poll for, and what a callback raised."""

    def __cinit__(self, progress=None, digest=None):
        self.progress = progress
        self.digest = digest
        self.c.user = <void *>self
        self.c.poll = poll
        if digest is not None:
            self.c.digest = update_digest

    def stopped(self):
        """Whether what is read for it is not wanted any more."""
        return self.exception is not None


# Callbacks are in two parts. An interpreter that is being shut down ends the threads that want the GIL, and one that is gone has none: so
# those that still read then, which daemon threads alone do, have to fail without it. The second part takes it before its first line.
#
# No `return` within `except`, and no `with`: where there is no memory for a traceback, what Cython makes of these reads a null pointer.


cdef int poll(void *user, uint64_t done_nbytes) noexcept nogil:
    return poll_python(user, done_nbytes) if Py_IsInitialized() else 1


cdef int poll_python(void *user, uint64_t done_nbytes) noexcept with gil:
    request = <Request>user
    try:
        if request.exception is None:
            PyErr_CheckSignals()
            if request.progress is not None:
                request.progress(done_nbytes)
    except BaseException as e:
        note(request, e)
    return request.exception is not None


ZEROES = bytes(1 << 20)


cdef int update_digest(void *user, const uint8_t *data, uint64_t nbytes) noexcept nogil:
    return update_digest_python(user, data, nbytes) if Py_IsInitialized() else -1


cdef int update_digest_python(void *user, const uint8_t *data, uint64_t nbytes) noexcept with gil:
    cdef int ret = -1
    request = <Request>user
    try:
        if data == NULL:
            request.digest.update(memoryview(ZEROES)[:nbytes])
        else:
            request.digest.update(PyMemoryView_FromMemory(<char *>data, nbytes, PyBUF_READ))
        ret = 0
    except BaseException as e:
        note(request, e)
    return ret


cdef void note(Request request, exception) noexcept:
    """Keep what a callback raised; of several threads' exceptions the first."""
    with cython.critical_section(request):
        if request.exception is None:
            request.exception = exception


cdef int check(fq_status status, const fq_error *error, Request request, list paths, target=None) except -1:
    """Raise what a status stands for. `paths` names the layers of the chain by depth, each by its image and by the file of its data
    clusters; `target` is what was written."""
    if request is not None and request.exception is not None:
        # It comes before what the core has to say: a Ctrl-C is not lost because some thread met damage at the same time, or because
        # another read came to the same bytes. And the request stays with its caller's frame, which the traceback holds: do not
        # close the circle.
        exception, request.exception = request.exception, None
        raise exception
    if status == _core.FQ_OK:
        return 0
    if status == _core.FQ_ERR_READ or status == _core.FQ_ERR_WRITE:
        name = "os"
    elif status == _core.FQ_ERR_NOMEM:
        name = "memory"
    elif status == _core.FQ_ERR_ARGUMENT or status == _core.FQ_ERR_TOO_LARGE:
        name = "argument"
    else:
        name = "format"
    raise errors.from_core(
        name,
        _core.fq_status_sentence(status).decode(),
        sys_errno=error.sys_errno,
        path=target if status == _core.FQ_ERR_WRITE else paths[error.depth][1 if error.in_data_file else 0],
        guest_off=place(error.guest_off),
        host_off=place(error.host_off),
        value=place(error.value),
    )


cdef object place(uint64_t number):
    return None if number == _core.FQ_NOWHERE else number


include "_source.pxi"


cdef int run_cipher(void *opaque, void *user, fq_cipher cipher, uint8_t *blocks, size_t nbytes) noexcept nogil:
    return run_cipher_python(opaque, user, cipher, blocks, nbytes) if Py_IsInitialized() else -1


cdef int run_cipher_python(void *opaque, void *user, fq_cipher cipher, uint8_t *blocks, size_t nbytes) noexcept with gil:
    cdef int ret = -1
    crypt = <Crypt>opaque
    try:
        out = crypt.ciphers[<int>cipher](PyBytes_FromStringAndSize(<char *>blocks, nbytes))
        if not isinstance(out, bytes) or <size_t>len(out) != nbytes:
            raise ValueError("a cipher returned something else than as many bytes as it was given")
        memcpy(blocks, PyBytes_AS_STRING(out), nbytes)
        ret = 0
    except BaseException as e:
        if user != NULL:
            note(<Request>user, e)
    return ret


cdef class Crypt:
    """How sectors are decrypted. The functions run blocks through a cipher: bytes in, as many bytes out, from any thread.

    mode: "ecb", "cbc", "ctr" or "xts"; vectors: "plain", "plain64" or "essiv"; by_guest_off: sectors are counted from the start of the
    disk, not of the file; data: decrypts; counters: encrypts with the same key; tweaks: encrypts with the second key of XTS;
    vector_keys: encrypts with the key of ESSIV.
    """

    def __init__(self, str mode, str vectors, uint32_t block_nbytes, *, bint by_guest_off, data, counters, tweaks, vector_keys):
        modes = {"ecb": _core.FQ_MODE_ECB, "cbc": _core.FQ_MODE_CBC, "ctr": _core.FQ_MODE_CTR, "xts": _core.FQ_MODE_XTS}
        ivs = {"plain": _core.FQ_IV_PLAIN, "plain64": _core.FQ_IV_PLAIN64, "essiv": _core.FQ_IV_ESSIV}
        self.c.mode = <_core.fq_mode><int>modes[mode]
        self.c.vectors = <_core.fq_iv><int>ivs[vectors]
        self.c.block_nbytes = block_nbytes
        self.c.by_guest_off = by_guest_off
        self.c.run = run_cipher
        self.c.opaque = <void *>self
        self.ciphers = {
            <int>_core.FQ_CIPHER_DATA: data,
            <int>_core.FQ_CIPHER_COUNTERS: counters,
            <int>_core.FQ_CIPHER_TWEAKS: tweaks,
            <int>_core.FQ_CIPHER_VECTORS: vector_keys,
        }

    def decrypt(self, bytes data, uint64_t sector):
        """The plain text of whole sectors, of which the first has this number."""
        cdef Request request = Request()
        cdef fq_error error
        cdef fq_status status
        cdef size_t nbytes = len(data)
        cdef bytes work = PyBytes_FromStringAndSize(NULL, _core.FQ_CRYPT_WORK_NBYTES)
        cdef bytes out = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data), nbytes)
        cdef uint8_t *to = <uint8_t *>PyBytes_AS_STRING(out)
        cdef uint8_t *scratch = <uint8_t *>PyBytes_AS_STRING(work)

        error.depth = 0
        error.in_data_file = False
        error.guest_off = error.host_off = error.value = _core.FQ_NOWHERE
        with nogil:
            status = _core.fq_crypt_decrypt(&self.c, <void *>request, to, nbytes, sector, scratch)
        check(status, &error, request, [(None, None)])
        return out


@cython.no_gc_clear  # C holds pointers into the source and the backing reader until the end
cdef class Reader:
    """One layer of an image, with those below it: guest bytes by position."""

    def __init__(self):
        raise TypeError("a Reader is made by raw or qcow2")

    def __dealloc__(self):
        with nogil:  # it waits for a worker that is still inflating ahead
            _core.fq_reader_close(self.c)

    @staticmethod
    cdef Reader create(Source source, Source data, Reader backing, uint64_t size):
        cdef Reader self = Reader.__new__(Reader)
        self.source = source
        self.data = data
        self.backing = backing
        self.size = size
        self.paths = [(source.path, data.path)] + (backing.paths if backing is not None else [])
        self.calls_python = source.file is not None or data.file is not None or (backing is not None and backing.calls_python)
        return self

    @staticmethod
    def raw(
        Source source, uint64_t size, *, unsigned threads, size_t largest_cluster, size_t cluster_cache_nbytes, size_t table_cache_nbytes
    ):
        """`size`: of the disk; the file's, or that in whole sectors."""
        cdef Reader self = Reader.create(source, source, None, size)
        cdef fq_reader_options options
        cdef fq_error error

        memset(&options, 0, sizeof(options))
        options.size = self.size
        options.threads = self.threads = threads
        options.largest_cluster = largest_cluster
        options.cluster_cache_nbytes = cluster_cache_nbytes
        options.table_cache_nbytes = table_cache_nbytes
        check(_core.fq_reader_open_raw(source.c, &options, &self.c, &error), &error, None, self.paths)
        return self

    @staticmethod
    def qcow2(
        Source source,
        Source data,
        Reader backing,
        Reader sibling,
        Crypt crypt,
        *,
        uint32_t version,
        uint32_t cluster_bits,
        bint extended_l2,
        int codec,
        uint64_t size,
        uint64_t l1_off,
        uint32_t l1_entries,
        unsigned threads,
        size_t largest_cluster,
        size_t cluster_cache_nbytes,
        size_t table_cache_nbytes,
    ):
        """`data`: where the data clusters are, if not in the image's own file; `sibling`: a reader of the same file, to share caches;
        `crypt`: how data clusters are decrypted, if they are encrypted."""
        cdef Reader self = Reader.create(source, data or source, backing, size)
        cdef Request request = Request()
        cdef fq_reader *below = backing.c if backing is not None else NULL
        cdef fq_reader *beside = sibling.c if sibling is not None else NULL
        cdef fq_source *outside = data.c if data is not None else NULL
        cdef fq_reader_options options
        cdef fq_error error
        cdef fq_status status

        memset(&options, 0, sizeof(options))
        options.geometry.version = version
        options.geometry.cluster_bits = cluster_bits
        options.geometry.extended_l2 = extended_l2
        options.geometry.external_data = data is not None
        options.geometry.codec = <_core.fq_codec>codec
        options.size = size
        options.l1_off = l1_off
        options.l1_entries = l1_entries
        options.threads = self.threads = threads
        options.largest_cluster = largest_cluster
        options.cluster_cache_nbytes = cluster_cache_nbytes
        options.table_cache_nbytes = table_cache_nbytes
        if crypt is not None:
            self.crypt = crypt
            self.calls_python = True
            options.crypt = crypt.c
        self.enter()
        with nogil:
            status = _core.fq_reader_open_qcow2(source.c, outside, below, beside, &options, &request.c, &self.c, &error)
        check(status, &error, request, self.paths)
        return self

    cdef int enter(self) except -1:
        """As that of its sources, and of those below."""
        cdef Reader layer = self

        if file_calls != NULL:
            while layer is not None:
                layer.source.enter()
                layer.data.enter()
                layer = layer.backing
        return 0

    cdef int read(self, const fq_iovec *iov, size_t niov, uint64_t guest_off, size_t nbytes) except -1:
        """The read itself. A small one that cannot call Python back does without a request."""
        cdef Request request = None
        cdef fq_request *c = NULL
        cdef fq_status status
        cdef fq_error error

        if self.calls_python or nbytes >= INTERRUPTIBLE_NBYTES:
            request = Request()
            c = &request.c
        self.enter()
        with nogil:
            status = _core.fq_reader_preadv(self.c, iov, niov, guest_off, c, &error)
        if status != _core.FQ_OK or request is not None:
            check(status, &error, request, self.paths)
        return 0

    def pread(self, Py_ssize_t nbytes, guest_off):
        """Up to nbytes at guest_off as bytes; short only at the end of the disk."""
        cdef uint64_t off = check_offset(guest_off)
        cdef fq_iovec iov

        if nbytes < 0:
            raise ValueError(f"the number of bytes to read is {nbytes}; it cannot be negative")
        if off >= self.size:
            return b""
        if <uint64_t>nbytes > self.size - off:
            nbytes = self.size - off
        data = PyBytes_FromStringAndSize(NULL, nbytes)
        iov.base = <uint8_t *>PyBytes_AS_STRING(data)
        iov.nbytes = nbytes
        iov.start = 0
        self.read(&iov, 1, off, nbytes)
        return data

    def preadv(self, buffers, guest_off):
        """Fill the writable buffers in turn from guest_off on; returns the count, short only at the end of the disk."""
        cdef uint64_t off = check_offset(guest_off), room = self.size - off if off < self.size else 0
        cdef size_t count = len(buffers), taken = 0, start = 0
        cdef fq_iovec *iov = <fq_iovec *>calloc(count + 1, sizeof(fq_iovec))
        cdef Py_buffer *views = <Py_buffer *>calloc(count + 1, sizeof(Py_buffer))

        try:
            if iov == NULL or views == NULL:
                raise MemoryError
            for i in range(count):
                PyObject_GetBuffer(buffers[i], &views[i], PyBUF_WRITABLE)
                taken += 1
                iov[i].base = <uint8_t *>views[i].buf
                iov[i].nbytes = min(<uint64_t>views[i].len, room - start)
                iov[i].start = start
                start += iov[i].nbytes
            if start:
                self.read(iov, count, off, start)
        finally:
            for i in range(taken):
                PyBuffer_Release(&views[i])
            free(views)
            free(iov)
        return start

    def extents(self, uint64_t guest_off, uint64_t end, size_t capacity):
        """Up to `capacity` extents as (guest_off, nbytes, host_off or None, depth, kind)."""
        cdef Request request = Request()
        cdef fq_extent *found = <fq_extent *>calloc(capacity + 1, sizeof(fq_extent))
        cdef fq_error error
        cdef fq_status status
        cdef size_t count

        if found == NULL:
            raise MemoryError
        try:
            self.enter()
            with nogil:
                status = _core.fq_reader_map(self.c, guest_off, end, found, capacity, &count, &request.c, &error)
            check(status, &error, request, self.paths)
            return [
                (found[i].guest_off, found[i].nbytes, place(found[i].host_off), found[i].depth, <int>found[i].kind)
                for i in range(count)
            ]
        finally:
            free(found)

    def export(self, int fd, path, uint64_t grain, bint reads_zero, bint offload, progress, digest):
        """Write the whole disk to a descriptor, by position; `path` is its name in errors. progress is called with the bytes done, the
        `update` of `digest`, if it is not None, with all bytes in their order.

        Returns the bytes written as data.
        """
        cdef Request request = Request(progress, digest)
        cdef fq_target target
        cdef uint64_t written
        cdef fq_error error
        cdef fq_status status

        target.fd = fd
        target.grain = grain
        target.reads_zero = reads_zero
        target.offload = offload
        self.enter()
        with nogil:
            status = _core.fq_export(self.c, 0, self.size, &target, &written, &request.c, &error)
        check(status, &error, request, self.paths, path)
        return written

    def stats(self):
        cdef fq_stats stats

        _core.fq_reader_stats(self.c, &stats)
        return stats


cdef uint64_t check_offset(guest_off) except? 0xffffffffffffffff:
    if guest_off < 0:
        raise ValueError(f"the offset is {guest_off}; it cannot be negative")
    return min(guest_off, 0x7fffffffffffffff)


cdef fq_status write(
    fq_reader *reader,
    int stream,
    fq_reader *backing,
    const fq_write_options *options,
    fq_written *written,
    const fq_request *request,
    fq_error *error,
) noexcept nogil:
    return _core.fq_write(reader, stream, backing, options, written, request, error)
