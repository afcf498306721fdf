// Affinity propagation on nine points around three centres.
#include <eimf.h>

#include <cstdio>
#include <vector>

int main() {
    const std::vector<float> points = {0, 0, 1, 0, 0, 1, 10, 10, 11, 10, 10, 11, 20, 0, 21, 0, 20, 1};  // (9, 2)
    const std::size_t n = points.size() / 2;
    const double preference = -20;
    std::vector<int64_t> exemplars(n), labels(n);
    eimf_ap_options options = eimf_ap_defaults();
    options.damping = 0.7;
    eimf_ap_result result;
    eimf_error error;
    if (eimf_affinity_propagation(points.data(), n, 2, &preference, 1, &options, exemplars.data(), labels.data(), &result, &error) != EIMF_OK) {
        std::fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    std::printf("%zu clusters, %s, net similarity %.1f\n", result.n_exemplars, result.converged ? "converged" : "not converged",
                result.net_similarity);
    for (std::size_t i = 0; i < n; ++i) std::printf("point %zu -> exemplar %d\n", i, static_cast<int>(exemplars[labels[i]]));
    return 0;
}
