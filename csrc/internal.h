/*
 * internal.h - what the files of the core share among themselves
 */
#ifndef FASTQCOW_INTERNAL_H
#define FASTQCOW_INTERNAL_H

#define _GNU_SOURCE /* before any system header: SEEK_DATA, fallocate, and POSIX under -std=c11 */
#define _FILE_OFFSET_BITS 64

#include "layout.h"

#include <pthread.h>
#include <stdatomic.h>

/* ---- source.c */

/* Whether reads should come in the order of the file: callbacks may stand for streams that cannot seek cheaply. */
bool fq_source_ordered(const fq_source *source);
/* Whether several ranges are read by one call, which takes its time. */
bool fq_source_is_remote(const fq_source *source);
/* The length of the file now, or when it was opened if that was more: what is not there any more is lost. */
uint64_t fq_source_once(const fq_source *source);
/* Read ranges of a remote source. An error carries the first host offset, and no guest offset. */
fq_status fq_source_read_ranges(fq_source *source, const fq_request *request, fq_range *ranges, size_t count, fq_error *error);
/* The run of holes or of data that starts at host_off, at most nbytes long: its length; *hole says which. */
uint64_t fq_source_run(const fq_source *source, uint64_t host_off, uint64_t nbytes, bool *hole);
/* Let the kernel copy a range to a descriptor, by sharing its blocks if it can. Whether it did; a part may be written if not. */
bool fq_source_copy(const fq_source *source, uint64_t host_off, int fd, uint64_t off, uint64_t nbytes);

/* ---- deflate.c: streams of deflate about which libz and libdeflate are of one opinion; with libdeflate only */

/* Whether there is one block alone, whose header leaves no doubt: what libdeflate makes of the stream, libz makes of it too. */
bool fq_deflate_is_one_block(const uint8_t *in, size_t in_nbytes);

typedef struct fq_deflate fq_deflate; /* for one thread at a time; free() frees it */

fq_deflate *fq_deflate_new(void); /* NULL without memory */
/* Whether the stream was inflated; then libz gives the same bytes. If not, `out` may hold anything, and libz is to be asked. */
bool fq_deflate_run(fq_deflate *state, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes);

/* ---- inflate.c: the codecs' states, for one thread at a time; made on first use, kept for the next cluster */

typedef struct fq_inflater fq_inflater;

fq_inflater *fq_inflater_new(void); /* NULL without memory */
void fq_inflater_free(fq_inflater *inflater);
/* As fq_inflate. */
fq_status fq_inflater_run(fq_inflater *inflater, fq_codec codec, const uint8_t *in, size_t in_nbytes, uint8_t *out,
                          size_t out_nbytes);

/* ---- scratch.c: buffers and codec states of one thread at work, kept for the next one */

typedef struct fq_scratch {
    struct fq_scratch *next;
    fq_inflater *inflater;
    uint8_t *in;     /* fetched bytes */
    uint8_t *out;    /* inflated or plain bytes on their way to several buffers */
    uint8_t *gather; /* a batch on its way to a descriptor */
    uint8_t *crypt;  /* working memory of decryption */
    uint8_t *remote; /* a batch's bytes of remote files */
    size_t in_capacity, out_capacity, gather_capacity, crypt_capacity, remote_capacity;
} fq_scratch;

fq_scratch *fq_scratch_get(void); /* NULL without memory */
void fq_scratch_put(fq_scratch *scratch);
/* What is not to be kept; NULL is nothing. */
void fq_scratch_free(fq_scratch *scratch);
bool fq_scratch_grow(uint8_t **buf, size_t *capacity, size_t nbytes);

/* ---- pool.c: the process's worker threads */

/*
 * Run fn(arg) on this thread and on up to `helpers` others at the same time; returns when all have returned. This thread, while it
 * waits for the others, calls idle(arg) some 20 times a second.
 */
void fq_pool_run(unsigned helpers, void (*fn)(void *arg, bool is_caller), void (*idle)(void *arg), void *arg);

/* A job that nobody waits for. Zeroes but for fn and arg before it is first started. */
typedef struct fq_pool_job {
    struct fq_pool_job *next;
    void (*fn)(void *arg, bool is_caller);
    void *arg;
    bool patient;    /* others come first */
    unsigned wanted; /* more workers that may join */
    unsigned active; /* workers inside fn */
    unsigned forks;  /* of the process that the numbers are true for */
    pthread_cond_t idle;
} fq_pool_job;

/* See to it that `helpers` workers are in fn(arg), or will be when they have time. */
void fq_pool_start(fq_pool_job *job, unsigned helpers);
/* No worker enters fn any more, and when this returns none is in it. */
void fq_pool_stop(fq_pool_job *job);
/* A condition to be waited on briefly: by a clock that nobody sets. */
void fq_cond_init(pthread_cond_t *cond);
/* Wait on it for at most FQ_POLL_MS. */
void fq_wait_briefly(pthread_cond_t *cond, pthread_mutex_t *lock);

enum { FQ_POLL_MS = 50 };

/* ---- cache.c: blocks of bytes by (owner, key), bounded, each made once */

typedef struct fq_cache fq_cache;
typedef struct fq_block fq_block;

fq_cache *fq_cache_new(size_t budget_nbytes, size_t block_nbytes); /* block_nbytes: of the largest blocks */
fq_cache *fq_cache_ref(fq_cache *cache);
void fq_cache_unref(fq_cache *cache);
uint32_t fq_cache_new_owner(fq_cache *cache);

typedef fq_status (*fq_fill_fn)(void *arg, uint8_t *data);

/*
 * The block, pinned until fq_cache_release. Of callers that ask at once for a block that is not there, one runs `fill` and the
 * others wait; if it fails, its caller gets the status and each waiter tries for itself. *filled says that this call ran `fill`.
 */
fq_status fq_cache_get(fq_cache *cache, uint32_t owner, uint64_t key, size_t nbytes, fq_fill_fn fill, void *arg, bool *filled,
                       fq_block **out);
/* The block if it is there, else NULL. Does not wait. */
fq_block *fq_cache_peek(fq_cache *cache, uint32_t owner, uint64_t key);
/* Whether the block is there, or is being filled. */
typedef enum fq_presence { FQ_ABSENT, FQ_COMING, FQ_PRESENT } fq_presence;
fq_presence fq_cache_look(fq_cache *cache, uint32_t owner, uint64_t key);
/*
 * `from` and `to`: the part of the block that was used. Use that carries on where the last one ended is one use, not two. Whether
 * it was the block's first.
 */
bool fq_cache_release(fq_cache *cache, fq_block *block, size_t from, size_t to);
/* As release, but the block was not used: it was filled for others. */
void fq_cache_unpin(fq_cache *cache, fq_block *block);
const uint8_t *fq_block_data(const fq_block *block);
/* Whether the cache grows, and few of the blocks that it will need lie ready. */
bool fq_cache_wants_spares(fq_cache *cache);
/* One more, by who has time for it; false where there are enough. */
bool fq_cache_add_spare(fq_cache *cache);

/* ---- reader.c, l2.c */

enum { FQ_TABLE_SLICE_BITS = 16, FQ_TABLE_SLICE_NBYTES = 1 << FQ_TABLE_SLICE_BITS }; /* L2 tables are read so much at a time */

enum { FQ_STREAMS = 8, FQ_MISSES = 32 };

/* Reads that continue one another, and what is to be inflated before the next one: clusters from `claimed` to `limit`. */
typedef struct fq_stream {
    uint64_t next, read_nbytes, claimed, limit;
    uint64_t used_at; /* 0: never */
} fq_stream;

typedef struct fq_ahead {
    pthread_mutex_t lock;
    fq_stream streams[FQ_STREAMS];
    uint64_t clock;
    unsigned order;               /* 0 to ORDER_MAX: how many of the last reads have continued others */
    uint64_t unit;                /* bytes of disk that are claimed at a time: a power of two */
    uint64_t window_max;          /* 0: no read-ahead */
    uint64_t share;               /* of the cache, for all windows together */
    atomic_bool stop, worthwhile; /* the last read met compressed clusters */
    atomic_int credit;            /* above 0: neighbours of what is read are worth inflating */
    uint64_t missed[FQ_MISSES];   /* where the last reads ended that had to inflate a cluster themselves, in units */
    uint64_t misses;
    fq_pool_job job;
} fq_ahead;

struct fq_reader {
    fq_source *source;
    fq_source *data; /* the data clusters' source: `source`, or an external data file */
    fq_reader *backing;
    bool raw;
    fq_geometry geometry;
    uint64_t size;
    uint64_t *l1; /* in the machine's byte order */
    uint32_t l1_entries;
    uint32_t owner;
    unsigned threads;
    fq_cache *tables, *clusters;
    fq_crypt crypt;
    uint64_t keep_nbytes; /* smaller reads keep whole clusters */
    bool ordered;         /* some source of the chain wants its reads in order */
    bool remote;          /* some source of the chain is remote */
    atomic_uint_fast64_t clusters_inflated, cache_hits, bytes_fetched, bytes_returned;
    char apart[64]; /* what small reads write to is in no cache line that they only read */
    fq_ahead ahead;
};

/* A stretch of the disk of one kind, in one layer, at one place of its file (a compressed run is one cluster or a part of it). */
typedef struct fq_run {
    fq_reader *layer;
    uint32_t depth;
    fq_kind kind;
    uint64_t guest_off, nbytes;
    uint64_t host_off;  /* of the run's first byte; of the stream, if compressed */
    uint64_t entry;     /* compressed: the L2 entry, by which its cluster is cached */
    uint32_t in_nbytes; /* compressed */
    uint32_t skip;      /* compressed: bytes of the cluster before the run */
} fq_run;

/*
 * The run at guest_off, at most nbytes long (nbytes > 0, all within the disk), looked up through the whole chain. A layer's L2
 * table is read into its cache if it must be. find_holes also asks plain files for their holes.
 */
fq_status fq_resolve(fq_reader *reader, uint64_t guest_off, uint64_t nbytes, bool find_holes, const fq_request *request,
                     fq_run *run, fq_error *error);

static inline bool fq_run_reads_zero(const fq_run *run)
{
    return run->kind != FQ_DATA && run->kind != FQ_COMPRESSED;
}

/* ---- batch.c: a batch is a stretch of a job, which one thread plans, fetches, inflates and delivers */

enum { FQ_BATCH_RUNS = 64, FQ_BATCH_RUNS_REMOTE = 256 };

/* A range that was fetched before all else is done, and whose bytes lie in scratch->remote. */
typedef struct fq_fetched {
    fq_source *source;
    uint64_t host_off;
    size_t nbytes, at, got;
} fq_fetched;

typedef struct fq_batch {
    uint64_t guest_off, nbytes;
    bool by_caller; /* the calling thread does it, and has to poll */
    size_t count;
    fq_run runs[FQ_BATCH_RUNS_REMOTE];
    fq_block *hit[FQ_BATCH_RUNS_REMOTE]; /* the cached cluster of a whole compressed run, if there is one */
    bool late[FQ_BATCH_RUNS_REMOTE];     /* it is being inflated by somebody else: to be waited for, but last */
    size_t in_at[FQ_BATCH_RUNS_REMOTE];  /* else where its bytes lie in scratch->in, ... */
    size_t in_got[FQ_BATCH_RUNS_REMOTE]; /* ... and how many of them the file had */
    size_t fetched_count;
    fq_fetched fetched[FQ_BATCH_RUNS_REMOTE];
} fq_batch;

/* Is it a whole compressed cluster? */
static inline bool fq_is_whole(const fq_run *run)
{
    return run->kind == FQ_COMPRESSED && run->skip == 0 && run->nbytes == fq_cluster_size(&run->layer->geometry);
}

/* A whole cluster that this batch has to inflate. */
static inline bool fq_is_to_be_fetched(const fq_batch *b, size_t i)
{
    return fq_is_whole(&b->runs[i]) && !b->hit[i] && !b->late[i];
}

/* Buffers that take the guest bytes from guest_off on. */
typedef struct fq_dest {
    const fq_iovec *iov;
    size_t niov;
    uint64_t guest_off;
} fq_dest;

typedef struct fq_job fq_job;

/* ---- digest.c: where the digest of a job is */

typedef struct fq_digest {
    pthread_mutex_t lock;
    pthread_cond_t turn;
    uint64_t next; /* the first byte that was not digested yet */
} fq_digest;

void fq_digest_init(fq_digest *digest);
void fq_digest_destroy(fq_digest *digest);
/* Digest a stretch of the disk, NULL for zeroes, and zeroes before it; when all that lies before `from` was. */
fq_status fq_digest_take(fq_job *job, fq_digest *digest, uint64_t from, uint64_t guest_off, const uint8_t *bytes, uint64_t nbytes,
                         bool is_caller, fq_error *error);

/* ---- remote.c: what a batch needs of remote files */

/* Fetch it, to scratch->remote. */
fq_status fq_remote_fetch(fq_job *job, fq_batch *batch, fq_scratch *scratch, fq_error *error);
/* As fq_source_read; from what was fetched before, if it is all there. batch: NULL where nothing was. */
fq_status fq_remote_read(const fq_batch *batch, const fq_scratch *scratch, fq_source *source, const fq_request *request,
                         uint8_t *to, size_t nbytes, uint64_t host_off, size_t *got, fq_error *error);

/* ---- batch.c again */

/* Read from the sources: plain data into the buffers, compressed clusters into scratch->in; pin those that are cached already. */
fq_status fq_batch_fetch(fq_job *job, fq_batch *batch, fq_scratch *scratch, const fq_dest *dest, fq_error *error);
/* Inflate what was fetched, and fill in the zeroes. */
fq_status fq_batch_inflate(fq_job *job, fq_batch *batch, fq_scratch *scratch, const fq_dest *dest, fq_error *error);
/* Inflate the cluster of a compressed run into the cache, if nobody does or has done so: whether it was done here. */
bool fq_batch_warm(const fq_run *run, fq_scratch *scratch);
/* Unpin what fetch has pinned, if it did. */
void fq_batch_release(fq_job *job, fq_batch *batch);

/* ---- reader.c: a job is a guest range that threads work off in batches */

struct fq_job {
    fq_reader *reader;
    const fq_request *request;
    const fq_dest *dest; /* where the bytes go; NULL: to write() */
    /* bytes: NULL for zeroes. is_caller: it is called by the thread that has to poll */
    fq_status (*write)(fq_job *job, uint64_t guest_off, const uint8_t *bytes, uint64_t nbytes, bool is_caller, fq_error *error);
    fq_digest *digest;                                /* of what is written; or NULL */
    bool (*copy)(fq_job *job, const fq_batch *batch); /* tried on plain data, before it is fetched: whether it is done; or NULL */
    void *arg;                                        /* for write() and copy() */
    bool zeroes_are_free;                             /* write() does nothing for zeroes: they need not be cut up */
    unsigned threads;
    uint64_t end;

    pthread_mutex_t lock;
    pthread_cond_t turn;
    bool fetching;         /* some thread has its turn, to plan and perhaps to fetch; the next one waits */
    uint64_t cursor;       /* the first byte that nobody has claimed */
    bool keep;             /* put whole clusters into the cache */
    bool compressed;       /* some run was */
    bool missed;           /* the caller has inflated a cluster for the cache */
    fq_run rest;           /* what is known of the run there; nbytes 0: nothing */
    fq_error error;        /* the first one by guest offset */
    atomic_bool stop;      /* claim no more: what is claimed is finished, so that the lowest error is found */
    atomic_bool cancelled; /* not even that */
    atomic_uint_fast64_t done_nbytes;
    uint64_t polled_at_ms;
};

void fq_job_init(fq_job *job, fq_reader *reader, uint64_t guest_off, uint64_t nbytes, const fq_request *request);
/* What fq_job_run does at its end. */
void fq_job_destroy(fq_job *job);
uint64_t fq_now_ms(void);
/* Ask the caller whether to go on, if it is time to; by the calling thread only. */
void fq_job_poll(void *job);
/* Work the job off with up to `threads` threads. */
fq_status fq_job_run(fq_job *job, unsigned threads, fq_error *error);
/* The same by a function of the caller's, which each thread runs once. */
fq_status fq_job_run_by(fq_job *job, unsigned threads, void (*fn)(void *job, bool is_caller), fq_error *error);
/* Stop the job with an error; of several, that at the lowest guest offset is the job's. */
void fq_job_fail(fq_job *job, const fq_error *error);
/* Wait until no other thread has its turn. The caller goes on polling. */
void fq_job_take_turn(fq_job *job, bool is_caller);
void fq_job_give_turn(fq_job *job, fq_status status);
/* Read a part of a job's range: nothing is read ahead, and nobody is polled. */
fq_status fq_reader_fill(fq_reader *reader, uint8_t *buf, size_t nbytes, uint64_t guest_off, unsigned threads,
                         const fq_request *request, fq_error *error);

/* ---- pwrite.c */

bool fq_is_zero(const uint8_t *p, size_t nbytes);
/* *done: how much was written, also where that failed. */
fq_status fq_pwrite(int fd, const uint8_t *p, size_t nbytes, uint64_t off, size_t *done, fq_error *error);

/* ---- space.c: who has which part of the file that is being written, by one thread */

typedef struct fq_space fq_space;

/* The first cluster is the header's. tables_nbytes: as of fq_write_options. NULL without memory. */
fq_space *fq_space_new(int fd, const fq_geometry *geometry, uint32_t refcount_order, size_t tables_nbytes);
void fq_space_free(fq_space *space);
/* A place for the stream of a compressed cluster, packed behind the one before as far as refcounts allow. */
fq_status fq_space_packed(fq_space *space, size_t nbytes, uint64_t *host_off, fq_error *error);
fq_status fq_space_cluster(fq_space *space, uint64_t *host_off, fq_error *error);
/* Set the L2 entry of a cluster of the disk; in the order of the disk. `bitmap` counts with extended entries only. */
fq_status fq_space_map(fq_space *space, uint64_t cluster, uint64_t entry, uint64_t bitmap, fq_error *error);
/* Write what is left of the tables; of the result, sets what is about them. */
fq_status fq_space_finish(fq_space *space, uint64_t size, fq_written *written, fq_error *error);

/* ---- ahead.c: clusters inflated before they are asked for */

void fq_ahead_open(fq_reader *reader, size_t cache_nbytes);
void fq_ahead_close(fq_reader *reader);
/* A read begins: see what comes next. Returns how many workers could inflate that: for fq_ahead_start. */
unsigned fq_ahead_note(fq_reader *reader, uint64_t guest_off, uint64_t nbytes);
void fq_ahead_start(fq_reader *reader, unsigned helpers);
/* It is done, and has met compressed clusters or not. */
void fq_ahead_learn(fq_reader *reader, bool compressed);
/* A read has to inflate a cluster itself: its neighbours may be wanted next. */
void fq_ahead_missed(fq_reader *reader, uint64_t guest_off);
/* A cluster that others have inflated was read for the first time. */
void fq_ahead_used(fq_reader *reader);
/* Something useful to do for a thread that has to wait for a cluster. */
void fq_ahead_help(fq_reader *reader, fq_scratch *scratch);

static inline void fq_count(atomic_uint_fast64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline fq_status fq_fail(fq_error *error, fq_status status, uint64_t guest_off, uint64_t host_off, uint64_t value)
{
    *error = (fq_error){.status = status, .guest_off = guest_off, .host_off = host_off, .value = value};
    return status;
}

#endif
