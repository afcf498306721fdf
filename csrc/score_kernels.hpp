// The innermost loops, one version per instruction set, all with the same result bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "eimf.h"

namespace eimf {

constexpr size_t STRETCH = 512, TILE = 16;

struct ScoreKernels {
    const char *name;
    size_t width;  // items per panel, at most 64
    size_t rows;   // query rows per tile, at most 8

    // The score of query row r and item j of a panel is bias[j] + sum over t of row r[t] * panel[t * width + j], accumulated
    // over t in order with fused multiply-adds in every version: so all versions agree bit for bit.

    // For users with k rows each, k <= rows: which of the panel's items in `valid` score above threshold[user] in the maximum over the
    // user's rows? Each user with such items is a hit; hits are returned by rising user.
    struct Hit {
        uint64_t items;  // bit j: item j
        uint32_t user;
    };
    // best[hit * width + j] = that maximum, for all items. Room for `users` hits. Returns their number.
    size_t (*tile_best)(const float *panel, const float *bias, const float *queries, size_t users, size_t k, size_t d, uint64_t valid,
                        const float *threshold, float *best, Hit *hits);

    // scores[r * stride + j] of `count` rows, count <= rows, queries[r * row + t]. Their sums start from start[r * again + j]: the bias, with again = 0,
    // or the scores of the dimensions before these.
    void (*tile)(const float *panel, const float *start, size_t again, const float *queries, size_t row, size_t count, size_t d, float *scores,
                 size_t stride);

    // The same reduction over the scores of one user's `count` rows; the result is the hit's items.
    uint64_t (*best)(const float *scores, size_t count, float threshold, float *best);

    // The same test on 8-bit integers, four times as many of which fit a register. It lets every item pass whose float score may be above
    // the threshold, and few others (see top_n.cpp); what passes is scored in float, so that results stay the same. nullptr where the
    // instruction set has no such products.
    struct Quantization {
        int32_t most, offset;  // values are in [-most, most]; a query's are stored with `offset` added
        // Of each run of `quads` fours of dimensions, the first two of all fours make one sum, the last two another. Where `halves`, these must
        // fit 16 bits: so these parts of a vector are at most this long before they are rounded.
        float length;
        bool halves;
        size_t quads;
    };
    // Values of items are in panels of (quads = ceil(d / 4), width, 4) bytes, padded with 0. Before each run, (width, 4) bytes are what sums
    // start from: the negative sum of the run's values times the offset.
    struct QuantizedPanel {
        const int8_t *values;
        const float *scale, *error, *norm;  // (width)
    };
    // Item j scores scale[j] * (the largest integer product of the user's k rows with it), give or take this error * error[j] + this norm * norm[j].
    // It passes where it may score above the limit.
    struct QuantizedUser {
        float error, norm, limit;
    };
    // rows (users * k, quads, 4). Hits as above, and for each of them what all the panel's items score at least and at most.
    size_t (*quantized_hits)(const QuantizedPanel &panel, const uint8_t *rows, const QuantizedUser *bounds, size_t users, size_t k, size_t quads,
                             uint64_t valid, float *least, float *most, Hit *hits);

    // Makes a quantized panel from a float one: item = unit * scale * values, but for an error of length unit * error at most; its own length is
    // unit * norm at most. unit = largest magnitude of all items / 127.
    void (*quantize)(const float *panel, size_t d, float unit, int8_t *values, float *scale, float *error, float *norm);
    Quantization quantization;

    // How many of the scores are above `threshold`.
    size_t (*count_above)(const float *scores, size_t count, float threshold);

    // The least and the largest of at least one score.
    void (*range)(const float *scores, size_t count, float *least, float *most);

    // Affinity propagation reads rows s of the similarities (n values) with these.
    // maxima[b] = the largest s[k] + column[k] of stretch b, k in [b * STRETCH, (b + 1) * STRETCH).
    void (*stretch_maxima)(const float *s, const float *column, size_t n, float *maxima);

    // found = all k with weight * s[k] + column[k] > limit, ascending. Returns how many.
    size_t (*find_above)(const float *s, const float *column, size_t n, float weight, float limit, uint32_t *found);

    // a[j] = damping * a[j] + (1 - damping) * min(0, column_sum[id[j]] - max(0, r[j])), where r[j] = weight * s[j] - level if r is nullptr.
    void (*update_availabilities)(const uint32_t *id, const float *s, const double *r, double *a, size_t n, const double *column_sum, double weight,
                                  double level, double damping);

    // r[j] = damping * r[j] + (1 - damping) * (s[j] - best).
    void (*update_responsibilities)(const float *s, double *r, size_t n, double best, double damping);

    // Raises best[0] and best[1] to the two largest of them and all s[j] + a[j].
    void (*two_best)(const float *s, const double *a, size_t n, double *best);

    // sum[k] += max(0, weight * s[k] - level).
    void (*add_positive)(const float *s, size_t n, double weight, double level, double *sum);

    // Squared Euclidean distance, in float64 over sixteen interleaved partial sums.
    double (*squared_distance)(const float *x, const float *y, size_t d);

    // s[k] = weight * min(0, 2 (products[k] + bias[k] + own)).
    void (*similarities)(const float *products, const float *bias, float own, float weight, size_t n, float *s);

    // panel[t * width + j] = items[j][t] for all j < width. Returns the largest magnitude's bits: 0x7f800000 or more if a
    // value is not finite.
    int32_t (*pack)(const float *const *items, size_t d, float *panel);

    // to[r * stride + k] = tile[k * from + r] for all k, r < TILE.
    void (*transpose)(const float *tile, size_t from, float *to, size_t stride);

    // The softmax loss multiplies with these. A factor of theirs (count, columns) is given in panels: panels[j * count + k * columns_per_panel + v]
    // is its value in row k and column j + v, j a multiple of columns_per_panel; the last panel is padded.
    size_t columns_per_panel;  // at most 32

    // out (rows, columns) = (`add`: +=, columns whole panels) the sum over k < count of a(i, k) times the factor's row k. a(i, k) is
    // a[i * row + k * step], and `jump` further on for every `stretch` of k.
    void (*product)(const float *a, size_t row, size_t step, size_t stretch, size_t jump, size_t rows, size_t count, const float *panels, size_t columns,
                    bool add, float *out);

    // out, in panels, as a factor of `rows` rows = 2 to the power of items (rows, d) times the factor (d, columns), less shift (columns, padded), but 0
    // in the rows that are excluded. totals (columns, padded) += its sums over the rows, one after the other.
    void (*exponentials)(const float *items, size_t rows, size_t d, const float *panels, const uint8_t *excluded, const float *shift, size_t columns,
                         float *out, float *totals);
};

// The versions this CPU can run; nullptr if it cannot.
const ScoreKernels *score_kernels(eimf_kernel kernel);

}  // namespace eimf
