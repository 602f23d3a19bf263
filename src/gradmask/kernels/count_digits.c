/* counts[d] += how many values have the 16-bit digit d at `shift`, and `prefix` above it.

   The values are non-negative floats, whose bits are in the order of the values; -0 counts as 0.
   Compiled with -DWord=uint32_t (float) or -DWord=uint64_t (double). */

#include <stdint.h>
#include <stdlib.h>

#define DIGITS 65536
#define BLOCK 32
#define TABLES 4
#define MOST ((int64_t)1 << 31) /* values that 32 bits can count */
#define SIGN ((Word)1 << (8 * sizeof(Word) - 1))

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline Word bits(Word value) { return value == SIGN ? 0 : value; }

/* Neighbours are often equal: tables in turn, so that none waits for the one before it. */
static void count_all(int64_t size, const Word *values, int shift, uint32_t *counts)
{
    int64_t i = 0;
    for (; i + TABLES <= size; i += TABLES)
        for (int table = 0; table < TABLES; table++)
            counts[table * DIGITS + (bits(values[i + table]) >> shift & (DIGITS - 1))]++;
    for (; i < size; i++)
        counts[bits(values[i]) >> shift & (DIGITS - 1)]++;
}

/* Few values match: whole blocks are tested before single values are. */
static void count_matching(int64_t size, const Word *values, int shift, Word prefix,
                           uint32_t *counts)
{
    Word low = prefix << shift << 16, width = (Word)1 << shift << 15; /* half, not to overflow */
    for (int64_t start = 0; start < size; start += BLOCK) {
        const Word *block = values + start;
        int64_t count = least(BLOCK, size - start);
        int found = 0;
        if (count == BLOCK)
            for (int i = 0; i < BLOCK; i++)
                found |= (bits(block[i]) - low) >> 1 < width;
        if (!found && count == BLOCK)
            continue;
        for (int64_t i = 0; i < count; i++)
            if ((bits(block[i]) - low) >> 1 < width)
                counts[bits(block[i]) >> shift & (DIGITS - 1)]++;
    }
}

/* Returns 0, or 1 if there is no memory for the tables of a thread. */
int count_digits(int64_t size, const Word *values, int shift, int all, Word prefix,
                 int64_t *counts, int threads)
{
    if (size < DIGITS) { /* not worth tables of its own */
        for (int64_t i = 0; i < size; i++)
            if (all || bits(values[i]) >> shift >> 16 == prefix)
                counts[bits(values[i]) >> shift & (DIGITS - 1)]++;
        return 0;
    }
    int failed = 0;
    int64_t part = least((size + threads - 1) / threads, MOST);
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < size; start += part) {
        int64_t count = least(part, size - start);
        uint32_t *own = calloc(TABLES * DIGITS, sizeof(uint32_t));
        if (!own) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        if (all)
            count_all(count, values + start, shift, own);
        else
            count_matching(count, values + start, shift, prefix, own);
#pragma omp critical
        for (int d = 0; d < TABLES * DIGITS; d++)
            counts[d % DIGITS] += own[d];
        free(own);
    }
    return failed;
}
