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
#define NAME "scalar"
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
static inline int32_t four_bytes(const void *from) {
    int32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

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
#define NAME "avx2"
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

// Pairs of products are added up in the 16-bit halves of each lane. A pair is at most 2 * 180 * 90, so it is not cut off; sums wrap around and
// come out right, as without the offset they are at most (178 + 3)^2 by Cauchy and Schwarz, rounding to integers included.
constexpr ScoreKernels::Quantization QUANTIZED{90, 90, 178, true, 16};
// In assembly as GCC 12 copies and spills the sums otherwise.
static inline __attribute__((always_inline)) void add_products(__m256i &sum, const __m256i &items, __m256i row) {
    __m256i pairs;
    asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "xm"(items), "x"(row));
}
#define INTS __m256i
#define LOAD_INTS(p) _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))
#define SPREAD_INT(p) _mm256_set1_epi32(four_bytes(p))
#define ADD_PRODUCTS(sum, items, row) add_products(sum, items, row)
#define WIDEN(x) _mm256_madd_epi16(x, _mm256_set1_epi16(1))
#define ADD_INT(a, b) _mm256_add_epi32(a, b)
#define MAX_INT(a, b) _mm256_max_epi32(a, b)
#define TO_FLOAT(x) _mm256_cvtepi32_ps(x)
#include "score_kernels.inc"
EIMF_TARGET_END
}  // namespace avx2

namespace avx512 {
#define NAME "avx512"
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

// Used only where the CPU has AVX-512 VNNI. The intrinsic makes GCC 12 copy and spill the sums; this keeps them in place.
constexpr ScoreKernels::Quantization QUANTIZED{127, 127, 0, false, 1u << 20};
static inline __attribute__((always_inline)) void add_products(__m512i &sum, const __m512i &items, __m512i row) {
    asm("vpdpbusd %1, %2, %0" : "+v"(sum) : "vm"(items), "v"(row));
}
#define INTS __m512i
#define LOAD_INTS(p) _mm512_loadu_si512(p)
#define SPREAD_INT(p) _mm512_set1_epi32(four_bytes(p))
#define ADD_PRODUCTS(sum, items, row) add_products(sum, items, row)
#define WIDEN(x) (x)
#define ADD_INT(a, b) _mm512_add_epi32(a, b)
#define MAX_INT(a, b) _mm512_maskz_max_epi32(static_cast<__mmask16>(0xffff), a, b)
#define TO_FLOAT(x) _mm512_maskz_cvtepi32_ps(static_cast<__mmask16>(0xffff), x)
#include "score_kernels.inc"
EIMF_TARGET_END
}  // namespace avx512
#endif

#if EIMF_ARM
namespace neon {
#define NAME "neon"
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

#if EIMF_X86
// A version that bounds scores by 8-bit integers as well.
static ScoreKernels bounding(ScoreKernels version, const char *name, decltype(version.quantized_hits) hits, decltype(version.quantize) quantize,
                             const ScoreKernels::Quantization &quantization) {
    version.name = name;
    version.quantized_hits = hits;
    version.quantize = quantize;
    version.quantization = quantization;
    return version;
}
#endif

const ScoreKernels *score_kernels(eimf_kernel kernel) {
#if EIMF_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f"), has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
    static const ScoreKernels vnni_version = bounding(avx512::VERSION, "avx512vnni", avx512::quantized_hits, avx512::quantize, avx512::QUANTIZED);
    static const ScoreKernels avx2_int8_version = bounding(avx2::VERSION, "avx2int8", avx2::quantized_hits, avx2::quantize, avx2::QUANTIZED);
    if (kernel == EIMF_KERNEL_AVX512_VNNI || (kernel == EIMF_KERNEL_AUTO && has_vnni)) return has_vnni ? &vnni_version : nullptr;
    if (kernel == EIMF_KERNEL_AVX512 || (kernel == EIMF_KERNEL_AUTO && has_avx512)) return has_avx512 ? &avx512::VERSION : nullptr;
    if (kernel == EIMF_KERNEL_AVX2_INT8 || (kernel == EIMF_KERNEL_AUTO && has_avx2)) return has_avx2 ? &avx2_int8_version : nullptr;
    if (kernel == EIMF_KERNEL_AVX2) return has_avx2 ? &avx2::VERSION : nullptr;
#endif
#if EIMF_ARM
    if (kernel == EIMF_KERNEL_AUTO || kernel == EIMF_KERNEL_NEON) return &neon::VERSION;
#endif
    return kernel == EIMF_KERNEL_AUTO || kernel == EIMF_KERNEL_SCALAR ? &scalar::VERSION : nullptr;
}

}  // namespace eimf
