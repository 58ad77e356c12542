# cython: freethreading_compatible = True
"""An L2 table's bytes to columns, for readers that walk tables themselves."""

from array import array

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

from fastqcow cimport _core
from fastqcow._core cimport fq_geometry, fq_l2_parse, uint8_t, uint32_t, uint64_t


# The values of `kind`; from INVALID on, INVALID + a status code of the core, which sentence() words.
UNALLOCATED = <int>_core.FQ_UNALLOCATED
UNALLOCATED_ALLOC = <int>_core.FQ_UNALLOCATED_ALLOC
ZERO = <int>_core.FQ_ZERO
ZERO_ALLOC = <int>_core.FQ_ZERO_ALLOC
DATA = <int>_core.FQ_DATA
COMPRESSED = <int>_core.FQ_COMPRESSED
INVALID = <int>_core.FQ_KIND_COUNT


def sentence(int kind):
    cdef int status = kind - <int>_core.FQ_KIND_COUNT
    return _core.fq_status_sentence(<_core.fq_status>status).decode()


def parse(table, int cluster_bits, bint extended, int version):
    cdef fq_geometry geometry
    cdef Py_buffer view
    cdef uint8_t[::1] kind
    cdef uint64_t[::1] host_off
    cdef uint32_t[::1] in_nbytes
    cdef size_t entries, rows

    if not 9 <= cluster_bits <= 21 or (extended and cluster_bits < 14):
        raise ValueError(f"cluster_bits is {cluster_bits}; it can be {14 if extended else 9} to 21")
    if version not in (2, 3) or (extended and version == 2):
        raise ValueError(f"version is {version}; it can be 2 or 3, and 3 only with extended L2 entries")
    geometry.version = version
    geometry.cluster_bits = cluster_bits
    geometry.extended_l2 = extended
    geometry.codec = _core.FQ_CODEC_DEFLATE
    PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
    try:
        if view.len % (16 if extended else 8):
            raise ValueError(f"the table has {view.len} bytes, which is not a multiple of {16 if extended else 8}")
        entries = <size_t>view.len // (16 if extended else 8)
        rows = entries * (32 if extended else 1)
        kinds, offsets, lengths = array("B", bytes(rows)), array("Q", bytes(8 * rows)), array("I", bytes(4 * rows))
        if rows:
            kind, host_off, in_nbytes = kinds, offsets, lengths
            with nogil:
                fq_l2_parse(&geometry, <const uint8_t *>view.buf, entries, &kind[0], &host_off[0], &in_nbytes[0])
    finally:
        PyBuffer_Release(&view)
    return kinds, offsets, lengths
