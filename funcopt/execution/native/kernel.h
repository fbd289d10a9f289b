// Around a sweep: how it goes over its memory, and what the driver does for it. That is
// in a library of its own, or each kernel would take twice as long to build.

// Elements that are fetched, computed and put away together: few, so that a processor
// computes while it waits for the next; more where each tile ends in a sum of its own.
#define TILE ((int64_t)(SUMS ? 256 : 256 / sizeof(S)))
// Of many, the two halves in turn, tile by tile: memory that is read in more places at
// once is read faster. Few are in the cache, or their ends would be what is waited for.
#define HALF(n) (SUMS || (n) < 8192 ? (n) : ((n) / 2 + TILE - 1) / TILE * TILE)
// Into the cache, two KiB before it is asked for: what the processor does by itself ends
// with each page, and a step that goes over many streams at once waits there.
#ifdef __GNUC__
#define FETCH(from) \
    for (int64_t k = 0; k < TILE; k += 64 / sizeof(S)) \
        __builtin_prefetch((const char *)((from) + k) + 2048)
#else
#define FETCH(from)
#endif

static int (*drive)(Job *job);
static void (*stream)(void *to, const void *from, int64_t bytes);

void bind(void *driver, void *streamer) {
    drive = (int (*)(Job *))driver;
    stream = (void (*)(void *, const void *, int64_t))streamer;
}

static Sweep sweep;

int run(int64_t leaves, int64_t tasks, const int64_t *sizes, const int64_t *rows,
        const double *scalars, char *const *pointers, double *sums, int streaming,
        int threads, int64_t spread) {
    Job job = {sweep, SCALARS, SUMS, COLUMNS, sizeof(S), leaves, tasks, sizes, rows,
               scalars, pointers, sums, 0, streaming, threads, spread};
    return drive(&job);
}

