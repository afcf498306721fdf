#include "top_n.hpp"

#include <algorithm>

namespace eimf {
namespace {

// The items that may still be among a user's n best: those seen so far above `threshold`, by rising id.
struct Candidates {
    float *scores;
    uint32_t *ids;
    size_t count;
    float threshold;
};

void keep_above(Candidates &c, float threshold) {
    size_t kept = 0;
    for (size_t i = 0; i < c.count; ++i) {
        const float score = c.scores[i];
        const uint32_t id = c.ids[i];
        c.scores[kept] = score;
        c.ids[kept] = id;
        kept += score > threshold;
    }
    c.count = kept;
    c.threshold = threshold;
}

// Raise the threshold so that little more than n candidates remain, at most `room`. Any threshold with n candidates above it is
// right, so bisection may stop early, and it beats finding the n-th best exactly.
void shrink(Candidates &c, size_t n, size_t room, const ScoreKernels &kernels) {
    if (c.count <= n) return;
    float low, high, found = c.threshold;
    kernels.range(c.scores, c.count, &low, &high);
    for (int step = 0; step < 24; ++step) {
        const float middle = low + (high - low) / 2;
        if (!(middle > low && middle < high)) break;
        const size_t above = kernels.count_above(c.scores, c.count, middle);
        if (above >= n) {
            low = found = middle;
            if (above <= n + n / 4) break;
        } else {
            high = middle;
        }
    }
    if (found > c.threshold) keep_above(c, found);
    if (c.count <= room) return;
    // Many equal scores: keep all above the n-th best score, and of those equal to it the first.
    std::vector<float> sorted(c.scores, c.scores + c.count);
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(n - 1), sorted.end(), std::greater<float>());
    const float last = sorted[n - 1];
    size_t equal = n - kernels.count_above(c.scores, c.count, last), kept = 0;
    for (size_t i = 0; i < c.count; ++i) {
        const bool tie = c.scores[i] == last;
        if (c.scores[i] > last || (tie && equal > 0)) {
            c.scores[kept] = c.scores[i];
            c.ids[kept++] = c.ids[i];
            equal -= tie;
        }
    }
    c.count = kept;
    c.threshold = last;  // items come by rising id, so a later one with this score ranks behind the n kept
}

// One block of users: its query rows should fit the L2 cache; candidates are touched rarely. The more users, the more often a packed
// panel is used. Together below 2 MB.
constexpr size_t QUERY_BYTES = 512 << 10, CANDIDATE_BYTES = 1280 << 10;

size_t users_per_block(const TopNProblem &p, size_t capacity) {
    const size_t by_rows = QUERY_BYTES / (p.k * p.d * sizeof(float)), by_keys = CANDIDATE_BYTES / (capacity * sizeof(RankKey));
    return std::max<size_t>(1, std::min<size_t>({512, by_rows, by_keys}));
}

// Which rows gave the scores of the `count` items in `keys`: the first row where the score is reached.
void find_winners(const TopNProblem &p, const float *query, const RankKey *keys, size_t count, float *panel, float *scores, int32_t *winner) {
    if (p.k == 1) {
        std::fill_n(winner, count, 0);
        return;
    }
    const ScoreKernels &kernels = *p.kernels;
    float bias[64];
    const float *item[64];
    for (size_t at = 0; at < count; at += kernels.width) {
        const size_t here = std::min(kernels.width, count - at);
        for (size_t j = 0; j < kernels.width; ++j) {
            const size_t id = key_id(keys[at + std::min(j, here - 1)]);
            item[j] = p.items + id * p.d;
            bias[j] = p.bias ? p.bias[id] : 0.0f;
        }
        kernels.pack(item, p.d, panel);
        for (size_t r = 0; r < p.k; r += kernels.rows)
            kernels.tile(panel, bias, query + r * p.d, std::min(kernels.rows, p.k - r), p.d, scores + r * kernels.width);
        for (size_t j = 0; j < here; ++j) {
            size_t top = 0;
            for (size_t r = 1; r < p.k; ++r)
                if (scores[r * kernels.width + j] > scores[top * kernels.width + j]) top = r;
            winner[at + j] = static_cast<int32_t>(top);
        }
    }
}

// Returns the bits of the largest magnitude among the items.
int32_t search_block(const TopNProblem &p, size_t first_user, size_t last_user, size_t capacity, Memory &memory) {
    const ScoreKernels &kernels = *p.kernels;
    const size_t width = kernels.width, users = last_user - first_user, row = p.k * p.d;

    Buffer<float> queries(memory, users * row);
    Buffer<float> panel(memory, width * p.d);
    Buffer<float> scores(memory, std::max(kernels.rows, p.k) * width);
    Buffer<float> candidate_scores(memory, users * capacity);
    Buffer<uint32_t> candidate_ids(memory, users * capacity);
    Buffer<Candidates> candidates(memory, users);
    Buffer<float> thresholds(memory, users, -std::numeric_limits<float>::infinity());  // of the candidates, side by side
    Buffer<ScoreKernels::Hit> hits(memory, users);
    Buffer<float> best(memory, users * width);  // of the hits
    Buffer<RankKey> keys(memory, capacity);
    Buffer<int32_t> winner(memory, p.n);
    for (size_t u = 0; u < users; ++u) {
        std::copy_n(p.rows(first_user + u), row, &queries[u * row]);
        candidates[u] = {&candidate_scores[u * capacity], &candidate_ids[u * capacity], 0, -std::numeric_limits<float>::infinity()};
    }

    int32_t largest = 0;
    float bias[64] = {};
    const float *item[64];
    uint32_t id[64];
    for (size_t next = 0; next < p.n_items;) {
        const float *packed = panel.data();
        uint64_t valid = 0;  // which of the panel's places hold an item; width < 64
        if (p.panels) {
            packed = p.panels + next * p.d;
            for (size_t j = 0; j < width && next < p.n_items; ++j, ++next) {
                bias[j] = p.bias ? p.bias[next] : 0.0f;
                id[j] = static_cast<uint32_t>(next);
                valid |= static_cast<uint64_t>(!p.allowed || p.allowed[next]) << j;
            }
            if (!valid) continue;
        } else {
            size_t filled = 0;
            for (; next < p.n_items && filled < width; ++next) {
                if (p.allowed && !p.allowed[next]) continue;
                item[filled] = p.items + next * p.d;
                bias[filled] = p.bias ? p.bias[next] : 0.0f;
                id[filled++] = static_cast<uint32_t>(next);
            }
            if (filled == 0) break;
            std::fill(item + filled, item + width, item[0]);  // repeats, which `valid` takes out again
            std::fill(bias + filled, bias + width, 0.0f);
            largest = std::max(largest, kernels.pack(item, p.d, panel.data()));
            valid = (uint64_t{1} << filled) - 1;
        }

        size_t n_hits = 0;
        if (p.k <= kernels.rows) {
            n_hits = kernels.tile_best(packed, bias, queries.data(), users, p.k, p.d, valid, thresholds.data(), best.data(), hits.data());
        } else {
            for (size_t u = 0; u < users; ++u) {
                for (size_t r = 0; r < p.k; r += kernels.rows)
                    kernels.tile(packed, bias, &queries[u * row] + r * p.d, std::min(kernels.rows, p.k - r), p.d, &scores[r * width]);
                const uint64_t above = kernels.best(scores.data(), p.k, thresholds[u], &best[n_hits * width]) & valid;
                if (above) hits[n_hits++] = {above, static_cast<uint32_t>(u)};
            }
        }
        for (size_t h = 0; h < n_hits; ++h) {
            const size_t u = hits[h].user;
            Candidates &mine = candidates[u];
            if (mine.count + width > capacity) shrink(mine, p.n, capacity - width, kernels);
            for (uint64_t mask = hits[h].items; mask; mask &= mask - 1) {
                const unsigned j = static_cast<unsigned>(__builtin_ctzll(mask));
                const float score = best[h * width + j];
                if (score > mine.threshold && (!p.accepts || p.accepts(first_user + u, id[j]))) {
                    mine.scores[mine.count] = score;
                    mine.ids[mine.count++] = id[j];
                }
            }
            thresholds[u] = mine.threshold;
        }
    }
    for (size_t u = 0; u < users; ++u) {
        Candidates &mine = candidates[u];
        shrink(mine, p.n, capacity, kernels);
        for (size_t i = 0; i < mine.count; ++i) keys[i] = rank_key(mine.scores[i], mine.ids[i]);
        std::sort(keys.begin(), keys.begin() + mine.count, std::greater<RankKey>());
        const size_t count = std::min(mine.count, p.n);
        find_winners(p, &queries[u * row], keys.data(), count, panel.data(), scores.data(), winner.data());
        p.result(first_user + u, keys.data(), winner.data(), count);
    }
    return largest;
}

}  // namespace

float top_n(const TopNProblem &p, Team &team, Memory &memory) {
    TopNProblem problem = p;
    problem.n = std::min(p.n, p.n_items);
    if (p.users == 0) return 0;
    if (problem.n == 0) {
        for (size_t u = 0; u < p.users; ++u) p.result(u, nullptr, nullptr, 0);
        return 0;
    }
    const size_t capacity = 2 * problem.n + 4 * p.kernels->width;
    const size_t block = std::min(users_per_block(problem, capacity), (p.users + team.size() - 1) / team.size());
    std::atomic<int32_t> largest{0};
    team.run((p.users + block - 1) / block, [&](size_t b) {
        const int32_t bits = search_block(problem, b * block, std::min(p.users, (b + 1) * block), capacity, memory);
        for (int32_t seen = largest; seen < bits && !largest.compare_exchange_weak(seen, bits);) {}
    });
    const int32_t bits = largest;
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return magnitude;
}

namespace {

constexpr size_t BLOCK_PANELS = 5, MOST_WIDTH = 48;

size_t pairs_capacity(size_t wanted) { return 2 * wanted + 4 * MOST_WIDTH; }

// Let a row see items [first, first + count) with these products.
void absorb(const AllPairs &p, Candidates &mine, size_t capacity, const float *products, size_t first, size_t count, const uint32_t *none, uint32_t *found) {
    const size_t above = p.kernels->find_above(products, p.bias + first, none, count, 1.0f, mine.threshold, found);
    for (size_t q = 0; q < above; ++q) {
        const float score = products[found[q]] + p.bias[first + found[q]];
        if (!(score > mine.threshold)) continue;
        if (mine.count == capacity) {
            shrink(mine, p.wanted, capacity - 1, *p.kernels);
            if (!(score > mine.threshold)) continue;
        }
        mine.scores[mine.count] = score;
        mine.ids[mine.count++] = static_cast<uint32_t>(first + found[q]);
    }
}

}  // namespace

size_t bytes_per_row(size_t wanted) { return (pairs_capacity(wanted) * 2 + BLOCK_PANELS * MOST_WIDTH) * sizeof(float) + sizeof(Candidates); }

void nearest_of_all(const AllPairs &given, Team &team, Memory &memory) {
    AllPairs p = given;
    p.wanted = std::min(p.wanted, p.n);
    const ScoreKernels &kernels = *p.kernels;
    const size_t n = p.n, d = p.d, width = kernels.width, block = BLOCK_PANELS * width, capacity = pairs_capacity(p.wanted);
    Buffer<float> scores(memory, checked_product(n, capacity)), panels(memory, block * d), own(memory, p.products ? 0 : checked_product(block, n));
    Buffer<uint32_t> ids(memory, checked_product(n, capacity)), none(memory, block / 32 + 2, 0u);
    Buffer<Candidates> candidates(memory, n);
    for (size_t i = 0; i < n; ++i) candidates[i] = {&scores[i * capacity], &ids[i * capacity], 0, -std::numeric_limits<float>::infinity()};
    const float zero[64] = {};

    // Each row must see the items by rising id. So at block J, first all earlier rows see J's, then J's rows see the earlier ones, then J's.
    for (size_t j0 = 0; j0 < n; j0 += block) {
        const size_t here = std::min(block, n - j0);
        float *const strip = p.products ? p.products + j0 * n : own.data();  // J's rows, n apart
        for (size_t j = 0; j < here; j += width) {
            const float *item[64];
            for (size_t v = 0; v < width; ++v) item[v] = p.x + std::min(j0 + j + v, n - 1) * d;
            kernels.pack(item, d, &panels[j * d]);
        }
        // The products of rows [first, first + count) with J's, (count, block).
        const auto multiply = [&](size_t first, size_t count, float *to) {
            float tile[8 * 64];
            for (size_t j = 0; j < here; j += width) {
                kernels.tile(&panels[j * d], zero, p.x + first * d, count, d, tile);
                for (size_t r = 0; r < count; ++r) std::copy_n(tile + r * width, width, to + r * block + j);
            }
        };
        team.run((j0 + block - 1) / block, [&](size_t b) {
            Buffer<float> part(memory, kernels.rows * block);
            Buffer<uint32_t> found(memory, block);
            for (size_t i = b * block; i < (b + 1) * block; i += kernels.rows) {
                const size_t count = std::min(kernels.rows, (b + 1) * block - i);
                multiply(i, count, part.data());
                for (size_t j = 0; j < here; ++j)
                    for (size_t r = 0; r < count; ++r) strip[j * n + i + r] = part[r * block + j];
                for (size_t r = 0; r < count; ++r) {
                    absorb(p, candidates[i + r], capacity, &part[r * block], j0, here, none.data(), found.data());
                    if (p.products) std::copy_n(&part[r * block], here, p.products + (i + r) * n + j0);
                }
            }
        });
        team.run((here + kernels.rows - 1) / kernels.rows, [&](size_t q) {
            Buffer<float> part(memory, kernels.rows * block);
            Buffer<uint32_t> found(memory, block);
            const size_t first = q * kernels.rows, count = std::min(kernels.rows, here - first);
            multiply(j0 + first, count, part.data());
            for (size_t r = 0; r < count; ++r) {
                Candidates &mine = candidates[j0 + first + r];
                for (size_t i = 0; i < j0; i += block) absorb(p, mine, capacity, strip + (first + r) * n + i, i, block, none.data(), found.data());
                absorb(p, mine, capacity, &part[r * block], j0, here, none.data(), found.data());
                if (p.products) std::copy_n(&part[r * block], here, p.products + (j0 + first + r) * n + j0);
            }
        });
    }
    team.run((n + block - 1) / block, [&](size_t b) {
        Buffer<RankKey> keys(memory, capacity);
        for (size_t i = b * block; i < std::min(n, (b + 1) * block); ++i) {
            Candidates &mine = candidates[i];
            shrink(mine, p.wanted, capacity, kernels);
            for (size_t j = 0; j < mine.count; ++j) keys[j] = rank_key(mine.scores[j], mine.ids[j]);
            std::sort(keys.begin(), keys.begin() + mine.count, std::greater<RankKey>());
            p.result(i, keys.data(), std::min(mine.count, p.wanted));
        }
    });
}

float largest_magnitude(const float *values, size_t rows, size_t columns, const char *what) {
    // The bits of magnitudes order as integers do, with infinity and NaN above all finite numbers.
    constexpr int32_t infinity = 0x7f800000;
    int32_t largest = 0;
    for (size_t i = 0; i < rows; ++i) {
        const float *row = values + i * columns;
        int32_t top = 0;
        for (size_t j = 0; j < columns; ++j) {
            int32_t bits;
            std::memcpy(&bits, row + j, 4);
            top = std::max(top, bits & 0x7fffffff);
        }
        for (size_t j = 0; top >= infinity && j < columns; ++j)
            if (!std::isfinite(row[j]))
                fail(EIMF_ERROR_ARGUMENT, "%s: found %s in row %zu, column %zu; expected finite numbers", what,
                     std::isnan(row[j]) ? "NaN" : "an infinity", i, j);
        largest = std::max(largest, top);
    }
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    return magnitude;
}

namespace {

struct Request {
    const float *interests;
    size_t users, k, d;
    const float *items;
    size_t n_items, n;
    eimf_top_n_options options;
};

void check(const Request &q) {
    if (q.k == 0 || q.d == 0) fail(EIMF_ERROR_ARGUMENT, "interests have shape (%zu, %zu, %zu); K and D must be at least 1", q.users, q.k, q.d);
    if (q.n_items >= std::numeric_limits<uint32_t>::max())
        fail(EIMF_ERROR_ARGUMENT, "%zu items; at most %u are supported", q.n_items, std::numeric_limits<uint32_t>::max() - 1);
    if (q.k > std::numeric_limits<int32_t>::max()) fail(EIMF_ERROR_ARGUMENT, "%zu interests per user are too many", q.k);
    checked_product(checked_product(q.users, checked_product(q.k, q.d)), sizeof(float));
    checked_product(checked_product(q.n_items, q.d), sizeof(float));
    checked_product(checked_product(q.users, q.n), sizeof(int64_t));
    if ((q.users && !q.interests) || (q.n_items && !q.items)) fail(EIMF_ERROR_ARGUMENT, "a NULL pointer was given for a non-empty array");
    const int64_t *indptr = q.options.exclude_indptr, *indices = q.options.exclude_indices;
    if (!indptr) {
        if (indices) fail(EIMF_ERROR_ARGUMENT, "exclude_indices is given without exclude_indptr");
        return;
    }
    if (indptr[0] != 0) fail(EIMF_ERROR_ARGUMENT, "exclude_indptr[0] is %lld; expected 0", static_cast<long long>(indptr[0]));
    for (size_t u = 0; u < q.users; ++u)
        if (indptr[u + 1] < indptr[u]) fail(EIMF_ERROR_ARGUMENT, "exclude_indptr falls from %lld to %lld at user %zu; it must not fall",
                                            static_cast<long long>(indptr[u]), static_cast<long long>(indptr[u + 1]), u);
    if (indptr[q.users] > 0 && !indices) fail(EIMF_ERROR_ARGUMENT, "exclude_indptr is given without exclude_indices");
    for (int64_t e = 0; e < indptr[q.users]; ++e)
        if (indices[e] < 0 || static_cast<uint64_t>(indices[e]) >= q.n_items)
            fail(EIMF_ERROR_ARGUMENT, "exclude_indices[%lld] is %lld; expected an item id from 0 to %lld", static_cast<long long>(e),
                 static_cast<long long>(indices[e]), static_cast<long long>(q.n_items) - 1);
}

void check_magnitudes(const Request &q, float largest_item) {
    if (!std::isfinite(largest_item)) largest_magnitude(q.items, q.n_items, q.d, "items");  // fails, and says where
    const double largest = static_cast<double>(largest_item) * largest_magnitude(q.interests, q.users, q.k * q.d, "interests");
    if (largest * static_cast<double>(q.d) > 1e38)
        fail(EIMF_ERROR_ARGUMENT, "scores could overflow float32 (largest product of two components %.3g, D = %zu); scale the vectors down",
             largest, q.d);
}

// Score of one item for one user and the first interest that reaches it, by the definition.
std::pair<float, int32_t> score_of(const float *interests, size_t k, const float *item, size_t d) {
    std::pair<float, int32_t> best{-std::numeric_limits<float>::infinity(), -1};
    for (size_t i = 0; i < k; ++i) {
        float sum = 0;
        for (size_t t = 0; t < d; ++t) sum = std::fma(interests[i * d + t], item[t], sum);
        if (sum > best.first) best = {sum, static_cast<int32_t>(i)};
    }
    return best;
}

void pad(size_t from, size_t n, int64_t *ids, float *scores, int32_t *interest) {
    for (size_t j = from; j < n; ++j) {
        ids[j] = -1;
        scores[j] = -std::numeric_limits<float>::infinity();
        interest[j] = -1;
    }
}

}  // namespace
}  // namespace eimf

using namespace eimf;

extern "C" eimf_top_n_options eimf_top_n_defaults(void) { return eimf_top_n_options{}; }

// A catalogue in panels.
struct eimf_items {
    eimf_items(const float *items_, size_t n_items_, size_t d_, const ScoreKernels *kernels_, const eimf_allocator &allocator)
        : items(items_), n_items(n_items_), d(d_), kernels(kernels_), memory(allocator, 0),
          largest(largest_magnitude(items, n_items, d, "items")),
          panels(memory, checked_product(checked_product((n_items + kernels->width - 1) / kernels->width, kernels->width), d)) {
        const size_t width = kernels->width;
        const float *item[64];
        for (size_t first = 0; first < n_items; first += width) {
            for (size_t j = 0; j < width; ++j) item[j] = items + std::min(first + j, n_items - 1) * d;
            kernels->pack(item, d, &panels[first * d]);
        }
    }

    const float *items;
    const size_t n_items, d;
    const ScoreKernels *kernels;
    Memory memory;
    const float largest;
    Buffer<float> panels;
};

namespace {

// `prepared` may be nullptr.
void run(const Request &q, const eimf_items *prepared, int64_t *ids, float *scores, int32_t *interest) {
    check(q);
    const ScoreKernels *kernels = prepared && q.options.kernel == EIMF_KERNEL_AUTO ? prepared->kernels : score_kernels(q.options.kernel);
    if (!kernels) fail(EIMF_ERROR_ARGUMENT, "kernel %d is not available on this CPU", static_cast<int>(q.options.kernel));
    if (prepared && kernels != prepared->kernels)
        fail(EIMF_ERROR_ARGUMENT, "the items were prepared for kernel %s; expected it or EIMF_KERNEL_AUTO, found %s", prepared->kernels->name, kernels->name);
    Memory memory(q.options.allocator, 0);
    const int64_t *indptr = q.options.exclude_indptr;
    const size_t n_excluded = indptr ? static_cast<size_t>(indptr[q.users]) : 0;
    Buffer<uint32_t> excluded(memory, n_excluded);  // each user's, ascending
    for (size_t e = 0; e < n_excluded; ++e) excluded[e] = static_cast<uint32_t>(q.options.exclude_indices[e]);
    for (size_t u = 0; n_excluded && u < q.users; ++u) std::sort(excluded.data() + indptr[u], excluded.data() + indptr[u + 1]);

    TopNProblem problem{kernels, q.items, q.n_items, q.d, nullptr, q.options.allowed, q.users, q.k, q.n, prepared ? prepared->panels.data() : nullptr, {}, {}, {}};
    problem.rows = [&](size_t user) { return q.interests + user * q.k * q.d; };
    if (n_excluded)
        problem.accepts = [&](size_t user, uint32_t id) {
            return !std::binary_search(excluded.data() + indptr[user], excluded.data() + indptr[user + 1], id);
        };
    problem.result = [&](size_t user, const RankKey *keys, const int32_t *winner, size_t count) {
        for (size_t j = 0; j < count; ++j) {
            const size_t at = user * q.n + j;
            ids[at] = key_id(keys[j]);
            scores[at] = key_score(keys[j]);
            interest[at] = winner[j];
        }
        pad(count, q.n, ids + user * q.n, scores + user * q.n, interest + user * q.n);
    };
    Team team(std::min(q.options.n_threads ? q.options.n_threads : std::thread::hardware_concurrency(), q.users));
    largest_magnitude(q.interests, q.users, q.k * q.d, "interests");
    if (prepared) check_magnitudes(q, prepared->largest);
    const float seen = top_n(problem, team, memory);
    if (!prepared) check_magnitudes(q, seen);  // the items are seen on the way
}

}  // namespace

extern "C" eimf_status eimf_top_n(const float *interests, size_t users, size_t n_interests, size_t dim, const float *items,
                                  size_t n_items, size_t n, const eimf_top_n_options *options, int64_t *ids, float *scores,
                                  int32_t *interest, eimf_error *error) {
    return guarded(error, [&] {
        run({interests, users, n_interests, dim, items, n_items, n, options ? *options : eimf_top_n_defaults()}, nullptr, ids, scores, interest);
    });
}

extern "C" eimf_status eimf_items_create(const float *items, size_t n_items, size_t dim, eimf_kernel kernel, const eimf_allocator *allocator,
                                         eimf_items **prepared, eimf_error *error) {
    return guarded(error, [&] {
        *prepared = nullptr;
        check({nullptr, 0, 1, dim, items, n_items, 0, eimf_top_n_defaults()});
        const ScoreKernels *kernels = score_kernels(kernel);
        if (!kernels) fail(EIMF_ERROR_ARGUMENT, "kernel %d is not available on this CPU", static_cast<int>(kernel));
        *prepared = new eimf_items(items, n_items, dim, kernels, allocator ? *allocator : eimf_allocator{});
    });
}

extern "C" void eimf_items_destroy(eimf_items *prepared) { delete prepared; }

extern "C" eimf_status eimf_items_top_n(const eimf_items *prepared, const float *interests, size_t users, size_t n_interests, size_t n,
                                        const eimf_top_n_options *options, int64_t *ids, float *scores, int32_t *interest, eimf_error *error) {
    return guarded(error, [&] {
        if (!prepared) fail(EIMF_ERROR_ARGUMENT, "the prepared items are NULL");
        run({interests, users, n_interests, prepared->d, prepared->items, prepared->n_items, n, options ? *options : eimf_top_n_defaults()}, prepared,
            ids, scores, interest);
    });
}

extern "C" eimf_status eimf_top_n_reference(const float *interests, size_t users, size_t n_interests, size_t dim,
                                            const float *items, size_t n_items, size_t n, const eimf_top_n_options *options,
                                            int64_t *ids, float *scores, int32_t *interest, eimf_error *error) {
    return guarded(error, [&] {
        const Request q{interests, users, n_interests, dim, items, n_items, n, options ? *options : eimf_top_n_defaults()};
        check(q);
        check_magnitudes(q, largest_magnitude(items, n_items, dim, "items"));
        for (size_t u = 0; u < users; ++u) {
            struct Entry {
                float score;
                int32_t interest;
                size_t id;
            };
            std::vector<Entry> all;
            for (size_t i = 0; i < n_items; ++i) {
                bool excluded = q.options.allowed && !q.options.allowed[i];
                if (q.options.exclude_indptr)
                    for (int64_t e = q.options.exclude_indptr[u]; e < q.options.exclude_indptr[u + 1]; ++e)
                        excluded |= static_cast<size_t>(q.options.exclude_indices[e]) == i;
                if (excluded) continue;
                const auto score = score_of(interests + u * n_interests * dim, n_interests, items + i * dim, dim);
                all.push_back({score.first, score.second, i});
            }
            std::stable_sort(all.begin(), all.end(), [](const Entry &a, const Entry &b) { return a.score > b.score; });
            const size_t count = std::min(n, all.size());
            for (size_t j = 0; j < count; ++j) {
                ids[u * n + j] = static_cast<int64_t>(all[j].id);
                scores[u * n + j] = all[j].score + 0.0f;
                interest[u * n + j] = all[j].interest;
            }
            pad(count, n, ids + u * n, scores + u * n, interest + u * n);
        }
    });
}
