/* total[k][d] += Σ_n (Σ_p g[n][k][p] · x[n][position[p] + offset[d]])²

   The sum over the samples n of squared per-sample weight gradients of a convolution (implicit
   unfolding) or of a linear layer over positions p. No per-sample gradient reaches memory: a tile
   of one is formed in registers, squared, and added to the tile of the total. Every entry is added
   up in the order of the samples by one thread, so the result does not depend on their number.

   Compiled with -DReal=float or -DReal=double. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A tile is two vectors of outputs k by DEPTH inputs d: as much as the registers hold. */
#if defined(__AVX512F__)
#define BYTES 64
#define DEPTH 12
#elif defined(__AVX__)
#define BYTES 32
#define DEPTH 6
#else
#define BYTES 16
#define DEPTH 6
#endif

#define LANES ((int64_t)(BYTES / sizeof(Real)))
#define WIDTH (2 * LANES)
#define PANEL_BYTES (1 << 20) /* g of as many samples at a time as stay in the cache */

typedef Real Vector __attribute__((vector_size(BYTES), aligned(sizeof(Real))));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* One sample's tile, squared and added to `total`. */
static inline void add_tile(int64_t positions, const Real *panel, const Real *x,
                            const int64_t *position, const int64_t *offset,
                            Vector total[DEPTH][2])
{
    Vector sum[DEPTH][2];
    const Real *shifted[DEPTH];
    for (int d = 0; d < DEPTH; d++) {
        sum[d][0] = sum[d][1] = (Vector){0};
        shifted[d] = x + offset[d];
    }
    for (int64_t p = 0; p < positions; p++) {
        Vector low = *(const Vector *)(panel + p * WIDTH);
        Vector high = *(const Vector *)(panel + p * WIDTH + LANES);
        for (int d = 0; d < DEPTH; d++) {
            Real value = shifted[d][position[p]];
            sum[d][0] += low * value;
            sum[d][1] += high * value;
        }
    }
    for (int d = 0; d < DEPTH; d++) {
        total[d][0] += sum[d][0] * sum[d][0];
        total[d][1] += sum[d][1] * sum[d][1];
    }
}

/* WIDTH outputs of one sample's g, positions first; zeros where there are fewer. */
static void pack(int64_t positions, int64_t width, const Real *g, int64_t g_output,
                 int64_t g_position, Real *panel)
{
    if (width < WIDTH)
        memset(panel, 0, positions * WIDTH * sizeof(Real));
    for (int64_t start = 0; start < positions; start += LANES) {
        int64_t end = least(start + LANES, positions);
        if (g_output == 1)
            for (int64_t p = start; p < end; p++)
                memcpy(panel + p * WIDTH, g + p * g_position, width * sizeof(Real));
        else
            for (int64_t k = 0; k < width; k++)
                for (int64_t p = start; p < end; p++)
                    panel[p * WIDTH + k] = g[k * g_output + p * g_position];
    }
}

/* Returns 0, or 1 if there is no memory for the panels. */
int add_squared_products(int64_t samples, int64_t outputs, int64_t inputs, int64_t positions,
                const Real *g, int64_t g_sample, int64_t g_output, int64_t g_position,
                const Real *x, int64_t x_sample, const int64_t *position, const int64_t *offset,
                Real *total, int threads)
{
    int64_t across = (outputs + WIDTH - 1) / WIDTH, down = (inputs + DEPTH - 1) / DEPTH;
    int64_t size = positions * WIDTH;
    int64_t most = PANEL_BYTES / (across * size * (int64_t)sizeof(Real));
    int64_t together = least(samples, most < 1 ? 1 : most);
    Real *panels = aligned_alloc(64, (together * across * size * sizeof(Real) + 63) / 64 * 64);
    int64_t *padded = malloc(down * DEPTH * sizeof(int64_t));
    if (!panels || !padded) {
        free(panels);
        free(padded);
        return 1;
    }
    for (int64_t d = 0; d < down * DEPTH; d++) /* what is beyond the last is not kept */
        padded[d] = offset[least(d, inputs - 1)];

#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < samples; first += together) {
        int64_t count = least(together, samples - first);
#pragma omp for collapse(2)
        for (int64_t n = 0; n < count; n++)
            for (int64_t a = 0; a < across; a++)
                pack(positions, least(WIDTH, outputs - a * WIDTH),
                     g + (first + n) * g_sample + a * WIDTH * g_output, g_output, g_position,
                     panels + (n * across + a) * size);
#pragma omp for collapse(2)
        for (int64_t a = 0; a < across; a++)
            for (int64_t b = 0; b < down; b++) {
                Vector tile[DEPTH][2];
                memset(tile, 0, sizeof tile);
                for (int64_t n = 0; n < count; n++)
                    add_tile(positions, panels + (n * across + a) * size,
                             x + (first + n) * x_sample, position, padded + b * DEPTH, tile);
                int64_t width = least(WIDTH, outputs - a * WIDTH);
                int64_t depth = least(DEPTH, inputs - b * DEPTH);
                for (int64_t k = 0; k < width; k++) {
                    Real *row = total + (a * WIDTH + k) * inputs + b * DEPTH;
                    for (int64_t d = 0; d < depth; d++)
                        row[d] += tile[d][k / LANES][k % LANES];
                }
            }
    }
    free(panels);
    free(padded);
    return 0;
}
