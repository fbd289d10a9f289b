// What a kernel hands to the driver: its sweep, and a ragged list of leaves for it.

typedef void Sweep(int64_t n, int64_t from, char *const *at, int64_t leaves,
                   const double *scalars, double *sums, int streaming);

typedef struct {
    Sweep *kernel;
    int64_t scalar_count, sum_count;  // of a row, of a block
    int64_t columns, number_size;     // of what is read and written, in bytes
    int64_t leaves, tasks;
    const int64_t *sizes, *rows;
    const double *scalars;
    char *const *pointers;
    double *sums, *partial;
    int streaming, threads;
    int64_t spread;  // a bit for each column that has but one number for each task
} Job;
