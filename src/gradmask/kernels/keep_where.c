/* values[t][i] = keep[t][i] ? values[t][i] : others[t][i], or 0 without others.

   Bits are moved, not numbers, so infinities and NaN do no harm.
   Compiled with -DWord=uint16_t, uint32_t or uint64_t for the size of an entry. */

#include <stddef.h>
#include <stdint.h>

void keep_where(int64_t tensors, const int64_t *sizes, Word *const *values,
                const uint8_t *const *keep, const Word *const *others, int threads)
{
#pragma omp parallel num_threads(threads)
    for (int64_t t = 0; t < tensors; t++) {
        Word *value = values[t];
        const uint8_t *kept = keep[t];
        const Word *other = others ? others[t] : NULL;
        if (other) {
#pragma omp for simd schedule(static) nowait
            for (int64_t i = 0; i < sizes[t]; i++)
                value[i] = kept[i] ? value[i] : other[i];
        } else {
#pragma omp for simd schedule(static) nowait
            for (int64_t i = 0; i < sizes[t]; i++)
                value[i] = kept[i] ? value[i] : 0;
        }
    }
}
