// Exercises the whole C API; built and run under sanitizers by test_core_native.py. Exits 1 at the first wrong answer.
// `check quick` takes smaller sizes, for emulators; `check halves` is so many points that their similarities are kept by halves.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "eimf.h"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1); \
        } \
    } while (0)

namespace {

std::vector<float> normal(size_t size, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> draw;
    std::vector<float> values(size);
    for (float &value : values) value = draw(generator);
    return values;
}

// Points around `centres` centres in d dimensions.
std::vector<float> blobs(size_t n, size_t d, size_t centres, unsigned seed) {
    const std::vector<float> centre = normal(centres * d, seed), noise = normal(n * d, seed + 1);
    std::vector<float> x(n * d);
    for (size_t i = 0; i < n; ++i)
        for (size_t t = 0; t < d; ++t) x[i * d + t] = 5 * centre[(i * 7919 % centres) * d + t] + noise[i * d + t];
    return x;
}

struct TopN {
    std::vector<int64_t> ids;
    std::vector<float> scores;
    std::vector<int32_t> interest;
    bool operator==(const TopN &o) const {
        return ids == o.ids && interest == o.interest && std::memcmp(scores.data(), o.scores.data(), scores.size() * 4) == 0;
    }
};

TopN top_n(bool reference, size_t users, size_t k, size_t d, size_t n_items, size_t n, const eimf_top_n_options &options) {
    const std::vector<float> interests = normal(users * k * d, 1), items = normal(n_items * d, 2);
    TopN out{std::vector<int64_t>(users * n), std::vector<float>(users * n), std::vector<int32_t>(users * n)};
    eimf_error error;
    const eimf_status status = (reference ? eimf_top_n_reference : eimf_top_n)(interests.data(), users, k, d, items.data(), n_items, n, &options,
                                                                               out.ids.data(), out.scores.data(), out.interest.data(), &error);
    CHECK(status == EIMF_OK && error.message[0] == 0);
    return out;
}

void check_top_n(bool quick) {
    for (const size_t d : quick ? std::vector<size_t>{1, 9, 18} : std::vector<size_t>{1, 7, 8, 9, 16, 65})
        for (const size_t k : {1, 3, 4, 17})
            for (const size_t n_items : quick ? std::vector<size_t>{49, 330} : std::vector<size_t>{1, 47, 49, 500})
                for (const int kernel : {EIMF_KERNEL_AUTO, EIMF_KERNEL_SCALAR, EIMF_KERNEL_AVX2, EIMF_KERNEL_AVX512, EIMF_KERNEL_NEON, EIMF_KERNEL_AVX512_VNNI, EIMF_KERNEL_AVX2_INT8}) {
                    if (!eimf_kernel_name(static_cast<eimf_kernel>(kernel))) continue;
                    std::vector<int64_t> start, excluded;
                    std::vector<uint8_t> allowed(n_items, 1);
                    for (size_t u = 0; u <= 20; ++u) start.push_back(static_cast<int64_t>(u * 3));
                    for (size_t e = 0; e < 60; ++e) excluded.push_back(static_cast<int64_t>(e * 31 % n_items));
                    for (size_t i = 0; i < n_items; i += 5) allowed[i] = 0;
                    eimf_top_n_options options = eimf_top_n_defaults();
                    options.kernel = static_cast<eimf_kernel>(kernel);
                    options.exclude_indptr = start.data();
                    options.exclude_indices = excluded.data();
                    options.allowed = allowed.data();
                    const TopN expected = top_n(true, 20, k, d, n_items, 20, options);
                    for (const size_t threads : {1, 2, 7}) {
                        options.n_threads = threads;
                        CHECK(top_n(false, 20, k, d, n_items, 20, options) == expected);
                    }
                }
}

struct Clusters {
    std::vector<int64_t> exemplars, labels;
    eimf_ap_result result{};
    eimf_status status = EIMF_OK;
    eimf_error error{};
};

Clusters cluster(const std::vector<float> &x, size_t n, double preference, const eimf_ap_options &options) {
    Clusters c;
    c.exemplars.resize(n);
    c.labels.resize(n);
    c.status = eimf_affinity_propagation(x.data(), n, x.size() / n, &preference, 1, &options, c.exemplars.data(), c.labels.data(), &c.result, &c.error);
    c.exemplars.resize(c.result.n_exemplars);
    return c;
}

void check_affinity_propagation(size_t points) {
    const std::vector<float> x = blobs(points, 6, 12, 3);
    for (const double preference : {-20.0, -300.0, -20000.0}) {  // short lists; the matrix of similarities; one cluster
        eimf_ap_options options = eimf_ap_defaults();
        options.damping = 0.8;
        options.max_iter = 400;
        options.n_threads = 1;
        const Clusters one = cluster(x, points, preference, options);
        CHECK(one.status == EIMF_OK && one.result.converged && one.result.n_exemplars >= 1);
        for (const size_t threads : {2, 7}) {
            options.n_threads = threads;
            const Clusters many = cluster(x, points, preference, options);
            CHECK(many.labels == one.labels && many.exemplars == one.exemplars && many.result.net_similarity == one.result.net_similarity);
        }
        for (size_t k = 0; k < one.exemplars.size(); ++k) CHECK(one.labels[one.exemplars[k]] == static_cast<int64_t>(k));
    }

    const size_t n = 80;
    std::vector<float> s = normal(n * n, 5);
    for (float &value : s) value = -value * value;
    const double preference = -1.5;
    eimf_ap_options options = eimf_ap_defaults();
    options.damping = 0.8;
    options.max_iter = 1000;
    std::vector<int64_t> exemplars(n), labels(n), expected_exemplars(n), expected(n), indptr(n + 1), indices(n * n);
    eimf_ap_result result, expected_result;
    CHECK(eimf_affinity_propagation_reference(s.data(), n, &preference, 1, &options, expected_exemplars.data(), expected.data(), &expected_result, nullptr) == EIMF_OK);
    CHECK(eimf_affinity_propagation_precomputed(s.data(), n, &preference, 1, &options, exemplars.data(), labels.data(), &result, nullptr) == EIMF_OK);
    CHECK(expected_result.converged && result.n_iter == expected_result.n_iter && labels == expected);
    for (size_t i = 0; i <= n; ++i) indptr[i] = static_cast<int64_t>(i * n);
    for (size_t e = 0; e < n * n; ++e) indices[e] = static_cast<int64_t>(e % n);
    CHECK(eimf_affinity_propagation_sparse(indptr.data(), indices.data(), s.data(), n, &preference, 1, &options, exemplars.data(), labels.data(), &result, nullptr) == EIMF_OK);
    CHECK(labels == expected);
}

void check_halves() {
    const size_t n = 5800;
    const std::vector<float> x = blobs(n, 6, 60, 17);
    eimf_ap_options options = eimf_ap_defaults();
    options.max_iter = 6;
    options.n_threads = 1;
    const Clusters one = cluster(x, n, -600.0, options);
    CHECK(one.status == EIMF_OK && one.result.peak_bytes > n * n * 2 && one.result.peak_bytes < n * n * 3);
    options.n_threads = 3;
    const Clusters many = cluster(x, n, -600.0, options);
    CHECK(many.labels == one.labels && many.exemplars == one.exemplars && many.result.net_similarity == one.result.net_similarity);
}

// An allocator that fails from the `left`-th allocation on, and counts what is held.
struct Failing {
    std::atomic<long> left;
    std::atomic<long> held{0};
    static void *allocate(void *context, size_t bytes) {
        Failing *self = static_cast<Failing *>(context);
        if (self->left.fetch_sub(1) <= 0) return nullptr;
        ++self->held;
        return std::malloc(bytes);
    }
    static void release(void *context, void *memory, size_t) {
        --static_cast<Failing *>(context)->held;
        std::free(memory);
    }
};

void check_allocation_failures(size_t points) {
    const std::vector<float> x = blobs(points, 3, 2, 7), interests = normal(70 * 4 * 5, 1), items = normal(300 * 5, 2);
    std::vector<int64_t> ids(70 * 10);
    std::vector<float> scores(70 * 10);
    std::vector<int32_t> interest(70 * 10);
    size_t failures = 0;
    for (long allowed = 0;; allowed = allowed < 30 ? allowed + 1 : allowed * 5 / 4) {
        Failing failing{{allowed}};
        eimf_ap_options options = eimf_ap_defaults();
        options.damping = 0.8;
        options.n_threads = 3;
        options.allocator = {Failing::allocate, Failing::release, &failing};
        const Clusters c = cluster(x, points, -5000, options);
        CHECK(failing.held == 0);
        Failing other{{allowed}};
        eimf_top_n_options top = eimf_top_n_defaults();
        top.n_threads = 3;
        top.allocator = {Failing::allocate, Failing::release, &other};
        const eimf_status status = eimf_top_n(interests.data(), 70, 4, 5, items.data(), 300, 10, &top, ids.data(), scores.data(), interest.data(), nullptr);
        CHECK(other.held == 0);
        CHECK(status == EIMF_OK || status == EIMF_ERROR_MEMORY);
        if (c.status == EIMF_OK && status == EIMF_OK) break;
        CHECK(c.status == EIMF_OK || (c.status == EIMF_ERROR_MEMORY && std::strstr(c.error.message, "could not allocate")));
        ++failures;
    }
    CHECK(failures > 10);
}

void check_interrupt_and_errors() {
    const std::vector<float> x = blobs(300, 3, 5, 9);
    eimf_ap_options options = eimf_ap_defaults();
    options.progress = [](void *, size_t iteration, size_t) { return iteration == 4 ? 1 : 0; };
    CHECK(cluster(x, 300, -50, options).status == EIMF_ERROR_INTERRUPTED);

    // At many a call: in the first search for neighbours, in the one for all similarities, in iterations. Points can then be used as if new.
    const std::vector<float> many = blobs(400, 3, 5, 9);
    struct Calls {
        long left;
        long searching = 0;
        static int progress(void *context, size_t iteration, size_t) {
            Calls *self = static_cast<Calls *>(context);
            self->searching += iteration == 0;
            return self->left-- == 0;
        }
    };
    for (const double preference : {-30.0, -2000.0}) {
        options = eimf_ap_defaults();
        options.max_iter = 20;
        const Clusters expected = cluster(many, 400, preference, options);
        for (long at = 0;; ++at) {
            Failing allocations{{1L << 40}};
            Calls calls{at};
            options = eimf_ap_defaults();
            options.max_iter = 20;
            options.n_threads = 2;
            options.allocator = {Failing::allocate, Failing::release, &allocations};
            eimf_points *points = nullptr;
            CHECK(eimf_points_create(many.data(), 400, 3, &options, &points, nullptr) == EIMF_OK);
            const long held = allocations.held;
            options.progress = Calls::progress;
            options.progress_context = &calls;
            const Clusters c = cluster(many, 400, preference, options);
            CHECK(allocations.held == held);
            CHECK(c.status == (calls.left < 0 ? EIMF_ERROR_INTERRUPTED : EIMF_OK));
            calls = {at};
            std::vector<int64_t> exemplars(400), labels(400);
            eimf_ap_result result;
            const eimf_status status = eimf_points_affinity_propagation(points, &preference, 1, &options, exemplars.data(), labels.data(), &result, nullptr);
            CHECK(status == c.status);
            if (status == EIMF_OK) CHECK(calls.searching >= 2 + 3);  // 400 points are searched in three parts
            options.progress = nullptr;
            CHECK(eimf_points_affinity_propagation(points, &preference, 1, &options, exemplars.data(), labels.data(), &result, nullptr) == EIMF_OK);
            CHECK(labels == expected.labels && result.net_similarity == expected.result.net_similarity);
            eimf_points_destroy(points);
            CHECK(allocations.held == 0);
            if (status == EIMF_OK) break;
            if (at > 8) at += 6;
        }
    }
    options = eimf_ap_defaults();
    options.damping = 2;
    CHECK(cluster(x, 300, -50, options).status == EIMF_ERROR_ARGUMENT);
    CHECK(std::strcmp(eimf_status_text(EIMF_ERROR_MEMORY), "not enough memory") == 0);
    CHECK(std::strcmp(eimf_status_text(static_cast<eimf_status>(99)), "unknown status") == 0);
    for (const int number : {99, 7, -1}) {  // no kernels, which may be read all the same
        const eimf_kernel kernel = static_cast<eimf_kernel>(number);
        CHECK(!eimf_kernel_name(kernel));
        options = eimf_ap_defaults();
        options.kernel = kernel;
        CHECK(cluster(x, 300, -50, options).status == EIMF_ERROR_ARGUMENT);
        eimf_top_n_options top = eimf_top_n_defaults();
        top.kernel = kernel;
        int64_t id = 0;
        float score, gradient;
        int32_t interest;
        CHECK(eimf_top_n(x.data(), 1, 1, 1, x.data(), 3, 1, &top, &id, &score, &interest, nullptr) == EIMF_ERROR_ARGUMENT);
        eimf_items *items = nullptr;
        CHECK(eimf_items_create(x.data(), 3, 1, kernel, nullptr, &items, nullptr) == EIMF_ERROR_ARGUMENT && !items);
        CHECK(eimf_softmax_loss(x.data(), 1, x.data(), 3, 1, &id, x.data(), nullptr, 0, 1, kernel, nullptr, &score, &gradient, nullptr, nullptr) == EIMF_ERROR_ARGUMENT);
    }
    CHECK(eimf_top_n(nullptr, 2, 1, 1, x.data(), 1, 1, nullptr, nullptr, nullptr, nullptr, nullptr) == EIMF_ERROR_ARGUMENT);
}

// Each pointer that must be there is missing once; empty arrays may be NULL.
void check_null_pointers() {
    const float x[8] = {0, 1, 2, 3, 5, 6, 7, 9};
    const double p = -1;
    const int64_t indptr[3] = {0, 1, 2}, indices[2] = {1, 0}, target[1] = {0};
    const int32_t category[8] = {};
    int64_t a[8] = {}, b[8];
    float f[8] = {}, g[8];
    int32_t w[8];
    eimf_ap_result r;
    eimf_error e;
    const auto refused = [&e](eimf_status status, const char *name) { return status == EIMF_ERROR_ARGUMENT && std::string(e.message) == std::string(name) + " is NULL; expected a pointer"; };
    CHECK(refused(eimf_affinity_propagation(nullptr, 8, 1, &p, 1, nullptr, a, b, &r, &e), "x"));
    for (int missing = 0; missing < 4; ++missing) {
        const char *const name = std::vector<const char *>{"preference", "exemplars", "labels", "result"}[static_cast<size_t>(missing)];
        const double *const preference = missing == 0 ? nullptr : &p;
        int64_t *const exemplars = missing == 1 ? nullptr : a, *const labels = missing == 2 ? nullptr : b;
        eimf_ap_result *const result = missing == 3 ? nullptr : &r;
        eimf_points *points = nullptr;
        CHECK(eimf_points_create(x, 8, 1, nullptr, &points, &e) == EIMF_OK);
        CHECK(refused(eimf_affinity_propagation(x, 8, 1, preference, 1, nullptr, exemplars, labels, result, &e), name));
        CHECK(refused(eimf_points_affinity_propagation(points, preference, 1, nullptr, exemplars, labels, result, &e), name));
        CHECK(refused(eimf_affinity_propagation_precomputed(x, 2, preference, 1, nullptr, exemplars, labels, result, &e), name));
        CHECK(refused(eimf_affinity_propagation_sparse(indptr, indices, x, 2, preference, 1, nullptr, exemplars, labels, result, &e), name));
        CHECK(refused(eimf_affinity_propagation_reference(x, 2, preference, 1, nullptr, exemplars, labels, result, &e), name));
        eimf_points_destroy(points);
    }
    CHECK(refused(eimf_points_create(x, 8, 1, nullptr, nullptr, &e), "points"));
    CHECK(refused(eimf_points_affinity_propagation(nullptr, &p, 1, nullptr, a, b, &r, &e), "points"));
    CHECK(refused(eimf_affinity_propagation_precomputed(nullptr, 2, &p, 1, nullptr, a, b, &r, &e), "s"));
    CHECK(refused(eimf_affinity_propagation_reference(nullptr, 2, &p, 1, nullptr, a, b, &r, &e), "s"));
    CHECK(eimf_affinity_propagation_sparse(nullptr, indices, x, 2, &p, 1, nullptr, a, b, &r, &e) == EIMF_ERROR_ARGUMENT);
    CHECK(eimf_affinity_propagation_sparse(indptr, nullptr, x, 2, &p, 1, nullptr, a, b, &r, &e) == EIMF_ERROR_ARGUMENT);
    CHECK(eimf_affinity_propagation_sparse(indptr, indices, nullptr, 2, &p, 1, nullptr, a, b, &r, &e) == EIMF_ERROR_ARGUMENT);
    const int64_t no_edges[3] = {};
    CHECK(eimf_affinity_propagation_sparse(no_edges, nullptr, nullptr, 2, &p, 1, nullptr, a, b, &r, &e) == EIMF_OK);
    eimf_ap_options options = eimf_ap_defaults();
    options.allocator.release = [](void *, void *, size_t) {};
    CHECK(eimf_affinity_propagation(x, 8, 1, &p, 1, &options, a, b, &r, &e) == EIMF_ERROR_ARGUMENT);

    eimf_items *items = nullptr;
    CHECK(eimf_items_create(x, 8, 1, EIMF_KERNEL_AUTO, nullptr, &items, &e) == EIMF_OK);
    CHECK(refused(eimf_items_create(x, 8, 1, EIMF_KERNEL_AUTO, nullptr, nullptr, &e), "prepared"));
    CHECK(refused(eimf_items_top_n(nullptr, x, 1, 1, 2, nullptr, a, f, w, &e), "prepared"));
    CHECK(refused(eimf_items_top_n(items, nullptr, 1, 1, 2, nullptr, a, f, w, &e), "interests"));
    CHECK(refused(eimf_items_top_n(items, x, 1, 1, 2, nullptr, a, nullptr, w, &e), "scores"));
    eimf_items_destroy(items);
    for (const auto top_n : {eimf_top_n, eimf_top_n_reference}) {
        CHECK(refused(top_n(nullptr, 1, 1, 1, x, 8, 2, nullptr, a, f, w, &e), "interests"));
        CHECK(refused(top_n(x, 1, 1, 1, nullptr, 8, 2, nullptr, a, f, w, &e), "items"));
        CHECK(refused(top_n(x, 1, 1, 1, x, 8, 2, nullptr, nullptr, f, w, &e), "ids"));
        CHECK(refused(top_n(x, 1, 1, 1, x, 8, 2, nullptr, a, nullptr, w, &e), "scores"));
        CHECK(refused(top_n(x, 1, 1, 1, x, 8, 2, nullptr, a, f, nullptr, &e), "interest"));
        CHECK(top_n(nullptr, 0, 1, 1, x, 8, 2, nullptr, nullptr, nullptr, nullptr, &e) == EIMF_OK);
        CHECK(top_n(x, 1, 1, 1, x, 8, 0, nullptr, nullptr, nullptr, nullptr, &e) == EIMF_OK);
        CHECK(top_n(x, 1, 1, 1, nullptr, 0, 2, nullptr, a, f, w, &e) == EIMF_OK);
    }

    CHECK(refused(eimf_diversify(nullptr, f, 1, 2, category, 8, 1, 1, 1, b, g, &e), "ids"));
    CHECK(refused(eimf_diversify(a, nullptr, 1, 2, category, 8, 1, 1, 1, b, g, &e), "scores"));
    CHECK(refused(eimf_diversify(a, f, 1, 2, nullptr, 8, 1, 1, 1, b, g, &e), "category"));
    CHECK(refused(eimf_diversify(a, f, 1, 2, category, 8, 1, 1, 1, nullptr, g, &e), "chosen_ids"));
    CHECK(refused(eimf_diversify(a, f, 1, 2, category, 8, 1, 1, 1, b, nullptr, &e), "chosen_scores"));
    CHECK(eimf_diversify(nullptr, nullptr, 0, 2, nullptr, 0, 1, 1, 1, nullptr, nullptr, &e) == EIMF_OK);

    const auto softmax = [&](const float *queries, const float *table, const int64_t *of, const float *weight, size_t n_excluded, float *losses, float *gradient) {
        return eimf_softmax_loss(queries, 1, table, 8, 1, of, weight, nullptr, n_excluded, 1, EIMF_KERNEL_AUTO, nullptr, losses, gradient, nullptr, &e);
    };
    CHECK(softmax(x, x, target, x, 0, f, g) == EIMF_OK);
    CHECK(refused(softmax(nullptr, x, target, x, 0, f, g), "queries"));
    CHECK(refused(softmax(x, nullptr, target, x, 0, f, g), "items"));
    CHECK(refused(softmax(x, x, nullptr, x, 0, f, g), "target"));
    CHECK(refused(softmax(x, x, target, nullptr, 0, f, g), "weight"));
    CHECK(refused(softmax(x, x, target, x, 3, f, g), "excluded"));
    CHECK(refused(softmax(x, x, target, x, 0, nullptr, g), "losses"));
    CHECK(refused(softmax(x, x, target, x, 0, f, nullptr), "query_gradient"));
}

void check_concurrent_calls() {
    const std::vector<float> x = blobs(300, 3, 5, 9);
    eimf_ap_options options = eimf_ap_defaults();
    options.n_threads = 2;
    const Clusters expected = cluster(x, 300, -50, options);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) threads.emplace_back([&] { CHECK(cluster(x, 300, -50, options).labels == expected.labels); });
    for (std::thread &thread : threads) thread.join();
}

void check_prepared() {
    const std::vector<float> x = blobs(600, 5, 12, 3), queries = normal(20 * 4 * 25, 4);
    eimf_ap_options options = eimf_ap_defaults();
    options.n_threads = 2;
    eimf_points *points = nullptr;
    CHECK(eimf_points_create(x.data(), 600, 5, &options, &points, nullptr) == EIMF_OK);
    for (const double preference : {-20.0, -5000.0, -100.0}) {
        std::vector<int64_t> exemplars(600), labels(600);
        eimf_ap_result result;
        CHECK(eimf_points_affinity_propagation(points, &preference, 1, &options, exemplars.data(), labels.data(), &result, nullptr) == EIMF_OK);
        CHECK(labels == cluster(x, 600, preference, options).labels);
    }
    eimf_points_destroy(points);
    eimf_points_destroy(nullptr);
    CHECK(eimf_points_affinity_propagation(nullptr, nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr) == EIMF_ERROR_ARGUMENT);

    eimf_items *items = nullptr;
    CHECK(eimf_items_create(x.data(), 120, 25, EIMF_KERNEL_AUTO, nullptr, &items, nullptr) == EIMF_OK);
    TopN a{std::vector<int64_t>(140), std::vector<float>(140), std::vector<int32_t>(140)}, b = a;
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
        threads.emplace_back([&, t] {
            TopN own = a;
            CHECK(eimf_items_top_n(items, queries.data(), 20, 4, 7, nullptr, own.ids.data(), own.scores.data(), own.interest.data(), nullptr) == EIMF_OK);
            if (t == 0) b = own;
        });
    for (std::thread &thread : threads) thread.join();
    CHECK(eimf_top_n(queries.data(), 20, 4, 25, x.data(), 120, 7, nullptr, a.ids.data(), a.scores.data(), a.interest.data(), nullptr) == EIMF_OK);
    CHECK(a == b);
    eimf_items_destroy(items);
    eimf_items_destroy(nullptr);
    CHECK(eimf_items_top_n(nullptr, queries.data(), 20, 4, 10, nullptr, nullptr, nullptr, nullptr, nullptr) == EIMF_ERROR_ARGUMENT);

    size_t failures = 0;
    for (long allowed = 0;; ++allowed) {
        Failing failing{{allowed}};
        options.allocator = {Failing::allocate, Failing::release, &failing};
        eimf_status status = eimf_points_create(x.data(), 60, 5, &options, &points, nullptr);
        CHECK((status == EIMF_OK) == (points != nullptr));
        const double preference = -50;
        std::vector<int64_t> exemplars(60), labels(60);
        eimf_ap_result result;
        if (points) status = eimf_points_affinity_propagation(points, &preference, 1, &options, exemplars.data(), labels.data(), &result, nullptr);
        eimf_points_destroy(points);
        CHECK(failing.held == 0);
        CHECK(status == EIMF_OK || status == EIMF_ERROR_MEMORY);
        Failing other{{allowed}};
        const eimf_allocator allocator{Failing::allocate, Failing::release, &other};
        const eimf_status created = eimf_items_create(x.data(), 120, 25, EIMF_KERNEL_AUTO, &allocator, &items, nullptr);
        CHECK(created == (items ? EIMF_OK : EIMF_ERROR_MEMORY));
        CHECK(allowed || !items);
        eimf_items_destroy(items);
        CHECK(other.held == 0);
        if (status == EIMF_OK) break;
        ++failures;
    }
    CHECK(failures > 10);
}

void check_diversify() {
    const int64_t ids[] = {0, 1, 2, -1};
    const float scores[] = {3, 2, 1, 0};
    const int32_t category[] = {7, 7, 8};
    int64_t chosen[4];
    float chosen_scores[4];
    CHECK(eimf_diversify(ids, scores, 1, 4, category, 3, 4, 5.0f, 2, chosen, chosen_scores, nullptr) == EIMF_OK);
    CHECK(chosen[0] == 0 && chosen[1] == 2 && chosen[2] == 1 && chosen[3] == -1);
}

void check_softmax() {
    const size_t users = 37, items = 700, d = 19;
    const std::vector<float> queries = normal(users * d, 5), table = normal(items * d, 6), weight(users, 0.5f);
    std::vector<int64_t> target(users);
    for (size_t u = 0; u < users; ++u) target[u] = static_cast<int64_t>(1 + u * 17 % (items - 1));
    const int64_t excluded[] = {0, 3};
    std::vector<float> first;
    for (const size_t threads : {1, 2, 7}) {
        std::vector<float> out(users + users * d + items * d);
        CHECK(eimf_softmax_loss(queries.data(), users, table.data(), items, d, target.data(), weight.data(), excluded, 2, threads, EIMF_KERNEL_AUTO, nullptr,
                                out.data(), out.data() + users, out.data() + users + users * d, nullptr) == EIMF_OK);
        if (first.empty()) first = out;
        CHECK(out == first);
    }
    for (long allowed = 0;; ++allowed) {
        Failing failing{{allowed}};
        const eimf_allocator allocator{Failing::allocate, Failing::release, &failing};
        std::vector<float> losses(users), gradient(users * d);
        const eimf_status status = eimf_softmax_loss(queries.data(), users, table.data(), items, d, target.data(), weight.data(), excluded, 2, 2,
                                                     EIMF_KERNEL_AUTO, &allocator, losses.data(), gradient.data(), nullptr, nullptr);
        CHECK(failing.held == 0);
        CHECK(status == (allowed < 6 ? EIMF_ERROR_MEMORY : EIMF_OK));
        if (status == EIMF_OK) break;
    }
}

}  // namespace

int main(int argc, char **argv) {
    const std::string size = argc > 1 ? argv[1] : "";
    if (size == "halves") {
        check_halves();
    } else {
        const bool quick = size == "quick";
        check_top_n(quick);
        check_affinity_propagation(quick ? 300 : 1500);
        check_allocation_failures(quick ? 60 : 400);
        check_interrupt_and_errors();
        check_null_pointers();
        check_concurrent_calls();
        check_prepared();
        check_diversify();
        check_softmax();
    }
    std::puts("all checks passed");
    return 0;
}
