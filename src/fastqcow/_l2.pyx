# cython: freethreading_compatible = True
"""An L2 table's bytes to columns, for readers that walk tables themselves."""

from cpython cimport array
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

from fastqcow cimport _core
from fastqcow._core cimport fq_geometry, fq_l2_parse, uint8_t, uint32_t, uint64_t

import array


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
    cdef array.array kind, host_off, in_nbytes
    cdef size_t entries, rows

    if not 9 <= cluster_bits <= 21 or (extended and cluster_bits < 14):
        raise ValueError(f"cluster_bits is {cluster_bits}; it can be {14 if extended else 9} to 21")
    if version not in (2, 3) or (extended and version == 2):
        raise ValueError(f"version is {version}; it can be 2 or 3, and 3 only with extended L2 entries")
    geometry.version = version
    geometry.cluster_bits = cluster_bits
    geometry.extended_l2 = extended
    geometry.external_data = False
    geometry.codec = _core.FQ_CODEC_DEFLATE
    PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
    try:
        if view.len % (16 if extended else 8):
            raise ValueError(f"the table has {view.len} bytes, which is not a multiple of {16 if extended else 8}")
        entries = <size_t>view.len // (16 if extended else 8)
        rows = entries * (32 if extended else 1)
        # The C types are those of the typecodes on every platform that has wheels: char, long long and int.
        kind = array.clone(array.array("B"), rows, False)
        host_off = array.clone(array.array("Q"), rows, False)
        in_nbytes = array.clone(array.array("I"), rows, False)
        with nogil:
            fq_l2_parse(
                &geometry,
                <const uint8_t *>view.buf,
                entries,
                <uint8_t *>kind.data.as_uchars,
                <uint64_t *>host_off.data.as_ulonglongs,
                <uint32_t *>in_nbytes.data.as_uints,
            )
    finally:
        PyBuffer_Release(&view)
    return kind, host_off, in_nbytes
