// Affinity propagation over sorted neighbour lists; eimf.h states the method.
//
// Where the messages are. Row i lists its neighbours by falling s(i,k). Only the first `used` entries of a row carry r(i,k)
// and a(i,k) of their own: all that ever had r > 0 or were the row's best. For any other k the messages are implied:
//   r(i,k) = weight * s(i,k) - level[i]   never the best and never positive, so each update subtracted the row's best value
//   a(i,k) = column[k]                    never positive, so each update saw the column sum alone
// Both follow from the damped updates started at 0, with weight = 1 - damping^t.
// Entries with r > 0, and the row's best, have s(i,k) >= the row's best value, so they are a prefix of the list.
//
// Where preferences are so low that the lists would approach whole rows, all similarities are kept in float32 (Pairs, use_matrix),
// and only entries where a message differs from the implied value hold their own: those that ever were a row's best
// (r) and those with r(i,k) > max(0, column sum) at some time (a). They are few at any preference. A row then is read whole only
// where its first list and the columns with the highest values cannot decide it, and it is screened in float32: what may matter
// is judged in float64. So every form has the same messages but for rounding in float64.
#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "top_n.hpp"

namespace eimf {
namespace {

constexpr double NEVER = -1e300;  // stands for minus infinity where arithmetic must stay finite
constexpr size_t FIRST_LENGTH = 64, USUAL_LENGTH = 256, GROWTH = 4;  // of lists
// Lists that hold more than 1 / LISTED_SHARE of all pairs are worse than the matrix.
constexpr size_t LISTED_SHARE = 16;
// A matrix of so many bytes at most is also preferred to lists that would do, but be longer than twice the first length; larger ones of
// points are kept by halves.
constexpr size_t SMALL_MATRIX = 128 << 20;
constexpr size_t ACTIVE_SHARE = 64;  // n / ACTIVE_SHARE columns are tried before a whole row
constexpr size_t SELF = static_cast<size_t>(-1);

// One row's neighbours, by falling s, equal s by rising id.
struct Row {
    uint32_t *id;
    float *s;
    uint32_t length;
    float bound;  // no neighbour outside the list is more similar than this; -infinity: none is missing
};

struct Neighbour {
    float s;
    uint32_t id;
    bool operator<(const Neighbour &other) const { return s != other.s ? s > other.s : id < other.id; }
};

constexpr size_t ENTRY_BYTES = sizeof(uint32_t) + sizeof(float);

// For each point, a list of this length and the search for it.
size_t search_bytes(size_t length) { return length * ENTRY_BYTES + bytes_per_row(length + 1); }

// All similarities; the diagonal is arbitrary. They lie row after row or, where there are many of points, by halves: those are symmetric but
// for the row's weight, so square tiles on and below the diagonal hold all. A row then is read with the whole strip of TILE rows that it is in.
class Pairs {
public:
    Pairs() = default;
    Pairs(const float *rows, size_t n, double largest) : largest(largest), n_(n), rows_(rows) {}
    // Of points, to be filled by `put`.
    Pairs(Memory &memory, const std::vector<uint32_t> &weight, double largest)
        : largest(largest), n_(weight.size()), weight_(weight.data()), values_(memory, size(n_)), rows_(halved(n_) ? nullptr : values_.data()) {}

    // Numbers that are held for n points.
    static size_t size(size_t n) {
        const size_t tiles = (n + TILE - 1) / TILE;
        return halved(n) ? checked_product(checked_product(tiles, tiles + 1) / 2, TILE * TILE) : checked_product(n, n);
    }
    explicit operator bool() const { return n_ > 0; }

    float operator()(size_t i, size_t k) const { return rows_ ? rows_[i * n_ + k] : values_[place(i, k)] * static_cast<float>(weight_[i]); }

    // The strip that a thread has read last.
    struct Strip {
        Buffer<float> rows;
        size_t number = SELF;
    };
    const float *row(size_t i, Strip &strip, const ScoreKernels &kernels, Memory &memory) const {
        if (rows_) return rows_ + i * n_;
        const size_t here = i / TILE, tiles = (n_ + TILE - 1) / TILE, length = tiles * TILE;
        if (strip.rows.size() == 0) strip.rows = Buffer<float>(memory, TILE * length);
        float *const rows = strip.rows.data();
        if (strip.number != here) {
            strip.number = here;
            for (size_t t = 0; t < tiles; ++t) {
                const float *tile = &values_[place(here * TILE, t * TILE)];
                if (t + 4 < tiles && t >= here)  // not one after the other in memory
                    for (size_t r = 0; r < TILE; ++r) __builtin_prefetch(&values_[place((t + 4) * TILE + r, here * TILE)]);
                if (t > here) kernels.transpose(tile, TILE, rows + t * TILE, length);
                else for (size_t r = 0; r < TILE; ++r) std::copy_n(tile + r * TILE, TILE, rows + r * length + t * TILE);
            }
            for (size_t r = 0; r < TILE && here * TILE + r < n_; ++r)
                for (size_t k = 0; k < n_ && weight_[here * TILE + r] != 1; ++k) rows[r * length + k] *= static_cast<float>(weight_[here * TILE + r]);
        }
        return rows + i % TILE * length;
    }

    // The similarities of i and the points from `first` on, by their products and biases. All pieces of all rows must be put in.
    void put(size_t i, size_t first, size_t count, const float *products, const float *bias, const ScoreKernels &kernels) {
        const size_t end = first + count;
        if (rows_) return kernels.similarities(products, bias + first, bias[i], static_cast<float>(weight_[i]), count, &values_[i * n_ + first]);
        for (size_t k = first; k < std::min(end, (i / TILE + 1) * TILE);) {
            const size_t next = std::min(end, (k / TILE + 1) * TILE);
            kernels.similarities(products + (k - first), bias + k, bias[i], 1, next - k, &values_[place(i, k)]);
            k = next;
        }
    }
    // A better value for one of them, after all pieces. Rows i and k may put in the same one at once.
    void put(size_t i, size_t k, float s) {
        if (rows_) values_[i * n_ + k] = s * static_cast<float>(weight_[i]);
        else for (const size_t at : {place(i, k), place(k, i)}) __atomic_store(&values_[at], &s, __ATOMIC_RELAXED);
    }

    double largest = 0;  // bounds all magnitudes

private:
    static bool halved(size_t n) { return n > SMALL_MATRIX / sizeof(float) / n; }
    static size_t place(size_t i, size_t k) {
        if (i / TILE < k / TILE) std::swap(i, k);
        return (((i / TILE) * (i / TILE + 1) / 2 + k / TILE) * TILE + i % TILE) * TILE + k % TILE;
    }

    size_t n_ = 0;
    const uint32_t *weight_ = nullptr;
    Buffer<float> values_;
    const float *rows_ = nullptr;
};

// Where similarities come from. Rows and columns are numbered 0 .. n-1 after equal points were merged.
class Source {
public:
    virtual ~Source() = default;
    virtual size_t n() const = 0;
    // Is s(i,k) the same for all pairs?
    virtual bool all_equal(const std::vector<Row> &rows) const = 0;
    // All similarities, or room for them.
    virtual Pairs pairs(Memory &) const { return {}; }
    // Are all pairs known?
    virtual bool complete() const { return true; }
    // Give each of `which` a list of at least `length` neighbours (or all there are), by calling fill(i, neighbours, bound).
    using Fill = std::function<void(size_t i, const Neighbour *sorted, size_t length, float bound)>;
    // If `pairs` is there, and all rows are wanted, all similarities go there. A search that takes long polls now and then, on the calling
    // thread; what that throws ends it.
    using Poll = std::function<void()>;
    virtual void neighbours(const uint32_t *which, size_t count, size_t length, Team &team, Memory &memory, const Fill &fill, Pairs *pairs, const Poll &poll) const = 0;
    // s(i,k); false if i has no edge to k.
    virtual bool similarity(size_t i, size_t k, double *s) const = 0;
    // For each member, the sum of s(i, member) over the other members (NEVER where one has no edge to it).
    virtual void medoid_scores(const uint32_t *members, size_t count, double *scores) const = 0;
    // The largest preference[k] + sum over i != k of s(i,k), the value of the best single cluster, and its k. False: not known.
    virtual bool best_single(const double *preference, size_t *k, double *value) const = 0;
};

// The first k with the largest preference[k] + score[k], relative to the highest preference lest huge ones swallow the score.
size_t best_of(const double *preference, const std::vector<double> &score, double *value) {
    const double highest = *std::max_element(preference, preference + score.size());
    size_t best = 0;
    for (size_t k = 1; k < score.size(); ++k)
        if (preference[k] - highest + score[k] > preference[best] - highest + score[best]) best = k;
    *value = preference[best] + score[best];
    return best;
}

// ---------------------------------------------------------------------------------------------------------------- points

// Points with minus the squared distance; row i is weighted by the number of equal points it stands for, which makes the
// merged problem's net similarity that of the whole one.
class Points final : public Source {
public:
    Points(const float *x, size_t d, const std::vector<uint32_t> &representative, const std::vector<uint32_t> &weight,
           const ScoreKernels *kernels, Memory &memory)
        : x_(x), d_(d), point_(representative), weight_(weight), kernels_(kernels), mean_(memory, d, 0.0),
          centred_(memory, checked_product(representative.size(), d)), bias_(memory, representative.size()) {
        // Centring keeps the rounding error of |x - y|^2 = |x|^2 - 2 x.y + |y|^2 small.
        const size_t n = point_.size();
        double total = 0;
        for (size_t i = 0; i < n; ++i) {
            total += weight_[i];
            for (size_t t = 0; t < d; ++t) mean_[t] += static_cast<double>(weight_[i]) * row(i)[t];
        }
        for (size_t t = 0; t < d; ++t) mean_[t] /= total;
        total_weight_ = total;
        for (size_t i = 0; i < n; ++i) {
            double norm = 0;
            for (size_t t = 0; t < d; ++t) {
                const float c = static_cast<float>(row(i)[t] - mean_[t]);
                centred_[i * d + t] = c;
                norm += static_cast<double>(c) * c;
            }
            bias_[i] = static_cast<float>(-norm / 2);
            largest_norm_ = std::max(largest_norm_, norm);
        }
        // Bounds the error of a float32 inner product of d terms plus bias, doubled as -|x - y|^2 takes it twice, and
        // the rounding of the centred values (gamma_d of Higham, Accuracy and Stability, 3.1).
        error_ = 2.0 * (static_cast<double>(d) + 16) * 5.97e-8 * 2 * largest_norm_;
    }

    size_t n() const override { return point_.size(); }

    bool similarity(size_t i, size_t k, double *s) const override {
        *s = unweighted(i, k) * static_cast<float>(weight_[i]);  // rounded as in the lists, so that it does not matter which one is read
        return true;
    }

    Pairs pairs(Memory &memory) const override {
        return Pairs(memory, weight_, 4 * largest_norm_ * *std::max_element(weight_.begin(), weight_.end()));
    }

    bool all_equal(const std::vector<Row> &rows) const override {
        for (const Row &row : rows)  // a necessary condition that is cheap
            if (row.s[0] != rows[0].s[0] || row.s[row.length - 1] != rows[0].s[0]) return false;
        for (size_t i = 0; i < n(); ++i)
            for (size_t k = 0; k < n(); ++k)
                if (i != k && unweighted(i, k) * static_cast<float>(weight_[i]) != rows[0].s[0]) return false;
        return true;
    }

    void neighbours(const uint32_t *which, size_t count, size_t length, Team &team, Memory &memory, const Fill &fill, Pairs *pairs, const Poll &poll) const override {
        const size_t wanted = std::min(length, n() - 1);
        const auto listed = [&](size_t i, const RankKey *keys, size_t found) {
            Buffer<Neighbour> list(memory, found);
            size_t kept = 0;
            for (size_t j = 0; j < found; ++j) {
                for (size_t t = 0; j + 2 < found && t < d_; t += 16) __builtin_prefetch(row(key_id(keys[j + 2])) + t);
                const uint32_t k = key_id(keys[j]);
                if (k == i || kept == wanted) continue;
                const float s = unweighted(i, k);
                list[kept++] = {s * static_cast<float>(weight_[i]), k};
                if (pairs) pairs->put(i, k, s);
            }
            std::sort(list.begin(), list.begin() + kept);
            float bound = -std::numeric_limits<float>::infinity();
            if (kept < n() - 1) {
                // All others scored at most as the last one found; -|x - y|^2 = 2 score - |x|^2.
                const double last = 2.0 * key_score(keys[found - 1]) + 2.0 * bias_[i] + error_;
                bound = static_cast<float>(std::min(0.0, last * weight_[i]) * (1 - 1e-6));
            }
            fill(i, list.data(), kept, bound);
        };
        if (count == n()) {
            AllPairs all{kernels_, centred_.data(), n(), d_, bias_.data(), wanted + 1, {}, listed, poll};
            if (pairs)
                all.products = [&](size_t i, size_t first, size_t count, const float *products) {
                    pairs->put(i, first, count, products, bias_.data(), *kernels_);
                };
            return nearest_of_all(all, team, memory);
        }
        const size_t part = 1024 * team.size();
        for (size_t first = 0; first < count; first += part) {
            poll();
            TopNProblem problem{kernels_, centred_.data(), n(), d_, bias_.data(), nullptr, std::min(part, count - first), 1, wanted + 1, nullptr, nullptr, {}, {}, {}};
            problem.rows = [&](size_t q) { return centred_.data() + static_cast<size_t>(which[first + q]) * d_; };
            problem.result = [&](size_t q, const RankKey *keys, const int32_t *, size_t found) { listed(which[first + q], keys, found); };
            top_n(problem, team, memory);
        }
    }

    void medoid_scores(const uint32_t *members, size_t count, double *scores) const override {
        // sum_i w_i |x_i - x_j|^2 = sum_i w_i |x_i - m|^2 + W |x_j - m|^2 with the weighted mean m.
        std::vector<double> mean(d_, 0.0);
        double weight = 0, spread = 0;
        for (size_t i = 0; i < count; ++i) {
            weight += weight_[members[i]];
            for (size_t t = 0; t < d_; ++t) mean[t] += static_cast<double>(weight_[members[i]]) * row(members[i])[t];
        }
        for (double &m : mean) m /= weight;
        for (size_t i = 0; i < count; ++i) {
            double distance = 0;
            for (size_t t = 0; t < d_; ++t) {
                const double difference = row(members[i])[t] - mean[t];
                distance += difference * difference;
            }
            scores[i] = distance;
            spread += weight_[members[i]] * distance;
        }
        for (size_t i = 0; i < count; ++i) scores[i] = -(spread + weight * scores[i]);
    }

    bool best_single(const double *preference, size_t *k, double *value) const override {
        std::vector<uint32_t> everyone(n());
        std::iota(everyone.begin(), everyone.end(), 0u);
        std::vector<double> scores(n());
        medoid_scores(everyone.data(), n(), scores.data());
        *k = best_of(preference, scores, value);
        return true;
    }

private:
    const float *row(size_t i) const { return x_ + static_cast<size_t>(point_[i]) * d_; }
    float unweighted(size_t i, size_t k) const { return static_cast<float>(-kernels_->squared_distance(row(i), row(k), d_)); }

    const float *x_;
    size_t d_;
    const std::vector<uint32_t> &point_, &weight_;
    const ScoreKernels *kernels_;
    Buffer<double> mean_;
    Buffer<float> centred_, bias_;
    double total_weight_ = 0, largest_norm_ = 0, error_ = 0;
};

// -------------------------------------------------------------------------------------------------- given similarities

class Matrix final : public Source {
public:
    Matrix(const float *s, size_t n, double largest) : s_(s), n_(n), largest_(largest) {}
    size_t n() const override { return n_; }

    bool similarity(size_t i, size_t k, double *s) const override {
        *s = s_[i * n_ + k];
        return true;
    }
    bool all_equal(const std::vector<Row> &) const override {
        for (size_t i = 0; i < n_; ++i)
            for (size_t k = 0; k < n_; ++k)
                if (i != k && s_[i * n_ + k] != s_[1]) return false;
        return true;
    }
    void neighbours(const uint32_t *which, size_t count, size_t length, Team &team, Memory &memory, const Fill &fill, Pairs *, const Poll &poll) const override {
        const size_t wanted = std::min(length, n_ - 1);
        for (size_t first = 0; first < count; first += 1024) {
            poll();
            team.run(std::min<size_t>(1024, count - first), [&](size_t q) {
                const size_t i = which[first + q];
                Buffer<Neighbour> all(memory, n_ - 1);
                for (size_t k = 0, j = 0; k < n_; ++k)
                    if (k != i) all[j++] = {s_[i * n_ + k], static_cast<uint32_t>(k)};
                std::partial_sort(all.begin(), all.begin() + wanted, all.end());
                const bool whole = wanted == n_ - 1;
                fill(i, all.data(), wanted, whole ? -std::numeric_limits<float>::infinity() : all[wanted - 1].s);
            });
        }
    }
    Pairs pairs(Memory &) const override { return {s_, n_, largest_}; }
    void medoid_scores(const uint32_t *members, size_t count, double *scores) const override {
        std::fill_n(scores, count, 0.0);
        for (size_t i = 0; i < count; ++i)
            for (size_t j = 0; j < count; ++j)
                if (i != j) scores[j] += s_[members[i] * n_ + members[j]];
    }
    bool best_single(const double *preference, size_t *k, double *value) const override {
        std::vector<double> total(n_, 0.0);
        for (size_t i = 0; i < n_; ++i)
            for (size_t j = 0; j < n_; ++j)
                if (i != j) total[j] += s_[i * n_ + j];
        *k = best_of(preference, total, value);
        return true;
    }

private:
    const float *s_;
    size_t n_;
    double largest_;
};

// --------------------------------------------------------------------------------------------------------------- graph

class Graph final : public Source {
public:
    Graph(const int64_t *indptr, const int64_t *indices, const float *similarity, size_t n)
        : indptr_(indptr), indices_(indices), s_(similarity), n_(n) {}
    size_t n() const override { return n_; }

    bool similarity(size_t i, size_t k, double *s) const override {
        for (int64_t e = indptr_[i]; e < indptr_[i + 1]; ++e)
            if (static_cast<size_t>(indices_[e]) == k) return *s = s_[e], true;
        return false;
    }
    bool all_equal(const std::vector<Row> &rows) const override {
        for (const Row &row : rows)
            if (row.length != n_ - 1 || row.s[0] != rows[0].s[0] || row.s[row.length - 1] != rows[0].s[0]) return false;
        return true;
    }
    void neighbours(const uint32_t *which, size_t count, size_t, Team &team, Memory &memory, const Fill &fill, Pairs *, const Poll &) const override {
        team.run((count + 1023) / 1024, [&](size_t block) {
            for (size_t q = block * 1024; q < std::min(count, (block + 1) * 1024); ++q) {
                const size_t i = which[q], degree = static_cast<size_t>(indptr_[i + 1] - indptr_[i]);
                Buffer<Neighbour> list(memory, degree);
                size_t kept = 0;
                for (int64_t e = indptr_[i]; e < indptr_[i + 1]; ++e)
                    if (static_cast<size_t>(indices_[e]) != i) list[kept++] = {s_[e], static_cast<uint32_t>(indices_[e])};
                std::sort(list.begin(), list.begin() + kept);
                fill(i, list.data(), kept, -std::numeric_limits<float>::infinity());
            }
        });
    }
    bool complete() const override { return false; }
    void medoid_scores(const uint32_t *members, size_t count, double *scores) const override {
        std::fill_n(scores, count, 0.0);
        std::vector<size_t> edges(count, 0);
        for (size_t i = 0; i < count; ++i)
            for (int64_t e = indptr_[members[i]]; e < indptr_[members[i] + 1]; ++e) {
                const uint32_t k = static_cast<uint32_t>(indices_[e]);
                const uint32_t *at = std::lower_bound(members, members + count, k);
                if (at == members + count || *at != k || k == members[i]) continue;
                scores[at - members] += s_[e];
                ++edges[at - members];
            }
        for (size_t j = 0; j < count; ++j)
            if (edges[j] + 1 != count) scores[j] = NEVER;
    }
    bool best_single(const double *, size_t *, double *) const override { return false; }

private:
    const int64_t *indptr_, *indices_;
    const float *s_;
    size_t n_;
};

// The neighbour lists of all rows. They only grow, so a later run over the same source finds them as long as earlier ones needed.
class Lists {
public:
    using Poll = Source::Poll;

    Lists(const Source &source, Memory &memory) : source_(source), memory_(memory), rows_(source.n()), owned_(source.n()) {}

    const Row &operator[](size_t i) const { return rows_[i]; }
    const std::vector<Row> &rows() const { return rows_; }

    // Make all lists at least this long, or whole. At the first time get all pairs as well, if they are wanted and may be held.
    void load(Team &team, size_t length, bool with_pairs, const Poll &poll) {
        if (!loaded_) {
            fetch_all(team, length, with_pairs && pairs_fit(), poll);
        } else {
            std::vector<uint32_t> all(source_.n());
            std::iota(all.begin(), all.end(), 0u);
            grow(all, std::vector<uint32_t>(all.size(), static_cast<uint32_t>(length)), team, poll);
        }
        loaded_ = true;
    }

    // May all pairs be held under the memory limit, with something left for what goes with them?
    bool pairs_fit() {
        if (!pairs_ && source_.complete() && memory_.allows(checked_product(Pairs::size(source_.n()), sizeof(float) + 1))) return true;
        return static_cast<bool>(pairs_);
    }

    const Pairs &pairs(Team &team, const Poll &poll) {
        if (!pairs_) {
            Lists again(source_, memory_);  // its lists are the first ones
            again.fetch_all(team, FIRST_LENGTH, true, poll);
            pairs_ = std::move(again.pairs_);
        }
        return pairs_;
    }

    // Make the lists of `which` at least as long as `lengths` says, or whole.
    void grow(const std::vector<uint32_t> &which, const std::vector<uint32_t> &lengths, Team &team, const Poll &poll) {
        std::map<uint32_t, std::vector<uint32_t>> by_length;
        for (size_t q = 0; q < which.size(); ++q)
            if (rows_[which[q]].length < lengths[q] && rows_[which[q]].bound > -std::numeric_limits<float>::infinity()) by_length[lengths[q]].push_back(which[q]);
        for (const auto &[length, rows] : by_length) fetch(rows, length, team, nullptr, poll);
    }

private:
    void fetch_all(Team &team, size_t length, bool with_pairs, const Poll &poll) {
        std::vector<uint32_t> all(source_.n());
        std::iota(all.begin(), all.end(), 0u);
        Pairs pairs;  // kept only if the search comes to its end
        if (with_pairs) pairs = source_.pairs(memory_);
        fetch(all, length, team, with_pairs ? &pairs : nullptr, poll);
        if (with_pairs) pairs_ = std::move(pairs);
    }

    void fetch(const std::vector<uint32_t> &which, size_t length, Team &team, Pairs *pairs, const Poll &poll) {
        source_.neighbours(which.data(), which.size(), length, team, memory_,
                           [this](size_t i, const Neighbour *sorted, size_t found, float bound) {
                               Buffer<unsigned char> larger(memory_, found * ENTRY_BYTES);
                               Row row{reinterpret_cast<uint32_t *>(larger.data()), nullptr, static_cast<uint32_t>(found), bound};
                               row.s = reinterpret_cast<float *>(row.id + found);
                               for (size_t j = 0; j < found; ++j) row.s[j] = sorted[j].s, row.id[j] = sorted[j].id;
                               rows_[i] = row;
                               owned_[i] = std::move(larger);
                           }, pairs, poll);
    }

    const Source &source_;
    Memory &memory_;
    std::vector<Row> rows_;
    std::vector<Buffer<unsigned char>> owned_;  // what the rows point into
    bool loaded_ = false;
    Pairs pairs_;
};

// ------------------------------------------------------------------------------------------------------------ the engine

// The messages r and a of the first `used` entries of a row, and beside them a copy of its first `room` entries.
struct Messages {
    Buffer<double> values;  // unless they lie in the block's
    double *r = nullptr, *a = nullptr;
    float *s = nullptr;
    uint32_t *id = nullptr;
    uint32_t used = 0, room = 0;
    uint32_t scanned = 0;  // so many entries were read in the last scan

    static constexpr size_t DOUBLES = 3;  // for each entry

    // Move to `place`, with DOUBLES * `larger` values; larger <= row.length.
    void move(double *place, uint32_t larger, const Row &row) {
        double *const next_a = place + larger;
        std::copy_n(r, used, place);
        std::copy_n(a, used, next_a);
        r = place;
        a = next_a;
        room = larger;
        s = reinterpret_cast<float *>(a + room);
        id = reinterpret_cast<uint32_t *>(s + room);
        std::copy_n(row.s, room, s);
        std::copy_n(row.id, room, id);
    }
    void extend(Memory &memory, const Row &row) {
        const uint32_t larger = std::min(row.length, room ? 2 * room : 8);
        Buffer<double> next(memory, DOUBLES * larger);
        move(next.data(), larger, row);
        values = std::move(next);
    }
};

// Row i's pairs with messages of their own, where the matrix is used.
struct Entry {  // r and a
    double r, a;
    float s;
    uint32_t id;
    double sum = 0;  // scratch
};

struct Lagging {  // a alone; r is the implied one
    Buffer<double> values;  // what the others point into
    double *a = nullptr;
    float *s = nullptr;
    uint32_t *id = nullptr;
    uint32_t used = 0, room = 0;

    void add(Memory &memory, uint32_t id_, float s_, double a_) {
        if (used == room) {
            room = room ? 2 * room : 16;
            Buffer<double> larger(memory, size_t{2} * room);
            std::copy_n(a, used, larger.data());
            a = larger.data();
            s = std::copy_n(s, used, reinterpret_cast<float *>(a + room)) - used;
            id = std::copy_n(id, used, reinterpret_cast<uint32_t *>(s + room)) - used;
            values = std::move(larger);
        }
        a[used] = a_;
        s[used] = s_;
        id[used++] = id_;
    }
    void move(uint32_t from, uint32_t to) {
        a[to] = a[from];
        s[to] = s[from];
        id[to] = id[from];
    }
};

struct Own {
    std::vector<Entry> entries;
    Lagging lagging;
    uint64_t listed = 0;  // bit j: the row's j-th neighbour is among them
};
static_assert(FIRST_LENGTH <= 64, "Own::listed has a bit for each");

// The two best values of a + s seen so far, and the column of the best.
struct Best {
    double value, second;
    uint32_t id;
    void see(double other, uint32_t k) {
        if (other > value) second = value, value = other, id = k;
        else if (other > second) second = other;
    }
};

// Distinct numbers in [0, 1) that differ much for neighbouring k (the van der Corput sequence).
double spread(uint32_t k) {
    uint32_t reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= ((k >> bit) & 1u) << (31 - bit);
    return reversed / 4294967296.0;
}

struct Clustering {
    std::vector<uint32_t> exemplars;  // ascending
    std::vector<uint32_t> label;      // point -> its exemplar, or NOBODY
    double net_similarity = 0;
    size_t unassigned = 0;
};
constexpr uint32_t NOBODY = std::numeric_limits<uint32_t>::max();

struct Positive {
    double r;
    uint32_t id;  // of the column
};

class Engine {
public:
    Engine(const Source &source, Lists &lists, const double *preference, const eimf_ap_options &options, const ScoreKernels *kernels,
           Team &team, Memory &memory)
        : source_(source), lists_(lists), options_(options), kernels_(kernels), team_(team), memory_(memory), n_(source.n()),
          preference_(preference), messages_(n_), visible_(memory, n_), p_(memory, n_), best_(memory, n_), second_(memory, n_), arg_(memory, n_), level_(memory, n_, 0.0),
          r_self_(memory, n_, 0.0), a_self_(memory, n_, 0.0), column_(memory, n_, 0.0), column_sum_(memory, n_, 0.0),
          is_exemplar_(memory, n_, uint8_t{0}), unchanged_(memory, n_, uint32_t{0}) {
        // Fixed blocks of rows make the sums over them the same for any number of threads.
        blocks_ = std::min<size_t>(32, (n_ + 511) / 512);
        positive_.resize(blocks_);
        packed_.resize(blocks_);
        waiting_.resize(blocks_);
    }

    Clustering run(eimf_ap_result *result) {
        report(0, 0);
        auto [length, with_matrix] = expected();
        // Shorter lists, which then grow where they must, if the search for these takes more memory than there may be.
        while (length > FIRST_LENGTH && !memory_.allows(n_ * search_bytes(length))) length = std::max(FIRST_LENGTH, length / 2);
        lists_.load(team_, length, with_matrix, searching_);
        for (size_t i = 0; i < n_; ++i) visible_[i] = static_cast<uint32_t>(std::min<size_t>(length, lists_[i].length));
        report(0, 0);
        Clustering found;
        if (trivial(&found)) {
            result->converged = 1;
            return found;
        }
        decide_ties();
        if (with_matrix && lists_.pairs_fit()) use_matrix();
        Clustering best;
        best.net_similarity = -std::numeric_limits<double>::infinity();
        const size_t first_candidate = options_.max_iter - std::min(options_.max_iter, options_.convergence_iter);
        for (size_t iteration = 0; iteration < options_.max_iter; ++iteration) {
            cleaning_ = iteration % 8 == 7;
            if (!pairs_ && iteration >= 2 && (iteration & (iteration - 1)) == 0) pack();
            responsibilities();
            const bool changing = availabilities();
            result->n_iter = iteration + 1;
            report(iteration + 1, exemplar_count_);
            if (iteration >= options_.convergence_iter && !changing && exemplar_count_ > 0) {
                result->converged = 1;
                return refined(current_exemplars());
            }
            if (iteration >= first_candidate && exemplar_count_ > 0) {
                Clustering now = refined(current_exemplars());
                // Points without an exemplar add nothing, so their number comes first.
                if (best.exemplars.empty() || now.unassigned < best.unassigned ||
                    (now.unassigned == best.unassigned && now.net_similarity > best.net_similarity))
                    best = std::move(now);
            }
        }
        result->converged = 0;
        size_t k = 0;
        double single = 0;
        if (source_.best_single(preference_, &k, &single) && (best.exemplars.empty() || single > best.net_similarity))
            best = assigned({static_cast<uint32_t>(k)});  // oscillating runs can be worse than one cluster
        if (best.exemplars.empty()) {  // no exemplar in sight: the point that is nearest to being one
            size_t top = 0;
            for (size_t k = 1; k < n_; ++k)
                if (a_self_[k] + r_self_[k] > a_self_[top] + r_self_[top]) top = k;
            best = refined({static_cast<uint32_t>(top)});
        }
        return best;
    }

private:
    void report(size_t iteration, size_t exemplars) {
        if (options_.progress && options_.progress(options_.progress_context, iteration, exemplars))
            fail(EIMF_ERROR_INTERRUPTED, "stopped by the progress callback at iteration %zu", iteration);
    }

    // Lower each preference by a little of its own, at most 2^-32 of its size, so that columns that serve equally differ.
    void decide_ties() {
        for (size_t i = 0; i < n_; ++i) {
            double scale = std::fabs(preference_[i]);
            if (lists_[i].length) scale = std::max(scale, std::fabs(static_cast<double>(lists_[i].s[0])));
            p_[i] = preference_[i] - std::ldexp(scale, -32) * spread(static_cast<uint32_t>(i));
        }
    }

    // How long the lists should be at first, and whether the matrix should be used at once. The second iteration scans rows furthest:
    // then columns are worth about gain^2 (p - s1), with s1 the row's best similarity. Judged by 8 rows, whatever lists there are.
    std::pair<size_t, bool> expected() const {
        if (!source_.complete() || n_ <= 2 * FIRST_LENGTH) return {FIRST_LENGTH, false};
        const double gain = 1 - options_.damping;
        constexpr size_t rows = 8;
        size_t scanned = 0;
        std::vector<double> s(n_);
        for (size_t i = 0; i < n_; i += (n_ + rows - 1) / rows) {
            double best = -std::numeric_limits<double>::infinity();
            for (size_t k = 0; k < n_; ++k)
                if (k != i && source_.similarity(i, k, &s[k])) best = std::max(best, s[k]);
            for (size_t k = 0; k < n_; ++k) scanned += k != i && s[k] > best + gain * gain * (preference_[i] - best);
        }
        const size_t wanted = 2 * scanned / rows;  // rows differ much
        const bool small = n_ * n_ <= SMALL_MATRIX / sizeof(float);
        if (wanted > (small ? 2 * FIRST_LENGTH : std::max(2 * FIRST_LENGTH, n_ / LISTED_SHARE))) return {FIRST_LENGTH, true};
        size_t length = FIRST_LENGTH;
        while (length < wanted) length *= 2;
        return {std::min(length, n_ - 1), false};
    }

    // Cases with a known answer, where messages would only oscillate.
    bool trivial(Clustering *found) {
        std::vector<uint32_t> everyone(n_);
        std::iota(everyone.begin(), everyone.end(), 0u);
        if (n_ == 1) return *found = assigned(everyone), true;
        const double highest = *std::max_element(preference_, preference_ + n_);
        if (highest == *std::min_element(preference_, preference_ + n_) && source_.all_equal(lists_.rows())) {
            *found = assigned(preference_[0] > lists_[0].s[0] ? everyone : std::vector<uint32_t>{0});
            return true;
        }
        // Two or more exemplars are worth at most the two highest preferences plus each row's best similarity (or none).
        double second = -std::numeric_limits<double>::infinity(), gain = 0, rows_best = 0;
        bool seen = false;
        for (size_t i = 0; i < n_; ++i) {
            if (preference_[i] == highest && !seen) seen = true;
            else second = std::max(second, preference_[i]);
            if (lists_[i].length == 0) return false;
            gain += std::max(0.0, static_cast<double>(lists_[i].s[0]));
            rows_best += lists_[i].s[0];
        }
        size_t k = 0;
        double single = 0;
        if (highest > 0 || second + gain >= rows_best || !source_.best_single(preference_, &k, &single)) return false;
        if (highest + second + gain >= single) return false;
        *found = assigned({static_cast<uint32_t>(k)});
        return true;
    }

    // The part of row i's list that this run has asked for. Each run starts with the same part, whatever earlier runs have left in
    // the lists, so it takes the same course as on new lists.
    Row visible(size_t i) const {
        Row row = lists_[i];
        if (visible_[i] < row.length) {
            row.length = visible_[i];
            row.bound = row.s[row.length];
        }
        return row;
    }

    // a of row i's own entries, from the last iteration's column sums and responsibilities.
    void update_row_availabilities(size_t i) {
        Messages &own = messages_[i];
        kernels_->update_availabilities(own.id, own.s, own.r, own.a, own.used, column_sum_.data(), 0, 0, options_.damping);
    }

    // Lay each block's messages side by side in the order of its rows, as far as the last scans went: what the rows point to lies anywhere,
    // and waiting for memory takes longer than all else.
    void pack() {
        team_.run(blocks_, [this](size_t b) {
            const size_t first = b * n_ / blocks_, last = (b + 1) * n_ / blocks_;
            const auto room = [this](size_t i) { return std::min(lists_[i].length, std::max(messages_[i].used, messages_[i].scanned) + 2); };
            size_t total = 0;
            for (size_t i = first; i < last; ++i) total += room(i);
            Buffer<double> packed(memory_, Messages::DOUBLES * total);
            double *place = packed.data();
            for (size_t i = first; i < last; ++i) {
                const uint32_t here = room(i);
                messages_[i].move(place, here, lists_[i]);
                messages_[i].values = Buffer<double>();
                place += Messages::DOUBLES * here;
            }
            packed_[b] = std::move(packed);
        });
    }

    // The two best values of a(i,k) + s(i,k). False if the list ends before that is certain.
    bool scan(size_t i) {
        Messages &own = messages_[i];
        double best = a_self_[i] + p_[i], second = -std::numeric_limits<double>::infinity();
        size_t arg = SELF;
        const auto see = [&](double value, size_t j) {
            if (value > best) second = best, best = value, arg = j;
            else if (value > second) second = value;
        };
        double pair[2] = {-std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
        kernels_->two_best(own.s, own.a, own.used, pair);
        size_t at = 0;  // the best of those
        if (pair[0] > best)
            while (own.s[at] + own.a[at] != pair[0]) ++at;
        see(pair[0], at);
        see(pair[1], at);  // never the best
        const size_t length = std::min(visible_[i], lists_[i].length), near = std::min<size_t>(own.room, length);
        size_t j = own.used;
        for (; j < near && own.s[j] > second; ++j) see(own.s[j] + column_[own.id[j]], j);
        bool certain = true;
        if (j == near) {
            const Row row = visible(i);
            for (; j < length && row.s[j] > second; ++j) see(row.s[j] + column_[row.id[j]], j);
            certain = j < length || row.bound <= second;
        }
        second_[i] = std::max(second, NEVER);
        if (!certain || lists_[i].bound > second) return false;  // the list's last entries may be less similar than its bound
        own.scanned = static_cast<uint32_t>(std::min(j + 1, length));
        best_[i] = best;
        arg_[i] = arg;
        return true;
    }

    void update_row_responsibilities(size_t i, std::vector<Positive> &positive) {
        Messages &own = messages_[i];
        const double damping = options_.damping, gain = 1 - damping, best = best_[i], second = second_[i];
        const size_t arg = arg_[i], length = std::min(visible_[i], lists_[i].length);
        r_self_[i] = damping * r_self_[i] + gain * (p_[i] - (arg == SELF ? second : best));
        size_t j = 0;
        const double before = arg < own.used ? own.r[arg] : 0.0;
        kernels_->update_responsibilities(own.s, own.r, own.used, best, damping);
        if (arg < own.used) own.r[arg] = damping * before + gain * (own.s[arg] - second);
        for (; j < own.used; ++j)
            if (own.r[j] > 0) positive.push_back({own.r[j], own.id[j]});
        for (; j < length; ++j) {
            const float s = j < own.room ? own.s[j] : lists_[i].s[j];
            const double r = damping * (weight_ * s - level_[i]) + gain * (s - (j == arg ? second : best));
            if (r <= 0 && (arg == SELF || j > arg)) break;
            if (j == own.room) own.extend(memory_, lists_[i]);
            own.r[j] = r;
            own.a[j] = column_[own.id[j]];
            own.used = static_cast<uint32_t>(j + 1);
            if (r > 0) positive.push_back({r, own.id[j]});
        }
        level_[i] = damping * level_[i] + gain * best;
    }

    void responsibilities() {
        if (pairs_) return team_.run(blocks_, [this](size_t b) { matrix_block(b, true); });
        team_.run(blocks_, [this](size_t b) {
            const size_t first = b * n_ / blocks_, last = (b + 1) * n_ / blocks_;
            waiting_[b].clear();
            positive_[b].clear();
            for (size_t i = first; i < last; ++i) {
                update_row_availabilities(i);
                if (!scan(i)) waiting_[b].push_back(static_cast<uint32_t>(i));
            }
            if (waiting_[b].empty())
                for (size_t i = first; i < last; ++i) update_row_responsibilities(i, positive_[b]);
        });
        std::vector<uint32_t> blocked;
        for (size_t b = 0; b < blocks_; ++b)
            if (!waiting_[b].empty()) blocked.push_back(static_cast<uint32_t>(b));
        if (blocked.empty()) return;
        std::vector<uint32_t> short_rows;
        for (uint32_t b : blocked) short_rows.insert(short_rows.end(), waiting_[b].begin(), waiting_[b].end());
        while (!short_rows.empty()) {
            const std::vector<uint32_t> lengths = lengths_for(short_rows);
            if (too_long(lengths) && lists_.pairs_fit()) {
                use_matrix();
                return team_.run(blocked.size(), [&](size_t q) { matrix_block(blocked[q], false); });
            }
            lists_.grow(short_rows, lengths, team_, searching_);
            for (size_t q = 0; q < short_rows.size(); ++q) visible_[short_rows[q]] = lengths[q];
            std::vector<uint32_t> still;
            for (uint32_t i : short_rows)
                if (!scan(i)) still.push_back(i);
            short_rows.swap(still);
        }
        team_.run(blocked.size(), [&](size_t q) {
            const size_t b = blocked[q];
            for (size_t i = b * n_ / blocks_; i < (b + 1) * n_ / blocks_; ++i) update_row_responsibilities(i, positive_[b]);
        });
    }

    // How long the lists of these rows should become: an estimate of the neighbours that are more similar than the second best
    // value so far, from a sample of 32, and GROWTH times the present length at least. Powers of 2.
    std::vector<uint32_t> lengths_for(const std::vector<uint32_t> &short_rows) {
        std::vector<uint32_t> lengths(short_rows.size());
        team_.run((short_rows.size() + 255) / 256, [&](size_t block) {
            for (size_t q = block * 256; q < std::min(short_rows.size(), (block + 1) * 256); ++q) {
                const size_t i = short_rows[q];
                size_t above = 0, power = 0;
                for (size_t sample = 0; sample < 32; ++sample) {
                    double s;
                    above += source_.similarity(i, (i + 1 + sample * n_ / 32) % n_, &s) && s > second_[i];
                }
                const size_t wanted = std::max(GROWTH * visible_[i], above * n_ / 32);
                while ((size_t{1} << power) < wanted) ++power;
                lengths[q] = static_cast<uint32_t>(std::min(n_ - 1, size_t{1} << power));
            }
        });
        return lengths;
    }

    // Would the lists hold more than a part of all pairs?
    bool too_long(const std::vector<uint32_t> &lengths) const {
        size_t listed = std::accumulate(lengths.begin(), lengths.end(), size_t{0});
        for (size_t i = 0; i < n_; ++i) listed += visible_[i];
        return listed > n_ / LISTED_SHARE * n_;
    }

    // From here on with the matrix. Between two iterations, or in the middle of one: then blocks without waiting rows have done this
    // iteration's responsibilities already.
    void use_matrix() {
        pairs_ = &lists_.pairs(team_, searching_);
        partial_ = Buffer<double>(memory_, checked_product(blocks_, n_), 0.0);
        for (size_t b = 0; b < blocks_; ++b) {
            for (const Positive &p : positive_[b]) partial_[b * n_ + p.id] += p.r;
            positive_[b] = {};
        }
        own_.resize(n_);
        near_.resize(n_);
        screen_ = Buffer<float>(memory_, n_);
        excess_ = Buffer<float>(memory_, n_);
        const double next_weight = options_.damping * weight_ + 1 - options_.damping;
        team_.run(blocks_, [&](size_t b) {
            const double weight = waiting_[b].empty() ? next_weight : weight_;
            for (size_t i = b * n_ / blocks_; i < (b + 1) * n_ / blocks_; ++i) {
                near_[i] = nearest(i);
                Messages &own = messages_[i];
                for (uint32_t j = 0; j < own.used; ++j) {
                    const Entry e{own.r[j], own.a[j], lists_[i].s[j], lists_[i].id[j]};
                    const bool implied = same(e.r, weight * e.s - level_[i], e.s);
                    if (implied && same(e.a, column_[e.id], e.s)) continue;
                    if (implied) own_[i].lagging.add(memory_, e.id, e.s, e.a);
                    else own_[i].entries.push_back(e);
                    if (j < near_[i].length) own_[i].listed |= uint64_t{1} << j;
                }
                own = Messages();
            }
        });
        packed_.clear();
        prepare_columns();
    }

    // The first neighbours of row i.
    Row nearest(size_t i) const {
        Row row = lists_[i];
        if (row.length > FIRST_LENGTH) row.length = FIRST_LENGTH, row.bound = row.s[FIRST_LENGTH];
        return row;
    }

    // The bit in Own::listed of row i's pair with k; 0 if k is none of its first neighbours.
    uint64_t listed_bit(size_t i, uint32_t k) const {
        const Row &row = near_[i];
        const auto j = std::find(row.id, row.id + row.length, k) - row.id;
        return j < row.length ? uint64_t{1} << j : 0;
    }

    // Is this message what a pair without one of its own has, but for rounding?
    static bool same(double own, double implied, float s) { return std::fabs(own - implied) <= 1e-13 * (std::fabs(implied) + std::fabs(s)); }

    // What all rows use of the columns' present values: float32 copies, for screening, and the columns with the highest values.
    void prepare_columns() {
        double largest = 0;
        for (size_t k = 0; k < n_; ++k) {
            largest = std::max(largest, std::fabs(column_[k]));
            screen_[k] = static_cast<float>(std::max(column_[k], -3e38));
            // A little smaller than it is, so that rounding hides no responsibility above it.
            excess_[k] = -static_cast<float>(std::min(std::max(column_sum_[k], 0.0), 3e38) * (1 - std::ldexp(1, -20)));
        }
        screen_error_ = std::ldexp(pairs_->largest + largest, -21);
        active_.resize(n_);
        std::iota(active_.begin(), active_.end(), 0u);
        const auto higher = [this](uint32_t a, uint32_t b) { return column_[a] != column_[b] ? column_[a] > column_[b] : a < b; };
        const size_t count = n_ / ACTIVE_SHARE + 1;
        std::nth_element(active_.begin(), active_.begin() + count, active_.end(), higher);
        rest_ = column_[active_[count]];
        active_.resize(count);
        std::sort(active_.begin(), active_.end(), higher);
        highest_ = column_[active_[0]];
        // Reading them one by one takes about as long as the whole row: not where most rows would need both, as in the last iteration.
        tried_ = undecided_ > decided_ ? 0 : active_.size();
        decided_ = undecided_ = 0;
    }

    // What the rows of a block use one after the other.
    struct Scratch {
        Buffer<float> screen, excess, maxima;
        Buffer<uint32_t> found;
        Pairs::Strip strip;
        double *column_sum;
        size_t decided = 0, undecided = 0;  // rows for which the columns in `active_` suffice, and for which they do not
    };

    // One iteration of the block's rows; with `all` = false the availabilities have been updated already.
    void matrix_block(size_t b, bool all) {
        Scratch scratch{{memory_, n_}, {memory_, n_}, {memory_, (n_ + STRETCH - 1) / STRETCH}, {memory_, n_}, {}, &partial_[b * n_], 0, 0};
        std::copy_n(screen_.data(), n_, scratch.screen.data());
        std::copy_n(excess_.data(), n_, scratch.excess.data());
        const size_t last = (b + 1) * n_ / blocks_;
        for (size_t i = b * n_ / blocks_; i < last; ++i) {
            // What rows point to lies anywhere, and waiting for it would take longer than all else.
            const size_t ahead = std::min(i + 4, last - 1);
            for (const void *place : {static_cast<const void *>(own_[ahead].entries.data()), static_cast<const void *>(own_[ahead].lagging.a),
                                      static_cast<const void *>(own_[ahead].lagging.s), static_cast<const void *>(own_[ahead].lagging.id),
                                      static_cast<const void *>(near_[ahead].s), static_cast<const void *>(near_[ahead].id)}) {
                __builtin_prefetch(place);
                __builtin_prefetch(static_cast<const char *>(place) + 64);
            }
            matrix_row(i, scratch, all);
        }
        decided_ += scratch.decided;
        undecided_ += scratch.undecided;
    }

    void matrix_row(size_t i, Scratch &scratch, bool all) {
        const double damping = options_.damping, gain = 1 - damping, weight = weight_, level = level_[i];
        const auto s = [&](size_t k) { return (*pairs_)(i, k); };
        const auto whole = [&] { return pairs_->row(i, scratch.strip, *kernels_, memory_); };
        const Row row = near_[i];
        Own &own = own_[i];
        std::vector<Entry> &entries = own.entries;
        Lagging &lagging = own.lagging;
        const uint64_t listed = row.length ? ~uint64_t{0} >> (64 - row.length) : 0;

        // Availabilities. Pairs whose messages have become as implied need none of their own any more.
        if (all) {
            kernels_->update_availabilities(lagging.id, lagging.s, nullptr, lagging.a, lagging.used, column_sum_.data(), weight, level, damping);
            if (cleaning_) {
                uint32_t left = 0;
                for (uint32_t j = 0; j < lagging.used; ++j) {
                    if (same(lagging.a[j], column_[lagging.id[j]], lagging.s[j])) own.listed &= ~listed_bit(i, lagging.id[j]);
                    else lagging.move(j, left++);
                }
                lagging.used = left;
            }
            size_t kept = 0;
            for (Entry &e : entries) {
                e.a = damping * e.a + gain * std::min(0.0, column_sum_[e.id] - std::max(e.r, 0.0));
                if (!same(e.r, weight * e.s - level, e.s)) entries[kept++] = e;
                else if (!same(e.a, column_[e.id], e.s)) lagging.add(memory_, e.id, e.s, e.a);
                else own.listed &= ~listed_bit(i, e.id);
            }
            entries.resize(kept);
            // New: pairs whose own responsibility now matters to their availability, r > max(0, column sum).
            const auto consider = [&](uint32_t k, float similarity) {
                const double r = weight * similarity - level, sum = column_sum_[k];
                if (r <= std::max(0.0, sum)) return false;
                lagging.add(memory_, k, similarity, column_[k] + gain * (std::min(0.0, sum - r) - std::min(0.0, sum)));
                return true;
            };
            if (weight * row.bound - level > 0) {
                const double limit = level - std::ldexp(pairs_->largest + std::fabs(level), -21);
                hide(i, scratch.excess.data());
                for (size_t j = 0; j < row.length; ++j) scratch.excess[row.id[j]] = -std::numeric_limits<float>::infinity();
                const float *all_s = whole();
                const size_t count = kernels_->find_above(all_s, scratch.excess.data(), n_, static_cast<float>(weight), static_cast<float>(limit), scratch.found.data());
                for (size_t j = 0; j < row.length; ++j) scratch.excess[row.id[j]] = excess_[row.id[j]];
                show(i, scratch.excess.data(), excess_.data());
                for (size_t q = 0; q < count; ++q) consider(scratch.found[q], all_s[scratch.found[q]]);
            }
            for (uint64_t rest = listed & ~own.listed; rest; rest &= rest - 1) {
                const int j = __builtin_ctzll(rest);
                if (weight * row.s[j] - level <= 0) break;
                if (consider(row.id[j], row.s[j])) own.listed |= uint64_t{1} << j;
            }
        }

        // The two best values of a + s: of the pairs with messages of their own, of the row's neighbours as far as they may matter, of the
        // columns with the highest values, and of the whole row where that does not decide it.
        Best best{a_self_[i] + p_[i], -std::numeric_limits<double>::infinity(), static_cast<uint32_t>(i)};
        for (const Entry &e : entries) best.see(e.s + e.a, e.id);
        double pair[2] = {-std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
        kernels_->two_best(lagging.s, lagging.a, lagging.used, pair);
        uint32_t at = lagging.used;  // the best of those, if it is the best of all
        if (pair[0] > best.value)
            for (at = 0; lagging.s[at] + lagging.a[at] != pair[0];) ++at;
        best.see(pair[0], at < lagging.used ? lagging.id[at] : 0);
        best.see(pair[1], 0);  // never the best
        const Best of_own = best;
        for (uint64_t rest = listed & ~own.listed; rest; rest &= rest - 1) {
            const int j = __builtin_ctzll(rest);
            if (row.s[j] + highest_ <= best.second) break;
            best.see(row.s[j] + column_[row.id[j]], row.id[j]);
        }
        if (row.bound + highest_ > best.second) {
            for (size_t tried = 0; tried < tried_ && row.bound + column_[active_[tried]] > best.second; ++tried) {
                const uint32_t k = active_[tried];
                if (const float value = s(k); value + column_[k] > best.second && k != i && !listed_bit(i, k) && !has(own, k)) best.see(value + column_[k], k);
            }
            if (row.bound + (tried_ ? rest_ : highest_) > best.second) best = scan_row(i, scratch, of_own, best.second);
            (row.bound + rest_ > best.second ? scratch.undecided : scratch.decided) += 1;
        }

        // From here on the best pair has an r of its own.
        if (best.id != of_own.id) {
            entries.push_back({weight * s(best.id) - level, column_[best.id], s(best.id), best.id});
            own.listed |= listed_bit(i, best.id);
        } else if (at < lagging.used) {
            entries.push_back({weight * lagging.s[at] - level, lagging.a[at], lagging.s[at], best.id});
            lagging.move(--lagging.used, at);
        }

        // Responsibilities, and the columns' sums of the positive ones. Those of entries and the diagonal are taken out again.
        r_self_[i] = damping * r_self_[i] + gain * (p_[i] - (best.id == i ? best.second : best.value));
        const double next_weight = damping * weight + gain, next_level = damping * level + gain * best.value;
        double *column_sum = scratch.column_sum;
        const double self_sum = column_sum[i];
        for (Entry &e : entries) {
            e.r = damping * e.r + gain * (e.s - (e.id == best.id ? best.second : best.value));
            e.sum = column_sum[e.id];
        }
        if (next_weight * row.bound - next_level > 0) {
            kernels_->add_positive(whole(), n_, next_weight, next_level, column_sum);
        } else {
            for (size_t j = 0; j < row.length; ++j) {
                const double r = next_weight * row.s[j] - next_level;
                if (r <= 0) break;
                column_sum[row.id[j]] += r;
            }
        }
        column_sum[i] = self_sum;
        for (const Entry &e : entries) column_sum[e.id] = e.sum + std::max(e.r, 0.0);
        level_[i] = next_level;
    }

    static bool has(const Own &own, uint32_t k) {
        for (const Entry &e : own.entries)
            if (e.id == k) return true;
        return std::find(own.lagging.id, own.lagging.id + own.lagging.used, k) != own.lagging.id + own.lagging.used;
    }

    // Take row i's pairs with messages of their own, and the diagonal, out of a screen; put them back.
    void hide(size_t i, float *screen) const {
        screen[i] = -std::numeric_limits<float>::infinity();
        for (const Entry &e : own_[i].entries) screen[e.id] = -std::numeric_limits<float>::infinity();
        for (size_t j = 0; j < own_[i].lagging.used; ++j) screen[own_[i].lagging.id[j]] = -std::numeric_limits<float>::infinity();
    }
    void show(size_t i, float *screen, const float *whole) const {
        screen[i] = whole[i];
        for (const Entry &e : own_[i].entries) screen[e.id] = whole[e.id];
        for (size_t j = 0; j < own_[i].lagging.used; ++j) screen[own_[i].lagging.id[j]] = whole[own_[i].lagging.id[j]];
    }

    // `best`, of the pairs with messages of their own, and all others of row i; two of them at least are worth `known`.
    Best scan_row(size_t i, Scratch &scratch, Best best, double known) const {
        const float *s = pairs_->row(i, scratch.strip, *kernels_, memory_);
        float *screen = scratch.screen.data(), *maxima = scratch.maxima.data();
        hide(i, screen);
        kernels_->stretch_maxima(s, screen, n_, maxima);
        if (!std::isfinite(s[i])) {  // the diagonal may hold anything
            const size_t first = i / STRETCH * STRETCH;
            float most = -std::numeric_limits<float>::infinity();
            for (size_t k = first; k < std::min(n_, first + STRETCH); ++k)
                if (k != i) most = std::max(most, s[k] + screen[k]);
            maxima[i / STRETCH] = most;
        }
        float top = -std::numeric_limits<float>::infinity(), next = top;
        for (size_t first = 0; first < n_; first += STRETCH) {
            const float value = maxima[first / STRETCH];
            next = std::max(next, std::min(top, value));
            top = std::max(top, value);
        }
        // Two pairs at least have a true value of `next` - error.
        const double limit = std::max(known, next - screen_error_) - screen_error_;
        for (size_t first = 0; first < n_; first += STRETCH) {
            if (maxima[first / STRETCH] < limit) continue;
            const size_t count = kernels_->find_above(s + first, screen + first, std::min(STRETCH, n_ - first), 1.0f, static_cast<float>(limit), scratch.found.data());
            for (size_t q = 0; q < count; ++q) {
                const size_t k = first + scratch.found[q];
                best.see(s[k] + column_[k], static_cast<uint32_t>(k));
            }
        }
        show(i, screen, screen_.data());
        return best;
    }

    // The columns' sums of positive responsibilities. Each thread adds up a range of the columns, all in the order of the rows.
    void sum_positive() {
        const size_t parts = team_.size();
        team_.run(parts, [&](size_t part) {
            const size_t first = part * n_ / parts, last = (part + 1) * n_ / parts;
            std::fill(column_sum_.begin() + first, column_sum_.begin() + last, 0.0);
            for (const std::vector<Positive> &block : positive_)
                for (const Positive &p : block)
                    if (p.id - first < last - first) column_sum_[p.id] += p.r;
        });
    }

    // Column sums, the diagonal, the implied column values, and the exemplars. True if some point has changed its mind within
    // the convergence window.
    bool availabilities() {
        const double damping = options_.damping, gain = 1 - damping;
        const size_t chunks = (n_ + 4095) / 4096;
        if (!pairs_) sum_positive();
        std::vector<size_t> count(chunks, 0);
        std::vector<uint8_t> changing(chunks, 0);
        team_.run(chunks, [&](size_t c) {
            for (size_t k = c * 4096; k < std::min(n_, (c + 1) * 4096); ++k) {
                double sum = pairs_ ? 0 : column_sum_[k];
                for (size_t b = 0; pairs_ && b < blocks_; ++b) {
                    sum += partial_[b * n_ + k];
                    partial_[b * n_ + k] = 0;
                }
                a_self_[k] = damping * a_self_[k] + gain * sum;
                column_sum_[k] = sum + r_self_[k];
                column_[k] = damping * column_[k] + gain * std::min(0.0, column_sum_[k]);
                const uint8_t exemplar = a_self_[k] + r_self_[k] > 0;
                unchanged_[k] = exemplar == is_exemplar_[k] ? unchanged_[k] + 1 : 1;
                is_exemplar_[k] = exemplar;
                count[c] += exemplar;
                changing[c] |= unchanged_[k] < options_.convergence_iter;
            }
        });
        exemplar_count_ = std::accumulate(count.begin(), count.end(), size_t{0});
        weight_ = damping * weight_ + gain;
        if (pairs_) prepare_columns();
        return std::find(changing.begin(), changing.end(), 1) != changing.end();
    }

    std::vector<uint32_t> current_exemplars() const {
        std::vector<uint32_t> exemplars;
        for (size_t k = 0; k < n_; ++k)
            if (is_exemplar_[k]) exemplars.push_back(static_cast<uint32_t>(k));
        return exemplars;
    }

    // Each point to its most similar exemplar (equal: the lower), exemplars to themselves.
    Clustering assigned(std::vector<uint32_t> exemplars) const {
        Clustering c;
        c.exemplars = std::move(exemplars);
        c.label.assign(n_, NOBODY);
        std::vector<uint8_t> chosen(n_, 0);
        for (uint32_t e : c.exemplars) chosen[e] = 1;
        Buffer<double> value(memory_, n_, 0.0);
        team_.run((n_ + 255) / 256, [&](size_t block) {
            for (size_t i = block * 256; i < std::min(n_, (block + 1) * 256); ++i) {
                if (chosen[i]) {
                    c.label[i] = static_cast<uint32_t>(i);
                    value[i] = preference_[i];
                    continue;
                }
                const Row row = visible(i);
                size_t j = 0;
                while (j < row.length && !chosen[row.id[j]]) ++j;
                if (j < row.length && row.s[j] >= row.bound) {
                    c.label[i] = row.id[j];
                    value[i] = row.s[j];
                } else if (row.bound > -std::numeric_limits<float>::infinity()) {
                    double best = -std::numeric_limits<double>::infinity(), s;
                    for (uint32_t e : c.exemplars)
                        if (source_.similarity(i, e, &s) && s > best) best = s, c.label[i] = e;
                    value[i] = best;
                }
            }
        });
        for (size_t i = 0; i < n_; ++i) {
            c.net_similarity += value[i];
            c.unassigned += c.label[i] == NOBODY;
        }
        return c;
    }

    // As scikit-learn's last step: each cluster's exemplar becomes the member that serves the cluster best, then all points
    // choose again.
    Clustering refined(const std::vector<uint32_t> &exemplars) const {
        const Clustering first = assigned(exemplars);
        std::vector<std::vector<uint32_t>> members(first.exemplars.size());
        std::vector<uint32_t> position(n_, 0);
        for (size_t c = 0; c < first.exemplars.size(); ++c) position[first.exemplars[c]] = static_cast<uint32_t>(c);
        for (size_t i = 0; i < n_; ++i)
            if (first.label[i] != NOBODY) members[position[first.label[i]]].push_back(static_cast<uint32_t>(i));
        std::vector<uint32_t> better(members.size());
        team_.run(members.size(), [&](size_t c) {
            std::vector<double> scores(members[c].size());
            source_.medoid_scores(members[c].data(), members[c].size(), scores.data());
            double best = -std::numeric_limits<double>::infinity();
            for (size_t j = 0; j < scores.size(); ++j) best = std::max(best, scores[j] += preference_[members[c][j]]);
            // Members that serve equally well differ by rounding only; take the first of them.
            size_t j = 0;
            while (scores[j] < best - 1e-12 * std::fabs(best)) ++j;
            better[c] = members[c][j];
        });
        std::sort(better.begin(), better.end());
        return assigned(better);
    }

    const Source &source_;
    Lists &lists_;
    const eimf_ap_options &options_;
    const ScoreKernels *kernels_;
    Team &team_;
    Memory &memory_;
    const Source::Poll searching_ = [this] { report(0, 0); };
    size_t n_, blocks_ = 0;
    const double *preference_;  // as given
    std::vector<Messages> messages_;
    Buffer<uint32_t> visible_;  // how much of each list this run has asked for
    Buffer<double> p_;                          // preferences with ties decided
    Buffer<double> best_, second_;
    Buffer<size_t> arg_;
    Buffer<double> level_, r_self_, a_self_, column_, column_sum_;
    std::vector<std::vector<Positive>> positive_;  // per block: this iteration's positive responsibilities, row after row
    std::vector<Buffer<double>> packed_;           // per block: most of its messages
    Buffer<uint8_t> is_exemplar_;
    Buffer<uint32_t> unchanged_;
    std::vector<std::vector<uint32_t>> waiting_;  // per block: rows whose list was too short
    double weight_ = 0;
    size_t exemplar_count_ = 0;
    // After use_matrix.
    const Pairs *pairs_ = nullptr;
    Buffer<double> partial_;  // per block: its part of the column sums
    double screen_error_ = 0;
    double highest_ = 0, rest_ = 0;  // no column is worth more, none outside `active_`
    std::vector<Own> own_;
    std::vector<Row> near_;
    std::atomic<size_t> decided_{0}, undecided_{0};  // rows of this iteration, see Scratch
    size_t tried_ = 0;  // so many of `active_` are tried before a whole row is read
    bool cleaning_ = false;      // in this iteration, look for lagging pairs that no longer are
    Buffer<float> screen_, excess_;
    std::vector<uint32_t> active_;
};

// ------------------------------------------------------------------------------------------------------- the C functions

void check_options(const eimf_ap_options &o, size_t n, const double *preference, size_t n_preference) {
    if (!(o.damping >= 0.5 && o.damping < 1)) fail(EIMF_ERROR_ARGUMENT, "damping is %g; expected 0.5 <= damping < 1", o.damping);
    if (o.max_iter == 0 || o.convergence_iter == 0)
        fail(EIMF_ERROR_ARGUMENT, "max_iter is %zu and convergence_iter is %zu; both must be at least 1", o.max_iter, o.convergence_iter);
    if (n == 0) fail(EIMF_ERROR_ARGUMENT, "there are 0 points; expected at least 1");
    if (n >= NOBODY) fail(EIMF_ERROR_ARGUMENT, "there are %zu points; at most %u are supported", n, NOBODY - 1);
    if (n_preference != 1 && n_preference != n)
        fail(EIMF_ERROR_ARGUMENT, "preference has %zu values; expected 1 or one for each of the %zu points", n_preference, n);
    check_pointer(preference, "preference");
    for (size_t i = 0; i < n_preference; ++i)
        if (!(std::fabs(preference[i]) <= 1e38)) fail(EIMF_ERROR_ARGUMENT, "preference[%zu] is %g; expected a finite float32 number", i, preference[i]);
}

const ScoreKernels *kernels_for(const eimf_ap_options &options) {
    const ScoreKernels *kernels = score_kernels(options.kernel);
    if (!kernels) fail(EIMF_ERROR_ARGUMENT, "kernel %d is not available on this CPU", static_cast<int>(options.kernel));
    return kernels;
}

void check_outputs(const int64_t *exemplars, const int64_t *labels, const eimf_ap_result *result) {
    check_pointer(exemplars, "exemplars");
    check_pointer(labels, "labels");
    check_pointer(result, "result");
}

std::vector<double> expand(const double *preference, size_t n_preference, size_t n) {
    return n_preference == 1 ? std::vector<double>(n, preference[0]) : std::vector<double>(preference, preference + n);
}

void write_result(const Clustering &c, const Memory &memory, int64_t *exemplars, int64_t *labels, eimf_ap_result *result) {
    for (size_t e = 0; e < c.exemplars.size(); ++e) exemplars[e] = c.exemplars[e];
    for (size_t i = 0; i < c.label.size(); ++i)
        labels[i] = c.label[i] == NOBODY ? -1 : std::lower_bound(c.exemplars.begin(), c.exemplars.end(), c.label[i]) - c.exemplars.begin();
    result->n_exemplars = c.exemplars.size();
    result->net_similarity = c.net_similarity;
    result->n_unassigned = c.unassigned;
    result->peak_bytes = memory.peak();
}

// Equal points, as one point with a weight.
struct Groups {
    std::vector<uint32_t> of;      // point -> its group
    std::vector<uint32_t> first;   // group -> its lowest point
    std::vector<uint32_t> weight;  // group -> number of points
};

// Points with a positive preference are never merged: each is its own exemplar. `preference` may be nullptr: none is positive.
Groups merge_equal(const float *x, size_t n, size_t d, const double *preference) {
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0u);
    std::vector<uint64_t> hash(n);
    for (size_t i = 0; i < n; ++i) {
        uint64_t h = 0xcbf29ce484222325u;
        for (size_t t = 0; t < d; ++t) {
            const float value = x[i * d + t] + 0.0f;  // -0 equals 0
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            h = (h ^ bits) * 0x9e3779b97f4a7c15u;
            h ^= h >> 29;
        }
        hash[i] = h;
    }
    const auto equal = [&](uint32_t a, uint32_t b) {
        for (size_t t = 0; t < d; ++t)
            if (x[a * d + t] != x[b * d + t]) return false;
        return true;
    };
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return hash[a] != hash[b] ? hash[a] < hash[b] : a < b; });
    std::vector<uint32_t> head(n);  // the first point equal to this one
    for (size_t at = 0; at < n;) {
        size_t end = at;
        while (end < n && hash[order[end]] == hash[order[at]]) ++end;
        std::vector<uint32_t> heads;
        for (; at < end; ++at) {
            const uint32_t i = order[at];
            head[i] = i;
            if (preference && preference[i] > 0) continue;
            const auto same = std::find_if(heads.begin(), heads.end(), [&](uint32_t h) { return equal(h, i); });
            if (same == heads.end()) heads.push_back(i);
            else head[i] = *same;
        }
    }
    Groups groups;
    groups.of.resize(n);
    for (size_t i = 0; i < n; ++i) {
        if (head[i] == i) {
            groups.of[i] = static_cast<uint32_t>(groups.first.size());
            groups.first.push_back(static_cast<uint32_t>(i));
            groups.weight.push_back(1);
        } else {
            ++groups.weight[groups.of[i] = groups.of[head[i]]];
        }
    }
    return groups;
}

void check_points(const float *x, size_t n, size_t d) {
    if (n == 0) fail(EIMF_ERROR_ARGUMENT, "there are 0 points; expected at least 1");
    if (n >= NOBODY) fail(EIMF_ERROR_ARGUMENT, "there are %zu points; at most %u are supported", n, NOBODY - 1);
    if (d == 0) fail(EIMF_ERROR_ARGUMENT, "points have 0 dimensions; expected at least 1");
    check_pointer(x, "x");
    checked_product(checked_product(n, d), sizeof(float));
    const double largest = largest_magnitude(x, n, d, "x");
    if (largest * largest * 4 * static_cast<double>(d) * static_cast<double>(n) > 1e38)
        fail(EIMF_ERROR_ARGUMENT, "squared distances could overflow float32 (largest component %.3g); scale the points down", largest);
}

}  // namespace
}  // namespace eimf

using namespace eimf;

// Points with what runs over them share: which are equal, and the neighbour lists.
struct eimf_points {
    eimf_points(const float *x_, size_t n_, size_t d_, const double *preference, const eimf_ap_options &options)
        : x(x_), n(n_), d(d_), memory(options.allocator, options.memory_limit), groups(merge_equal(x, n, d, preference)),
          source(x, d, groups.first, groups.weight, kernels_for(options), memory), lists(source, memory) {}

    // True if points with these preferences may be merged as they were: equal points share no exemplar if they are all their own.
    bool suits(const std::vector<double> &preference) const {
        return groups.first.size() == n || *std::max_element(preference.begin(), preference.end()) <= 0;
    }

    void run(const std::vector<double> &preference, const eimf_ap_options &options, int64_t *exemplars, int64_t *labels, eimf_ap_result *result) {
        std::vector<uint32_t> representative = groups.first;  // of each group the point with the highest preference (equal: the first)
        for (size_t i = 0; i < n; ++i)
            if (preference[i] > preference[representative[groups.of[i]]]) representative[groups.of[i]] = static_cast<uint32_t>(i);
        std::vector<double> merged;
        for (const uint32_t i : representative) merged.push_back(preference[i]);
        Team team(options.n_threads);
        const Clustering found = Engine(source, lists, merged.data(), options, kernels_for(options), team, memory).run(result);

        Clustering c;
        c.net_similarity = found.net_similarity;
        for (uint32_t e : found.exemplars) c.exemplars.push_back(representative[e]);
        std::sort(c.exemplars.begin(), c.exemplars.end());
        for (size_t i = 0; i < n; ++i) c.label.push_back(representative[found.label[groups.of[i]]]);
        write_result(c, memory, exemplars, labels, result);
    }

    const float *x;
    const size_t n, d;
    Memory memory;
    const Groups groups;
    const Points source;
    Lists lists;
    std::atomic<bool> busy{false};  // one run at a time, as it may grow the lists
};

extern "C" eimf_ap_options eimf_ap_defaults(void) {
    eimf_ap_options options{};
    options.damping = 0.5;
    options.max_iter = 200;
    options.convergence_iter = 15;
    return options;
}

extern "C" size_t eimf_affinity_propagation_bytes(size_t n, size_t d) {
    // Lists and the search for them or, of few points, all similarities, with what Lists::pairs_fit leaves free.
    const double points = static_cast<double>(n), blocks = std::min<double>(32, points / 512 + 1);
    double search = static_cast<double>(search_bytes(std::min(USUAL_LENGTH, n)));
    if (d && points * points <= SMALL_MATRIX / sizeof(float))
        search = std::max(search, static_cast<double>(search_bytes(std::min(FIRST_LENGTH, n))) + points * (sizeof(float) + 1));
    const double bytes = points * (search + 4.0 * static_cast<double>(d) + 8 * blocks + 256) + (4 << 20);
    return bytes < static_cast<double>(std::numeric_limits<size_t>::max()) ? static_cast<size_t>(bytes) : std::numeric_limits<size_t>::max();
}

extern "C" eimf_status eimf_affinity_propagation(const float *x, size_t n, size_t d, const double *preference, size_t n_preference,
                                                 const eimf_ap_options *given, int64_t *exemplars, int64_t *labels,
                                                 eimf_ap_result *result, eimf_error *error) {
    return guarded(error, [&] {
        const eimf_ap_options options = given ? *given : eimf_ap_defaults();
        check_points(x, n, d);
        check_options(options, n, preference, n_preference);
        check_outputs(exemplars, labels, result);
        *result = {};
        const std::vector<double> all = expand(preference, n_preference, n);
        eimf_points(x, n, d, all.data(), options).run(all, options, exemplars, labels, result);
    });
}

extern "C" eimf_status eimf_points_create(const float *x, size_t n, size_t d, const eimf_ap_options *given, eimf_points **points, eimf_error *error) {
    return guarded(error, [&] {
        check_pointer(points, "points");
        *points = nullptr;
        const eimf_ap_options options = given ? *given : eimf_ap_defaults();
        check_points(x, n, d);
        *points = new eimf_points(x, n, d, nullptr, options);
    });
}

extern "C" void eimf_points_destroy(eimf_points *points) { delete points; }

extern "C" eimf_status eimf_points_affinity_propagation(eimf_points *points, const double *preference, size_t n_preference,
                                                        const eimf_ap_options *given, int64_t *exemplars, int64_t *labels,
                                                        eimf_ap_result *result, eimf_error *error) {
    return guarded(error, [&] {
        const eimf_ap_options options = given ? *given : eimf_ap_defaults();
        check_pointer(points, "points");
        check_options(options, points->n, preference, n_preference);
        check_outputs(exemplars, labels, result);
        *result = {};
        const std::vector<double> all = expand(preference, n_preference, points->n);
        if (!points->suits(all)) return eimf_points(points->x, points->n, points->d, all.data(), options).run(all, options, exemplars, labels, result);
        if (points->busy.exchange(true)) fail(EIMF_ERROR_ARGUMENT, "another run over these points is still going on; wait for its end, or create the points twice");
        const std::unique_ptr<std::atomic<bool>, void (*)(std::atomic<bool> *)> release(&points->busy, [](std::atomic<bool> *busy) { *busy = false; });
        points->memory.limit(options.memory_limit);
        points->run(all, options, exemplars, labels, result);
    });
}

extern "C" eimf_status eimf_affinity_propagation_precomputed(const float *s, size_t n, const double *preference, size_t n_preference,
                                                             const eimf_ap_options *given, int64_t *exemplars, int64_t *labels,
                                                             eimf_ap_result *result, eimf_error *error) {
    return guarded(error, [&] {
        const eimf_ap_options options = given ? *given : eimf_ap_defaults();
        check_options(options, n, preference, n_preference);
        check_outputs(exemplars, labels, result);
        checked_product(checked_product(n, n), sizeof(float));
        check_pointer(s, "s");
        const double largest = largest_magnitude(s, n, n, "similarities", false);
        *result = {};
        Memory memory(options.allocator, options.memory_limit);
        const std::vector<double> all = expand(preference, n_preference, n);
        Team team(options.n_threads);
        const Matrix matrix(s, n, largest);
        Lists lists(matrix, memory);
        Engine engine(matrix, lists, all.data(), options, kernels_for(options), team, memory);
        write_result(engine.run(result), memory, exemplars, labels, result);
    });
}

extern "C" eimf_status eimf_affinity_propagation_sparse(const int64_t *indptr, const int64_t *indices, const float *similarity,
                                                        size_t n, const double *preference, size_t n_preference,
                                                        const eimf_ap_options *given, int64_t *exemplars, int64_t *labels,
                                                        eimf_ap_result *result, eimf_error *error) {
    return guarded(error, [&] {
        const eimf_ap_options options = given ? *given : eimf_ap_defaults();
        check_options(options, n, preference, n_preference);
        check_outputs(exemplars, labels, result);
        if (!indptr || indptr[0] != 0) fail(EIMF_ERROR_ARGUMENT, "indptr must begin with 0");
        for (size_t i = 0; i < n; ++i)
            if (indptr[i + 1] < indptr[i])
                fail(EIMF_ERROR_ARGUMENT, "indptr falls from %lld to %lld at row %zu; it must not fall", static_cast<long long>(indptr[i]),
                     static_cast<long long>(indptr[i + 1]), i);
        if (indptr[n] > 0 && (!indices || !similarity)) fail(EIMF_ERROR_ARGUMENT, "indptr names %lld edges, but none are given", static_cast<long long>(indptr[n]));
        std::vector<size_t> seen(n, 0);
        for (size_t i = 0; i < n; ++i)
            for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e) {
                if (indices[e] < 0 || static_cast<uint64_t>(indices[e]) >= n)
                    fail(EIMF_ERROR_ARGUMENT, "indices[%lld] is %lld; expected a point from 0 to %zu", static_cast<long long>(e),
                         static_cast<long long>(indices[e]), n - 1);
                if (seen[indices[e]] == i + 1)
                    fail(EIMF_ERROR_ARGUMENT, "row %zu names point %lld twice; expected each neighbour once", i, static_cast<long long>(indices[e]));
                seen[indices[e]] = i + 1;
            }
        largest_magnitude(similarity, 1, static_cast<size_t>(indptr[n]), "similarity");
        *result = {};
        Memory memory(options.allocator, options.memory_limit);
        const std::vector<double> all = expand(preference, n_preference, n);
        Team team(options.n_threads);
        const Graph graph(indptr, indices, similarity, n);
        Lists lists(graph, memory);
        Engine engine(graph, lists, all.data(), options, kernels_for(options), team, memory);
        write_result(engine.run(result), memory, exemplars, labels, result);
    });
}
