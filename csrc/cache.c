/*
 * cache.c - blocks of bytes by (owner, key): L2 tables in one cache, inflated clusters in another
 *
 * Why it is fast: a hit takes one of several locks (shards, by hash) for a look-up and a counter; the bytes are copied outside it.
 *
 * Why nothing is made twice: a block is listed before it is filled, and whoever wants it meanwhile waits for that one filling. A
 * failed filling is taken off the list; each waiter then tries itself, so that everybody gets an error of its own request.
 *
 * Why a long sequential read does not wash it out: a new block is on probation, and the block that has been there longest leaves
 * first. It is kept for good (in the protected list, at most 3/4 of the budget) when it is used a second time. Sixteen reads of 4
 * KiB that run through one cluster are one use: a use counts only if it does not start where the last one ended.
 *
 * Bound: the listed blocks of a shard never sum to more than its budget for longer than one look-up. Blocks in use are pinned;
 * taken off the list while pinned, they are freed by the last user. So at most what is in use lies outside the budget.
 *
 * fork: locks are held over it, so the child finds the lists whole. A block that was being filled by a thread that the child does
 * not have is recognised by its count of forks and filled anew.
 */
#include "internal.h"

#include <stdlib.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; headers may be older */
#endif
#endif

enum {
    MAX_SHARDS = 16,
    BLOCKS_PER_SHARD = 8,    /* at least, of the largest blocks, so that one does not push out another */
    BUCKET_NBYTES = 4 << 10, /* one bucket for so much of the budget: few blocks are smaller, and then chains are short */
    MAX_BUCKETS = 1 << 14,
    POPULATE_NBYTES_MIN = 64 << 10,
    SPARE_PART = 32,            /* of the budget can lie ready, ... */
    SPARE_NBYTES_MAX = 4 << 20, /* ... but no more: budgets may be far larger than what there is to cache */
};

typedef enum block_state { FILLING, READY, FAILED } block_state;

typedef struct node {
    struct node *prev, *next;
} node;

struct fq_block {
    node order; /* first: a node is cast to its block */
    fq_block *chain;
    uint64_t key;
    size_t nbytes, last_to;
    uint32_t owner, pins;
    unsigned forks;
    uint8_t state;
    bool listed, protected, used;
    _Alignas(64) uint8_t data[];
};

typedef struct shard {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    fq_block **buckets;
    node probation, protected; /* newest first */
    size_t nbytes, protected_nbytes;
} shard;

struct fq_cache {
    fq_cache *prev, *next; /* of all caches, for fork */
    atomic_uint refs, owners;
    unsigned shard_count, bucket_count; /* powers of two */
    size_t shard_budget;
    atomic_size_t nbytes; /* of all shards */
    pthread_mutex_t spare_lock;
    fq_block *spares; /* blocks of block_nbytes */
    size_t block_nbytes;
    atomic_uint spare_count;
    unsigned spares_max;
    shard shards[MAX_SHARDS];
};

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static fq_cache *all;
static unsigned forks;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void before_fork(void)
{
    pthread_mutex_lock(&all_lock);
    for (fq_cache *c = all; c; c = c->next) {
        for (unsigned i = 0; i < c->shard_count; i++)
            pthread_mutex_lock(&c->shards[i].lock);
        pthread_mutex_lock(&c->spare_lock);
    }
}

static void after_fork_in_parent(void)
{
    for (fq_cache *c = all; c; c = c->next) {
        pthread_mutex_unlock(&c->spare_lock);
        for (unsigned i = 0; i < c->shard_count; i++)
            pthread_mutex_unlock(&c->shards[i].lock);
    }
    pthread_mutex_unlock(&all_lock);
}

static void after_fork_in_child(void)
{
    forks++;
    for (fq_cache *c = all; c; c = c->next)
        for (unsigned i = 0; i < c->shard_count; i++)
            pthread_cond_init(&c->shards[i].filled, NULL);
    after_fork_in_parent();
}

static void set_up(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void list_init(node *head)
{
    head->prev = head->next = head;
}

static void list_remove(node *at)
{
    at->prev->next = at->next;
    at->next->prev = at->prev;
}

static void list_push(node *head, node *at)
{
    at->prev = head;
    at->next = head->next;
    head->next->prev = at;
    head->next = at;
}

static unsigned power_of_two_up_to(size_t n, unsigned max)
{
    unsigned p = 1;

    while (p < max && p * (size_t)2 <= n)
        p *= 2;
    return p;
}

fq_cache *fq_cache_new(size_t budget_nbytes, size_t block_nbytes)
{
    fq_cache *c = calloc(1, sizeof(*c));

    if (!c)
        return NULL;
    pthread_once(&once, set_up);
    atomic_init(&c->refs, 1);
    atomic_init(&c->owners, 0);
    c->shard_count = power_of_two_up_to(budget_nbytes / BLOCKS_PER_SHARD / (block_nbytes ? block_nbytes : 1), MAX_SHARDS);
    c->shard_budget = budget_nbytes / c->shard_count;
    c->bucket_count = power_of_two_up_to(c->shard_budget / BUCKET_NBYTES, MAX_BUCKETS);
    c->block_nbytes = block_nbytes;
    if (block_nbytes >= POPULATE_NBYTES_MIN) {
        const size_t part = budget_nbytes / SPARE_PART;

        c->spares_max = (unsigned)((part < SPARE_NBYTES_MAX ? part : SPARE_NBYTES_MAX) / block_nbytes);
    }
    pthread_mutex_init(&c->spare_lock, NULL);
    for (unsigned i = 0; i < c->shard_count; i++) {
        shard *s = &c->shards[i];

        pthread_mutex_init(&s->lock, NULL);
        pthread_cond_init(&s->filled, NULL);
        list_init(&s->probation);
        list_init(&s->protected);
        s->buckets = calloc(c->bucket_count, sizeof(*s->buckets));
        if (!s->buckets) {
            while (i-- > 0)
                free(c->shards[i].buckets);
            free(c);
            return NULL;
        }
    }
    pthread_mutex_lock(&all_lock);
    c->next = all;
    if (all)
        all->prev = c;
    all = c;
    pthread_mutex_unlock(&all_lock);
    return c;
}

fq_cache *fq_cache_ref(fq_cache *c)
{
    atomic_fetch_add(&c->refs, 1);
    return c;
}

void fq_cache_unref(fq_cache *c)
{
    if (!c || atomic_fetch_sub(&c->refs, 1) > 1)
        return;
    pthread_mutex_lock(&all_lock);
    if (c->prev)
        c->prev->next = c->next;
    else
        all = c->next;
    if (c->next)
        c->next->prev = c->prev;
    pthread_mutex_unlock(&all_lock);
    for (fq_block *b = c->spares, *after; b; b = after) {
        after = b->chain;
        free(b);
    }
    pthread_mutex_destroy(&c->spare_lock);
    for (unsigned i = 0; i < c->shard_count; i++) {
        shard *s = &c->shards[i];

        for (unsigned j = 0; j < c->bucket_count; j++) {
            for (fq_block *b = s->buckets[j], *after; b; b = after) {
                after = b->chain;
                free(b);
            }
        }
        free(s->buckets);
        pthread_mutex_destroy(&s->lock);
        pthread_cond_destroy(&s->filled);
    }
    free(c);
}

uint32_t fq_cache_new_owner(fq_cache *c)
{
    return atomic_fetch_add(&c->owners, 1);
}

/* Host offsets differ in their middle bits; the multiplication (by 2^64 over the golden ratio) brings all of them to the top. */
static uint64_t hash_of(uint32_t owner, uint64_t key)
{
    return ((key ^ key >> 29) + owner) * UINT64_C(0x9e3779b97f4a7c15);
}

static shard *shard_of(fq_cache *c, uint64_t hash)
{
    return &c->shards[hash >> 60 & (c->shard_count - 1)];
}

static fq_block **bucket_of(fq_cache *c, shard *s, uint64_t hash)
{
    return &s->buckets[hash >> 40 & (c->bucket_count - 1)];
}

static fq_block *find(fq_cache *c, shard *s, uint64_t hash, uint32_t owner, uint64_t key)
{
    fq_block *b = *bucket_of(c, s, hash);

    while (b && (b->key != key || b->owner != owner))
        b = b->chain;
    return b;
}

static void unlist(fq_cache *c, shard *s, fq_block *b)
{
    fq_block **at = bucket_of(c, s, hash_of(b->owner, b->key));

    while (*at != b)
        at = &(*at)->chain;
    *at = b->chain;
    list_remove(&b->order);
    s->nbytes -= b->nbytes;
    atomic_fetch_sub_explicit(&c->nbytes, b->nbytes, memory_order_relaxed);
    if (b->protected)
        s->protected_nbytes -= b->nbytes;
    b->listed = false;
    if (b->pins == 0)
        free(b);
}

static void shrink(fq_cache *c, shard *s)
{
    while (s->nbytes > c->shard_budget) {
        node *last = s->probation.prev != &s->probation ? s->probation.prev : s->protected.prev;

        unlist(c, s, (fq_block *)last);
    }
}

static void protect(fq_cache *c, shard *s, fq_block *b)
{
    list_remove(&b->order);
    list_push(&s->protected, &b->order);
    if (!b->protected) {
        b->protected = true;
        s->protected_nbytes += b->nbytes;
    }
    while (s->protected_nbytes > c->shard_budget / 4 * 3) {
        fq_block *oldest = (fq_block *)s->protected.prev;

        list_remove(&oldest->order);
        list_push(&s->probation, &oldest->order);
        oldest->protected = false;
        s->protected_nbytes -= oldest->nbytes;
    }
}

/*
 * While the cache grows its blocks are new memory, of which the first touch of each page would be a fault: some 20 us for 64 KiB,
 * where inflating them takes 90. One call for all pages takes half of that. A system that does not know it says so, and no harm.
 * And where workers have time, they keep some blocks ready.
 */
static void populate(fq_block *b, size_t nbytes)
{
#ifdef __linux__
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)b & ~(page - 1);

    madvise((void *)start, ((uintptr_t)b + nbytes - start) & ~(page - 1), MADV_POPULATE_WRITE);
#else
    (void)b;
    (void)nbytes;
#endif
}

static fq_block *allocate(size_t nbytes, bool is_new_memory)
{
    /* aligned_alloc wants a multiple; sizes here are powers of two, the header is a multiple by its alignment. */
    fq_block *b = aligned_alloc(64, (sizeof(*b) + nbytes + 63) & ~(size_t)63);

    if (b && nbytes >= POPULATE_NBYTES_MIN && is_new_memory)
        populate(b, sizeof(*b) + nbytes);
    return b;
}

static fq_block *take_spare(fq_cache *c)
{
    fq_block *b;

    pthread_mutex_lock(&c->spare_lock);
    b = c->spares;
    if (b) {
        c->spares = b->chain;
        atomic_fetch_sub_explicit(&c->spare_count, 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&c->spare_lock);
    return b;
}

/* A cache that is full has memory that is in use already. */
static bool has_room_for_spares(fq_cache *c, unsigned count)
{
    const size_t listed = atomic_load_explicit(&c->nbytes, memory_order_relaxed);

    return atomic_load_explicit(&c->spare_count, memory_order_relaxed) < count &&
           listed + c->spares_max * c->block_nbytes <= c->shard_budget * c->shard_count;
}

bool fq_cache_wants_spares(fq_cache *c)
{
    return has_room_for_spares(c, c->spares_max / 2);
}

bool fq_cache_add_spare(fq_cache *c)
{
    fq_block *b = has_room_for_spares(c, c->spares_max) ? allocate(c->block_nbytes, true) : NULL;

    if (!b)
        return false;
    pthread_mutex_lock(&c->spare_lock);
    b->chain = c->spares;
    c->spares = b;
    atomic_fetch_add_explicit(&c->spare_count, 1, memory_order_relaxed);
    pthread_mutex_unlock(&c->spare_lock);
    return true;
}

static fq_block *new_block(fq_cache *c, shard *s, uint64_t hash, uint32_t owner, uint64_t key, size_t nbytes)
{
    fq_block *b = c->spares_max > 0 && nbytes == c->block_nbytes ? take_spare(c) : NULL;
    fq_block **bucket = bucket_of(c, s, hash);

    if (!b)
        b = allocate(nbytes, s->nbytes + nbytes <= c->shard_budget);
    if (!b)
        return NULL;
    *b = (fq_block){.chain = *bucket, .key = key, .nbytes = nbytes, .owner = owner, .pins = 1, .forks = forks, .listed = true};
    *bucket = b;
    list_push(&s->probation, &b->order);
    s->nbytes += nbytes;
    atomic_fetch_add_explicit(&c->nbytes, nbytes, memory_order_relaxed);
    shrink(c, s);
    return b;
}

fq_status fq_cache_get(fq_cache *c, uint32_t owner, uint64_t key, size_t nbytes, fq_fill_fn fill, void *arg, bool *filled,
                       fq_block **out)
{
    const uint64_t hash = hash_of(owner, key);
    shard *s = shard_of(c, hash);
    fq_status status;
    fq_block *b;

    *filled = false;
    pthread_mutex_lock(&s->lock);
    while ((b = find(c, s, hash, owner, key))) {
        if (b->state == FILLING && b->forks != forks) {
            b->pins = 1; /* its users are in the parent; nobody will free it, and one block is not worth more */
            unlist(c, s, b);
            break;
        }
        b->pins++;
        while (b->state == FILLING)
            pthread_cond_wait(&s->filled, &s->lock);
        if (b->state == READY) {
            pthread_mutex_unlock(&s->lock);
            *out = b;
            return FQ_OK;
        }
        if (--b->pins == 0)
            free(b);
    }
    b = new_block(c, s, hash, owner, key, nbytes);
    pthread_mutex_unlock(&s->lock);
    if (!b)
        return FQ_ERR_NOMEM;

    *filled = true;
    status = fill(arg, b->data);
    pthread_mutex_lock(&s->lock);
    b->state = status == FQ_OK ? READY : FAILED;
    pthread_cond_broadcast(&s->filled);
    if (status == FQ_OK) {
        *out = b;
    } else {
        if (b->listed)
            unlist(c, s, b);
        if (--b->pins == 0)
            free(b);
    }
    pthread_mutex_unlock(&s->lock);
    return status;
}

fq_block *fq_cache_peek(fq_cache *c, uint32_t owner, uint64_t key)
{
    const uint64_t hash = hash_of(owner, key);
    shard *s = shard_of(c, hash);
    fq_block *b;

    pthread_mutex_lock(&s->lock);
    b = find(c, s, hash, owner, key);
    if (b && b->state == READY)
        b->pins++;
    else
        b = NULL;
    pthread_mutex_unlock(&s->lock);
    return b;
}

fq_presence fq_cache_look(fq_cache *c, uint32_t owner, uint64_t key)
{
    const uint64_t hash = hash_of(owner, key);
    shard *s = shard_of(c, hash);
    fq_presence presence = FQ_ABSENT;
    const fq_block *b;

    pthread_mutex_lock(&s->lock);
    b = find(c, s, hash, owner, key);
    if (b && b->state == READY)
        presence = FQ_PRESENT;
    else if (b && b->state == FILLING && b->forks == forks)
        presence = FQ_COMING;
    pthread_mutex_unlock(&s->lock);
    return presence;
}

void fq_cache_unpin(fq_cache *c, fq_block *b)
{
    shard *s = shard_of(c, hash_of(b->owner, b->key));

    pthread_mutex_lock(&s->lock);
    if (--b->pins == 0 && !b->listed)
        free(b);
    pthread_mutex_unlock(&s->lock);
}

bool fq_cache_release(fq_cache *c, fq_block *b, size_t from, size_t to)
{
    shard *s = shard_of(c, hash_of(b->owner, b->key));
    bool first;

    pthread_mutex_lock(&s->lock);
    if (b->listed && b->used && b->last_to != from)
        protect(c, s, b);
    first = !b->used;
    b->used = true;
    b->last_to = to;
    if (--b->pins == 0 && !b->listed)
        free(b);
    pthread_mutex_unlock(&s->lock);
    return first;
}

const uint8_t *fq_block_data(const fq_block *b)
{
    return b->data;
}
