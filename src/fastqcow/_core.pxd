# The declarations of csrc/fastqcow.h, where everything is documented. The contract of this boundary:
#
# * Everything here is called without the GIL, but for the *_new, *_free and fq_check_close functions, which do not block.
# * A callback given to the core (fq_read_fn, fq_cipher_fn, poll, report) takes the GIL itself, raises nothing, and leaves its exception
#   in the object that fq_request.user points to.
# * Pointers given to the core stay valid until the call returns; sources and backing readers until the reader is closed. The objects
#   of _reader.pyx hold references to see to that.

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "fastqcow.h" nogil:
    ctypedef enum fq_status:
        FQ_OK
        FQ_ERR_NOMEM
        FQ_ERR_ARGUMENT
        FQ_ERR_READ
        FQ_ERR_WRITE
        FQ_ERR_SOURCE
        FQ_ERR_CANCELLED
        FQ_ERR_TOO_LARGE
        FQ_STATUS_COUNT

    const char *fq_status_sentence(fq_status status)

    const uint64_t FQ_NOWHERE

    ctypedef struct fq_error:
        fq_status status
        int sys_errno
        uint32_t depth
        bint in_data_file
        bint in_backing
        uint64_t guest_off
        uint64_t host_off
        uint64_t value

    ctypedef enum fq_codec:
        FQ_CODEC_DEFLATE
        FQ_CODEC_DEFLATE_LIBZ
        FQ_CODEC_ZSTD

    fq_status fq_inflate(fq_codec codec, const uint8_t *in_, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
    const char *fq_version_libdeflate()
    const char *fq_version_libz()
    const char *fq_version_libzstd()

    enum:
        FQ_SECTOR_NBYTES
        FQ_CRYPT_WORK_NBYTES

    ctypedef enum fq_mode:
        FQ_MODE_ECB
        FQ_MODE_CBC
        FQ_MODE_CTR
        FQ_MODE_XTS

    ctypedef enum fq_iv:
        FQ_IV_PLAIN
        FQ_IV_PLAIN64
        FQ_IV_ESSIV

    ctypedef enum fq_cipher:
        FQ_CIPHER_DATA
        FQ_CIPHER_COUNTERS
        FQ_CIPHER_TWEAKS
        FQ_CIPHER_VECTORS

    ctypedef int (*fq_cipher_fn)(void *opaque, void *user, fq_cipher cipher, uint8_t *blocks, size_t nbytes) noexcept

    ctypedef struct fq_crypt:
        fq_mode mode
        fq_iv vectors
        uint32_t block_nbytes
        bint by_guest_off
        fq_cipher_fn run
        void *opaque

    fq_status fq_crypt_decrypt(const fq_crypt *crypt, void *user, uint8_t *buf, size_t nbytes, uint64_t sector, uint8_t *work)

    ctypedef enum fq_kind:
        FQ_UNALLOCATED
        FQ_UNALLOCATED_ALLOC
        FQ_ZERO
        FQ_ZERO_ALLOC
        FQ_DATA
        FQ_COMPRESSED
        FQ_KIND_COUNT

    ctypedef struct fq_geometry:
        uint32_t version
        uint32_t cluster_bits
        bint extended_l2
        bint external_data
        fq_codec codec

    void fq_l2_parse(const fq_geometry *geometry, const uint8_t *table, size_t entries, uint8_t *kind, uint64_t *host_off,
                     uint32_t *in_nbytes)

    ctypedef struct fq_request:
        void *user
        int (*poll)(void *user, uint64_t done_nbytes) noexcept
        int (*digest)(void *user, const uint8_t *data, uint64_t nbytes) noexcept

    ctypedef struct fq_source
    ctypedef ptrdiff_t (*fq_read_fn)(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off) noexcept

    ctypedef struct fq_range:
        uint64_t host_off
        size_t nbytes
        uint8_t *buf
        size_t got

    ctypedef int (*fq_ranges_fn)(void *opaque, void *user, fq_range *ranges, size_t count) noexcept
    fq_source *fq_source_fd(int fd, bint seek_holes)
    fq_source *fq_source_callback(fq_read_fn read, void *opaque, uint64_t nbytes)
    fq_source *fq_source_remote(fq_ranges_fn read, void *opaque, uint64_t nbytes)
    void fq_source_free(fq_source *source)
    fq_status fq_source_read(fq_source *source, const fq_request *request, uint8_t *buf, size_t nbytes, uint64_t host_off, size_t *got,
                             fq_error *error)
    uint64_t fq_source_size(const fq_source *source)

    ctypedef struct fq_reader

    ctypedef struct fq_iovec:
        uint8_t *base
        size_t nbytes
        uint64_t start

    ctypedef struct fq_reader_options:
        fq_geometry geometry
        uint64_t size
        uint64_t l1_off
        uint32_t l1_entries
        size_t largest_cluster
        size_t cluster_cache_nbytes
        size_t table_cache_nbytes
        unsigned threads
        fq_crypt crypt

    fq_status fq_reader_open_qcow2(fq_source *source, fq_source *data, fq_reader *backing, fq_reader *sibling,
                                   const fq_reader_options *options, const fq_request *request, fq_reader **out, fq_error *error)
    fq_status fq_reader_open_raw(fq_source *source, const fq_reader_options *options, fq_reader **out, fq_error *error)
    void fq_reader_close(fq_reader *reader)
    fq_status fq_reader_preadv(fq_reader *reader, const fq_iovec *iov, size_t niov, uint64_t guest_off, const fq_request *request,
                               fq_error *error)

    ctypedef struct fq_extent:
        uint64_t guest_off
        uint64_t nbytes
        uint64_t host_off
        uint32_t depth
        fq_kind kind

    fq_status fq_reader_map(fq_reader *reader, uint64_t guest_off, uint64_t end, fq_extent *extents, size_t capacity, size_t *count,
                            const fq_request *request, fq_error *error)

    ctypedef struct fq_stats:
        uint64_t clusters_inflated
        uint64_t cache_hits
        uint64_t bytes_fetched
        uint64_t bytes_returned

    void fq_reader_stats(const fq_reader *reader, fq_stats *stats)

    ctypedef struct fq_target:
        int fd
        uint64_t grain
        bint reads_zero
        bint offload

    fq_status fq_export(fq_reader *reader, uint64_t guest_off, uint64_t nbytes, const fq_target *target, uint64_t *written,
                        const fq_request *request, fq_error *error)

    ctypedef struct fq_encoder:
        int level_min
        int level_max

    const fq_encoder fq_encoder_libz
    const fq_encoder fq_encoder_zstd
    const fq_encoder fq_encoder_isal
    const char *fq_version_isal()

    ctypedef struct fq_write_options:
        int fd
        fq_geometry geometry
        uint32_t refcount_order
        const fq_encoder *encoder
        int level
        uint64_t grain
        unsigned threads
        size_t tables_nbytes

    ctypedef struct fq_written:
        uint64_t size
        uint64_t nbytes
        uint64_t data_nbytes
        uint64_t compressed
        uint64_t plain
        uint64_t zero
        uint64_t l1_off
        uint64_t refcount_table_off
        uint32_t l1_entries
        uint32_t refcount_table_clusters

    fq_status fq_write(fq_reader *reader, int stream, fq_reader *backing, const fq_write_options *options, fq_written *written,
                       const fq_request *request, fq_error *error)

    ctypedef enum fq_severity:
        FQ_CORRUPTION
        FQ_LEAK
        FQ_CHECK_ERROR
        FQ_OVERLAP

    enum:
        FQ_CHECK_REPORTS_MAX

    ctypedef enum fq_finding_kind:
        pass

    const char *fq_finding_sentence(fq_finding_kind kind)
    fq_severity fq_finding_severity(fq_finding_kind kind)

    ctypedef struct fq_finding:
        fq_finding_kind kind
        uint64_t guest_off
        uint64_t host_off
        uint64_t value
        uint64_t refcount
        uint64_t references

    ctypedef enum fq_role:
        FQ_ROLE_HEADER
        FQ_ROLE_L1
        FQ_ROLE_SNAPSHOT_L1
        FQ_ROLE_REFCOUNT_TABLE
        FQ_ROLE_OTHER
        FQ_ROLE_DATA

    ctypedef struct fq_check

    ctypedef struct fq_check_options:
        fq_geometry geometry
        uint32_t refcount_order
        uint32_t refcount_table_entries
        uint64_t refcount_table_off
        void (*report)(void *opaque, const fq_finding *found, uint64_t times) noexcept
        void *opaque

    ctypedef struct fq_check_counts:
        uint64_t corruptions
        uint64_t leaks
        uint64_t check_errors
        uint64_t overlaps
        uint64_t allocated_clusters
        uint64_t compressed_clusters
        uint64_t fragmented_clusters
        uint64_t image_end_off
        uint64_t not_reported

    ctypedef struct fq_l1_range:
        uint64_t l1_off
        uint64_t entries
        uint64_t l1_index
        uint32_t active
        uint32_t inactive

    fq_status fq_check_open(fq_source *source, const fq_check_options *options, const fq_request *request, fq_check **out,
                            fq_error *error)
    void fq_check_close(fq_check *check)
    fq_status fq_check_use(fq_check *check, fq_role role, uint64_t host_off, uint64_t nbytes, uint64_t times, fq_error *error)
    fq_status fq_check_l1(fq_check *check, const fq_l1_range *range, const fq_request *request, fq_error *error)
    fq_status fq_check_bitmap(fq_check *check, uint64_t table_off, uint64_t entries, uint32_t times, const fq_request *request,
                              fq_error *error)
    fq_status fq_check_finish(fq_check *check, const fq_request *request, fq_error *error)
    const fq_check_counts *fq_check_result(const fq_check *check)
