// Speed of the core against what this CPU can do: cmake -S csrc -B build -DEIMF_BENCH=ON && cmake --build build && build/eimf_bench
// One thread. Scoring as a share of the measured peak of fused multiply-adds; affinity propagation as seconds per iteration. All
// times are the process's CPU time, so other work on the machine disturbs little. With --peaks only the peaks, as JSON.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

#include "../score_kernels.hpp"
#include "eimf.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

double now() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

std::vector<float> normal(size_t size, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> draw;
    std::vector<float> values(size);
    for (float &value : values) value = draw(generator);
    return values;
}

// 24 independent sums, as many as the scoring kernel keeps in registers, and nothing else. Returns the multiply-adds done.
#define FMA_LOOP(name, target, Vector, lanes, spread, multiply_add)                       \
    target double name(size_t repeats) {                                                  \
        Vector sum[24];                                                                   \
        for (int i = 0; i < 24; ++i) sum[i] = spread(static_cast<float>(i));              \
        Vector a = spread(0.999f), b = spread(0.001f);                                    \
        for (size_t r = 0; r < repeats; ++r) {                                            \
            _Pragma("GCC unroll 24") for (int i = 0; i < 24; ++i) sum[i] = multiply_add(sum[i], a, b); \
        }                                                                                 \
        volatile Vector keep;                                                             \
        for (int i = 0; i < 24; ++i) keep = sum[i];                                       \
        (void)keep;                                                                       \
        return 24.0 * lanes * static_cast<double>(repeats);                               \
    }
#if defined(__x86_64__)
FMA_LOOP(fma_avx512, __attribute__((target("avx512f"))), __m512, 16, _mm512_set1_ps, _mm512_fmadd_ps)
__attribute__((target("avx2,fma"))) double fma_avx2(size_t repeats) {  // 16 registers: 12 sums
    __m256 sum[12];
    for (int i = 0; i < 12; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
    for (size_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) sum[i] = _mm256_fmadd_ps(sum[i], a, b);
    }
    volatile __m256 keep;
    for (int i = 0; i < 12; ++i) keep = sum[i];
    (void)keep;
    return 12.0 * 8 * static_cast<double>(repeats);
}
#elif defined(__aarch64__)
#define NEON_FMA(x, a, b) vfmaq_f32(b, x, a)
FMA_LOOP(fma_neon, , float32x4_t, 4, vdupq_n_f32, NEON_FMA)
#endif
FMA_LOOP(fma_scalar, , float, 1, , std::fma)

// GFLOP/s of multiply-adds in registers with the instructions of this kernel.
double peak(const eimf::ScoreKernels &kernels) {
    double (*loop)(size_t) = fma_scalar;
#if defined(__x86_64__)
    if (!std::strncmp(kernels.name, "avx512", 6)) loop = fma_avx512;
    if (!std::strncmp(kernels.name, "avx2", 4)) loop = fma_avx2;
#elif defined(__aarch64__)
    if (!std::strcmp(kernels.name, "neon")) loop = fma_neon;
#endif
    double best = 0;
    for (int round = 0; round < 10; ++round) {
        const double start = now(), done = loop(2000000);
        best = std::max(best, 2 * done / (now() - start) / 1e9);
    }
    return best;
}

double bandwidth() {
    std::vector<float> values(64 << 20, 1.0f);
    double best = 0;
    for (int round = 0; round < 3; ++round) {
        const double start = now();
        for (float &value : values) value += 1.0f;
        best = std::max(best, 2.0 * 4 * static_cast<double>(values.size()) / (now() - start) / 1e9);
    }
    return best;
}

void scoring(size_t n_items, size_t users, double peak_gflops) {
    const size_t k = 4, d = 64, n = 50;
    const std::vector<float> items = normal(n_items * d, 3), interests = normal(users * k * d, 4);
    std::vector<int64_t> ids(users * n);
    std::vector<float> scores(users * n);
    std::vector<int32_t> interest(users * n);
    eimf_top_n_options options = eimf_top_n_defaults();
    options.n_threads = 1;
    std::vector<double> times;
    for (int round = 0; round < 5; ++round) {
        const double start = now();
        if (eimf_top_n(interests.data(), users, k, d, items.data(), n_items, n, &options, ids.data(), scores.data(), interest.data(), nullptr) != EIMF_OK) return;
        times.push_back(now() - start);
    }
    std::sort(times.begin(), times.end());
    const double seconds = times[2], gflops = 2.0 * static_cast<double>(users * k * d) * static_cast<double>(n_items) / seconds / 1e9;
    std::printf("| %zu items | %.0f users/s | %.0f GFLOP/s | %.0f %% of peak |\n", n_items, static_cast<double>(users) / seconds, gflops, 100 * gflops / peak_gflops);
}

void clustering(size_t n, double preference) {
    const size_t d = 64, centres = n / 40;
    const std::vector<float> centre = normal(centres * d, 5), noise = normal(n * d, 6);
    std::vector<float> x(n * d);
    for (size_t i = 0; i < n; ++i)
        for (size_t t = 0; t < d; ++t) x[i * d + t] = 0.1f * (centre[(i * 7919 % centres) * d + t] + 0.9f * noise[i * d + t]);
    std::vector<int64_t> exemplars(n), labels(n);
    std::vector<double> stamps;
    eimf_ap_options options = eimf_ap_defaults();
    options.n_threads = 1;
    options.progress = [](void *context, size_t, size_t) { return static_cast<std::vector<double> *>(context)->push_back(now()), 0; };
    options.progress_context = &stamps;
    eimf_ap_result result;
    const double start = now();
    if (eimf_affinity_propagation(x.data(), n, d, &preference, 1, &options, exemplars.data(), labels.data(), &result, nullptr) != EIMF_OK) return;
    const double total = now() - start;
    std::printf("| %zu points | %zu clusters | %.5f s/iteration | fit %.2f s | %zu MiB |\n", n, result.n_exemplars,
                (stamps.back() - stamps[1]) / static_cast<double>(std::max<size_t>(1, result.n_iter)), total, result.peak_bytes >> 20);
}

}  // namespace

int main(int argc, char **argv) {
    const eimf::ScoreKernels &kernels = *eimf::score_kernels(EIMF_KERNEL_AUTO);
    const double gflops = peak(kernels), gbytes = bandwidth();
    if (argc > 1 && !std::strcmp(argv[1], "--peaks")) {
        std::printf("{\"fma_gflops\": %.1f, \"memory_gbs\": %.1f}\n", gflops, gbytes);
        return 0;
    }
    std::printf("eimf %s, %s: multiply-add peak %.0f GFLOP/s, memory %.0f GB/s\n\n", eimf_version(), kernels.name, gflops, gbytes);
    scoring(12101, 1024, gflops);
    scoring(100000, 256, gflops);
    scoring(1000000, 256, gflops);
    std::puts("");
    for (const size_t n : {4905, 14681, 22363})
        for (const double preference : {-1.0, -5.0}) clustering(n, preference);
    return 0;
}
