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

// A value with n scores above it, few more if bisection soon finds one; `below` if that many are not above it. Finding the n-th best exactly
// takes longer.
float rough_threshold(const float *scores, size_t count, size_t n, float below, const ScoreKernels &kernels) {
    if (count <= n) return below;
    float low, high, found = below;
    kernels.range(scores, count, &low, &high);
    for (int step = 0; step < 24; ++step) {
        const float middle = low + (high - low) / 2;
        if (!(middle > low && middle < high)) break;
        const size_t above = kernels.count_above(scores, count, middle);
        if (above >= n) {
            low = found = middle;
            if (above <= n + n / 4) break;
        } else {
            high = middle;
        }
    }
    return found;
}

// Raise the threshold so that little more than n candidates remain, at most `room`. Any threshold with n candidates above it is right.
void shrink(Candidates &c, size_t n, size_t room, const ScoreKernels &kernels) {
    if (c.count <= n) return;
    const float found = rough_threshold(c.scores, c.count, n, c.threshold, kernels);
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

// How many items may wait for a user to be scored: more than the bounds usually leave open, so that few are scored before all are seen.
size_t waiting_room(size_t n, size_t width) { return 4 * n + 4 * width; }

// One block of users: its query rows should fit the L2 cache; candidates are touched rarely. The more users, the more often a packed panel is
// used. Together below 2 MB. By 8-bit integers a panel is done with so soon that fewer users, all of whose data stay in the cache, are faster.
constexpr size_t QUERY_BYTES = 512 << 10, CANDIDATE_BYTES = 1280 << 10, MOST_USERS = 512, MOST_QUANTIZED_USERS = 128;

size_t users_per_block(const TopNProblem &p, size_t capacity, bool quantized) {
    const size_t by_rows = QUERY_BYTES / (p.k * p.d * sizeof(float));
    const size_t by_keys = CANDIDATE_BYTES / (capacity * sizeof(RankKey) + quantized * waiting_room(p.n, p.kernels->width) * 3 * sizeof(float));
    return std::max<size_t>(1, std::min({quantized ? MOST_QUANTIZED_USERS : MOST_USERS, by_rows, by_keys}));
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
            kernels.tile(panel, bias, 0, query + r * p.d, p.d, std::min(kernels.rows, p.k - r), p.d, scores + r * kernels.width, kernels.width);
        for (size_t j = 0; j < here; ++j) {
            size_t top = 0;
            for (size_t r = 1; r < p.k; ++r)
                if (scores[r * kernels.width + j] > scores[top * kernels.width + j]) top = r;
            winner[at + j] = static_cast<int32_t>(top);
        }
    }
}

// Within these limits squares and lengths stay well inside float's range.
bool fit_to_quantize(float largest) { return largest > 1e-10f && largest < 1e15f; }

// The next `width` items to look at.
struct Panel {
    size_t first;  // place of the panel among the prepared ones
    uint64_t valid;  // which places hold an item that may be given; width < 64
    // Unless the problem comes with panels, which hold all items and have no bias:
    uint32_t ids[64];
    const float *item[64];
    float bias[64];

    uint32_t id(const TopNProblem &p, size_t place) const { return p.panels ? static_cast<uint32_t>(first + place) : ids[place]; }

    // Returns false if no item is left from `next` on; moves `next` past those taken.
    bool fill(const TopNProblem &p, size_t &next) {
        const size_t width = p.kernels->width;
        first = next;
        if (p.panels) {
            const size_t here = std::min(width, p.n_items - first);
            next += here;
            valid = (uint64_t{1} << here) - 1;
            for (size_t j = 0; p.allowed && j < here; ++j) valid &= ~(static_cast<uint64_t>(!p.allowed[first + j]) << j);
            return here > 0;
        }
        size_t filled = 0;
        for (; next < p.n_items && filled < width; ++next) {
            if (p.allowed && !p.allowed[next]) continue;
            item[filled] = p.items + next * p.d;
            bias[filled] = p.bias ? p.bias[next] : 0.0f;
            ids[filled++] = static_cast<uint32_t>(next);
        }
        std::fill(item + filled, item + width, item[0]);  // repeats, which `valid` takes out again
        std::fill(bias + filled, bias + width, 0.0f);
        valid = (uint64_t{1} << filled) - 1;
        return filled > 0;
    }
};

// Users [first_user, first_user + users) and what is known of their best items.
class Block {
public:
    Block(const TopNProblem &problem, size_t first, size_t last, size_t capacity_, Memory &memory)
        : p(problem), kernels(*problem.kernels), first_user(first), users(last - first), capacity(capacity_), row(problem.k * problem.d),
          queries(memory, users * row), packed(memory, kernels.width * p.d), tile(memory, std::max(kernels.rows, p.k) * kernels.width),
          candidate_scores(memory, users * capacity), candidate_ids(memory, users * capacity), candidates(memory, users),
          thresholds(memory, users, -infinity), hits(memory, users), best(memory, users * kernels.width) {
        for (size_t u = 0; u < users; ++u) {
            std::copy_n(p.rows(first_user + u), row, &queries[u * row]);
            candidates[u] = {&candidate_scores[u * capacity], &candidate_ids[u * capacity], 0, thresholds[u]};
        }
    }

    // Let the users see all items from `next` on. Returns the bits of the largest magnitude among them if they come without panels.
    int32_t scan(size_t next) {
        int32_t largest = 0;
        for (Panel panel; panel.fill(p, next);) {
            if (!panel.valid) continue;
            const float *values = packed.data(), *bias = panel.bias;
            if (p.panels) values = p.panels + panel.first * p.d, bias = NO_BIAS;
            else largest = std::max(largest, kernels.pack(panel.item, p.d, packed.data()));
            const size_t n_hits = products(values, bias, panel.valid, 0, users);
            for (size_t h = 0; h < n_hits; ++h)
                offer(hits[h].user, hits[h].items, [&](size_t j) { return panel.id(p, j); }, &best[h * kernels.width]);
        }
        return largest;
    }

    // The same by bounds on each score from 8-bit integers, computed four times as fast. An item that may score above the threshold waits
    // until n others are known to score no less; only the few that remain are scored in float, `width` at a time. Returns where it
    // stopped: before the end if so many had to be scored that it does not pay.
    //
    // With rows q = s (v + e), items x = t (w + f), v and w the integers: q . x = s t (v . w + v . f + e . x / t), so by Cauchy and Schwarz
    // q . x is s t v . w, give or take s t (|v| |f| + |e| |x| / t). Rounding is accounted for by a share of |q| |x|, ROUNDING for each dimension.
    size_t scan_quantized(Memory &memory, float largest) {
        const size_t width = kernels.width, quads = (p.d + 3) / 4, room = waiting_room(p.n, width);
        Buffer<uint8_t> rows(memory, users * p.k * quads * 4);
        Buffer<ScoreKernels::QuantizedUser> bounds(memory, users);
        Buffer<double> unit(memory, users);  // of the bounds, in scores
        Buffer<float> least(memory, users * room), most(memory, users * room), panel_least(memory, users * width), panel_most(memory, users * width);
        Buffer<uint32_t> ids(memory, users * room), waiting(memory, users, 0u);
        QuantizedItems own;
        if (!p.quantized) own = QuantizedItems(memory, kernels, width, p.d, largest);
        const QuantizedItems &quantized = p.quantized ? *p.quantized : own;
        for (size_t u = 0; u < users; ++u)
            unit[u] = static_cast<double>(quantized.unit) * quantize_user(u, quads, &rows[u * p.k * quads * 4], bounds[u]);

        size_t scored = 0;
        const auto drop = [&](size_t u) {  // those that n others surpass
            const size_t at = u * room;
            float &limit = bounds[u].limit;
            limit = std::max(limit, static_cast<float>(rough_threshold(&least[at], waiting[u], p.n, limit, kernels) - SLACK / unit[u]));
            size_t kept = 0;
            for (size_t j = at; j < at + waiting[u]; ++j) {
                least[at + kept] = least[j];
                most[at + kept] = most[j];
                ids[at + kept] = ids[j];
                kept += most[j] >= limit;  // of equals the first ids are wanted, and these are not in order of ids
            }
            waiting[u] = static_cast<uint32_t>(kept);
        };
        const auto score = [&](size_t u) {
            const float *item[64];
            const uint32_t *id = &ids[u * room];
            for (size_t count; waiting[u] > 0; waiting[u] -= static_cast<uint32_t>(count), id += count) {
                count = std::min<size_t>(width, waiting[u]);
                for (size_t j = 0; j < width; ++j) item[j] = p.items + id[std::min(j, count - 1)] * p.d;
                kernels.pack(item, p.d, packed.data());
                if (const size_t n_hits = products(packed.data(), NO_BIAS, (uint64_t{1} << count) - 1, u, u + 1))
                    offer(u, hits[n_hits - 1].items, [id](size_t j) { return id[j]; }, best.data());
                scored += count;
            }
            shrink(candidates[u], p.n, capacity, kernels);
            thresholds[u] = candidates[u].threshold;
            bounds[u].limit = std::max(bounds[u].limit, static_cast<float>((thresholds[u] - SLACK) / unit[u]));
        };
        size_t next = 0;
        for (Panel panel; scored <= users * (MOST_SCORED + next / MOST_SHARE) && panel.fill(p, next);) {
            if (!panel.valid) continue;
            if (!p.quantized) {
                kernels.pack(panel.item, p.d, packed.data());
                own.set(kernels, 0, packed.data());
            }
            const size_t n_hits = kernels.quantized_hits(quantized.panel(p.quantized ? panel.first : 0), rows.data(), bounds.data(), users, p.k, quads,
                                                         panel.valid, panel_least.data(), panel_most.data(), hits.data());
            for (size_t h = 0; h < n_hits; ++h) {
                const size_t u = hits[h].user;
                size_t at = u * room + waiting[u];
                for (uint64_t mask = hits[h].items; mask; mask &= mask - 1) {
                    const size_t j = static_cast<size_t>(__builtin_ctzll(mask));
                    const uint32_t id = panel.id(p, j);
                    if (p.accepts && !p.accepts(first_user + u, id)) continue;
                    least[at] = panel_least[h * width + j];
                    most[at] = panel_most[h * width + j];
                    ids[at++] = id;
                }
                waiting[u] = static_cast<uint32_t>(at - u * room);
                if (waiting[u] + width > room) drop(u);
                if (waiting[u] + width > room) score(u);
            }
        }
        for (size_t u = 0; u < users; ++u) {
            drop(u);
            score(u);
        }
        return next;
    }

    void finish(Memory &memory) {
        Buffer<RankKey> keys(memory, capacity);
        Buffer<int32_t> winner(memory, p.n);
        for (size_t u = 0; u < users; ++u) {
            Candidates &mine = candidates[u];
            shrink(mine, p.n, capacity, kernels);
            for (size_t i = 0; i < mine.count; ++i) keys[i] = rank_key(mine.scores[i], mine.ids[i]);
            std::sort(keys.begin(), keys.begin() + mine.count, std::greater<RankKey>());
            const size_t count = std::min(mine.count, p.n);
            find_winners(p, &queries[u * row], keys.data(), count, packed.data(), tile.data(), winner.data());
            p.result(first_user + u, keys.data(), winner.data(), count);
        }
    }

private:
    static constexpr float ROUNDING = 1.0f / (1 << 22), infinity = std::numeric_limits<float>::infinity();
    static constexpr double SLACK = 1e-36;  // products near the smallest float may be rounded by more than a share of themselves
    static constexpr float NO_BIAS[64] = {};
    // More than so many scores a user, and one in so many items, cost more than the bound saves.
    static constexpr size_t MOST_SCORED = 1024, MOST_SHARE = 4;

    // Fills hits and best for users [first, last), counted from `first`; returns the number of hits.
    size_t products(const float *panel, const float *bias, uint64_t valid, size_t first, size_t last) {
        if (p.k <= kernels.rows)
            return kernels.tile_best(panel, bias, &queries[first * row], last - first, p.k, p.d, valid, &thresholds[first], best.data(), hits.data());
        size_t n_hits = 0;
        for (size_t u = first; u < last; ++u) {
            for (size_t r = 0; r < p.k; r += kernels.rows)
                kernels.tile(panel, bias, 0, &queries[u * row] + r * p.d, p.d, std::min(kernels.rows, p.k - r), p.d, &tile[r * kernels.width], kernels.width);
            const uint64_t above = kernels.best(tile.data(), p.k, thresholds[u], &best[n_hits * kernels.width]) & valid;
            if (above) hits[n_hits++] = {above, static_cast<uint32_t>(u - first)};
        }
        return n_hits;
    }

    // Of the items in `mask`, with ids id(place), `scores` are the user's.
    template <class Id>
    void offer(size_t u, uint64_t mask, Id id, const float *scores) {
        Candidates &mine = candidates[u];
        if (mine.count + kernels.width > capacity) shrink(mine, p.n, capacity - kernels.width, kernels);
        for (; mask; mask &= mask - 1) {
            const unsigned j = static_cast<unsigned>(__builtin_ctzll(mask));
            if (scores[j] > mine.threshold && (!p.accepts || p.accepts(first_user + u, id(j)))) {
                mine.scores[mine.count] = scores[j];
                mine.ids[mine.count++] = id(j);
            }
        }
        thresholds[u] = mine.threshold;
    }

    // Returns the scale of the user's rows.
    float quantize_user(size_t u, size_t quads, uint8_t *rows, ScoreKernels::QuantizedUser &bound) {
        const ScoreKernels::Quantization &to = kernels.quantization;
        const float *query = &queries[u * row];
        float largest = 0, longest = 0;  // component, part of a row that one sum is of; squared
        for (size_t t = 0; t < row; ++t) largest = std::max(largest, std::fabs(query[t]));
        std::fill_n(rows, p.k * quads * 4, static_cast<uint8_t>(to.offset));
        if (!fit_to_quantize(largest)) {  // nothing is known of this user's scores
            bound = {0.0f, infinity, -infinity};
            return 1;
        }
        for (size_t r = 0; to.halves && r < p.k; ++r)
            for (size_t first = 0; first < p.d; first += 4 * to.quads) {
                float half[2] = {};
                for (size_t t = first; t < std::min(p.d, first + 4 * to.quads); ++t) half[t / 2 % 2] += query[r * p.d + t] * query[r * p.d + t];
                longest = std::max({longest, half[0], half[1]});
            }
        constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to a whole number
        const float scale = std::max(largest / static_cast<float>(to.most), to.halves ? std::sqrt(longest) / to.length : 0), inverse = 1 / scale, more = 1.0001f;
        float error = 0, norm = 0;  // the largest |v|, and |e| + rounding's share of |q| / s
        for (size_t r = 0; r < p.k; ++r) {
            float squares = 0, lost = 0, length = 0;
            for (size_t t = 0; t < p.d; ++t) {
                const float value = query[r * p.d + t] * inverse, whole = (value + MAGIC) - MAGIC;
                rows[r * quads * 4 + t] = static_cast<uint8_t>(static_cast<int32_t>(whole) + to.offset);
                squares += whole * whole;
                lost += (value - whole) * (value - whole);
                length += value * value;
            }
            error = std::max(error, more * std::sqrt(squares));
            norm = std::max(norm, more * (std::sqrt(lost) + ROUNDING * static_cast<float>(p.d + 32) * std::sqrt(length)));
        }
        bound = {error, norm, -infinity};
        return scale;
    }

    const TopNProblem &p;
    const ScoreKernels &kernels;
    const size_t first_user, users, capacity, row;
    Buffer<float> queries, packed, tile, candidate_scores;
    Buffer<uint32_t> candidate_ids;
    Buffer<Candidates> candidates;
    Buffer<float> thresholds;  // of the candidates, side by side
    Buffer<ScoreKernels::Hit> hits;
    Buffer<float> best;  // of the hits
};

// Fewer dimensions gain nothing; in many, where vectors are nearly orthogonal, quantizing blurs the differences between scores.
bool can_quantize(const ScoreKernels &kernels, size_t d) { return kernels.quantized_hits && d >= 16 && d <= 512; }

// Does the bound pay? Scores for fewer users than it takes to make up for quantizing, and lists that take in many of the items, do not.
bool quantized_pays(const TopNProblem &p) {
    return can_quantize(*p.kernels, p.d) && !p.bias && p.d <= 256 * p.k && p.n_items / 16 >= p.n && (p.quantized || p.users * p.k >= 64);
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
    float magnitude = 0;
    bool quantized = quantized_pays(problem);
    if (quantized && !p.quantized) {
        magnitude = largest_magnitude(p.items, p.n_items, p.d, "items");
        quantized = fit_to_quantize(magnitude);
    }
    const size_t capacity = 2 * problem.n + 4 * p.kernels->width;
    const size_t block = std::min(users_per_block(problem, capacity, quantized), (p.users + team.size() - 1) / team.size());
    std::atomic<int32_t> largest{0};
    team.run((p.users + block - 1) / block, [&](size_t b) {
        Block users(problem, b * block, std::min(p.users, (b + 1) * block), capacity, memory);
        const int32_t bits = users.scan(quantized ? users.scan_quantized(memory, magnitude) : 0);
        users.finish(memory);
        for (int32_t seen = largest; seen < bits && !largest.compare_exchange_weak(seen, bits);) {}
    });
    if (quantized) return magnitude;
    const int32_t bits = largest;
    std::memcpy(&magnitude, &bits, 4);
    return magnitude;
}

QuantizedItems::QuantizedItems(Memory &memory, const ScoreKernels &kernels, size_t n_items, size_t d_, float largest)
    : d(d_), bytes(((d + 3) / 4 + (d + 4 * kernels.quantization.quads - 1) / (4 * kernels.quantization.quads)) * 4), unit(largest / 127),
      values(memory, checked_product((n_items + kernels.width - 1) / kernels.width * kernels.width, bytes)),
      scale(memory, n_items + kernels.width), error(memory, n_items + kernels.width), norm(memory, n_items + kernels.width) {}

void QuantizedItems::set(const ScoreKernels &kernels, size_t place, const float *panel) {
    kernels.quantize(panel, d, unit, &values[place * bytes], &scale[place], &error[place], &norm[place]);
}

ScoreKernels::QuantizedPanel QuantizedItems::panel(size_t place) const {
    return {values.data() + place * bytes, scale.data() + place, error.data() + place, norm.data() + place};
}

namespace {

// Rows of a block, a multiple of TILE and of each kernel's width; rows whose products lie in the cache together; dimensions of a panel that do.
constexpr size_t BLOCK = 192, TOGETHER = 48, DEPTH = 192, MOST_WIDTH = 48;

size_t pairs_capacity(size_t wanted) { return 2 * wanted + 4 * MOST_WIDTH; }

// Let a row see items [first, first + count) with these products.
void absorb(const AllPairs &p, Candidates &mine, size_t capacity, const float *products, size_t first, size_t count, uint32_t *found) {
    const size_t above = p.kernels->find_above(products, p.bias + first, count, 1.0f, mine.threshold, found);
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

size_t bytes_per_row(size_t wanted) { return (pairs_capacity(wanted) * 2 + BLOCK) * sizeof(float) + sizeof(Candidates); }

void nearest_of_all(const AllPairs &given, Team &team, Memory &memory) {
    AllPairs p = given;
    p.wanted = std::min(p.wanted, p.n);
    const ScoreKernels &kernels = *p.kernels;
    const size_t n = p.n, d = p.d, width = kernels.width, capacity = pairs_capacity(p.wanted);
    Buffer<float> scores(memory, checked_product(n, capacity)), panels(memory, BLOCK * d), strip(memory, checked_product(BLOCK, n));
    Buffer<uint32_t> ids(memory, checked_product(n, capacity));
    Buffer<Candidates> candidates(memory, n);
    for (size_t i = 0; i < n; ++i) candidates[i] = {&scores[i * capacity], &ids[i * capacity], 0, -std::numeric_limits<float>::infinity()};
    const float zero[64] = {};

    // Each row must see the items by rising id. So at block J, first all earlier rows see J's, then J's rows see the earlier ones, then J's.
    for (size_t j0 = 0; j0 < n; j0 += BLOCK) {
        if (p.poll) p.poll();
        const size_t here = std::min(BLOCK, n - j0);
        for (size_t j = 0; j < here; j += width) {
            const float *item[64];
            for (size_t v = 0; v < width; ++v) item[v] = p.x + std::min(j0 + j + v, n - 1) * d;
            kernels.pack(item, d, &panels[j * d]);
        }
        // The products of rows [first, first + count) with J's, (count, BLOCK).
        const auto multiply = [&](size_t first, size_t count, float *to) {
            for (size_t j = 0; j < here; j += width)
                for (size_t t = 0; t < d; t += DEPTH)
                    for (size_t r = 0; r < count; r += kernels.rows)
                        kernels.tile(&panels[j * d + t * width], t ? to + r * BLOCK + j : zero, t ? BLOCK : 0, p.x + (first + r) * d + t, d,
                                     std::min(kernels.rows, count - r), std::min(DEPTH, d - t), to + r * BLOCK + j, BLOCK);
        };
        team.run((j0 + BLOCK - 1) / BLOCK, [&](size_t b) {
            Buffer<float> part(memory, TOGETHER * BLOCK);
            Buffer<uint32_t> found(memory, BLOCK);
            for (size_t i = b * BLOCK; i < (b + 1) * BLOCK; i += TOGETHER) {
                multiply(i, TOGETHER, part.data());
                for (size_t r = 0; r < TOGETHER; r += TILE) {
                    size_t j = 0;
                    for (; j + TILE <= here; j += TILE) kernels.transpose(&part[r * BLOCK + j], BLOCK, &strip[j * n + i + r], n);
                    for (; j < here; ++j)
                        for (size_t q = r; q < r + TILE; ++q) strip[j * n + i + q] = part[q * BLOCK + j];
                }
                for (size_t r = 0; r < TOGETHER; ++r) {
                    absorb(p, candidates[i + r], capacity, &part[r * BLOCK], j0, here, found.data());
                    if (p.products) p.products(i + r, j0, here, &part[r * BLOCK]);
                }
            }
        });
        team.run((here + TILE - 1) / TILE, [&](size_t q) {
            Buffer<float> part(memory, TILE * BLOCK);
            Buffer<uint32_t> found(memory, BLOCK);
            const size_t first = q * TILE, count = std::min(TILE, here - first);
            multiply(j0 + first, count, part.data());
            for (size_t r = 0; r < count; ++r) {
                Candidates &mine = candidates[j0 + first + r];
                for (size_t i = 0; i < j0; i += BLOCK) absorb(p, mine, capacity, &strip[(first + r) * n + i], i, BLOCK, found.data());
                absorb(p, mine, capacity, &part[r * BLOCK], j0, here, found.data());
                if (!p.products) continue;
                p.products(j0 + first + r, 0, j0, &strip[(first + r) * n]);
                p.products(j0 + first + r, j0, here, &part[r * BLOCK]);
            }
        });
    }
    team.run((n + BLOCK - 1) / BLOCK, [&](size_t b) {
        Buffer<RankKey> keys(memory, capacity);
        for (size_t i = b * BLOCK; i < std::min(n, (b + 1) * BLOCK); ++i) {
            Candidates &mine = candidates[i];
            shrink(mine, p.wanted, capacity, kernels);
            for (size_t j = 0; j < mine.count; ++j) keys[j] = rank_key(mine.scores[j], mine.ids[j]);
            std::sort(keys.begin(), keys.begin() + mine.count, std::greater<RankKey>());
            p.result(i, keys.data(), std::min(mine.count, p.wanted));
        }
    });
}

float largest_magnitude(const float *values, size_t rows, size_t columns, const char *what, bool diagonal) {
    // The bits of magnitudes order as integers do, with infinity and NaN above all finite numbers.
    constexpr int32_t infinity = 0x7f800000;
    int32_t largest = 0;
    for (size_t i = 0; i < rows; ++i) {
        const float *row = values + i * columns;
        const size_t skipped = diagonal ? columns : std::min(i, columns);
        int32_t top = 0;
        const auto look = [&](size_t first, size_t last) {
            for (size_t j = first; j < last; ++j) {
                int32_t bits;
                std::memcpy(&bits, row + j, 4);
                top = std::max(top, bits & 0x7fffffff);
            }
        };
        look(0, skipped);
        look(skipped + 1, columns);
        for (size_t j = 0; top >= infinity && j < columns; ++j)
            if (j != skipped && !std::isfinite(row[j]))
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
    check_pointer(q.interests, "interests", q.users);
    check_pointer(q.items, "items", q.n_items);
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

void check_outputs(const Request &q, const int64_t *ids, const float *scores, const int32_t *interest) {
    check_pointer(ids, "ids", q.users * q.n);
    check_pointer(scores, "scores", q.users * q.n);
    check_pointer(interest, "interest", q.users * q.n);
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
        if (may_quantize()) quantized = QuantizedItems(memory, *kernels, n_items, d, largest);
        const size_t width = kernels->width;
        const float *item[64];
        for (size_t first = 0; first < n_items; first += width) {
            for (size_t j = 0; j < width; ++j) item[j] = items + std::min(first + j, n_items - 1) * d;
            kernels->pack(item, d, &panels[first * d]);
            if (may_quantize()) quantized.set(*kernels, first, &panels[first * d]);
        }
    }

    bool may_quantize() const { return can_quantize(*kernels, d) && fit_to_quantize(largest); }

    const float *items;
    const size_t n_items, d;
    const ScoreKernels *kernels;
    Memory memory;
    const float largest;
    Buffer<float> panels;
    QuantizedItems quantized;
};

namespace {

// `prepared` may be nullptr.
void run(const Request &q, const eimf_items *prepared, int64_t *ids, float *scores, int32_t *interest) {
    check(q);
    check_outputs(q, ids, scores, interest);
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

    TopNProblem problem{kernels, q.items, q.n_items, q.d, nullptr, q.options.allowed, q.users, q.k, q.n, prepared ? prepared->panels.data() : nullptr,
                        prepared && prepared->may_quantize() ? &prepared->quantized : nullptr, {}, {}, {}};
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
    const bool all_seen = !prepared && !q.options.allowed && q.users && q.n;  // the items, on the way
    if (!all_seen) check_magnitudes(q, prepared ? prepared->largest : largest_magnitude(q.items, q.n_items, q.d, "items"));
    const float seen = top_n(problem, team, memory);
    if (all_seen) check_magnitudes(q, seen);
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
        check_pointer(prepared, "prepared");
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
        check_pointer(prepared, "prepared");
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
        check_outputs(q, ids, scores, interest);
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
