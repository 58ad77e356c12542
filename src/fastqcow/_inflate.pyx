# cython: freethreading_compatible = True
"""One compressed cluster to one cluster."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from fastqcow cimport _core
from fastqcow._core cimport fq_codec, fq_status, uint8_t

from fastqcow import errors

DEFLATE = <int>_core.FQ_CODEC_DEFLATE
DEFLATE_LIBZ = <int>_core.FQ_CODEC_DEFLATE_LIBZ
ZSTD = <int>_core.FQ_CODEC_ZSTD

# QEMU's clusters have 2 MiB at most; other readers may have reasons for more.
OUT_NBYTES_MAX = 1 << 30


cdef inflate_buffer(int codec, data, uint8_t *out, size_t out_nbytes):
    cdef Py_buffer view
    cdef fq_status status

    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            status = _core.fq_inflate(<fq_codec>codec, <const uint8_t *>view.buf, view.len, out, out_nbytes)
    finally:
        PyBuffer_Release(&view)
    if status == _core.FQ_ERR_NOMEM:
        raise MemoryError
    if status == _core.FQ_ERR_ARGUMENT:
        raise ValueError("the data or the buffer is larger than a cluster can be")
    if status != _core.FQ_OK:
        raise errors.FormatError(_core.fq_status_sentence(status).decode())


def inflate(data, Py_ssize_t out_nbytes, int codec):
    if not 0 <= out_nbytes <= OUT_NBYTES_MAX:
        raise ValueError(f"cluster_size is {out_nbytes}; it can be 0 to {OUT_NBYTES_MAX}")
    out = PyBytes_FromStringAndSize(NULL, out_nbytes)
    inflate_buffer(codec, data, <uint8_t *>PyBytes_AS_STRING(out), out_nbytes)
    return out


def inflate_into(data, out, int codec):
    cdef Py_buffer view

    PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
    try:
        inflate_buffer(codec, data, <uint8_t *>view.buf, view.len)
        return view.len
    finally:
        PyBuffer_Release(&view)


def versions():
    cdef const char *libdeflate = _core.fq_version_libdeflate()
    return {
        "libdeflate": libdeflate.decode() if libdeflate != NULL else None,
        "libz": _core.fq_version_libz().decode(),
        "libzstd": _core.fq_version_libzstd().decode(),
    }
