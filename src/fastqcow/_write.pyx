# cython: freethreading_compatible = True
"""A disk to the clusters and tables of an image."""

from libc.string cimport memset

from fastqcow cimport _core
from fastqcow._core cimport fq_error, fq_reader, fq_status, fq_write_options, fq_written, uint32_t
from fastqcow._reader cimport Reader, Request, check

NONE = <int>_core.FQ_ENCODING_NONE
LIBZ = <int>_core.FQ_ENCODING_LIBZ
ISAL = <int>_core.FQ_ENCODING_ISAL
ZSTD = <int>_core.FQ_ENCODING_ZSTD


def write(
    Reader reader,
    int stream,
    str stream_path,
    Reader backing,
    int fd,
    str path,
    progress,
    digest,
    *,
    uint32_t version,
    uint32_t cluster_bits,
    bint extended_l2,
    uint32_t refcount_order,
    int encoding,
    int level,
    bint dense,
    unsigned threads,
    size_t tables_nbytes,
):
    """Write the disk of a reader, or where that is None what comes from the descriptor `stream`, to the descriptor `fd`, all but the
    header. The paths are their names in errors; progress is called with the bytes done, the `update` of
    `digest`, if it is not None, with the bytes of the disk.

    Returns the fields of fq_written.
    """
    cdef Request request = Request(progress, digest)
    cdef fq_reader *of = reader.c if reader is not None else NULL
    cdef fq_reader *over = backing.c if backing is not None else NULL
    cdef fq_write_options options
    cdef fq_written written
    cdef fq_error error
    cdef fq_status status
    cdef list paths

    memset(&options, 0, sizeof(options))
    options.fd = fd
    options.geometry.version = version
    options.geometry.cluster_bits = cluster_bits
    options.geometry.extended_l2 = extended_l2
    options.refcount_order = refcount_order
    options.encoding = <_core.fq_encoding>encoding
    options.level = level
    options.dense = dense
    options.threads = threads
    options.tables_nbytes = tables_nbytes
    with nogil:
        status = _core.fq_write(of, stream, over, &options, &written, &request.c, &error)
    if written.in_backing:
        paths = backing.paths
    else:
        paths = reader.paths if reader is not None else [(stream_path, stream_path)]
    check(status, &error, request, paths, path)
    return written


def isal_version():
    cdef const char *isal = _core.fq_version_isal()
    return isal.decode() if isal != NULL else None
