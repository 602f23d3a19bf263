/* Clipping of masked values: the norm of what is kept, then keep ? factor * value : 0.

   Partial sums of squares are of CHUNK values each, so they do not depend on the threads.
   Compiled with -DReal=float or -DReal=double. */

#include <stdint.h>

#define CHUNK 16384
#define BLOCK 256

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* `partial` has a place for every CHUNK values of a tensor, begun or whole. */
void sum_kept_squares(int64_t tensors, const int64_t *sizes, const Real *const *values,
                      const uint8_t *const *keep, double *partial, int threads)
{
#pragma omp parallel num_threads(threads)
    for (int64_t t = 0, first = 0; t < tensors; t++) {
        const Real *value = values[t];
        const uint8_t *kept = keep[t];
        int64_t chunks = (sizes[t] + CHUNK - 1) / CHUNK;
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < chunks; c++) {
            double sum = 0;
            int64_t end = least((c + 1) * CHUNK, sizes[t]);
            for (int64_t start = c * CHUNK; start < end; start += BLOCK) {
                int64_t stop = least(start + BLOCK, end);
                Real part = 0; /* of few values: in their own type, quickly */
#pragma omp simd reduction(+ : part)
                for (int64_t i = start; i < stop; i++) {
                    Real one = kept[i] ? value[i] : 0;
                    part += one * one;
                }
                sum += part;
            }
            partial[first + c] = sum;
        }
        first += chunks;
    }
}

void scale_kept(int64_t tensors, const int64_t *sizes, Real *const *values,
                const uint8_t *const *keep, double factor, int threads)
{
#pragma omp parallel num_threads(threads)
    for (int64_t t = 0; t < tensors; t++) {
        Real *value = values[t], scale = (Real)factor;
        const uint8_t *kept = keep[t];
#pragma omp for simd schedule(static) nowait
        for (int64_t i = 0; i < sizes[t]; i++)
            value[i] = kept[i] ? value[i] * scale : 0;
    }
}
