// The innermost loops, one version per instruction set, all with the same result bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "eimf.h"

namespace eimf {

struct ScoreKernels {
    const char *name;
    size_t width;  // items per panel, at most 64
    size_t rows;   // query rows per tile, at most 8

    // The score of query row r and item j of a panel is bias[j] + sum over t of row r[t] * panel[t * width + j], accumulated
    // over t in order with fused multiply-adds in every version: so all versions agree bit for bit.

    // For each of `users` users with k rows each, users * k <= rows: best[u * width + j] = the largest score of item j over
    // the user's rows, and bit j of above[u] = best > threshold[u].
    void (*tile_best)(const float *panel, const float *bias, const float *queries, size_t users, size_t k, size_t d,
                      const float *threshold, float *best, uint64_t *above);

    // scores[r * width + j] of `count` rows, count <= rows.
    void (*tile)(const float *panel, const float *bias, const float *queries, size_t count, size_t d, float *scores);

    // The same reduction as tile_best over the scores of one user's `count` rows.
    uint64_t (*best)(const float *scores, size_t count, float threshold, float *best);

    // How many of the scores are above `threshold`.
    size_t (*count_above)(const float *scores, size_t count, float threshold);

    // Affinity propagation on a stretch of one row of explicit messages. First a is updated from the column sums and r,
    // a = damping a + gain min(0, column_sum - max(0, r)), and the two largest a + s are kept in best and second; then r from
    // those: r = damping r + gain (s - (a + s == best ? second : best)), and max(0, r) is added to the column's partial sum.
    void (*row_availabilities)(const float *s, const float *r, float *a, const float *column_sum, size_t n, float damping, float gain,
                               float *best, float *second);
    void (*row_responsibilities)(const float *s, float *r, const float *a, size_t n, float damping, float gain, float best,
                                 float second, float *partial);

    // Squared Euclidean distance, in float64 over eight interleaved partial sums.
    double (*squared_distance)(const float *x, const float *y, size_t d);

    // panel[t * width + j] = items[j][t] for all j < width. Returns the largest magnitude's bits: 0x7f800000 or more if a
    // value is not finite.
    int32_t (*pack)(const float *const *items, size_t d, float *panel);
};

// The versions this CPU can run; nullptr if it cannot.
const ScoreKernels *score_kernels(eimf_kernel kernel);

}  // namespace eimf
