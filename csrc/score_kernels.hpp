// The innermost loops of scoring, one version per instruction set, all with the same result bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "eimf.h"

namespace eimf {

struct ScoreKernels {
    const char *name;
    size_t width;  // items per panel, at most 64
    size_t rows;   // query rows per tile, at most 8

    // scores[r * width + j] = bias[j] + sum over t of rows[r * d + t] * panel[t * width + j], for r < count <= rows.
    // Accumulated over t in order, with fused multiply-adds, in every version: so all versions agree bit for bit.
    void (*tile)(const float *panel, const float *bias, const float *rows, size_t count, size_t d, float *scores);

    // best[j] = max over r < count of scores[r * width + j]. Bit j of the result: best[j] > threshold.
    uint64_t (*best)(const float *scores, size_t count, float threshold, float *best);

    // panel[t * width + j] = items[j][t] for j < count; zero for the other j.
    void (*pack)(const float *const *items, size_t count, size_t d, float *panel);
};

// The versions this CPU can run; nullptr if it cannot.
const ScoreKernels *score_kernels(eimf_kernel kernel);

}  // namespace eimf
