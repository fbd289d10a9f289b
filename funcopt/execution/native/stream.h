// Past the cache: else each line is read before it is written, a third of the traffic.
#if defined(__AVX512F__) && defined(__GNUC__)
typedef long long Line __attribute__((vector_size(64)));
#define PUT(to, line) __builtin_ia32_movntdq512((Line *)(to), line)
#elif defined(__AVX__) && defined(__GNUC__)
typedef long long Line __attribute__((vector_size(32)));
#define PUT(to, line) __builtin_ia32_movntdq256((Line *)(to), line)
#endif
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

static __attribute__((noinline)) void stream(S *to, const S *from, int64_t n) {
    int64_t i = 0;
#ifdef PUT
    for (; i < n && ((uintptr_t)(to + i) & (sizeof(Line) - 1)); i++) to[i] = from[i];
    for (int64_t per = sizeof(Line) / sizeof(S); i + per <= n; i += per) {
        Line line;
        memcpy(&line, from + i, sizeof(Line));
        PUT(to + i, line);
    }
#endif
    for (; i < n; i++) to[i] = from[i];
}

static inline void fence(void) {
#ifdef PUT
    __builtin_ia32_sfence();
#endif
}
