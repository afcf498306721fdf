// Affinity propagation by the textbook: every message explicit, three n x n arrays. For tests and for readers.
#include <algorithm>
#include <cmath>

#include "common.hpp"

using namespace eimf;

extern "C" eimf_status eimf_affinity_propagation_reference(const float *s, size_t n, const double *preference, size_t n_preference,
                                                           const eimf_ap_options *given, int64_t *exemplars, int64_t *labels,
                                                           eimf_ap_result *result, eimf_error *error) {
    return guarded(error, [&] {
        const eimf_ap_options options = given ? *given : eimf_ap_defaults();
        if (n == 0 || (n_preference != 1 && n_preference != n)) fail(EIMF_ERROR_ARGUMENT, "expected n >= 1 and 1 or n preferences");
        check_pointer(s, "s");
        check_pointer(preference, "preference");
        check_pointer(exemplars, "exemplars");
        check_pointer(labels, "labels");
        check_pointer(result, "result");
        *result = {};
        const double damping = options.damping, gain = 1 - damping;
        std::vector<double> S(s, s + checked_product(n, n)), R(n * n, 0.0), A(n * n, 0.0), p(n);
        for (size_t i = 0; i < n; ++i) S[i * n + i] = p[i] = preference[n_preference == 1 ? 0 : i];

        std::vector<uint8_t> is_exemplar(n, 0);
        std::vector<size_t> unchanged(n, 0);
        for (size_t iteration = 0; iteration < options.max_iter && !result->converged; ++iteration) {
            for (size_t i = 0; i < n; ++i)
                for (size_t k = 0; k < n; ++k) {
                    double others = -std::numeric_limits<double>::infinity();
                    for (size_t j = 0; j < n; ++j)
                        if (j != k) others = std::max(others, A[i * n + j] + S[i * n + j]);
                    R[i * n + k] = damping * R[i * n + k] + gain * (S[i * n + k] - std::max(others, -1e300));
                }
            size_t count = 0;
            bool stable = true;
            for (size_t k = 0; k < n; ++k) {
                double sum = 0;
                for (size_t i = 0; i < n; ++i)
                    if (i != k) sum += std::max(0.0, R[i * n + k]);
                for (size_t i = 0; i < n; ++i) {
                    const double update = i == k ? sum : std::min(0.0, R[k * n + k] + sum - std::max(0.0, R[i * n + k]));
                    A[i * n + k] = damping * A[i * n + k] + gain * update;
                }
                const uint8_t now = A[k * n + k] + R[k * n + k] > 0;
                unchanged[k] = now == is_exemplar[k] ? unchanged[k] + 1 : 1;
                is_exemplar[k] = now;
                count += now;
                stable &= unchanged[k] >= options.convergence_iter;
            }
            result->n_iter = iteration + 1;
            result->converged = iteration >= options.convergence_iter && stable && count > 0;
        }

        std::vector<size_t> chosen;
        for (size_t k = 0; k < n; ++k)
            if (is_exemplar[k]) chosen.push_back(k);
        std::vector<size_t> label(n, 0);
        const auto assign = [&] {
            for (size_t i = 0; i < n; ++i) {
                label[i] = 0;
                for (size_t c = 1; c < chosen.size(); ++c)
                    if (S[i * n + chosen[c]] > S[i * n + chosen[label[i]]]) label[i] = c;
            }
            for (size_t c = 0; c < chosen.size(); ++c) label[chosen[c]] = c;
        };
        if (!chosen.empty()) {
            assign();
            for (size_t c = 0; c < chosen.size(); ++c) {
                double best = -std::numeric_limits<double>::infinity();
                for (size_t j = 0; j < n; ++j) {
                    if (label[j] != c) continue;
                    double sum = 0;
                    for (size_t i = 0; i < n; ++i)
                        if (label[i] == c) sum += S[i * n + j];
                    if (sum > best + 1e-12 * std::fabs(best)) best = sum, chosen[c] = j;
                }
            }
            std::sort(chosen.begin(), chosen.end());
            assign();
        }
        for (size_t i = 0; i < n; ++i) {
            labels[i] = chosen.empty() ? -1 : static_cast<int64_t>(label[i]);
            if (!chosen.empty()) result->net_similarity += S[i * n + chosen[label[i]]];
        }
        for (size_t c = 0; c < chosen.size(); ++c) exemplars[c] = static_cast<int64_t>(chosen[c]);
        result->n_exemplars = chosen.size();
        result->n_unassigned = chosen.empty() ? n : 0;
    });
}
