/* EIMF core: affinity propagation, multi-interest top-n scoring and the softmax loss. Plain C99, no dependencies.
 *
 * Conventions
 *  - Matrices are row-major and contiguous. Sizes are size_t. Inputs are read only and never kept after the call.
 *  - Outputs are caller-owned buffers of the stated lengths, written completely when EIMF_OK is returned.
 *  - Work memory comes from options.allocator (malloc/free by default) and is released before the call returns.
 *  - No globals, no printing. Worker threads live only during a call. Functions may be called from any thread at once.
 *  - Results do not depend on n_threads, bit for bit, nor on the instruction set that is chosen at run time.
 *  - `error` may be NULL; otherwise it receives one sentence: what was found and what was expected.
 */
#ifndef EIMF_H
#define EIMF_H

#include <stddef.h>
#include <stdint.h>

/* The functions below are the only names that a shared library shows; none of them if EIMF_LOCAL is defined where they are compiled. */
#if defined(__GNUC__) && !defined(EIMF_LOCAL)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

#define EIMF_VERSION "0.1.0"

/* From C++11 on an enumeration of which any int may be read, as in C: a value that is none of these is refused. */
#if defined(__cplusplus) && __cplusplus >= 201103L
#define EIMF_ENUM(name) typedef enum name : int
#else
#define EIMF_ENUM(name) typedef enum name
#endif

EIMF_ENUM(eimf_status) {
    EIMF_OK = 0,
    EIMF_ERROR_ARGUMENT = 1,    /* a size, pointer, index or value that cannot be used (NaN and infinities included) */
    EIMF_ERROR_MEMORY = 2,      /* the allocator returned NULL, or memory_limit would be exceeded */
    EIMF_ERROR_INTERRUPTED = 3, /* the progress callback asked to stop */
    EIMF_ERROR_INTERNAL = 4     /* a bug in this library */
} eimf_status;

typedef struct eimf_error {
    char message[320]; /* NUL-terminated; empty after success */
} eimf_error;

/* Where work memory comes from. Both NULL: malloc and free. `allocate` returns memory aligned as malloc's, or NULL; it may
 * be called from several threads at once. */
typedef struct eimf_allocator {
    void *(*allocate)(void *context, size_t bytes);
    void (*release)(void *context, void *memory, size_t bytes);
    void *context;
} eimf_allocator;

/* Instruction set of the scoring kernels. Every choice gives the same bits. */
EIMF_ENUM(eimf_kernel) {
    EIMF_KERNEL_AUTO = 0, /* the fastest one this CPU has */
    EIMF_KERNEL_SCALAR = 1,
    EIMF_KERNEL_AVX2 = 2, /* with FMA */
    EIMF_KERNEL_AVX512 = 3,
    EIMF_KERNEL_NEON = 4,
    EIMF_KERNEL_AVX512_VNNI = 5, /* AVX-512, and top_n first bounds scores by 8-bit integer products */
    EIMF_KERNEL_AVX2_INT8 = 6    /* the same with AVX2 */
} eimf_kernel;

/* "0.1.0" */
const char *eimf_version(void);

/* One fixed English phrase for a status. */
const char *eimf_status_text(eimf_status status);

/* Name of a kernel if this CPU can run it ("avx512", ...), else NULL. EIMF_KERNEL_AUTO names the one it stands for. */
const char *eimf_kernel_name(eimf_kernel kernel);

/* ---------------------------------------------------------------------------------------------------------------
 * Affinity propagation (Frey and Dueck, Science 2007), with scikit-learn's damping, convergence window and final
 * refinement of the exemplars.
 *
 *   r(i,k) <- damping r(i,k) + (1 - damping) (s(i,k) - max_{k' != k} (a(i,k') + s(i,k')))
 *   a(i,k) <- damping a(i,k) + (1 - damping) min(0, r(k,k) + sum_{i' not in {i,k}} max(0, r(i',k)))      i != k
 *   a(k,k) <- damping a(k,k) + (1 - damping) sum_{i' != k} max(0, r(i',k))
 *
 * s(k,k) is the preference of point k. k is an exemplar when a(k,k) + r(k,k) > 0. The run has converged when the set of
 * exemplars is not empty and has not changed for `convergence_iter` iterations.
 *
 * Exact without any n x n array: a(i,k) <= 0 off the diagonal, so s(i,k) bounds a(i,k) + s(i,k). Each row keeps its nearest
 * neighbours by falling similarity; a scan for the row's two best values stops where s(i,k) falls to the second best. Where a
 * list proves too short it grows. Time per iteration is O(n x scanned neighbours), some 15 to 100 at usual preferences. At
 * low ones, where lists would hold more than a sixteenth of all pairs (or where lists of 64 do not do and the matrix takes no
 * more than 128 MiB), all similarities are kept in float32: none more if precomputed, n^2 of few points, n^2 / 2 of points that
 * would take more than those 128 MiB, as theirs are symmetric; and what the pairs need whose messages are not implied by their
 * row's and column's: few, but some hundred for each row where only a handful of clusters form. An iteration then reads at most
 * those and every row once. memory_limit can forbid that; lists then go on growing. All messages are float64 in either form.
 *
 * Ties: equal points are merged first (one point with a weight; exact, since equal points share an exemplar unless their
 * preference is positive). Other ties are decided by lowering the preference of point k by an amount that depends on k only,
 * at most 2^-32 of its size. No random numbers. If all similarities and all preferences are
 * equal, the result is one cluster with exemplar 0, or n clusters when the preference exceeds the similarity (n_iter = 0), as
 * scikit-learn's. If the preferences are so low that one cluster is provably the optimum, that is returned at once (n_iter = 0).
 * --------------------------------------------------------------------------------------------------------------- */

typedef struct eimf_ap_options {
    double damping;          /* 0.5 <= damping < 1; default 0.5 */
    size_t max_iter;         /* default 200, at least 1 */
    size_t convergence_iter; /* default 15, at least 1 */
    size_t n_threads;        /* 0 (default): all cores */
    size_t memory_limit;     /* bytes of work memory; 0 (default): no limit */
    eimf_kernel kernel;
    /* Called on the calling thread after each iteration; a non-zero result stops the run with EIMF_ERROR_INTERRUPTED.
     * iteration 0 is reported while neighbours are searched, several times where that takes long: at first, and again where all
     * lists must grow or all similarities prove to be needed. NULL (default): none. */
    int (*progress)(void *context, size_t iteration, size_t exemplars);
    void *progress_context;
    eimf_allocator allocator;
} eimf_ap_options;

typedef struct eimf_ap_result {
    size_t n_exemplars;
    size_t n_iter;         /* iterations done */
    int converged;         /* 0: max_iter reached; the outputs then hold the best of the last convergence_iter states and one cluster.
                            * Sparse: of the states alone, the one with fewest points unassigned */
    size_t n_unassigned;   /* sparse only: points without an edge to any exemplar, label -1 */
    double net_similarity; /* sum of s(i, exemplar of i) over the others + sum of the exemplars' preferences */
    size_t peak_bytes;     /* most work memory held at once */
} eimf_ap_result;

eimf_ap_options eimf_ap_defaults(void);

/* Work memory of a run over n points of d dimensions (d = 0: precomputed) at usual preferences: as long as neighbour lists of 256 suffice,
 * or with all similarities of few points (n^2 floats within 128 MiB). Where longer lists would be faster a run without a limit takes more;
 * with this as memory_limit it starts with shorter ones and gets through. Low preferences take more: see above. SIZE_MAX on overflow. */
size_t eimf_affinity_propagation_bytes(size_t n, size_t d);

/* Points x (n, d), similarity = minus squared Euclidean distance.
 * preference: n_preference = 1 (the same for all) or n values.
 * exemplars: room for n; the first n_exemplars are written, ascending. labels: n, positions in `exemplars`. */
eimf_status eimf_affinity_propagation(const float *x, size_t n, size_t d, const double *preference, size_t n_preference,
                                      const eimf_ap_options *options, int64_t *exemplars, int64_t *labels,
                                      eimf_ap_result *result, eimf_error *error);

/* Points for several runs, as a search for the preference makes them: the neighbour search, usually the largest part of a run,
 * is done once, and lists that one run had to grow, or the array of similarities, stay for the next. A run gives what
 * eimf_affinity_propagation gives at the same preference and options, whatever runs came before.
 *
 * x must stay alive and unchanged until eimf_points_destroy, and so must options.allocator; of the options only that, the kernel and the
 * memory limit are read by _create. One run at a time: a second one on the same object is an error, as runs share its lists;
 * memory_limit and peak_bytes count those in. Create: on failure *points is NULL. Destroy accepts NULL. */
typedef struct eimf_points eimf_points;

eimf_status eimf_points_create(const float *x, size_t n, size_t d, const eimf_ap_options *options, eimf_points **points,
                               eimf_error *error);
eimf_status eimf_points_affinity_propagation(eimf_points *points, const double *preference, size_t n_preference,
                                             const eimf_ap_options *options, int64_t *exemplars, int64_t *labels,
                                             eimf_ap_result *result, eimf_error *error);
void eimf_points_destroy(eimf_points *points);

/* The same on given similarities s (n, n), s[i * n + k] = how well k serves as the exemplar of i. The diagonal is ignored. */
eimf_status eimf_affinity_propagation_precomputed(const float *s, size_t n, const double *preference, size_t n_preference,
                                                  const eimf_ap_options *options, int64_t *exemplars, int64_t *labels,
                                                  eimf_ap_result *result, eimf_error *error);

/* The same on a CSR graph: row i's candidate exemplars are indices[indptr[i] .. indptr[i+1]) with their similarities; all
 * other pairs count as minus infinity. Entries on the diagonal are ignored, repeated ones are an error. O(edges) per
 * iteration at most. A point that no edge connects to an exemplar gets label -1 and is counted in n_unassigned. */
eimf_status eimf_affinity_propagation_sparse(const int64_t *indptr, const int64_t *indices, const float *similarity, size_t n,
                                             const double *preference, size_t n_preference, const eimf_ap_options *options,
                                             int64_t *exemplars, int64_t *labels, eimf_ap_result *result, eimf_error *error);

/* ---------------------------------------------------------------------------------------------------------------
 * Multi-interest retrieval: the n items with the highest score, where
 *
 *   score(b, i) = max_k  interests[b, k] . items[i]
 *
 * Exact. Scores are accumulated in float32 with fused multiply-adds in the order of the dimensions; those that bounds show to be too low are not
 * computed. Items with equal scores are ranked by
 * lower id, equal interests by lower k. No B x N array is made: work memory is under 2 MB per thread (more only for n above
 * some ten thousands). Time O(B N K D).
 * --------------------------------------------------------------------------------------------------------------- */

typedef struct eimf_top_n_options {
    size_t n_threads;               /* 0 (default): all cores */
    const int64_t *exclude_indptr;  /* (B + 1) or NULL (default): user b must not get exclude_indices[indptr[b] .. indptr[b+1]) */
    const int64_t *exclude_indices; /* item ids in any order, repeats allowed */
    const uint8_t *allowed;         /* (N) or NULL (default): items with 0 are never returned */
    eimf_kernel kernel;
    eimf_allocator allocator;
} eimf_top_n_options;

eimf_top_n_options eimf_top_n_defaults(void);

/* interests (B, K, D), items (N, D), all finite. Outputs (B, n): item ids by falling score, their scores, the winning
 * interest. Where fewer than n items remain: id -1, score -infinity, interest -1. */
eimf_status eimf_top_n(const float *interests, size_t users, size_t n_interests, size_t dim, const float *items, size_t n_items,
                       size_t n, const eimf_top_n_options *options, int64_t *ids, float *scores, int32_t *interest,
                       eimf_error *error);

/* A catalogue prepared for many calls with few users each: its vectors are also kept in the kernel's own order, n_items * dim
 * floats of work memory (0.3 times more for kernels AVX512_VNNI and AVX2_INT8), and are checked once. Results are eimf_top_n's, bit for bit; one user's answer
 * takes a fraction of the time.
 *
 * items must stay alive and unchanged until eimf_items_destroy, and so must allocator (NULL: malloc and free). Any number of
 * threads may query one object at once; options->kernel must be EIMF_KERNEL_AUTO or the one given to _create. Create: on failure
 * *prepared is NULL. Destroy accepts NULL. */
typedef struct eimf_items eimf_items;

eimf_status eimf_items_create(const float *items, size_t n_items, size_t dim, eimf_kernel kernel, const eimf_allocator *allocator,
                              eimf_items **prepared, eimf_error *error);
eimf_status eimf_items_top_n(const eimf_items *prepared, const float *interests, size_t users, size_t n_interests, size_t n,
                             const eimf_top_n_options *options, int64_t *ids, float *scores, int32_t *interest, eimf_error *error);
void eimf_items_destroy(eimf_items *prepared);

/* Controllable diversity, after ComiRec: re-rank each user's candidates greedily. n times, the remaining candidate with the largest
 *
 *   score - penalty * (number of items already chosen that share its category)
 *
 * is chosen; equal ones by their order in the list. Maximises ComiRec's accuracy + penalty * (pairs in different categories).
 * ids, scores (B, candidates): as eimf_top_n returns them, -1 entries are skipped. category (n_items): of each item, -1 for items that
 * share theirs with no other. penalty: finite, 0 or more. Outputs (B, n): ids and their original scores, padded like eimf_top_n's.
 * Time O(B n candidates). */
eimf_status eimf_diversify(const int64_t *ids, const float *scores, size_t users, size_t candidates, const int32_t *category,
                           size_t n_items, size_t n, float penalty, size_t n_threads, int64_t *chosen_ids, float *chosen_scores,
                           eimf_error *error);

/* ---------------------------------------------------------------------------------------------------------------
 * Softmax loss over all items, for training, with its gradients:
 *
 *   losses[u] = log sum_i exp(queries[u] . items[i]) - queries[u] . items[target[u]],   i over the items that are not excluded
 *
 *   query_gradient, item_gradient = those of sum_u weight[u] losses[u]
 *
 * queries (users, dim), items (n_items, dim), target (users), weight (users), excluded: item numbers, any order, repeats allowed.
 * Outputs losses (users), query_gradient (users, dim), item_gradient (n_items, dim) or NULL if the items are not learned. A row of weight 0 has
 * loss 0 and no part in the gradients; otherwise the loss of an excluded target is infinite. NaN in means NaN out. allocator: NULL for malloc and free.
 * The scores are not kept: their exponentials are, if there is an item_gradient (n_items * users floats), and a few hundred kB for each 128 users
 * otherwise. Time O(n_items users dim), 4 (otherwise 3) multiply-adds for each of these.
 * --------------------------------------------------------------------------------------------------------------- */
eimf_status eimf_softmax_loss(const float *queries, size_t users, const float *items, size_t n_items, size_t dim, const int64_t *target,
                              const float *weight, const int64_t *excluded, size_t n_excluded, size_t n_threads, eimf_kernel kernel,
                              const eimf_allocator *allocator, float *losses, float *query_gradient, float *item_gradient, eimf_error *error);

/* top_n by the plain loop: the reference that tests compare with, bit for bit. Uses no options but exclusions. */
eimf_status eimf_top_n_reference(const float *interests, size_t users, size_t n_interests, size_t dim, const float *items,
                                 size_t n_items, size_t n, const eimf_top_n_options *options, int64_t *ids, float *scores,
                                 int32_t *interest, eimf_error *error);

/* Affinity propagation by the textbook loops on three n x n double arrays; the reference for the functions above. */
eimf_status eimf_affinity_propagation_reference(const float *s, size_t n, const double *preference, size_t n_preference,
                                                const eimf_ap_options *options, int64_t *exemplars, int64_t *labels,
                                                eimf_ap_result *result, eimf_error *error);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__) && !defined(EIMF_LOCAL)
#pragma GCC visibility pop
#endif
#endif
