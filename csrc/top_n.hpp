// Exact top-n of a maximum over inner products, shared by eimf_top_n and the neighbour search of affinity propagation.
#pragma once

#include <cmath>
#include <cstring>

#include "common.hpp"
#include "score_kernels.hpp"

namespace eimf {

// A score and an item id in one integer: greater means ranked earlier (higher score, then lower id).
using RankKey = uint64_t;

inline RankKey rank_key(float score, uint32_t id) {
    score += 0.0f;  // -0 ranks as 0
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~id);
}
inline float key_score(RankKey key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
}
inline uint32_t key_id(RankKey key) { return ~static_cast<uint32_t>(key); }

// Items as 8-bit integers, in panels that ScoreKernels::quantize makes.
struct QuantizedItems {
    QuantizedItems() = default;
    QuantizedItems(Memory &memory, const ScoreKernels &kernels, size_t n_items, size_t d, float largest);
    // `place`, a multiple of the kernels' width, is that of the panel's first item.
    void set(const ScoreKernels &kernels, size_t place, const float *panel);
    ScoreKernels::QuantizedPanel panel(size_t place) const;

    size_t d = 0, bytes = 0;  // of an item's values, starts of runs included
    float unit = 0;
    Buffer<int8_t> values;
    Buffer<float> scale, error, norm;
};

struct TopNProblem {
    const ScoreKernels *kernels;
    const float *items;      // (n_items, d)
    size_t n_items, d;
    const float *bias;       // (n_items) added to every score of an item, or nullptr
    const uint8_t *allowed;  // (n_items) or nullptr
    size_t users, k;         // a user has k query rows
    size_t n;                // how many to find
    const float *panels = nullptr;  // the items packed by `kernels`, (ceil(n_items / width), d, width), or nullptr: pack on the way
    const QuantizedItems *quantized = nullptr;  // the same items, or nullptr: where that is faster, quantize on the way

    // (k, d) query rows of a user.
    std::function<const float *(size_t user)> rows;
    // May item `id` be given to `user`? Asked only of items that would enter the list. Empty: all may.
    std::function<bool(size_t user, uint32_t id)> accepts;
    // The result: up to n keys, best first, and which of the user's rows gave the score. Called on worker threads, once per user.
    std::function<void(size_t user, const RankKey *keys, const int32_t *winner, size_t count)> result;
};

// Returns the largest magnitude among the items packed on the way; infinity or NaN if one is not finite, and then the results mean nothing.
float top_n(const TopNProblem &problem, Team &team, Memory &memory);

// For each of n rows the `wanted` rows with the highest inner product plus bias, itself included. Each product is computed once for
// both its rows.
struct AllPairs {
    const ScoreKernels *kernels;
    const float *x;     // (n, d)
    size_t n, d;
    const float *bias;  // (n)
    size_t wanted;

    // May be empty. A piece of a row of all inner products; each row's pieces come one after the other, on worker threads, all before the
    // first result.
    std::function<void(size_t row, size_t first, size_t count, const float *products)> products;

    // The result for a row, best first; once per row, on worker threads.
    std::function<void(size_t row, const RankKey *keys, size_t count)> result;

    // May be empty. Called on the calling thread now and then before the first result; what it throws ends the search.
    std::function<void()> poll;
};
void nearest_of_all(const AllPairs &problem, Team &team, Memory &memory);

// Bytes of work memory for each row of `nearest_of_all`.
size_t bytes_per_row(size_t wanted);

// Fails unless all values are finite; returns their largest magnitude. `what` names the array in the message. Without `diagonal` the
// values (i, i) may be anything.
float largest_magnitude(const float *values, size_t rows, size_t columns, const char *what, bool diagonal = true);

}  // namespace eimf
