/* Workers take items from one atomic word that holds the task's number and the next item, so a worker that wakes late,
 * after its task is over, can neither take nor repeat an item: its compare-and-swap fails on the number.
 *
 * The caller works too and waits only for items that others have begun: a worker that the system does not run delays
 * nothing that it has not taken. Workers spin for some tens of microseconds, because tasks of one step follow each other
 * closely, and then sleep.
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define SPINS 4000
#define CLOSED 0xffffffffu /* an item number that no task reaches: fields may be changed */

struct pool {
    int threads, started;
    pthread_t *handles;
    _Atomic uint64_t next; /* task number << 32 | next item */
    _Atomic(pool_task) task;
    _Atomic(void *) argument;
    atomic_int items, done, sleepers, stop;
    atomic_int workers_named;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Take and do items of task `number` until none is left. */
static void work(struct pool *pool, uint64_t number, int worker) {
    for (;;) {
        uint64_t seen = atomic_load(&pool->next);
        pool_task task = atomic_load_explicit(&pool->task, memory_order_relaxed);
        void *argument = atomic_load_explicit(&pool->argument, memory_order_relaxed);
        uint32_t item = (uint32_t)seen;
        if (seen >> 32 != number || item == CLOSED || item >= (uint32_t)atomic_load(&pool->items)) return;
        if (!atomic_compare_exchange_weak(&pool->next, &seen, seen + 1)) continue;
        task(argument, (int)item, worker);
        atomic_fetch_add(&pool->done, 1);
    }
}

static uint64_t task_number(struct pool *pool) { return atomic_load(&pool->next) >> 32; }

static void *worker_main(void *argument) {
    struct pool *pool = argument;
    int worker = atomic_fetch_add(&pool->workers_named, 1) + 1;
    uint64_t finished = 0;
    while (!atomic_load(&pool->stop)) {
        for (int spin = 0; spin < SPINS && task_number(pool) == finished; spin++) relax();
        if (task_number(pool) == finished) {
            pthread_mutex_lock(&pool->lock);
            atomic_fetch_add(&pool->sleepers, 1);
            while (task_number(pool) == finished && !atomic_load(&pool->stop)) pthread_cond_wait(&pool->wake, &pool->lock);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->lock);
            continue;
        }
        uint64_t seen = atomic_load(&pool->next);
        if ((uint32_t)seen == CLOSED) continue; /* its fields are being written */
        finished = seen >> 32;
        work(pool, finished, worker);
    }
    return NULL;
}

struct pool *pool_create(int threads) {
    struct pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pool->threads = threads;
    pool->handles = calloc((size_t)threads, sizeof *pool->handles);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (; pool->handles != NULL && pool->started < threads - 1; pool->started++)
        if (pthread_create(&pool->handles[pool->started], NULL, worker_main, pool) != 0) break;
    if (pool->started == threads - 1) return pool;
    pool_destroy(pool);
    return NULL;
}

int pool_threads(const struct pool *pool) { return pool->threads; }

void pool_run(struct pool *pool, pool_task task, void *argument, int items) {
    if (pool->threads == 1 || items <= 1) {
        for (int item = 0; item < items; item++) task(argument, item, 0);
        return;
    }
    uint64_t number = (task_number(pool) + 1) & 0xffffffffu;
    atomic_store(&pool->next, number << 32 | CLOSED);
    atomic_store_explicit(&pool->task, task, memory_order_relaxed);
    atomic_store_explicit(&pool->argument, argument, memory_order_relaxed);
    atomic_store(&pool->items, items);
    atomic_store(&pool->done, 0);
    atomic_store(&pool->next, number << 32);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    work(pool, number, 0);
    for (int spin = 0; atomic_load(&pool->done) < items; spin++) {
        relax();
        if (spin > SPINS) sched_yield(); /* the worker that has the last item is not running: let it have this core */
    }
}

void pool_destroy(struct pool *pool) {
    if (pool == NULL) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stop, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->handles[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->wake);
    free(pool->handles);
    free(pool);
}
