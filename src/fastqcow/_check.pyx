# cython: freethreading_compatible = True
"""Checks of an image's refcounts as Python objects."""

cimport cython
from libc.string cimport memset

from fastqcow cimport _core
from fastqcow._core cimport fq_check, fq_check_counts, fq_check_options, fq_error, fq_finding, fq_l1_range, fq_role, fq_status
from fastqcow._core cimport uint32_t, uint64_t
from fastqcow._reader cimport Py_IsInitialized, Request, Source, check, note, place

HEADER = <int>_core.FQ_ROLE_HEADER
REFCOUNT_TABLE = <int>_core.FQ_ROLE_REFCOUNT_TABLE
L1 = <int>_core.FQ_ROLE_L1
SNAPSHOT_L1 = <int>_core.FQ_ROLE_SNAPSHOT_L1
OTHER = <int>_core.FQ_ROLE_OTHER
DATA = <int>_core.FQ_ROLE_DATA

CORRUPTION = <int>_core.FQ_CORRUPTION
LEAK = <int>_core.FQ_LEAK
CHECK_ERROR = <int>_core.FQ_CHECK_ERROR
OVERLAP = <int>_core.FQ_OVERLAP

REPORTS_MAX = <int>_core.FQ_CHECK_REPORTS_MAX


cdef void report_finding(void *opaque, const fq_finding *found, uint64_t times) noexcept nogil:
    if Py_IsInitialized():
        report_finding_python(opaque, found, times)


cdef void report_finding_python(void *opaque, const fq_finding *found, uint64_t times) noexcept with gil:
    checker = <Checker>opaque
    if checker.request.exception is not None:
        return
    try:
        checker.report(
            <int>_core.fq_finding_severity(found.kind),
            _core.fq_finding_sentence(found.kind).decode(),
            place(found.guest_off),
            place(found.host_off),
            place(found.value),
            place(found.refcount),
            place(found.references),
            times,
        )
    except BaseException as e:
        note(checker.request, e)


@cython.no_gc_clear  # C holds a pointer into the source until the end
cdef class Checker:
    """One check of one file: name what the header speaks of by `use` and `l1`, then `finish`. By one thread.

    report: called with (severity, sentence, guest_off, host_off, value, refcount, references, times) of each finding; the numbers are
    None where they mean nothing.
    """

    cdef fq_check *c
    cdef Source source
    cdef Request request
    cdef object report

    def __init__(
        self,
        Source source,
        report,
        *,
        uint32_t version,
        uint32_t cluster_bits,
        bint extended_l2,
        bint external_data,
        uint32_t refcount_order,
        uint64_t refcount_table_off,
        uint32_t refcount_table_entries,
    ):
        cdef fq_check_options options
        cdef fq_error error
        cdef fq_status status

        if self.c != NULL:
            raise ValueError("a Checker is made once")
        self.source = source
        self.report = report
        self.request = Request()
        memset(&options, 0, sizeof(options))
        options.geometry.version = version
        options.geometry.cluster_bits = cluster_bits
        options.geometry.extended_l2 = extended_l2
        options.geometry.external_data = external_data
        options.refcount_order = refcount_order
        options.refcount_table_off = refcount_table_off
        options.refcount_table_entries = refcount_table_entries
        options.report = report_finding
        options.opaque = <void *>self
        with nogil:
            status = _core.fq_check_open(source.c, &options, &self.request.c, &self.c, &error)
        check(status, &error, self.request, [(source.path, source.path)])

    def __dealloc__(self):
        _core.fq_check_close(self.c)

    cdef int is_open(self) except -1:
        if self.c == NULL:
            raise ValueError("this Checker was not made")
        return 0

    def use(self, int role, uint64_t host_off, uint64_t nbytes, uint64_t times):
        """Count so many references to a range of the file."""
        cdef fq_error error
        cdef fq_status status

        self.is_open()
        with nogil:
            status = _core.fq_check_use(self.c, <fq_role>role, host_off, nbytes, times, &error)
        check(status, &error, self.request, [(self.source.path, self.source.path)])

    def l1(self, uint64_t l1_off, uint64_t entries, uint64_t l1_index, uint32_t active, uint32_t inactive):
        """Check L1 entries that lie side by side: of `active` and `inactive` tables, the former from its entry l1_index on."""
        cdef fq_l1_range found
        cdef fq_error error
        cdef fq_status status

        self.is_open()
        found.l1_off = l1_off
        found.entries = entries
        found.l1_index = l1_index
        found.active = active
        found.inactive = inactive
        with nogil:
            status = _core.fq_check_l1(self.c, &found, &self.request.c, &error)
        check(status, &error, self.request, [(self.source.path, self.source.path)])

    def bitmap(self, uint64_t table_off, uint64_t entries, uint32_t times):
        """Check entries of bitmaps' tables that lie side by side, and belong to so many of them."""
        cdef fq_error error
        cdef fq_status status

        self.is_open()
        with nogil:
            status = _core.fq_check_bitmap(self.c, table_off, entries, times, &self.request.c, &error)
        check(status, &error, self.request, [(self.source.path, self.source.path)])

    def finish(self):
        """The rest; returns the counts by their names."""
        cdef fq_error error
        cdef fq_status status

        self.is_open()
        with nogil:
            status = _core.fq_check_finish(self.c, &self.request.c, &error)
        check(status, &error, self.request, [(self.source.path, self.source.path)])
        return _core.fq_check_result(self.c)[0]
