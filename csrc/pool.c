/*
 * pool.c - the process's worker threads
 *
 * One pool for all readers. A job is a function that any number of threads may run at once, each taking work until none is left, so
 * the calling thread does all of it where no worker comes in time, where none can be started, and in a child after fork, where the
 * parent's workers do not exist. Nothing ever waits for a worker to become free; that is also why no job can deadlock on another.
 *
 * Workers are started when a job first wants them and then sleep on a condition. They block all signals, which belong to the
 * application's threads, and are detached: the process may exit at any time, as they hold nothing that outlives it.
 */
#include "internal.h"

#include <signal.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_WORKERS = 256,
    WORKER_STACK_NBYTES = 1 << 20, /* a source's callback runs on it, and with it the interpreter */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static fq_pool_job *jobs; /* those that want workers, oldest first, patient ones last */
static unsigned workers;
static unsigned forks; /* how many lie between the process that started the pool and this one */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&lock);
}

/* The child has neither the workers nor the threads whose jobs they did. */
static void after_fork_in_child(void)
{
    jobs = NULL;
    workers = 0;
    forks++;
    pthread_cond_init(&work, NULL);
    pthread_mutex_unlock(&lock);
}

static void set_up(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void unlist(fq_pool_job *job)
{
    fq_pool_job **at = &jobs;

    while (*at && *at != job)
        at = &(*at)->next;
    if (*at)
        *at = job->next;
}

/*
 * A callback may end its thread: an interpreter that is shut down does so to those that come back to it. What others are at work on
 * lies on this thread's stack, so it has to stay; it ends with the process, which is about to.
 */
static void stay(void *unused)
{
    (void)unused;
    for (;;)
        pause();
}

static void *worker_main(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        fq_pool_job *job = jobs;

        if (!job) {
            pthread_cond_wait(&work, &lock);
            continue;
        }
        if (--job->wanted == 0)
            jobs = job->next;
        job->active++;
        pthread_mutex_unlock(&lock);
        job->fn(job->arg, false);
        pthread_mutex_lock(&lock);
        if (--job->active == 0)
            pthread_cond_signal(&job->idle);
    }
    return NULL;
}

/* Called with the lock. Best effort: a machine that refuses a thread gets its answers from fewer. */
static void start_workers(unsigned wanted)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (workers < wanted && workers < MAX_WORKERS) {
        pthread_attr_t attr;
        pthread_t thread;
        int ret;

        if (pthread_attr_init(&attr) != 0)
            break;
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attr, WORKER_STACK_NBYTES);
        ret = pthread_create(&thread, &attr, worker_main, NULL);
        pthread_attr_destroy(&attr);
        if (ret != 0)
            break;
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* macOS has no such clock for conditions, but waits that are relative. */
void fq_cond_init(pthread_cond_t *cond)
{
#ifdef __APPLE__
    pthread_cond_init(cond, NULL);
#else
    pthread_condattr_t attr;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
#endif
}

void fq_wait_briefly(pthread_cond_t *cond, pthread_mutex_t *held)
{
#ifdef __APPLE__
    const struct timespec span = {0, FQ_POLL_MS * 1000000};

    pthread_cond_timedwait_relative_np(cond, held, &span);
#else
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += FQ_POLL_MS * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_cond_timedwait(cond, held, &until);
#endif
}

void fq_pool_run(unsigned helpers, void (*fn)(void *arg, bool is_caller), void (*idle)(void *arg), void *arg)
{
    fq_pool_job job = {.fn = fn, .arg = arg, .wanted = helpers};
    fq_pool_job **tail = &jobs;
    unsigned forks_before;

    if (helpers == 0) {
        fn(arg, true);
        return;
    }
    pthread_once(&once, set_up);
    fq_cond_init(&job.idle);
    pthread_mutex_lock(&lock);
    forks_before = forks;
    start_workers(helpers);
    while (*tail && !(*tail)->patient)
        tail = &(*tail)->next;
    job.next = *tail;
    *tail = &job;
    for (unsigned i = 0; i < helpers; i++)
        pthread_cond_signal(&work);
    pthread_mutex_unlock(&lock);

    pthread_cleanup_push(stay, NULL);
    fn(arg, true);
    pthread_mutex_lock(&lock);
    if (job.wanted > 0)
        unlist(&job);
    while (job.active > 0 && forks == forks_before) {
        fq_wait_briefly(&job.idle, &lock);
        pthread_mutex_unlock(&lock);
        idle(arg);
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    pthread_cleanup_pop(0);
    pthread_cond_destroy(&job.idle);
}

void fq_pool_start(fq_pool_job *job, unsigned helpers)
{
    fq_pool_job **tail = &jobs;

    pthread_once(&once, set_up);
    pthread_mutex_lock(&lock);
    if (!job->patient || job->forks != forks) {
        job->patient = true;
        job->forks = forks;
        job->wanted = job->active = 0;
        pthread_cond_init(&job->idle, NULL);
    }
    if (job->active + job->wanted < helpers) {
        const unsigned more = helpers - job->active - job->wanted;

        start_workers(helpers);
        if (job->wanted == 0) {
            while (*tail)
                tail = &(*tail)->next;
            job->next = NULL;
            *tail = job;
        }
        job->wanted += more;
        for (unsigned i = 0; i < more; i++)
            pthread_cond_signal(&work);
    }
    pthread_mutex_unlock(&lock);
}

void fq_pool_stop(fq_pool_job *job)
{
    if (!job->patient) /* never started; and before the first start of all, a fork would not mind the lock */
        return;
    pthread_mutex_lock(&lock);
    if (job->forks == forks) {
        if (job->wanted > 0)
            unlist(job);
        job->wanted = 0;
        while (job->active > 0)
            pthread_cond_wait(&job->idle, &lock);
        pthread_cond_destroy(&job->idle);
    }
    pthread_mutex_unlock(&lock);
}
