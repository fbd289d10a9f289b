// `run`: sweeps over a ragged list of leaves, on as many threads as it is told.
//
// Blocks are of one size whatever the number of threads, and the sums of blocks are added
// in their order: a result does not depend on who computed it.

#define BLOCK 4096

typedef struct {
    int64_t leaves, tasks;
    const int64_t *sizes, *rows;
    const double *scalars;
    char *const *pointers;
    double *partial;
    int streaming, parallel;
} Job;

// Of the OpenMP that torch has loaded, so that both share one pool of threads.
static int (*thread_number)(void), (*thread_count)(void);
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

void bind(void *number, void *count, void *run) {
    thread_number = (int (*)(void))number;
    thread_count = (int (*)(void))count;
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))run;
}

static int64_t blocks_of(const Job *job) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < job->leaves; i++)
        blocks += (job->sizes[i] + BLOCK - 1) / BLOCK * job->tasks;
    return blocks;
}

static void work(void *data) {
    const Job *job = data;
    int64_t total = blocks_of(job), block = 0;
    int64_t mine = job->parallel ? thread_number() : 0;
    int64_t all = job->parallel ? thread_count() : 1;
    int64_t begin = total * mine / all, end = total * (mine + 1) / all;
    for (int64_t i = 0; i < job->leaves && block < end; i++) {
        int64_t size = job->sizes[i], each = (size + BLOCK - 1) / BLOCK;
        if (block + each * job->tasks <= begin) {
            block += each * job->tasks;
            continue;
        }
        for (int64_t task = 0; task < job->tasks; task++) {
            int64_t row = job->rows[i] * job->tasks + task;
            int64_t b = block < begin ? begin - block : 0;
            int64_t stop = end - block < each ? end - block : each;
            for (int64_t more = SUMS ? 1 : each; b < stop; b += more) {
                int64_t past = b + more < stop ? b + more : stop;
                int64_t n = (past * BLOCK < size ? past * BLOCK : size) - b * BLOCK;
                sweep(n, task * size + b * BLOCK, job->pointers + i, job->leaves,
                      job->scalars + row * SCALARS, job->partial + (block + b) * SUMS,
                      job->streaming);
            }
            block += each;
        }
    }
    if (job->streaming) fence();
}

int run(int64_t leaves, int64_t tasks, const int64_t *sizes, const int64_t *rows,
        const double *scalars, char *const *pointers, double *sums, int streaming,
        int threads) {
    Job job = {leaves, tasks, sizes, rows, scalars, pointers, 0, streaming,
               threads > 1 && parallel};
    if (SUMS && !(job.partial = malloc((blocks_of(&job) + 1) * SUMS * sizeof(double))))
        return 1;
    if (job.parallel) parallel(work, &job, threads, 0);
    else work(&job);
    const double *partial = job.partial;
    for (int64_t i = 0; SUMS && i < leaves; i++)
        for (int64_t task = 0; task < tasks; task++, sums += SUMS) {
            for (int k = 0; k < SUMS; k++) sums[k] = 0;
            for (int64_t b = 0; b < (sizes[i] + BLOCK - 1) / BLOCK; b++, partial += SUMS)
                for (int k = 0; k < SUMS; k++) sums[k] += partial[k];
        }
    free(job.partial);
    return 0;
}
