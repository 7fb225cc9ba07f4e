/* A few threads that share the items of one task at a time. */
#ifndef MEGALITH_POOL_H
#define MEGALITH_POOL_H

struct pool;
/* Does item `item`; `worker` (0 is the caller) says whose scratch memory to use. */
typedef void (*pool_task)(void *argument, int item, int worker);

/* A pool of `threads` in all, the caller included, or NULL. */
struct pool *pool_create(int threads);
int pool_threads(const struct pool *pool);
/* Run items 0..items-1, in any order and on any worker; returns when all are done. One caller at a time. */
void pool_run(struct pool *pool, pool_task task, void *argument, int items);
void pool_destroy(struct pool *pool);

#endif
