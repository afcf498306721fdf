// Greedy re-ranking for diversity.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common.hpp"

using namespace eimf;

namespace {

struct Lists {
    const int64_t *ids;
    const float *scores;
    size_t candidates;
    const int32_t *category;
    size_t n_items, n;
    float penalty;
};

void check_user(const Lists &q, size_t user) {
    for (size_t j = 0; j < q.candidates; ++j) {
        const int64_t id = q.ids[user * q.candidates + j];
        if (id == -1) continue;
        if (id < 0 || static_cast<uint64_t>(id) >= q.n_items)
            fail(EIMF_ERROR_ARGUMENT, "ids: found %lld for user %zu; expected -1 or an item id below %zu", static_cast<long long>(id), user, q.n_items);
        if (!std::isfinite(q.scores[user * q.candidates + j]))
            fail(EIMF_ERROR_ARGUMENT, "scores: found %g for user %zu, candidate %zu; expected a finite number", q.scores[user * q.candidates + j], user, j);
    }
}

void diversify(const Lists &q, size_t user, int64_t *chosen_ids, float *chosen_scores) {
    const int64_t *ids = q.ids + user * q.candidates;
    const float *scores = q.scores + user * q.candidates;
    // Kept up to date for the remaining candidates: how many chosen items share the category.
    std::vector<size_t> remaining, shared(q.candidates, 0);
    for (size_t j = 0; j < q.candidates; ++j)
        if (ids[j] != -1) remaining.push_back(j);
    for (size_t at = 0; at < q.n; ++at) {
        if (remaining.empty()) {
            chosen_ids[at] = -1;
            chosen_scores[at] = -std::numeric_limits<float>::infinity();
            continue;
        }
        const auto value = [&](size_t j) { return scores[j] - static_cast<double>(q.penalty) * static_cast<double>(shared[j]); };
        const auto best = std::max_element(remaining.begin(), remaining.end(), [&](size_t a, size_t b) { return value(a) < value(b); });
        const size_t j = *best;
        remaining.erase(best);
        chosen_ids[at] = ids[j];
        chosen_scores[at] = scores[j];
        const int32_t category = q.category[ids[j]];
        if (category == -1) continue;
        for (size_t other : remaining) shared[other] += q.category[ids[other]] == category;
    }
}

}  // namespace

extern "C" eimf_status eimf_diversify(const int64_t *ids, const float *scores, size_t users, size_t candidates, const int32_t *category,
                                      size_t n_items, size_t n, float penalty, size_t n_threads, int64_t *chosen_ids, float *chosen_scores,
                                      eimf_error *error) {
    return guarded(error, [&] {
        if (!(penalty >= 0) || !std::isfinite(penalty)) fail(EIMF_ERROR_ARGUMENT, "penalty is %g; expected a finite number of 0 or more", penalty);
        checked_product(checked_product(users, std::max(candidates, n)), sizeof(int64_t));
        check_pointer(ids, "ids", users * candidates);
        check_pointer(scores, "scores", users * candidates);
        check_pointer(category, "category", users && candidates ? n_items : 0);
        check_pointer(chosen_ids, "chosen_ids", users * n);
        check_pointer(chosen_scores, "chosen_scores", users * n);
        const Lists lists{ids, scores, candidates, category, n_items, n, penalty};
        Team team(std::min(n_threads ? n_threads : std::thread::hardware_concurrency(), (users + 63) / 64));
        team.run((users + 63) / 64, [&](size_t block) {
            for (size_t u = block * 64; u < std::min(users, (block + 1) * 64); ++u) {
                check_user(lists, u);
                diversify(lists, u, chosen_ids + u * n, chosen_scores + u * n);
            }
        });
    });
}
