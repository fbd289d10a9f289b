// `drive`: a kernel's sweep over a ragged list of leaves, on as many threads as it is told.
//
// Blocks are of one size whatever the number of threads, and the sums of blocks are added
// in their order: a result does not depend on who computed it.

#include <stdlib.h>

#define BLOCK 4096
#define SPREAD 4  // columns at most

// Past the cache: else each line is read before it is written, a third of the traffic.
#if defined(__AVX512F__) && defined(__GNUC__)
typedef long long Line __attribute__((vector_size(64)));
#define PUT(to, line) __builtin_ia32_movntdq512((Line *)(to), line)
#elif defined(__AVX__) && defined(__GNUC__)
typedef long long Line __attribute__((vector_size(32)));
#define PUT(to, line) __builtin_ia32_movntdq256((Line *)(to), line)
#endif

void stream(char *to, const char *from, int64_t bytes) {
    int64_t i = 0;
#ifdef PUT
    i = -(uintptr_t)to & (sizeof(Line) - 1);  // to where a line begins
    i = i < bytes ? i : bytes;
    memcpy(to, from, i);
    for (; i + (int64_t)sizeof(Line) <= bytes; i += sizeof(Line)) {
        Line line;
        memcpy(&line, from + i, sizeof(Line));
        PUT(to + i, line);
    }
#endif
    memcpy(to + i, from + i, bytes - i);
}

static void fence(void) {
#ifdef PUT
    __builtin_ia32_sfence();
#endif
}

// Of the OpenMP that torch has loaded, so that both share one pool of threads.
static int (*thread_number)(void), (*thread_count)(void);
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

void bind(void *number, void *count, void *start) {
    thread_number = (int (*)(void))number;
    thread_count = (int (*)(void))count;
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))start;
}

static int64_t blocks_of(const Job *job) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < job->leaves; i++)
        blocks += (job->sizes[i] + BLOCK - 1) / BLOCK * job->tasks;
    return blocks;
}

static void repeat(char *to, const char *number, int64_t size, int64_t bytes) {
    memcpy(to, number, size);
    for (int64_t done = size; done < bytes; done *= 2)
        memcpy(to + done, to, done < bytes - done ? done : bytes - done);
}

// Where a leaf's columns lie; of one that is spread, copies of the task's number, which a
// kernel that begins at `from` finds there. Only the first `n` of a task make them.
static void columns_of(const Job *job, int64_t leaf, int64_t task, int64_t from,
                       int64_t n, char *copies, char **at) {
    int64_t size = job->number_size;
    for (int64_t column = 0; column < job->columns; column++) {
        at[column] = job->pointers[column * job->leaves + leaf];
        if (!(job->spread >> column & 1)) continue;
        if (n) repeat(copies, at[column] + task * size, size, n * size);
        at[column] = copies - from * size;
        copies += BLOCK * size;
    }
}

static void work(void *data) {
    const Job *job = data;
    char *at[job->columns], copies[job->spread ? SPREAD * BLOCK * job->number_size : 1];
    int64_t total = blocks_of(job), block = 0;
    int64_t mine = job->threads > 1 ? thread_number() : 0;
    int64_t all = job->threads > 1 ? thread_count() : 1;
    int64_t begin = total * mine / all, end = total * (mine + 1) / all;
    for (int64_t i = 0; i < job->leaves && block < end; i++) {
        int64_t size = job->sizes[i], each = (size + BLOCK - 1) / BLOCK;
        if (block + each * job->tasks <= begin) {
            block += each * job->tasks;
            continue;
        }
        for (int64_t task = 0; task < job->tasks; task++) {
            int64_t row = job->rows[i];
            if (!job->spread) row = row * job->tasks + task;
            int64_t b = block < begin ? begin - block : 0;
            int64_t stop = end - block < each ? end - block : each;
            int64_t more = job->sum_count || job->spread ? 1 : each, fresh = 1;
            for (; b < stop; b += more, fresh = 0) {
                int64_t past = b + more < stop ? b + more : stop;
                int64_t n = (past * BLOCK < size ? past * BLOCK : size) - b * BLOCK;
                int64_t from = task * size + b * BLOCK;
                if (job->spread) columns_of(job, i, task, from, fresh * n, copies, at);
                job->kernel(n, from, job->spread ? at : job->pointers + i,
                            job->spread ? 1 : job->leaves,
                            job->scalars + row * job->scalar_count,
                            job->partial + (block + b) * job->sum_count, job->streaming);
            }
            block += each;
        }
    }
    if (job->streaming) fence();
}

int drive(Job *job) {
    int64_t count = job->sum_count;
    if (!parallel) job->threads = 1;
    if (count && !(job->partial = malloc((blocks_of(job) + 1) * count * sizeof(double))))
        return 1;
    if (job->threads > 1) parallel(work, job, job->threads, 0);
    else work(job);
    double *sums = job->sums;
    const double *partial = job->partial;
    for (int64_t i = 0; count && i < job->leaves; i++)
        for (int64_t task = 0; task < job->tasks; task++, sums += count) {
            for (int64_t k = 0; k < count; k++) sums[k] = 0;
            int64_t blocks = (job->sizes[i] + BLOCK - 1) / BLOCK;
            for (int64_t b = 0; b < blocks; b++, partial += count)
                for (int64_t k = 0; k < count; k++) sums[k] += partial[k];
        }
    free(job->partial);
    return 0;
}
