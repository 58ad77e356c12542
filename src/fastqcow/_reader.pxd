# What the modules beside _reader use of it: sources, how calls of the core are made and their failures raised, and what works with the
# threads of the readers, of which a process has one pool: so that part of the core is linked into _reader alone.

from libc.stddef cimport ptrdiff_t

from fastqcow._core cimport (
    fq_crypt,
    fq_error,
    fq_iovec,
    fq_range,
    fq_reader,
    fq_request,
    fq_source,
    fq_status,
    fq_write_options,
    fq_written,
    uint8_t,
    uint64_t,
)


cdef extern from "Python.h":
    bint Py_IsInitialized() noexcept nogil


cdef class Request:
    cdef fq_request c
    cdef object exception
    cdef object progress
    cdef object digest


cdef class Source:
    cdef fq_source *c
    cdef int fd
    cdef object file
    cdef object lock
    cdef readonly str path
    cdef readonly bint has_path

    cdef int enter(self) except -1
    cdef ptrdiff_t read_file(self, uint8_t *buf, size_t nbytes, uint64_t host_off) except -1
    cdef int read_ranges(self, fq_range *ranges, size_t count, Request request) except -1


cdef class Crypt:
    cdef fq_crypt c
    cdef dict ciphers


cdef class Reader:
    cdef fq_reader *c
    cdef readonly Source source
    cdef readonly Source data
    cdef readonly Reader backing
    cdef Crypt crypt
    cdef readonly uint64_t size
    cdef readonly unsigned threads
    cdef list paths
    cdef bint calls_python

    @staticmethod
    cdef Reader create(Source source, Source data, Reader backing, uint64_t size)
    cdef int enter(self) except -1
    cdef int read(self, const fq_iovec *iov, size_t niov, uint64_t guest_off, size_t nbytes) except -1


cdef void note(Request request, exception) noexcept
cdef int check(fq_status status, const fq_error *error, Request request, list paths, target=*) except -1
cdef object place(uint64_t number)
cdef fq_status write(
    fq_reader *reader,
    int stream,
    fq_reader *backing,
    const fq_write_options *options,
    fq_written *written,
    const fq_request *request,
    fq_error *error,
) noexcept nogil
