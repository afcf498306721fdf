#include "score_kernels.hpp"

#include <cmath>

// Only inside the push/pop blocks may the wider instructions be used, and nothing from the standard library may be
// instantiated there: the linker could keep that copy for code that runs on any CPU.
#if defined(__GNUC__) && !defined(__clang__)
#define EIMF_PRAGMA(x) _Pragma(#x)
#define EIMF_TARGET_BEGIN(names) EIMF_PRAGMA(GCC push_options) EIMF_PRAGMA(GCC target(names))
#define EIMF_TARGET_END EIMF_PRAGMA(GCC pop_options)
#elif defined(__clang__)
#define EIMF_PRAGMA(x) _Pragma(#x)
#define EIMF_TARGET_BEGIN(names) EIMF_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define EIMF_TARGET_END _Pragma("clang attribute pop")
#endif

#if defined(__x86_64__) && defined(EIMF_TARGET_BEGIN)
#define EIMF_X86 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define EIMF_ARM 1
#include <arm_neon.h>
#endif

namespace eimf {

namespace scalar {
#define VEC float
#define LANES 1
#define ROWS 4
#define LOAD(p) (*(p))
#define STORE(p, x) (*(p) = (x))
#define SPREAD(x) (x)
#define FMA(a, b, c) std::fma(a, b, c)
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ABOVE(x, y) static_cast<unsigned>((x) > (y))
#define PACK8 0
#include "score_kernels.inc"
}  // namespace scalar

#if EIMF_X86
EIMF_TARGET_BEGIN("avx2,fma,popcnt")
// An 8 x 8 block: panel[i * stride + j] = rows[j][t + i]. Raises `most` to the magnitudes' bits seen.
static inline void transpose8(const float *const *rows, size_t t, float *panel, size_t stride, __m256i *most) {
    __m256 r[8], s[8];
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm256_loadu_ps(rows[j] + t);
        *most = _mm256_max_epi32(*most, _mm256_and_si256(_mm256_castps_si256(r[j]), magnitude));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 8; j += 2) {
        s[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
        s[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 8; j += 4) {
        r[j] = _mm256_shuffle_ps(s[j], s[j + 2], 0x44);
        r[j + 1] = _mm256_shuffle_ps(s[j], s[j + 2], 0xee);
        r[j + 2] = _mm256_shuffle_ps(s[j + 1], s[j + 3], 0x44);
        r[j + 3] = _mm256_shuffle_ps(s[j + 1], s[j + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(panel + j * stride, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_storeu_ps(panel + (j + 4) * stride, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
    }
}
EIMF_TARGET_END

namespace avx2 {
EIMF_TARGET_BEGIN("avx2,fma,popcnt")
#define VEC __m256
#define LANES 8
#define ROWS 4
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, x) _mm256_storeu_ps(p, x)
#define SPREAD(x) _mm256_set1_ps(x)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define PACK8 1
#define ABOVE(x, y) static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)))
#include "score_kernels.inc"
EIMF_TARGET_END
}  // namespace avx2

namespace avx512 {
EIMF_TARGET_BEGIN("avx512f,avx2,fma,popcnt")
#define VEC __m512
#define LANES 16
#define ROWS 8
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, x) _mm512_storeu_ps(p, x)
#define SPREAD(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
// With a mask of all lanes: GCC 12 warns of an uninitialised value inside the header's _mm512_max_ps.
#define MAX(a, b) _mm512_maskz_max_ps(static_cast<__mmask16>(0xffff), a, b)
#define PACK8 1
#define ABOVE(x, y) _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ)
#include "score_kernels.inc"
EIMF_TARGET_END
}  // namespace avx512

namespace vnni {
EIMF_TARGET_BEGIN("avx512f,avx512vnni,avx2,fma,popcnt")
constexpr size_t WIDTH = 48;
constexpr int ROWS = 8;

// sum + four products in each lane. The intrinsic makes GCC 12 copy and spill the sums; this keeps them in place.
static inline __attribute__((always_inline)) void add_products(__m512i &sum, __m512i items, __m512i row) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(items), "v"(row));
}

// USERS users of K rows, from `user` on; in shape the float kernel, with four products per lane at a time.
template <int K, int USERS>
static inline __attribute__((always_inline)) size_t some_users(const ScoreKernels::QuantizedPanel &panel, const int32_t *rows, const int32_t *start,
                                                               const ScoreKernels::QuantizedUser *bounds, size_t user, size_t quads, uint64_t valid,
                                                               float *least, float *most, ScoreKernels::Hit *hits, size_t count) {
    __m512i sum[K * USERS][3];
    rows += user * K * quads;
#pragma GCC unroll 8
    for (int r = 0; r < K * USERS; ++r) sum[r][0] = sum[r][1] = sum[r][2] = _mm512_set1_epi32(start[user * K + static_cast<size_t>(r)]);
    for (size_t t = 0; t < quads; ++t) {
        const uint8_t *values = panel.values + t * WIDTH * 4;
        const __m512i p0 = _mm512_loadu_si512(values), p1 = _mm512_loadu_si512(values + 64), p2 = _mm512_loadu_si512(values + 128);
#pragma GCC unroll 8
        for (int r = 0; r < K * USERS; ++r) {
            const __m512i x = _mm512_set1_epi32(rows[static_cast<size_t>(r) * quads + t]);
            add_products(sum[r][0], p0, x);
            add_products(sum[r][1], p1, x);
            add_products(sum[r][2], p2, x);
        }
    }
#pragma GCC unroll 8
    for (int u = 0; u < USERS; ++u) {
        const ScoreKernels::QuantizedUser &bound = bounds[user + static_cast<size_t>(u)];
        uint64_t mask = 0;
        __m512 low[3], high[3];
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) {
            __m512i top = sum[u * K][v];
#pragma GCC unroll 8
            for (int r = 1; r < K; ++r) top = _mm512_maskz_max_epi32(0xffff, top, sum[u * K + r][v]);
            const __m512 score = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, top), _mm512_loadu_ps(panel.scale + v * 16));
            __m512 error = _mm512_mul_ps(_mm512_set1_ps(bound.error), _mm512_loadu_ps(panel.error + v * 16));
            error = _mm512_fmadd_ps(_mm512_set1_ps(bound.norm), _mm512_loadu_ps(panel.norm + v * 16), error);
            low[v] = _mm512_sub_ps(score, error);
            high[v] = _mm512_add_ps(score, error);
            mask |= static_cast<uint64_t>(_mm512_cmp_ps_mask(high[v], _mm512_set1_ps(bound.limit), _CMP_GT_OQ)) << (v * 16);
        }
        if (!(mask &= valid)) continue;
        for (int v = 0; v < 3; ++v) {
            _mm512_storeu_ps(least + count * WIDTH + v * 16, low[v]);
            _mm512_storeu_ps(most + count * WIDTH + v * 16, high[v]);
        }
        hits[count++] = {mask, static_cast<uint32_t>(user) + static_cast<uint32_t>(u)};
    }
    return count;
}

template <int K>
static size_t all_users(const ScoreKernels::QuantizedPanel &panel, const int32_t *rows, const int32_t *start, const ScoreKernels::QuantizedUser *bounds,
                        size_t users, size_t quads, uint64_t valid, float *least, float *most, ScoreKernels::Hit *hits) {
    size_t count = 0, user = 0;
    for (; user + ROWS / K <= users; user += ROWS / K) count = some_users<K, ROWS / K>(panel, rows, start, bounds, user, quads, valid, least, most, hits, count);
    for (; user < users; ++user) count = some_users<K, 1>(panel, rows, start, bounds, user, quads, valid, least, most, hits, count);
    return count;
}

static size_t quantized_hits(const ScoreKernels::QuantizedPanel &panel, const int32_t *rows, const int32_t *start, const ScoreKernels::QuantizedUser *bounds,
                             size_t users, size_t k, size_t quads, uint64_t valid, float *least, float *most, ScoreKernels::Hit *hits) {
    switch (k) {
        case 1: return all_users<1>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
        case 2: return all_users<2>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
        case 3: return all_users<3>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
        case 4: return all_users<4>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
        case 5: return all_users<5>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
        case 6: return all_users<6>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
        case 7: return all_users<7>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
        case 8: return all_users<8>(panel, rows, start, bounds, users, quads, valid, least, most, hits);
    }
    return 0;
}

static void quantize(const float *panel, size_t d, float unit, uint8_t *values, float *scale, float *error, float *norm) {
    const __m512 zero = _mm512_setzero_ps();
    // Squares below the smallest float vanish: they take no more than this from a length.
    const __m512 vanished = _mm512_set1_ps(1e-18f * std::sqrt(static_cast<float>(d))), units = _mm512_set1_ps(1 / unit), more = _mm512_set1_ps(1.0001f);
    for (size_t v = 0; v < WIDTH; v += 16) {
        __m512 top = zero;
        for (size_t t = 0; t < d; ++t) top = _mm512_maskz_max_ps(0xffff, top, _mm512_abs_ps(_mm512_loadu_ps(panel + t * WIDTH + v)));
        const __m512 step = _mm512_maskz_max_ps(0xffff, _mm512_mul_ps(top, _mm512_set1_ps(1 / 127.0f)), _mm512_set1_ps(1e-30f));
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), step);
        __m512 squares = zero, lost = zero;
        for (size_t quad = 0; quad < d; quad += 4) {
            __m512i four = _mm512_set1_epi32(static_cast<int>(0x80808080u));
            for (size_t t = quad; t < d && t < quad + 4; ++t) {
                const __m512 value = _mm512_loadu_ps(panel + t * WIDTH + v);
                const __m512i whole = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(value, inverse));  // to the nearest
                const __m512 rest = _mm512_fnmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, whole), step, value);
                squares = _mm512_fmadd_ps(value, value, squares);
                lost = _mm512_fmadd_ps(rest, rest, lost);
                const __m512i byte = _mm512_and_si512(whole, _mm512_set1_epi32(0xff));
                four = _mm512_xor_si512(four, _mm512_maskz_sllv_epi32(0xffff, byte, _mm512_set1_epi32(static_cast<int>(8 * (t - quad)))));  // 128 more is the top bit flipped
            }
            _mm512_storeu_si512(values + (quad / 4 * WIDTH + v) * 4, four);
        }
        _mm512_storeu_ps(scale + v, _mm512_mul_ps(step, units));
        _mm512_storeu_ps(error + v, _mm512_mul_ps(_mm512_fmadd_ps(_mm512_maskz_sqrt_ps(0xffff, lost), more, vanished), units));
        _mm512_storeu_ps(norm + v, _mm512_mul_ps(_mm512_fmadd_ps(_mm512_maskz_sqrt_ps(0xffff, squares), more, vanished), units));
    }
}
EIMF_TARGET_END
}  // namespace vnni
#endif

#if EIMF_ARM
namespace neon {
static inline unsigned greater_mask(float32x4_t x, float32x4_t y) {
    const uint32x4_t bits = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgtq_f32(x, y), bits));
}
#define VEC float32x4_t
#define LANES 4
#define ROWS 8
#define LOAD(p) vld1q_f32(p)
#define STORE(p, x) vst1q_f32(p, x)
#define SPREAD(x) vdupq_n_f32(x)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define MAX(a, b) vmaxq_f32(a, b)
#define ABOVE(x, y) greater_mask(x, y)
#define PACK8 0
#include "score_kernels.inc"
}  // namespace neon
#endif

const ScoreKernels *score_kernels(eimf_kernel kernel) {
    static const ScoreKernels scalar_version{"scalar", scalar::WIDTH, 4, scalar::tile_best, scalar::tile, scalar::best, nullptr, nullptr, scalar::count_above, scalar::range, scalar::stretch_maxima, scalar::find_above,
                                              scalar::update_availabilities, scalar::update_responsibilities, scalar::two_best, scalar::add_positive, scalar::squared_distance, scalar::pack, scalar::transpose};
#if EIMF_X86
    static const ScoreKernels avx2_version{"avx2", avx2::WIDTH, 4, avx2::tile_best, avx2::tile, avx2::best, nullptr, nullptr, avx2::count_above, avx2::range, avx2::stretch_maxima, avx2::find_above,
                                              avx2::update_availabilities, avx2::update_responsibilities, avx2::two_best, avx2::add_positive, avx2::squared_distance, avx2::pack, avx2::transpose};
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f"), has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
    static const ScoreKernels avx512_version{"avx512", avx512::WIDTH, 8, avx512::tile_best, avx512::tile, avx512::best, nullptr, nullptr, avx512::count_above, avx512::range, avx512::stretch_maxima, avx512::find_above,
                                              avx512::update_availabilities, avx512::update_responsibilities, avx512::two_best, avx512::add_positive, avx512::squared_distance, avx512::pack, avx512::transpose};
    static const ScoreKernels vnni_version = [] {
        ScoreKernels version = avx512_version;
        version.name = "avx512vnni";
        version.quantized_hits = vnni::quantized_hits;
        version.quantize = vnni::quantize;
        return version;
    }();
    if (kernel == EIMF_KERNEL_AVX512_VNNI || (kernel == EIMF_KERNEL_AUTO && has_vnni)) return has_vnni ? &vnni_version : nullptr;
    if (kernel == EIMF_KERNEL_AVX512 || (kernel == EIMF_KERNEL_AUTO && has_avx512)) return has_avx512 ? &avx512_version : nullptr;
    if (kernel == EIMF_KERNEL_AVX2 || (kernel == EIMF_KERNEL_AUTO && has_avx2)) return has_avx2 ? &avx2_version : nullptr;
#endif
#if EIMF_ARM
    static const ScoreKernels neon_version{"neon", neon::WIDTH, 8, neon::tile_best, neon::tile, neon::best, nullptr, nullptr, neon::count_above, neon::range, neon::stretch_maxima, neon::find_above,
                                              neon::update_availabilities, neon::update_responsibilities, neon::two_best, neon::add_positive, neon::squared_distance, neon::pack, neon::transpose};
    if (kernel == EIMF_KERNEL_AUTO || kernel == EIMF_KERNEL_NEON) return &neon_version;
#endif
    return kernel == EIMF_KERNEL_AUTO || kernel == EIMF_KERNEL_SCALAR ? &scalar_version : nullptr;
}

}  // namespace eimf
