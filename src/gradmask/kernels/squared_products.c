/* Of G[n][k][d] = Σ_p g[n][k][p] · x[n][position[p] + offset[d]], for each group of channels, one of

   total[k][d] += Σ_n G[n][k][d]²     (and if wanted sums[k][d] += Σ_n G[n][k][d])
   values[n] += Σ_kd weights[k][d] · G[n][k][d]²

   G are the per-sample weight gradients of a convolution (implicit unfolding) or of a linear layer
   over positions p. None reaches memory: a tile of one is formed in registers, squared, and added
   to the tile of the total, or weighted and summed. Every entry is added up in the same order by
   one thread, so the result does not depend on their number.

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

/* One sample's tile. */
static inline void form_tile(int64_t positions, const Real *panel, const Real *x,
                             const int64_t *position, const int64_t *offset, Vector sum[DEPTH][2])
{
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
}

static inline void add_squares(Vector sum[DEPTH][2], Vector total[DEPTH][2])
{
    for (int d = 0; d < DEPTH; d++) {
        total[d][0] += sum[d][0] * sum[d][0];
        total[d][1] += sum[d][1] * sum[d][1];
    }
}

static inline void add_plain(Vector sum[DEPTH][2], Vector total[DEPTH][2])
{
    for (int d = 0; d < DEPTH; d++) {
        total[d][0] += sum[d][0];
        total[d][1] += sum[d][1];
    }
}

static inline Real weigh_squares(Vector sum[DEPTH][2], Vector weights[DEPTH][2])
{
    Vector lanes = {0};
    Real value = 0;
    for (int d = 0; d < DEPTH; d++) {
        lanes += weights[d][0] * (sum[d][0] * sum[d][0]);
        lanes += weights[d][1] * (sum[d][1] * sum[d][1]);
    }
    for (int i = 0; i < LANES; i++)
        value += lanes[i];
    return value;
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

/* Everything that is given, with the copies of g and the offsets that tiles are formed from. */
typedef struct {
    int64_t outputs, inputs, positions, across;
    Real *panels;
    const Real *x;
    int64_t x_sample;
    const int64_t *position, *padded;
    Real *matrix, *sums;
    double *values;
} Work;

/* A tile's part of what is added up in memory; `corner` is where it begins. */
static void add_tile(Vector tile[DEPTH][2], int64_t width, int64_t depth, int64_t inputs,
                     Real *corner)
{
    for (int64_t k = 0; k < width; k++)
        for (int64_t d = 0; d < depth; d++)
            corner[k * inputs + d] += tile[d][k / LANES][k % LANES];
}

/* A tile at (a, b) of the samples from `start` to `end`: added up, or weighted and summed. */
static void use_tile(const Work *work, int64_t a, int64_t b, int64_t first, int64_t start,
                     int64_t end)
{
    Vector tile[DEPTH][2], plain[DEPTH][2], sum[DEPTH][2];
    int64_t width = least(WIDTH, work->outputs - a * WIDTH);
    int64_t depth = least(DEPTH, work->inputs - b * DEPTH);
    int64_t place = a * WIDTH * work->inputs + b * DEPTH;
    Real *corner = work->matrix + place;
    memset(tile, 0, sizeof tile);
    memset(plain, 0, sizeof plain);
    if (work->values)
        for (int64_t k = 0; k < width; k++)
            for (int64_t d = 0; d < depth; d++)
                tile[d][k / LANES][k % LANES] = corner[k * work->inputs + d];
    for (int64_t n = start; n < end; n++) {
        form_tile(work->positions, work->panels + (n * work->across + a) * work->positions * WIDTH,
                  work->x + (first + n) * work->x_sample, work->position,
                  work->padded + b * DEPTH, sum);
        if (work->values)
            work->values[first + n] += weigh_squares(sum, tile);
        else
            add_squares(sum, tile);
        if (work->sums)
            add_plain(sum, plain);
    }
    if (!work->values)
        add_tile(tile, width, depth, work->inputs, corner);
    if (work->sums)
        add_tile(plain, width, depth, work->inputs, work->sums + place);
}

/* Many outputs in one group: vectors of outputs. */
static int many_outputs(int64_t samples, int64_t outputs, int64_t inputs, int64_t positions,
                        const Real *g, int64_t g_sample, int64_t g_output, int64_t g_position,
                        const Real *x, int64_t x_sample, const int64_t *position,
                        const int64_t *offset, Real *matrix, Real *sums, double *values,
                        int threads)
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
    Work work = {outputs, inputs, positions, across, panels, x, x_sample, position, padded,
                 matrix, sums, values};

#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < samples; first += together) {
        int64_t count = least(together, samples - first);
#pragma omp for collapse(2)
        for (int64_t n = 0; n < count; n++)
            for (int64_t a = 0; a < across; a++)
                pack(positions, least(WIDTH, outputs - a * WIDTH),
                     g + (first + n) * g_sample + a * WIDTH * g_output, g_output, g_position,
                     panels + (n * across + a) * size);
        if (values) { /* threads share out the samples */
#pragma omp for
            for (int64_t share = 0; share < threads; share++)
                for (int64_t a = 0; a < across; a++)
                    for (int64_t b = 0; b < down; b++)
                        use_tile(&work, a, b, first, count * share / threads,
                                 count * (share + 1) / threads);
        } else { /* threads share out the tiles */
#pragma omp for collapse(2)
            for (int64_t a = 0; a < across; a++)
                for (int64_t b = 0; b < down; b++)
                    use_tile(&work, a, b, first, 0, count);
        }
    }
    free(panels);
    free(padded);
    return 0;
}

#define CHUNKS 4 /* vectors of inputs at a time */

/* Neighbouring inputs, at most a vector of them. */
typedef struct {
    int64_t first, count;
} Chunk;

/* One sample's vectors of inputs, of one output. */
static inline void form_chunks(int64_t positions, const Real *g, int64_t g_position, const Real *x,
                               const int64_t *position, const int64_t *offset,
                               const Chunk *chunk, Vector sum[CHUNKS])
{
    Vector odd[CHUNKS];
    const Real *shifted[CHUNKS];
    for (int c = 0; c < CHUNKS; c++) {
        sum[c] = odd[c] = (Vector){0};
        shifted[c] = x + offset[chunk[c].first];
    }
    int64_t p = 0;
    for (; p + 1 < positions; p += 2)
        for (int c = 0; c < CHUNKS; c++) {
            sum[c] += g[p * g_position] * *(const Vector *)(shifted[c] + position[p]);
            odd[c] += g[(p + 1) * g_position] * *(const Vector *)(shifted[c] + position[p + 1]);
        }
    if (p < positions)
        for (int c = 0; c < CHUNKS; c++)
            sum[c] += g[p * g_position] * *(const Vector *)(shifted[c] + position[p]);
    for (int c = 0; c < CHUNKS; c++)
        sum[c] += odd[c];
}

/* Few outputs in each of many groups, as in depthwise convolutions: vectors of inputs.
   Vectors reach beyond the last input, so that they are read from a copy of the sample's group. */
static int few_outputs(int64_t samples, int64_t groups, int64_t outputs, int64_t inputs,
                       int64_t positions, const Real *g, int64_t g_sample, int64_t g_group,
                       int64_t g_output, int64_t g_position, const Real *x, int64_t x_sample,
                       int64_t x_group, const int64_t *position, const int64_t *offset,
                       Real *matrix, Real *sums, double *values, int threads)
{
    int failed = 0;
    int64_t chunks = 0, last = 0, reach = 0;
    Chunk *chunk = malloc((inputs + CHUNKS) * sizeof(Chunk));
    if (!chunk)
        return 1;
    for (int64_t d = 0; d < inputs; d++) {
        if (d && offset[d] == offset[d - 1] + 1 && chunk[chunks - 1].count < LANES)
            chunk[chunks - 1].count++;
        else
            chunk[chunks++] = (Chunk){d, 1};
        reach = offset[d] > reach ? offset[d] : reach;
    }
    for (int64_t p = 0; p < positions; p++)
        last = position[p] > last ? position[p] : last;
    reach += last + 1;
    int64_t blocks = (chunks + CHUNKS - 1) / CHUNKS;
    for (int64_t c = chunks; c < blocks * CHUNKS; c++) /* nothing of these is kept */
        chunk[c] = (Chunk){0, 0};
    int64_t shares = values ? threads : groups * outputs;

#pragma omp parallel num_threads(threads)
    {
        Real *copy = calloc(reach + LANES, sizeof(Real));
        Vector *tile = aligned_alloc(BYTES, 2 * blocks * CHUNKS * BYTES);
        Vector *plain = tile + blocks * CHUNKS;
        if (!copy || !tile)
#pragma omp atomic write
            failed = 1;
#pragma omp barrier
#pragma omp for
        for (int64_t share = 0; share < shares; share++) {
            if (failed)
                continue;
            /* Threads share out the samples if each has a value, else the outputs. */
            int64_t n0 = values ? samples * share / threads : 0;
            int64_t n1 = values ? samples * (share + 1) / threads : samples;
            int64_t k0 = values ? 0 : share, k1 = values ? groups * outputs : share + 1;
            for (int64_t k = k0; k < k1; k++) {
                Real *row = matrix + k * inputs;
                int64_t group = k / outputs;
                memset(tile, 0, 2 * blocks * CHUNKS * BYTES);
                if (values)
                    for (int64_t c = 0; c < chunks; c++)
                        for (int64_t i = 0; i < chunk[c].count; i++)
                            tile[c][i] = row[chunk[c].first + i];
                for (int64_t n = n0; n < n1; n++) {
                    const Real *own = g + n * g_sample + group * g_group + k % outputs * g_output;
                    Real value = 0;
                    memcpy(copy, x + n * x_sample + group * x_group, reach * sizeof(Real));
                    for (int64_t b = 0; b < blocks * CHUNKS; b += CHUNKS) {
                        Vector sum[CHUNKS];
                        form_chunks(positions, own, g_position, copy, position, offset, chunk + b,
                                    sum);
                        for (int c = 0; c < CHUNKS; c++) {
                            if (sums)
                                plain[b + c] += sum[c];
                            sum[c] *= sum[c];
                            if (values)
                                for (int64_t i = 0; i < chunk[b + c].count; i++)
                                    value += tile[b + c][i] * sum[c][i];
                            else
                                tile[b + c] += sum[c];
                        }
                    }
                    if (values)
                        values[n] += value;
                }
                if (!values)
                    for (int64_t c = 0; c < chunks; c++)
                        for (int64_t i = 0; i < chunk[c].count; i++)
                            row[chunk[c].first + i] += tile[c][i];
                if (sums)
                    for (int64_t c = 0; c < chunks; c++)
                        for (int64_t i = 0; i < chunk[c].count; i++)
                            sums[k * inputs + chunk[c].first + i] += plain[c][i];
            }
        }
        free(copy);
        free(tile);
    }
    free(chunk);
    return failed;
}

/* `matrix` (groups, outputs, inputs) is the total, or with `values` the weights; `sums` is of its
   shape, or null, and null with `values`.
   Returns 0, or 1 if there is no memory for copies. */
int squared_products(int64_t samples, int64_t groups, int64_t outputs, int64_t inputs,
                     int64_t positions, const Real *g, int64_t g_sample, int64_t g_group,
                     int64_t g_output, int64_t g_position, const Real *x, int64_t x_sample,
                     int64_t x_group, const int64_t *position, const int64_t *offset,
                     Real *matrix, Real *sums, double *values, int threads)
{
    if (outputs < LANES)
        return few_outputs(samples, groups, outputs, inputs, positions, g, g_sample, g_group,
                           g_output, g_position, x, x_sample, x_group, position, offset, matrix,
                           sums, values, threads);
    int failed = 0;
    for (int64_t a = 0; a < groups && !failed; a++)
        failed = many_outputs(samples, outputs, inputs, positions, g + a * g_group, g_sample,
                              g_output, g_position, x + a * x_group, x_sample, position, offset,
                              matrix + a * outputs * inputs,
                              sums ? sums + a * outputs * inputs : NULL, values, threads);
    return failed;
}
