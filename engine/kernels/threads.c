/* A small pool of threads that wait for the next piece of work without sleeping right away.
 *
 * A step of a small model calls it hundreds of times, a few tens of microseconds apart: a helper
 * polls that long before it waits on a condition variable. After fork() the child starts anew.
 */
#define _GNU_SOURCE
#include "native.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_THREADS = 256, SPIN_NS = 60000 };

static struct {
    pthread_mutex_t use;  /* held by the thread whose work is being done */
    pthread_mutex_t lock; /* guards sleepers and the threads themselves */
    pthread_cond_t wake;
    int wanted;  /* threads asked for, the caller's own included */
    int started; /* helpers that run */
    int sleepers;
    pthread_t helpers[MAX_THREADS];
    atomic_int stop;
    /* One round of work. `round` is written last and read first. */
    Task task;
    void *context;
    int64_t count, grain;
    atomic_llong next;
    atomic_int busy;
    atomic_uint round;
} pool = {.use = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .wanted = 1};

INLINE void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void take_pieces(void) {
    for (;;) {
        int64_t begin = atomic_fetch_add(&pool.next, pool.grain);
        if (begin >= pool.count) return;
        int64_t end = begin + pool.grain;
        pool.task(pool.context, begin, end < pool.count ? end : pool.count);
    }
}

static unsigned next_round(unsigned seen) {
    int64_t until = now_ns() + SPIN_NS;
    for (int polls = 0; atomic_load(&pool.round) == seen; polls++) {
        relax();
        if (polls % 64 || now_ns() < until) continue;
        pthread_mutex_lock(&pool.lock);
        pool.sleepers++;
        while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        pool.sleepers--;
        pthread_mutex_unlock(&pool.lock);
    }
    return atomic_load(&pool.round);
}

static void *help(void *seen_round) {
    unsigned seen = (unsigned)(uintptr_t)seen_round;
    for (;;) {
        seen = next_round(seen);
        if (atomic_load(&pool.stop)) return NULL;
        take_pieces();
        atomic_fetch_sub(&pool.busy, 1);
    }
}

static void announce(void) {
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.round, 1);
    if (pool.sleepers) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* Called with `use` held. */
static void stop_helpers(void) {
    if (!pool.started) return;
    atomic_store(&pool.stop, 1);
    announce();
    for (int i = 0; i < pool.started; i++) pthread_join(pool.helpers[i], NULL);
    atomic_store(&pool.stop, 0);
    pool.started = 0;
}

/* Called with `use` held. Fewer threads than wanted are no error: the work is done all the same. */
static void start_helpers(void) {
    while (pool.started < pool.wanted - 1) {
        void *seen = (void *)(uintptr_t)atomic_load(&pool.round);
        if (pthread_create(&pool.helpers[pool.started], NULL, help, seen)) {
            pool.wanted = pool.started + 1;
            return;
        }
        pool.started++;
    }
}

static void forget_helpers(void) { /* in the child of a fork: no helper came along */
    pthread_mutex_init(&pool.use, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.started = pool.sleepers = 0;
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_helpers); }

int num_threads(void) { return pool.wanted; }

void set_num_threads(int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&pool.use);
    stop_helpers();
    pool.wanted = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    pthread_mutex_unlock(&pool.use);
}

void parallel_for(int64_t count, int64_t grain, Task task, void *context) {
    if (grain < 1) grain = 1;
    if (pool.wanted == 1 || count <= grain || pthread_mutex_trylock(&pool.use)) {
        if (count > 0) task(context, 0, count);
        return;
    }
    start_helpers();
    pool.task = task;
    pool.context = context;
    pool.count = count;
    pool.grain = grain;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.busy, pool.started);
    announce();
    take_pieces();
    for (int polls = 0; atomic_load(&pool.busy); polls++) {
        relax();
        if (polls > 4096) sched_yield();
    }
    pthread_mutex_unlock(&pool.use);
}

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

typedef struct {
    void *memory[SCRATCH_SLOTS];
    size_t bytes[SCRATCH_SLOTS];
} Scratch;

static void free_scratch(void *mine) {
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(((Scratch *)mine)->memory[slot]);
    free(mine);
}

static void make_key(void) { pthread_key_create(&scratch_key, free_scratch); }

void *scratch(int slot, size_t bytes) {
    pthread_once(&scratch_once, make_key);
    Scratch *mine = pthread_getspecific(scratch_key);
    if (!mine) {
        if (!(mine = calloc(1, sizeof *mine))) return NULL;
        pthread_setspecific(scratch_key, mine);
    }
    if (mine->bytes[slot] < bytes) {
        free(mine->memory[slot]);
        mine->bytes[slot] = 0;
        if (posix_memalign(&mine->memory[slot], 64, bytes + 4096)) mine->memory[slot] = NULL;
        if (mine->memory[slot]) mine->bytes[slot] = bytes;
    }
    return mine->memory[slot];
}
