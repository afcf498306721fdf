// The softmax loss over all items, with its gradients, in one pass over the items and one more for theirs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.hpp"
#include "score_kernels.hpp"

namespace eimf {
namespace {

constexpr size_t CHUNK = 126;   // items whose exponentials are made and used while they are in the cache; a multiple of six, and no power of two
constexpr size_t GROUPS = 16;   // partial sums over items; their number is fixed, so that results do not depend on the threads'
constexpr double LOG2_E = 1.44269504088896340736, LN_2 = 0.69314718055994530942;

// A factor (rows, columns) in the order that the kernels read, each row times its scale.
void pack(const float *factor, size_t rows, size_t columns, size_t row, size_t column, const float *scale, size_t width, float *panels) {
    for (size_t j = 0; j < columns; j += width)
        for (size_t k = 0; k < rows; ++k)
            for (size_t v = 0; v < width; ++v)
                panels[j * rows + k * width + v] = j + v < columns ? factor[k * row + (j + v) * column] * (scale ? scale[k] : 1.0f) : 0.0f;
}

struct Softmax {
    const float *queries, *items, *weight;
    const int64_t *target;
    size_t users, n_items, d;
    const ScoreKernels &kernels;
    Memory &memory;
    Team &team;

    size_t padded(size_t columns) const { return (columns + kernels.columns_per_panel - 1) / kernels.columns_per_panel * kernels.columns_per_panel; }
    size_t chunks() const { return (n_items + CHUNK - 1) / CHUNK; }

    // exponentials (chunks, padded users / panel, items of the chunk, panel) if kept, else one chunk's for each group; totals (users) over the items,
    // and sums (d, padded users) of the items times them.
    void pass(const float *panels, const uint8_t *excluded, const float *shift, bool keep, float *exponentials, double *totals, float *sums) const {
        const size_t groups = std::min(GROUPS, chunks()), wide = padded(users);
        Buffer<double> group_totals(memory, groups * users, 0.0);
        Buffer<float> chunk_totals(memory, groups * wide), group_sums(memory, checked_product(groups, d * wide), 0.0f);
        team.run(groups, [&](size_t group) {
            float *const total = chunk_totals.data() + group * wide;
            for (size_t chunk = chunks() * group / groups; chunk < chunks() * (group + 1) / groups; ++chunk) {
                const size_t first = chunk * CHUNK, rows = std::min(CHUNK, n_items - first);
                float *const out = exponentials + (keep ? first : group * CHUNK) * wide;
                std::fill(total, total + wide, 0.0f);
                kernels.exponentials(items + first * d, rows, d, panels, excluded + first, shift, wide, out, total);
                for (size_t u = 0; u < users; ++u) group_totals[group * users + u] += static_cast<double>(total[u]);
                kernels.product(items + first * d, 1, d, rows, 0, d, rows, out, wide, true, group_sums.data() + group * d * wide);
            }
        });
        for (size_t u = 0; u < users; ++u) {
            totals[u] = 0;
            for (size_t group = 0; group < groups; ++group) totals[u] += group_totals[group * users + u];
        }
        std::fill(sums, sums + d * wide, 0.0f);
        for (size_t group = 0; group < groups; ++group)
            for (size_t i = 0; i < d * wide; ++i) sums[i] += group_sums[group * d * wide + i];
    }

    // shift[u] = user u's largest score, in bits.
    void largest(const float *panels, const uint8_t *excluded, float *shift) const {
        std::vector<float> scores(CHUNK * users);
        std::fill(shift, shift + users, -std::numeric_limits<float>::infinity());
        for (size_t first = 0; first < n_items; first += CHUNK) {
            const size_t rows = std::min(CHUNK, n_items - first);
            kernels.product(items + first * d, d, 1, d, 0, rows, d, panels, users, false, scores.data());
            for (size_t i = 0; i < rows; ++i)
                for (size_t u = 0; u < users && !excluded[first + i]; ++u) shift[u] = std::max(shift[u], scores[i * users + u]);
        }
        for (size_t u = 0; u < users; ++u)
            if (!std::isfinite(shift[u])) shift[u] = 0;
    }

    void run(const std::vector<uint8_t> &excluded, float *losses, float *query_gradient, float *item_gradient) const {
        const size_t width = kernels.columns_per_panel, wide = padded(users);
        Buffer<float> panels(memory, checked_product(wide, d)), shift(memory, wide, 0.0f);
        const std::vector<float> bits(d, static_cast<float>(LOG2_E));
        pack(queries, d, users, 1, d, bits.data(), width, panels.data());
        Buffer<float> exponentials(memory, checked_product(item_gradient ? n_items : std::min(GROUPS, chunks()) * CHUNK, wide));
        std::vector<double> totals(users);
        std::vector<float> sums(d * wide), scale(users);
        const auto pass_with_shift = [&] { pass(panels.data(), excluded.data(), shift.data(), item_gradient != nullptr, exponentials.data(), totals.data(), sums.data()); };
        pass_with_shift();
        // Usually no score is so large or small that the sum leaves the range where nothing of weight over- or underflows.
        if (!std::all_of(totals.begin(), totals.end(), [](double total) { return total > 0x1p-60 && total < 0x1p100; })) {
            largest(panels.data(), excluded.data(), shift.data());
            pass_with_shift();
        }
        for (size_t u = 0; u < users; ++u) {
            const float *query = queries + u * d, *item = items + static_cast<size_t>(target[u]) * d;
            double score = 0;
            for (size_t t = 0; t < d; ++t) score += static_cast<double>(query[t]) * static_cast<double>(item[t]);
            if (excluded[static_cast<size_t>(target[u])]) score = -std::numeric_limits<double>::infinity();
            const bool counts = weight[u] != 0;
            losses[u] = counts ? static_cast<float>((std::log2(totals[u]) + static_cast<double>(shift[u])) * LN_2 - score) : 0.0f;
            scale[u] = counts ? static_cast<float>(static_cast<double>(weight[u]) / totals[u]) : 0.0f;
            for (size_t t = 0; t < d; ++t) query_gradient[u * d + t] = counts ? sums[t * wide + u] * scale[u] - item[t] * weight[u] : 0.0f;
        }
        if (!item_gradient) return;
        Buffer<float> scaled(memory, checked_product(users, padded(d)));
        pack(queries, users, d, d, 1, scale.data(), width, scaled.data());
        team.run(chunks(), [&](size_t chunk) {
            const size_t first = chunk * CHUNK, rows = std::min(CHUNK, n_items - first);
            kernels.product(exponentials.data() + first * wide, width, 1, width, rows * width, rows, users, scaled.data(), d, false, item_gradient + first * d);
        });
        for (size_t u = 0; u < users; ++u)
            for (size_t t = 0; t < d; ++t) item_gradient[static_cast<size_t>(target[u]) * d + t] -= queries[u * d + t] * weight[u];
    }
};

}  // namespace
}  // namespace eimf

using namespace eimf;

extern "C" eimf_status eimf_softmax_loss(const float *queries, size_t users, const float *items, size_t n_items, size_t dim, const int64_t *target,
                                         const float *weight, const int64_t *excluded, size_t n_excluded, size_t n_threads, eimf_kernel kernel,
                                         const eimf_allocator *allocator, float *losses, float *query_gradient, float *item_gradient, eimf_error *error) {
    return guarded(error, [&] {
        const ScoreKernels *kernels = score_kernels(kernel);
        if (!kernels) fail(EIMF_ERROR_ARGUMENT, "this CPU cannot run the kernel asked for (%d)", static_cast<int>(kernel));
        if (users && (!n_items || !dim)) fail(EIMF_ERROR_ARGUMENT, "items have shape (%zu, %zu); expected at least one item of one dimension", n_items, dim);
        check_pointer(queries, "queries", users);
        check_pointer(items, "items", users);
        check_pointer(target, "target", users);
        check_pointer(weight, "weight", users);
        check_pointer(excluded, "excluded", n_excluded);
        check_pointer(losses, "losses", users);
        check_pointer(query_gradient, "query_gradient", users);
        std::vector<uint8_t> is_excluded(n_items, 0);
        for (size_t i = 0; i < n_excluded; ++i) {
            if (excluded[i] < 0 || static_cast<size_t>(excluded[i]) >= n_items)
                fail(EIMF_ERROR_ARGUMENT, "excluded[%zu] is %lld; expected an item from 0 to %zu", i, static_cast<long long>(excluded[i]), n_items - 1);
            is_excluded[static_cast<size_t>(excluded[i])] = 1;
        }
        for (size_t u = 0; u < users; ++u)
            if (target[u] < 0 || static_cast<size_t>(target[u]) >= n_items)
                fail(EIMF_ERROR_ARGUMENT, "target[%zu] is %lld; expected an item from 0 to %zu", u, static_cast<long long>(target[u]), n_items - 1);
        if (users && std::all_of(is_excluded.begin(), is_excluded.end(), [](uint8_t out) { return out; }))
            fail(EIMF_ERROR_ARGUMENT, "all %zu items are excluded; expected at least one class", n_items);
        if (!users) {
            if (item_gradient) std::fill(item_gradient, item_gradient + checked_product(n_items, dim), 0.0f);
            return;
        }
        Memory memory(allocator ? *allocator : eimf_allocator{}, 0);
        Team team(std::min(n_threads ? n_threads : std::thread::hardware_concurrency(), (n_items + CHUNK - 1) / CHUNK));
        Softmax{queries, items, weight, target, users, n_items, dim, *kernels, memory, team}.run(is_excluded, losses, query_gradient, item_gradient);
    });
}
