/*
 * fastqcow.h - the whole interface of the core
 *
 * The core reads guest bytes out of qcow2 images and knows nothing of Python: it is told where bytes come from (a source),
 * what an image's header said (options, already checked against their limits by the caller), and where bytes go (buffers, or
 * a descriptor). Everything is documented here, once; the .c files say why they do it the way they do.
 *
 * Words: a guest offset (guest_off) is a place on the virtual disk, a host offset (host_off) a place in the file that holds it;
 * in_nbytes counts compressed bytes, out_nbytes inflated ones. All counts are bytes. "Layer" is one file of a backing chain,
 * depth 0 being the image that was asked for.
 *
 * Errors are values. Every function that can fail returns an fq_status and, where it takes an fq_error, fills it with the place.
 *
 * Threads: a source, a reader and their caches may be used by any number of threads at once. A reader and everything that it was
 * given (source, backing reader) must outlive the calls made on it; the core counts no references to them.
 */
#ifndef FASTQCOW_H
#define FASTQCOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Every way to fail, each with the sentence that a person is shown. */
#define FQ_STATUSES(X)                                                                                        \
    X(FQ_OK, "no error")                                                                                      \
    X(FQ_ERR_NOMEM, "not enough memory")                                                                      \
    X(FQ_ERR_ARGUMENT, "an argument is out of its range")                                                     \
    X(FQ_ERR_READ, "the file could not be read")                                                              \
    X(FQ_ERR_WRITE, "the target could not be written")                                                        \
    X(FQ_ERR_SOURCE, "the file object failed to read")                                                        \
    X(FQ_ERR_DECRYPT, "the data could not be decrypted")                                                      \
    X(FQ_ERR_SHORT_READ, "the file ended before the length that it has")                                      \
    X(FQ_ERR_CANCELLED, "the caller asked to stop")                                                           \
    X(FQ_ERR_L1_EOF, "the L1 table runs past the end of the file")                                            \
    X(FQ_ERR_L2_UNALIGNED, "the L1 entry points to an L2 table that is not aligned to a cluster")             \
    X(FQ_ERR_L2_EOF, "the L2 table runs past the end of the file")                                            \
    X(FQ_ERR_CLUSTER_UNALIGNED, "the L2 entry points to a data cluster that is not aligned to a cluster")     \
    X(FQ_ERR_CLUSTER_EOF, "the data cluster starts beyond the end of the file")                               \
    X(FQ_ERR_ZERO_IN_V2, "the L2 entry has the zero flag, which version 2 does not have")                     \
    X(FQ_ERR_COMPRESSED_OUTSIDE, "the L2 entry is compressed, which it cannot be with an external data file") \
    X(FQ_ERR_OTHER_PLACE, "the L2 entry does not point to the cluster's own place in the external data file") \
    X(FQ_ERR_SUBCLUSTER_BOTH, "the L2 entry says of a subcluster that it is both allocated and zero")         \
    X(FQ_ERR_SUBCLUSTER_NOWHERE, "the L2 entry says that subclusters are allocated, but gives no cluster")    \
    X(FQ_ERR_COMPRESSED_EOF, "the compressed cluster starts beyond the end of the file")                      \
    X(FQ_ERR_DEFLATE, "the compressed cluster is not a valid deflate stream")                                 \
    X(FQ_ERR_ZSTD, "the compressed cluster is not a valid zstd stream")                                       \
    X(FQ_ERR_INFLATED_SHORT, "the compressed cluster inflates to less than a cluster")                        \
    X(FQ_ERR_INFLATED_LONG, "the compressed cluster inflates to more than a cluster")                         \
    X(FQ_ERR_BITMAP_ENTRY, "an entry of a bitmap's table is damaged")                                         \
    X(FQ_ERR_TOO_MANY_CLUSTERS, "the file has more clusters than can be counted")                             \
    X(FQ_ERR_TOO_MANY_UNALIGNED, "there are more L2 tables that are not aligned than are worth a look")       \
    X(FQ_ERR_TOO_LARGE, "the image would be larger than its tables can tell; with larger clusters they tell more")

typedef enum fq_status {
#define FQ_ENUM(name, sentence) name,
    FQ_STATUSES(FQ_ENUM)
#undef FQ_ENUM
        FQ_STATUS_COUNT
} fq_status;

/* The sentence of a status; a fixed string also for a number that is no status. */
const char *fq_status_sentence(fq_status status);

#define FQ_NOWHERE UINT64_MAX

/* Where it went wrong. A field that means nothing for the status is FQ_NOWHERE (or 0 for the errno). */
typedef struct fq_error {
    fq_status status;
    int sys_errno;     /* of FQ_ERR_READ and FQ_ERR_WRITE */
    uint32_t depth;    /* layer of the chain: 0 is the image itself */
    bool in_data_file; /* host_off is a place in that layer's external data file */
    bool in_backing;   /* of fq_write: the layer is one of the backing file's chain, not of the source's */
    uint64_t guest_off;
    uint64_t host_off;
    uint64_t value; /* the table entry, or the number, that was wrong */
} fq_error;

/* ---- Inflation (inflate.c, scratch.c) */

typedef enum fq_codec {
    FQ_CODEC_DEFLATE,      /* raw deflate by the fastest engine built in, which has the reference's verdict and bytes */
    FQ_CODEC_DEFLATE_LIBZ, /* raw deflate by libz, the reference */
    FQ_CODEC_ZSTD,
    FQ_CODEC_COUNT
} fq_codec;

/*
 * Inflate one compressed cluster of in_nbytes into exactly out_nbytes. `in` may hold anything after the stream's end, as a
 * qcow2 descriptor counts whole sectors. The verdict is QEMU's (qcow2-threads.c): deflate is good once the cluster is full, also
 * if the end mark is not reached; zstd frames are read until the cluster is full, and the last must end there.
 */
fq_status fq_inflate(fq_codec codec, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes);

/* "1.14" and such; NULL where the engine is not built in. */
const char *fq_version_libdeflate(void);
const char *fq_version_libz(void);
const char *fq_version_libzstd(void);

/* ---- Encryption (crypt.c) */

enum { FQ_SECTOR_NBYTES = 512, FQ_CRYPT_PIECE_NBYTES = 64 << 10, FQ_CRYPT_WORK_NBYTES = FQ_CRYPT_PIECE_NBYTES / 32 * 33 };

typedef enum fq_mode { FQ_MODE_ECB, FQ_MODE_CBC, FQ_MODE_CTR, FQ_MODE_XTS, FQ_MODE_COUNT } fq_mode;

/* What a sector's initialisation vector is made of: its number in 32 or 64 bits, or that encrypted. */
typedef enum fq_iv { FQ_IV_PLAIN, FQ_IV_PLAIN64, FQ_IV_ESSIV, FQ_IV_COUNT } fq_iv;

/* Which cipher is asked for: a key and a direction. */
typedef enum fq_cipher {
    FQ_CIPHER_DATA,     /* decrypts with the key of the data */
    FQ_CIPHER_COUNTERS, /* encrypts with the key of the data: CTR alone needs that */
    FQ_CIPHER_TWEAKS,   /* encrypts with XTS' second key */
    FQ_CIPHER_VECTORS,  /* encrypts with ESSIV's key */
} fq_cipher;

/*
 * Runs nbytes of blocks through a cipher in place, each block for itself. Returns 0, or -1 for a failure that the callee has noted
 * itself, in `user` as an fq_read_fn does. May be called from any thread, by several at once.
 */
typedef int (*fq_cipher_fn)(void *opaque, void *user, fq_cipher cipher, uint8_t *blocks, size_t nbytes);

typedef struct fq_crypt {
    fq_mode mode;
    fq_iv vectors;
    uint32_t block_nbytes; /* of the cipher: 8 or 16 */
    bool by_guest_off;     /* sectors are counted from the start of the disk, not of the file */
    fq_cipher_fn run;      /* NULL: nothing is encrypted */
    void *opaque;
} fq_crypt;

/* Decrypt whole sectors in place; `sector` is the number of the first. work: FQ_CRYPT_WORK_NBYTES of memory. */
fq_status fq_crypt_decrypt(const fq_crypt *crypt, void *user, uint8_t *buf, size_t nbytes, uint64_t sector, uint8_t *work);

/* ---- Tables (layout.h, l2.c) */

typedef enum fq_kind {
    FQ_UNALLOCATED,       /* the backing file's bytes, or zeroes */
    FQ_UNALLOCATED_ALLOC, /* the same, of a subcluster whose cluster has a place in the file */
    FQ_ZERO,
    FQ_ZERO_ALLOC, /* zeroes, with a place in the file that is not read */
    FQ_DATA,
    FQ_COMPRESSED,
    FQ_KIND_COUNT
} fq_kind;

typedef struct fq_geometry {
    uint32_t version;      /* 2 or 3 */
    uint32_t cluster_bits; /* 9 to 21 */
    bool extended_l2;      /* 16-byte entries, 32 subclusters a cluster */
    bool external_data;    /* clusters lie in another file, each at its guest offset */
    fq_codec codec;
} fq_geometry;

/*
 * Decode `entries` entries of an L2 table as it stands in the file (big-endian; 8 bytes an entry, 16 if extended) into arrays of
 * `entries` elements, or 32 times as many if extended. kind[i] is an fq_kind, or FQ_KIND_COUNT + the status where the entry is
 * invalid. in_nbytes[i] is 0 but for compressed clusters.
 */
void fq_l2_parse(const fq_geometry *geometry, const uint8_t *table, size_t entries, uint8_t *kind, uint64_t *host_off,
                 uint32_t *in_nbytes);

/* ---- Sources (source.c) */

typedef struct fq_source fq_source;

/*
 * Reads up to nbytes at host_off into buf and returns how many, 0 only at the end, or -1 for a failure that the callee has noted
 * itself, for instance in `user`: what the caller of the core put into the fq_request that this read is done for.
 * May be called from any thread, by several at once.
 */
typedef ptrdiff_t (*fq_read_fn)(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off);

/* One of several ranges that are read at once. */
typedef struct fq_range {
    uint64_t host_off;
    size_t nbytes;
    uint8_t *buf;
    size_t got; /* set by the callee: less than nbytes only where the file ends */
} fq_range;

/*
 * Reads all of the ranges, in any order or at the same time, and returns 0; or -1 for a failure, as an fq_read_fn does. What each
 * call costs in time is mostly waiting, so a whole batch of a job is asked for by one. May be called from any thread, by several
 * at once.
 */
typedef int (*fq_ranges_fn)(void *opaque, void *user, fq_range *ranges, size_t count);

/* The descriptor stays the caller's. seek_holes allows lseek(SEEK_DATA), which moves the descriptor's own position. */
fq_source *fq_source_fd(int fd, bool seek_holes);
fq_source *fq_source_callback(fq_read_fn read, void *opaque, uint64_t nbytes);
fq_source *fq_source_remote(fq_ranges_fn read, void *opaque, uint64_t nbytes);
void fq_source_free(fq_source *source);

typedef struct fq_request fq_request;

/* Read until nbytes are there or the file ends; *got says how many came. An error carries host_off, and no guest offset. */
fq_status fq_source_read(fq_source *source, const fq_request *request, uint8_t *buf, size_t nbytes, uint64_t host_off, size_t *got,
                         fq_error *error);
/* The length of the file as it is now. */
uint64_t fq_source_size(const fq_source *source);

/* ---- Readers (reader.c) */

typedef struct fq_reader fq_reader;

/*
 * Whom a call is made for. All fields may be NULL. poll is called by the calling thread only, some 20 times a second. digest is
 * called by fq_export and fq_write with all bytes of the disk in their order, by any thread, but by one at a time; without bytes
 * for zeroes, at most 1 MiB of them. What returns non-zero stops the call with FQ_ERR_CANCELLED.
 */
struct fq_request {
    void *user;
    int (*poll)(void *user, uint64_t done_nbytes);
    int (*digest)(void *user, const uint8_t *bytes, uint64_t nbytes);
};

/* One buffer of a scattered read. `start` is where it begins within the request: the sum of nbytes of those before it. */
typedef struct fq_iovec {
    uint8_t *base;
    size_t nbytes;
    uint64_t start;
} fq_iovec;

typedef struct fq_reader_options {
    fq_geometry geometry;
    uint64_t size;   /* of the virtual disk */
    uint64_t l1_off; /* of the active L1 table in the file */
    uint32_t l1_entries;
    size_t largest_cluster;      /* of the chain, to size the caches' locks by */
    size_t cluster_cache_nbytes; /* bound on inflated clusters kept, and ... */
    size_t table_cache_nbytes;   /* ... on L2 tables kept; a reader with a backing reader uses that one's caches */
    unsigned threads;            /* at most this many threads work on one call, the calling one included */
    fq_crypt crypt;              /* of data clusters; compressed ones are not encrypted */
} fq_reader_options;

/*
 * The L1 table is read here. May be NULL: `backing`; `data`, the source of the data clusters, if that is not the image's own file;
 * and `sibling`, a reader of the same file with another L1 table (the disk, for a snapshot), whose cached clusters this one shares.
 */
fq_status fq_reader_open_qcow2(fq_source *source, fq_source *data, fq_reader *backing, fq_reader *sibling,
                               const fq_reader_options *options, const fq_request *request, fq_reader **out, fq_error *error);
/* A plain file; of options only size, threads and the cache bounds count. */
fq_status fq_reader_open_raw(fq_source *source, const fq_reader_options *options, fq_reader **out, fq_error *error);
void fq_reader_close(fq_reader *reader);

/* Fill the buffers from guest_off on. The range must lie within the disk (else FQ_ERR_ARGUMENT). All or nothing. */
fq_status fq_reader_preadv(fq_reader *reader, const fq_iovec *iov, size_t niov, uint64_t guest_off, const fq_request *request,
                           fq_error *error);

/* A range whose bytes come from one place. host_off continues through the extent; FQ_NOWHERE where it means nothing. */
typedef struct fq_extent {
    uint64_t guest_off;
    uint64_t nbytes;
    uint64_t host_off;
    uint32_t depth; /* of the layer that decides */
    fq_kind kind;
} fq_extent;

/* The extents from guest_off to end, neighbours merged; at most `capacity` of them, their count in *count. */
fq_status fq_reader_map(fq_reader *reader, uint64_t guest_off, uint64_t end, fq_extent *extents, size_t capacity, size_t *count,
                        const fq_request *request, fq_error *error);

typedef struct fq_stats {
    uint64_t clusters_inflated;
    uint64_t cache_hits;     /* reads of a compressed cluster served without inflating it */
    uint64_t bytes_fetched;  /* read from the file of this layer */
    uint64_t bytes_returned; /* guest bytes given to callers */
} fq_stats;

/* Sums over the reader and the layers below it (bytes_returned: of this reader alone). */
void fq_reader_stats(const fq_reader *reader, fq_stats *stats);

/* ---- Export (export.c) */

typedef struct fq_target {
    int fd;          /* written by position; its own position is not touched */
    uint64_t grain;  /* runs of zeroes in units of so many bytes are not written as data; 0: everything is written */
    bool reads_zero; /* what is not written reads as zeroes already (a new file) */
    bool offload;    /* plain data is copied by the kernel where it can, zeroes in it too; not if it is to be digested */
} fq_target;

/* Write the guest range to the same offsets of the target, by many threads. *written counts bytes of data written. */
fq_status fq_export(fq_reader *reader, uint64_t guest_off, uint64_t nbytes, const fq_target *target, uint64_t *written,
                    const fq_request *request, fq_error *error);

/* ---- Writing (write.c, encode.c, isal.c, space.c) */

/* What makes a cluster a stream, from any thread, each with a state of its own. */
typedef struct fq_encoder {
    int level_min, level_max;
    void *(*open)(int level); /* NULL without memory */
    void (*close)(void *state);
    size_t (*state_nbytes)(int level, size_t in_nbytes); /* at most, for clusters of so many bytes */
    /* *out_nbytes is 0 where the stream would take more than `room`. What it is does not depend on what was encoded before. */
    fq_status (*run)(void *state, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes);
} fq_encoder;

extern const fq_encoder fq_encoder_libz; /* raw deflate with a window of 4 KiB, by libz: levels 1 to 9 */
extern const fq_encoder fq_encoder_zstd; /* levels 1 to 19 */
#ifdef FQ_HAVE_ISAL
extern const fq_encoder fq_encoder_isal; /* raw deflate with the same window, by ISA-L: levels 0 to 3 */
const char *fq_version_isal(void);       /* "2.30.0" and such */
#endif

typedef struct fq_write_options {
    int fd;               /* written by position, from the second cluster on: the first is the header's, and the caller's */
    fq_geometry geometry; /* of the image: its codec and external_data do not count */
    uint32_t refcount_order;
    const fq_encoder *encoder; /* NULL: clusters are stored as they are */
    int level;
    uint64_t grain;       /* clusters of zeroes are left out; but where nothing is compressed, and whole blocks of so many bytes
                             (a power of two) are larger, only those in blocks of zeroes; 0: none is */
    unsigned threads;     /* at most, the calling one included; fewer where they would take too much memory */
    size_t tables_nbytes; /* so much of L2 tables, and of refcount blocks, is kept in memory, to lie side by side; 0: the usual */
} fq_write_options;

typedef struct fq_written {
    uint64_t size;                    /* of the disk: the source's, in whole sectors of 512 bytes */
    uint64_t nbytes;                  /* of the file */
    uint64_t data_nbytes;             /* of it, those of clusters */
    uint64_t compressed, plain, zero; /* clusters */
    uint64_t l1_off, refcount_table_off;
    uint32_t l1_entries, refcount_table_clusters;
} fq_written;

/*
 * Write a disk as the clusters and tables of a qcow2 image. What is written depends on the source's bytes and on the options but
 * threads, on nothing else. With `backing`, the reader of the image's backing file, only clusters that differ from it are written.
 * Without a reader the disk is what `stream`, a descriptor that need not seek, gives from where it is to its end. The options must
 * be within the format's bounds (else FQ_ERR_ARGUMENT).
 */
fq_status fq_write(fq_reader *reader, int stream, fq_reader *backing, const fq_write_options *options, fq_written *written,
                   const fq_request *request, fq_error *error);

/* ---- Checks (check.c) */

typedef enum fq_severity { FQ_CORRUPTION, FQ_LEAK, FQ_CHECK_ERROR, FQ_OVERLAP } fq_severity;

/* What a check can find: how it counts, and the sentence for it. */
#define FQ_FINDINGS(X)                                                                                                         \
    X(FQ_FOUND_BEYOND_END, FQ_CORRUPTION, "what is referred to ends a cluster or more behind the end of the file")             \
    X(FQ_FOUND_COPIED, FQ_CORRUPTION, "the COPIED flag and the refcount of what the entry points to contradict each other")    \
    X(FQ_FOUND_L1_RESERVED, FQ_CORRUPTION, "the L1 entry has reserved bits set")                                               \
    X(FQ_FOUND_L2_UNALIGNED, FQ_CORRUPTION, "the L1 entry points to an L2 table that is not aligned to a cluster")             \
    X(FQ_FOUND_L2_RESERVED, FQ_CORRUPTION, "the L2 entry has reserved bits set")                                               \
    X(FQ_FOUND_CLUSTER_UNALIGNED, FQ_CORRUPTION, "the L2 entry points to a cluster that is not aligned")                       \
    X(FQ_FOUND_COMPRESSED_COPIED, FQ_CORRUPTION, "the L2 entry of a compressed cluster has the COPIED flag")                   \
    X(FQ_FOUND_COMPRESSED_OUTSIDE, FQ_CORRUPTION, "the L2 entry is compressed, which it cannot be with an external data file") \
    X(FQ_FOUND_COMPRESSED_BITMAP, FQ_CORRUPTION, "the L2 entry of a compressed cluster has subcluster bits set")               \
    X(FQ_FOUND_SUBCLUSTER_BOTH, FQ_CORRUPTION, "the L2 entry says of a subcluster that it is both allocated and zero")         \
    X(FQ_FOUND_SUBCLUSTER_NOWHERE, FQ_CORRUPTION, "the L2 entry says that subclusters are allocated, but gives no cluster")    \
    X(FQ_FOUND_BLOCK_RESERVED, FQ_CORRUPTION, "the refcount table entry has reserved bits set")                                \
    X(FQ_FOUND_BLOCK_UNALIGNED, FQ_CORRUPTION, "the refcount table entry points to a block that is not aligned to a cluster")  \
    X(FQ_FOUND_BLOCK_BEYOND_END, FQ_CORRUPTION, "the refcount table entry points to a block behind the end of the file")       \
    X(FQ_FOUND_BLOCK_SHARED, FQ_CORRUPTION, "the refcount block is in use for something else")                                 \
    X(FQ_FOUND_OVERFLOW, FQ_CORRUPTION, "the cluster is referred to more often than its refcount can count")                   \
    X(FQ_FOUND_TOO_LOW, FQ_CORRUPTION, "the refcount is lower than the number of references")                                  \
    X(FQ_FOUND_LEAK, FQ_LEAK, "the refcount is higher than the number of references: the space is lost")                       \
    X(FQ_FOUND_UNKNOWN, FQ_CHECK_ERROR, "the refcount cannot be told, as its block is in no place for one")                    \
    X(FQ_FOUND_OVERLAP, FQ_OVERLAP, "the cluster is in use for different things at once")

typedef enum fq_finding_kind {
#define FQ_ENUM(name, severity, sentence) name,
    FQ_FINDINGS(FQ_ENUM)
#undef FQ_ENUM
        FQ_FINDING_KINDS
} fq_finding_kind;

/* Of each kind so many are reported. All are counted. */
enum { FQ_CHECK_REPORTS_MAX = 1000 };

const char *fq_finding_sentence(fq_finding_kind kind);
fq_severity fq_finding_severity(fq_finding_kind kind);

/* FQ_NOWHERE where a field means nothing. host_off: of the entry, or of the (first) cluster. */
typedef struct fq_finding {
    fq_finding_kind kind;
    uint64_t guest_off, host_off, value, refcount, references;
} fq_finding;

/* What a cluster can be in use for; bits, of which more than one is an overlap. */
typedef enum fq_role {
    FQ_ROLE_HEADER = 1,
    FQ_ROLE_L1 = 2,
    FQ_ROLE_SNAPSHOT_L1 = 4,
    FQ_ROLE_L2 = 8,
    FQ_ROLE_REFCOUNT_TABLE = 16,
    FQ_ROLE_REFCOUNT_BLOCK = 32,
    FQ_ROLE_OTHER = 64, /* the snapshot table, bitmaps, the encryption header */
    FQ_ROLE_DATA = 128,
} fq_role;

typedef struct fq_check fq_check;

typedef struct fq_check_options {
    fq_geometry geometry;
    uint32_t refcount_order; /* log2 of a refcount's bits, 0 to 6 */
    uint32_t refcount_table_entries;
    uint64_t refcount_table_off;
    /* Called for each finding, by the thread that checks. times: how often it counts; for neighbouring clusters, how many there
     * are. */
    void (*report)(void *opaque, const fq_finding *found, uint64_t times);
    void *opaque;
} fq_check_options;

typedef struct fq_check_counts {
    uint64_t corruptions, leaks, check_errors, overlaps;
    uint64_t allocated_clusters, compressed_clusters, fragmented_clusters; /* of the active L1 table */
    uint64_t image_end_off;                                                /* behind the last cluster in use */
    uint64_t not_reported;                                                 /* findings */
} fq_check_counts;

/* Entries of L1 tables that lie side by side, and how many tables they belong to. */
typedef struct fq_l1_range {
    uint64_t l1_off, entries;
    uint64_t l1_index; /* of the first one in the active table */
    uint32_t active, inactive;
} fq_l1_range;

/* The refcount table is read here. The bounds on it, and on the geometry, are the caller's to check. */
fq_status fq_check_open(fq_source *source, const fq_check_options *options, const fq_request *request, fq_check **out,
                        fq_error *error);
void fq_check_close(fq_check *check);
/* Count `times` references to a range of the file. */
fq_status fq_check_use(fq_check *check, fq_role role, uint64_t host_off, uint64_t nbytes, uint64_t times, fq_error *error);
/* Check L1 entries and collect the L2 tables that they point to. The ranges that are given must not overlap. */
fq_status fq_check_l1(fq_check *check, const fq_l1_range *range, const fq_request *request, fq_error *error);
/* Check entries of bitmaps' tables that lie side by side, and belong to `times` tables. The ranges given must not overlap either.
 */
fq_status fq_check_bitmap(fq_check *check, uint64_t table_off, uint64_t entries, uint32_t times, const fq_request *request,
                          fq_error *error);
/* The rest, when everything is named: L2 tables, refcount blocks, and the refcounts against the references. */
fq_status fq_check_finish(fq_check *check, const fq_request *request, fq_error *error);
const fq_check_counts *fq_check_result(const fq_check *check);

#endif
