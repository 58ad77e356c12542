# cython: freethreading_compatible = True
"""A disk to the clusters and tables of an image."""

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.string cimport memset

from fastqcow cimport _core, _reader
from fastqcow._core cimport fq_encoder, fq_error, fq_reader, fq_status, fq_write_options, fq_written, uint32_t, uint64_t
from fastqcow._reader cimport Reader, Request, check


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
    encoder,
    int level,
    uint64_t grain,
    unsigned threads,
    size_t tables_nbytes,
):
    """Write the disk of a reader, or where that is None what comes from the descriptor `stream`, to the descriptor `fd`, all but the
    header. The paths are their names in errors; progress is called with the bytes done, the `update` of `digest`, if it is not None, with
    the bytes of the disk. encoder: LIBZ or ZSTD of _reader, ENCODER of _isal, or None to store clusters as they are.

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
    if encoder is not None:
        options.encoder = <const fq_encoder *>PyCapsule_GetPointer(encoder, "fastqcow.encoder")
    options.level = level
    options.grain = grain
    options.threads = threads
    options.tables_nbytes = tables_nbytes
    for layers in (reader, backing):
        if layers is not None:
            (<Reader>layers).enter()
    with nogil:
        status = _reader.write(of, stream, over, &options, &written, &request.c, &error)
    if status != _core.FQ_OK and error.in_backing:
        paths = backing.paths
    else:
        paths = reader.paths if reader is not None else [(stream_path, stream_path)]
    check(status, &error, request, paths, path)
    return written
