// The Python module eimf_core: checks types, shapes and layouts, releases the GIL, turns statuses into exceptions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "eimf.h"

namespace py = pybind11;

namespace {

std::string shape_text(const py::array &array) {
    std::string text = "(";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + (array.ndim() == 1 ? ",)" : ")");
}

// The array behind `object` if it has exactly this element type, number of dimensions and row-major layout. Nothing is
// ever converted or copied.
template <class T>
py::array checked(const py::object &object, const char *name, const char *expected_shape, py::ssize_t ndim) {
    const std::string expected = std::string("expected a C-contiguous NumPy array of ") +
                                 py::str(py::dtype::of<T>()).cast<std::string>() + " with shape " + expected_shape;
    if (!py::isinstance<py::array>(object))
        throw py::value_error(std::string(name) + ": found " + py::str(py::type::of(object).attr("__name__")).cast<std::string>() + "; " + expected);
    const py::array array = py::reinterpret_borrow<py::array>(object);
    const bool aligned = (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
    const bool contiguous = (array.flags() & py::array::c_style) != 0;
    if (!array.dtype().equal(py::dtype::of<T>()) || array.ndim() != ndim || !contiguous || !aligned)
        throw py::value_error(std::string(name) + ": found " + py::str(array.dtype()).cast<std::string>() + " with shape " + shape_text(array) +
                              (contiguous ? "" : ", not C-contiguous") + (aligned ? "" : ", not aligned") + "; " + expected);
    return array;
}

void raise(eimf_status status, const eimf_error &error) {
    if (PyErr_Occurred()) throw py::error_already_set();  // what the progress callback raised
    if (status == EIMF_OK) return;
    const std::string message = error.message[0] ? error.message : eimf_status_text(status);
    if (status == EIMF_ERROR_INTERNAL) throw std::runtime_error(message);
    throw py::value_error(message);
}

size_t thread_count(long long n_threads) {
    if (n_threads < 0) throw py::value_error("n_threads is " + std::to_string(n_threads) + "; expected 0 (all cores) or more");
    return static_cast<size_t>(n_threads);
}

constexpr eimf_kernel KERNELS[] = {EIMF_KERNEL_SCALAR, EIMF_KERNEL_NEON,   EIMF_KERNEL_AVX2,
                                   EIMF_KERNEL_AVX512, EIMF_KERNEL_AVX2_INT8, EIMF_KERNEL_AVX512_VNNI};  // slowest first

eimf_kernel kernel_named(const std::string &name) {
    if (name == "auto") return EIMF_KERNEL_AUTO;
    std::string list = "'auto'";
    for (const eimf_kernel kernel : KERNELS)
        if (const char *available = eimf_kernel_name(kernel)) {
            if (name == available) return kernel;
            list += std::string(", '") + available + "'";
        }
    throw py::value_error("kernel is '" + name + "'; this CPU can run " + list);
}

// ------------------------------------------------------------------------------------------------ affinity propagation

struct Clustering {
    py::array_t<int64_t> exemplars, labels;
    size_t n_iter, n_unassigned, peak_bytes;
    bool converged;
    double net_similarity;
};

std::vector<double> preferences(const py::object &object, size_t n) {
    py::array array;
    try {
        array = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(object);
    } catch (py::error_already_set &) {
    }
    if (!array) {
        PyErr_Clear();
        throw py::value_error("preference: found " + py::str(py::type::of(object).attr("__name__")).cast<std::string>() +
                              "; expected a number or an array of shape (" + std::to_string(n) + ",)");
    }
    if (array.ndim() > 1 || (array.ndim() == 1 && static_cast<size_t>(array.shape(0)) != n))
        throw py::value_error("preference: found shape " + shape_text(array) + "; expected a number or shape (" + std::to_string(n) + ",)");
    const double *values = static_cast<const double *>(array.data());
    return std::vector<double>(values, values + array.size());
}

// Lets Ctrl-C through, and calls the user's function if there is one. Runs on the calling thread.
struct Progress {
    PyObject *callback;
    static int call(void *context, size_t iteration, size_t exemplars) {
        py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) return 1;
        PyObject *callback = static_cast<Progress *>(context)->callback;
        if (callback == Py_None) return 0;
        PyObject *result = PyObject_CallFunction(callback, "nn", static_cast<Py_ssize_t>(iteration), static_cast<Py_ssize_t>(exemplars));
        Py_XDECREF(result);
        return result == nullptr;
    }
};

// A limit that turns hopeless requests into an error before the system runs out of memory. 0 if it is not known.
size_t physical_memory() {
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(size) : 0;
}

// A new array for results. If there is no memory for it, a ValueError, as for all sizes that do not fit.
template <class T>
py::array_t<T> results(py::ssize_t rows, py::ssize_t columns) {
    const std::string shape = "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
    const size_t most = physical_memory() ? physical_memory() : static_cast<size_t>(PY_SSIZE_T_MAX);
    if (rows && static_cast<size_t>(columns) > most / sizeof(T) / static_cast<size_t>(rows)) throw py::value_error("results of shape " + shape + " do not fit into memory");
    try {
        return py::array_t<T>({rows, columns});
    } catch (py::error_already_set &error) {
        if (!error.matches(PyExc_MemoryError)) throw;
    }
    throw py::value_error("results of shape " + shape + " do not fit into memory");
}

struct Settings {
    double damping;
    long long max_iter, convergence_iter, n_threads, memory_limit;
    py::object progress;
};

template <class Run>
Clustering cluster(size_t n, const py::object &preference, const Settings &settings, Run run) {
    if (settings.max_iter < 1 || settings.convergence_iter < 1)
        throw py::value_error("max_iter is " + std::to_string(settings.max_iter) + " and convergence_iter is " +
                              std::to_string(settings.convergence_iter) + "; both must be at least 1");
    if (n == 0) throw py::value_error("found 0 points; expected at least 1");
    if (!settings.progress.is_none() && !PyCallable_Check(settings.progress.ptr())) throw py::value_error("progress is not callable");
    eimf_ap_options options = eimf_ap_defaults();
    options.damping = settings.damping;
    options.max_iter = static_cast<size_t>(settings.max_iter);
    options.convergence_iter = static_cast<size_t>(settings.convergence_iter);
    options.n_threads = thread_count(settings.n_threads);
    if (settings.memory_limit < 0) throw py::value_error("memory_limit is negative; expected bytes, or 0 for no limit");
    options.memory_limit = settings.memory_limit ? static_cast<size_t>(settings.memory_limit) : physical_memory();
    Progress progress{settings.progress.ptr()};
    options.progress = Progress::call;
    options.progress_context = &progress;
    const std::vector<double> p = preferences(preference, n);
    std::vector<int64_t> exemplars(n);
    py::array_t<int64_t> labels(static_cast<py::ssize_t>(n));
    int64_t *labels_data = labels.mutable_data();
    eimf_ap_result result{};
    eimf_error error{};
    eimf_status status;
    {
        py::gil_scoped_release nogil;
        status = run(p, options, exemplars.data(), labels_data, &result, &error);
    }
    raise(status, error);
    return {py::array_t<int64_t>(static_cast<py::ssize_t>(result.n_exemplars), exemplars.data()), std::move(labels), result.n_iter,
            result.n_unassigned, result.peak_bytes, result.converged != 0, result.net_similarity};
}

Clustering affinity_propagation(const py::object &x, const py::object &preference, double damping, long long max_iter,
                                long long convergence_iter, long long n_threads, bool precomputed, long long memory_limit, const py::object &progress,
                                bool reference) {
    const py::array points = checked<float>(x, "x", precomputed ? "(n, n)" : "(n, d)", 2);
    const size_t n = static_cast<size_t>(points.shape(0)), d = static_cast<size_t>(points.shape(1));
    if (precomputed && n != d) throw py::value_error("x: found shape " + shape_text(points) + "; expected a square matrix of similarities");
    if (reference && !precomputed) throw py::value_error("the reference works on precomputed similarities");
    const float *data = static_cast<const float *>(points.data());
    return cluster(n, preference, {damping, max_iter, convergence_iter, n_threads, memory_limit, progress},
                   [&](const std::vector<double> &p, const eimf_ap_options &options, int64_t *exemplars, int64_t *labels,
                       eimf_ap_result *result, eimf_error *error) {
                       if (reference) return eimf_affinity_propagation_reference(data, n, p.data(), p.size(), &options, exemplars, labels, result, error);
                       if (precomputed) return eimf_affinity_propagation_precomputed(data, n, p.data(), p.size(), &options, exemplars, labels, result, error);
                       return eimf_affinity_propagation(data, n, d, p.data(), p.size(), &options, exemplars, labels, result, error);
                   });
}

// Points for several runs. Keeps the array alive; nobody may write to it, which is the caller's part.
class Points {
public:
    Points(const py::object &x, long long memory_limit) : x_(checked<float>(x, "x", "(n, d)", 2)) {
        if (memory_limit < 0) throw py::value_error("memory_limit is negative; expected bytes, or 0 for no limit");
        eimf_ap_options options = eimf_ap_defaults();
        options.memory_limit = memory_limit ? static_cast<size_t>(memory_limit) : physical_memory();
        eimf_points *points = nullptr;
        eimf_error error{};
        eimf_status status;
        {
            py::gil_scoped_release nogil;
            status = eimf_points_create(static_cast<const float *>(x_.data()), static_cast<size_t>(x_.shape(0)), static_cast<size_t>(x_.shape(1)),
                                        &options, &points, &error);
        }
        raise(status, error);
        points_.reset(points);
    }

    Clustering affinity_propagation(const py::object &preference, double damping, long long max_iter, long long convergence_iter,
                                    long long n_threads, long long memory_limit, const py::object &progress) {
        return cluster(static_cast<size_t>(x_.shape(0)), preference, {damping, max_iter, convergence_iter, n_threads, memory_limit, progress},
                       [&](const std::vector<double> &p, const eimf_ap_options &options, int64_t *exemplars, int64_t *labels,
                           eimf_ap_result *result, eimf_error *error) {
                           return eimf_points_affinity_propagation(points_.get(), p.data(), p.size(), &options, exemplars, labels, result, error);
                       });
    }

    std::string repr() const { return "<eimf_core.Points: " + shape_text(x_) + ">"; }

private:
    struct Destroy {
        void operator()(eimf_points *points) const { eimf_points_destroy(points); }
    };
    py::array x_;
    std::unique_ptr<eimf_points, Destroy> points_;
};

Clustering affinity_propagation_sparse(const py::object &indptr, const py::object &indices, const py::object &similarity,
                                       const py::object &preference, double damping, long long max_iter, long long convergence_iter,
                                       long long n_threads, long long memory_limit, const py::object &progress) {
    const py::array starts = checked<int64_t>(indptr, "indptr", "(n + 1,)", 1);
    const py::array columns = checked<int64_t>(indices, "indices", "(edges,)", 1);
    const py::array values = checked<float>(similarity, "similarity", "(edges,)", 1);
    if (starts.shape(0) == 0) throw py::value_error("indptr: found shape (0,); expected (n + 1,)");
    const size_t n = static_cast<size_t>(starts.shape(0) - 1);
    const int64_t *start = static_cast<const int64_t *>(starts.data());
    if (columns.shape(0) != start[n] || values.shape(0) != start[n])
        throw py::value_error("indptr ends with " + std::to_string(start[n]) + ", indices has " + std::to_string(columns.shape(0)) +
                              " and similarity " + std::to_string(values.shape(0)) + " elements; expected three equal numbers");
    return cluster(n, preference, {damping, max_iter, convergence_iter, n_threads, memory_limit, progress},
                   [&](const std::vector<double> &p, const eimf_ap_options &options, int64_t *exemplars, int64_t *labels,
                       eimf_ap_result *result, eimf_error *error) {
                       return eimf_affinity_propagation_sparse(start, static_cast<const int64_t *>(columns.data()),
                                                               static_cast<const float *>(values.data()), n, p.data(), p.size(), &options,
                                                               exemplars, labels, result, error);
                   });
}

// -------------------------------------------------------------------------------------------------------------- top_n

// A catalogue prepared for many calls. Keeps the array alive.
class Items {
public:
    Items(const py::object &items, const std::string &kernel) : table_(checked<float>(items, "items", "(N, D)", 2)) {
        const eimf_kernel chosen = kernel_named(kernel);
        eimf_items *prepared = nullptr;
        eimf_error error{};
        eimf_status status;
        {
            py::gil_scoped_release nogil;
            status = eimf_items_create(static_cast<const float *>(table_.data()), static_cast<size_t>(table_.shape(0)),
                                       static_cast<size_t>(table_.shape(1)), chosen, nullptr, &prepared, &error);
        }
        raise(status, error);
        prepared_.reset(prepared);
    }
    const py::array &table() const { return table_; }
    const eimf_items *prepared() const { return prepared_.get(); }
    std::string repr() const { return "<eimf_core.Items: " + shape_text(table_) + ">"; }

private:
    struct Destroy {
        void operator()(eimf_items *prepared) const { eimf_items_destroy(prepared); }
    };
    py::array table_;
    std::unique_ptr<eimf_items, Destroy> prepared_;
};

py::tuple top_n(const py::object &interests, const py::object &items, long long n, const py::object &exclude_indptr,
                const py::object &exclude_indices, const py::object &allowed, long long n_threads, const std::string &kernel, bool reference) {
    const py::array queries = checked<float>(interests, "interests", "(B, K, D)", 3);
    const Items *prepared = py::isinstance<Items>(items) ? &items.cast<const Items &>() : nullptr;
    const py::array table = prepared ? prepared->table() : checked<float>(items, "items", "(N, D)", 2);
    if (queries.shape(2) != table.shape(1))
        throw py::value_error("interests have shape " + shape_text(queries) + " and items " + shape_text(table) + "; expected (B, K, D) and (N, D) with the same D");
    if (n < 0) throw py::value_error("n is " + std::to_string(n) + "; expected 0 or more");
    eimf_top_n_options options = eimf_top_n_defaults();
    options.n_threads = thread_count(n_threads);
    options.kernel = kernel_named(kernel);
    if (exclude_indptr.is_none() != exclude_indices.is_none())
        throw py::value_error("exclude_indptr and exclude_indices belong together; only one was given");
    py::array starts, excluded, mask;
    if (!exclude_indptr.is_none()) {
        starts = checked<int64_t>(exclude_indptr, "exclude_indptr", "(B + 1,)", 1);
        excluded = checked<int64_t>(exclude_indices, "exclude_indices", "(excluded,)", 1);
        options.exclude_indptr = static_cast<const int64_t *>(starts.data());
        options.exclude_indices = static_cast<const int64_t *>(excluded.data());
        if (starts.shape(0) != queries.shape(0) + 1 || options.exclude_indptr[queries.shape(0)] != excluded.shape(0))
            throw py::value_error("exclude_indptr has shape " + shape_text(starts) + " for " + std::to_string(queries.shape(0)) +
                                  " users and exclude_indices has " + std::to_string(excluded.shape(0)) +
                                  " elements; expected (B + 1,), the last of them the number of excluded items");
    }
    if (!allowed.is_none()) {
        mask = checked<bool>(allowed, "allowed", "(N,)", 1);
        if (mask.shape(0) != table.shape(0))
            throw py::value_error("allowed: found shape " + shape_text(mask) + "; expected (" + std::to_string(table.shape(0)) + ",), one for each item");
        options.allowed = static_cast<const uint8_t *>(mask.data());
    }
    const py::ssize_t users = queries.shape(0), count = static_cast<py::ssize_t>(n);
    py::array_t<int64_t> ids = results<int64_t>(users, count);
    py::array_t<float> scores = results<float>(users, count);
    py::array_t<int32_t> winner = results<int32_t>(users, count);
    int64_t *ids_data = ids.mutable_data();
    float *scores_data = scores.mutable_data();
    int32_t *winner_data = winner.mutable_data();
    eimf_error error{};
    eimf_status status;
    {
        py::gil_scoped_release nogil;
        const float *rows = static_cast<const float *>(queries.data());
        const size_t b = static_cast<size_t>(users), k = static_cast<size_t>(queries.shape(1)), d = static_cast<size_t>(queries.shape(2));
        if (prepared)
            status = eimf_items_top_n(prepared->prepared(), rows, b, k, static_cast<size_t>(n), &options, ids_data, scores_data, winner_data, &error);
        else
            status = (reference ? eimf_top_n_reference : eimf_top_n)(rows, b, k, d, static_cast<const float *>(table.data()),
                                                                     static_cast<size_t>(table.shape(0)), static_cast<size_t>(n), &options,
                                                                     ids_data, scores_data, winner_data, &error);
    }
    raise(status, error);
    return py::make_tuple(ids, scores, winner);
}

py::tuple diversify(const py::object &ids, const py::object &scores, const py::object &category, long long n, double penalty, long long n_threads) {
    const py::array candidates = checked<int64_t>(ids, "ids", "(B, C)", 2), values = checked<float>(scores, "scores", "(B, C)", 2);
    const py::array categories = checked<int32_t>(category, "category", "(N,)", 1);
    if (candidates.shape(0) != values.shape(0) || candidates.shape(1) != values.shape(1))
        throw py::value_error("ids have shape " + shape_text(candidates) + " and scores " + shape_text(values) + "; expected the same");
    if (n < 0) throw py::value_error("n is " + std::to_string(n) + "; expected 0 or more");
    const py::ssize_t users = candidates.shape(0), count = static_cast<py::ssize_t>(n);
    const size_t threads = thread_count(n_threads);
    py::array_t<int64_t> chosen = results<int64_t>(users, count);
    py::array_t<float> chosen_scores = results<float>(users, count);
    int64_t *chosen_data = chosen.mutable_data();
    float *scores_data = chosen_scores.mutable_data();
    eimf_error error{};
    eimf_status status;
    {
        py::gil_scoped_release nogil;
        status = eimf_diversify(static_cast<const int64_t *>(candidates.data()), static_cast<const float *>(values.data()), static_cast<size_t>(users),
                                static_cast<size_t>(candidates.shape(1)), static_cast<const int32_t *>(categories.data()),
                                static_cast<size_t>(categories.shape(0)), static_cast<size_t>(n), static_cast<float>(penalty), threads, chosen_data,
                                scores_data, &error);
    }
    raise(status, error);
    return py::make_tuple(chosen, chosen_scores);
}

py::tuple softmax_loss(const py::object &queries, const py::object &items, const py::object &target, const py::object &weight,
                       const py::object &excluded, bool item_gradient, long long n_threads, const std::string &kernel) {
    const py::array rows = checked<float>(queries, "queries", "(B, D)", 2), table = checked<float>(items, "items", "(N, D)", 2);
    const py::array wanted = checked<int64_t>(target, "target", "(B,)", 1), weights = checked<float>(weight, "weight", "(B,)", 1);
    const py::array left_out = checked<int64_t>(excluded, "excluded", "(X,)", 1);
    const py::ssize_t b = rows.shape(0), n = table.shape(0), d = table.shape(1);
    if (rows.shape(1) != d || wanted.shape(0) != b || weights.shape(0) != b)
        throw py::value_error("queries have shape " + shape_text(rows) + ", items " + shape_text(table) + ", target " + shape_text(wanted) + " and weight " +
                              shape_text(weights) + "; expected (B, D), (N, D), (B,) and (B,)");
    const size_t threads = thread_count(n_threads);
    const eimf_kernel chosen = kernel_named(kernel);
    py::array_t<float> losses(b), query_gradient = results<float>(b, d);
    py::object gradient = py::none();
    float *gradient_data = nullptr;
    if (item_gradient) {
        py::array_t<float> made = results<float>(n, d);
        gradient_data = made.mutable_data();
        gradient = made;
    }
    float *losses_data = losses.mutable_data(), *query_data = query_gradient.mutable_data();
    eimf_error error{};
    eimf_status status;
    {
        py::gil_scoped_release nogil;
        status = eimf_softmax_loss(static_cast<const float *>(rows.data()), static_cast<size_t>(b), static_cast<const float *>(table.data()),
                                   static_cast<size_t>(n), static_cast<size_t>(d), static_cast<const int64_t *>(wanted.data()),
                                   static_cast<const float *>(weights.data()), static_cast<const int64_t *>(left_out.data()),
                                   static_cast<size_t>(left_out.shape(0)), threads, chosen, nullptr, losses_data, query_data, gradient_data, &error);
    }
    raise(status, error);
    return py::make_tuple(losses, query_gradient, gradient);
}

}  // namespace

PYBIND11_MODULE(eimf_core, m) {
    m.doc() = "Affinity propagation, exact multi-interest top-n scoring and the softmax loss over all items. Same results for every number of threads.";
    m.attr("__version__") = eimf_version();

    py::class_<Clustering>(m, "Clustering", "Result of affinity propagation.")
        .def_readonly("exemplars", &Clustering::exemplars, "(m,) int64, ascending: the points that stand for a cluster.")
        .def_readonly("labels", &Clustering::labels, "(n,) int64: each point's cluster, a position in `exemplars`; -1 (sparse only) without one.")
        .def_readonly("n_iter", &Clustering::n_iter, "Iterations done; 0 if the answer needed none.")
        .def_readonly("converged", &Clustering::converged, "False: max_iter was reached, and this is the best of the last convergence_iter states and (not sparse) one cluster.")
        .def_readonly("net_similarity", &Clustering::net_similarity, "Sum of similarities to the exemplars plus the exemplars' preferences.")
        .def_readonly("n_unassigned", &Clustering::n_unassigned, "Points with label -1.")
        .def_readonly("peak_bytes", &Clustering::peak_bytes, "Most work memory that was held at once, in bytes.")
        .def("__repr__", [](const Clustering &c) {
            return "<eimf_core.Clustering: " + std::to_string(c.exemplars.size()) + " clusters of " + std::to_string(c.labels.size()) + " points, " +
                   (c.converged ? "converged" : "not converged") + " after " + std::to_string(c.n_iter) + " iterations>";
        });

    m.def("affinity_propagation", [](const py::object &x, const py::object &preference, double damping, long long max_iter,
                                     long long convergence_iter, long long n_threads, bool precomputed, long long memory_limit, const py::object &progress) {
              return affinity_propagation(x, preference, damping, max_iter, convergence_iter, n_threads, precomputed, memory_limit, progress, false);
          },
          py::arg("x"), py::arg("preference"), py::kw_only(), py::arg("damping") = 0.5, py::arg("max_iter") = 200,
          py::arg("convergence_iter") = 15, py::arg("n_threads") = 0, py::arg("precomputed") = false,
          py::arg("memory_limit") = 0, py::arg("progress") = py::none(),
          R"(Cluster by affinity propagation (Frey and Dueck 2007), exactly, without n x n memory unless
the preference is so low that only few clusters form (see eimf.h; memory_limit can forbid it).

x: float32 (n, d) points, similarity = minus squared Euclidean distance; or float32 (n, n) similarities if `precomputed`,
    row i holding how well each k would serve as i's exemplar (the diagonal is ignored).
preference: similarity of a point to itself, a number or an array (n,); lower gives fewer clusters.
damping, max_iter, convergence_iter: as in scikit-learn. n_threads: 0 for all cores.
memory_limit: most bytes of work memory to take, 0 for the machine's physical memory.
progress: called as progress(iteration, exemplars) after each iteration, and with 0, 0 while neighbours are searched; what it
    raises ends the run.

Equal points are merged first and other ties decided by index, without random numbers. Returns a Clustering. Raises
ValueError for a wrong dtype, shape or layout, for NaN or infinities, and when memory does not suffice.)");

    py::class_<Points>(m, "Points", R"(Points for several runs of affinity propagation, as a search for the preference makes them.

Points(x, *, memory_limit=0): x float32 (n, d), kept and not copied; it must not change. The neighbour search, usually the largest
part of a run, is done in the first run only. Each run gives what the function affinity_propagation gives. One at a time: a run
while another one is going on, as from its progress callback, raises ValueError.)")
        .def(py::init<const py::object &, long long>(), py::arg("x"), py::kw_only(), py::arg("memory_limit") = 0)
        .def("affinity_propagation", &Points::affinity_propagation, py::arg("preference"), py::kw_only(), py::arg("damping") = 0.5,
             py::arg("max_iter") = 200, py::arg("convergence_iter") = 15, py::arg("n_threads") = 0, py::arg("memory_limit") = 0,
             py::arg("progress") = py::none(), "As the function of this name; memory_limit and peak_bytes count the lists that are kept.")
        .def("__repr__", &Points::repr);

    m.def("affinity_propagation_sparse", &affinity_propagation_sparse, py::arg("indptr"), py::arg("indices"), py::arg("similarity"),
          py::arg("preference"), py::kw_only(), py::arg("damping") = 0.5, py::arg("max_iter") = 200, py::arg("convergence_iter") = 15,
          py::arg("n_threads") = 0, py::arg("memory_limit") = 0, py::arg("progress") = py::none(),
          R"(Affinity propagation over a CSR neighbour graph, O(edges) per iteration.

indptr: int64 (n + 1,). indices: int64 (edges,), row i's candidate exemplars, each once; entries i are ignored.
similarity: float32 (edges,). All other pairs count as minus infinity. The rest is as for affinity_propagation.
A point without an edge to any exemplar gets label -1; `n_unassigned` counts them.)");

    py::class_<Items>(m, "Items", R"(A catalogue prepared for many calls of top_n with few users each.

Items(items, *, kernel='auto'): items float32 (N, D), kept and not copied; it must not change. Its vectors are checked once and
also kept in the kernel's own order, which takes as much memory again. Threads may share one object.)")
        .def(py::init<const py::object &, const std::string &>(), py::arg("items"), py::kw_only(), py::arg("kernel") = "auto")
        .def_property_readonly("shape", [](const Items &items) { return py::make_tuple(items.table().shape(0), items.table().shape(1)); }, "(N, D)")
        .def("__repr__", &Items::repr);

    m.def("top_n", [](const py::object &interests, const py::object &items, long long n, const py::object &exclude_indptr,
                      const py::object &exclude_indices, const py::object &allowed, long long n_threads, const std::string &kernel) {
              return top_n(interests, items, n, exclude_indptr, exclude_indices, allowed, n_threads, kernel, false);
          },
          py::arg("interests"), py::arg("items"), py::arg("n"), py::kw_only(), py::arg("exclude_indptr") = py::none(),
          py::arg("exclude_indices") = py::none(), py::arg("allowed") = py::none(), py::arg("n_threads") = 0, py::arg("kernel") = "auto",
          R"(The n items with the highest score, score = maximum over a user's K interests of interest . item. Exact.

interests: float32 (B, K, D). items: float32 (N, D), at most 2^32 - 2 rows, or Items, which suits calls with few users.
exclude_indptr, exclude_indices: int64 (B + 1,) and (excluded,): CSR lists of items that a user must not get.
allowed: bool (N,): items that may be returned at all. n_threads: 0 for all cores.
kernel: 'auto', 'scalar', 'avx2', 'avx2int8', 'avx512', 'avx512vnni' or 'neon'; all give the same bits.

Returns ids int64 (B, n), scores float32 (B, n), winning interest int32 (B, n), best first, ties by lower id; -1, -inf and
-1 where fewer than n items remain. Raises ValueError for a wrong dtype, shape or layout, and for NaN or infinities.)");

    m.def("diversify", &diversify, py::arg("ids"), py::arg("scores"), py::arg("category"), py::arg("n"), py::kw_only(), py::arg("penalty"),
          py::arg("n_threads") = 0,
          R"(Re-rank each user's candidates for diversity (ComiRec's controllable re-ranking, greedy).

n times, the remaining candidate with the largest score - penalty * (chosen items of the same category) is chosen, equal ones
in their order. ids int64 (B, C) and scores float32 (B, C): as top_n returns them; -1 entries are skipped. category: int32 (N,)
of each item, -1 for items that share theirs with no other. Returns ids int64 (B, n) and their scores float32 (B, n), padded
with -1 and -inf.)");

    m.def("softmax_loss", &softmax_loss, py::arg("queries"), py::arg("items"), py::arg("target"), py::arg("weight"), py::arg("excluded"), py::kw_only(),
          py::arg("item_gradient") = true, py::arg("n_threads") = 0, py::arg("kernel") = "auto",
          R"(Softmax loss over all items and its gradients, for training: log sum_i exp(query . item i) - query . target.

queries: float32 (B, D). items: float32 (N, D). target: int64 (B,). weight: float32 (B,). excluded: int64 (X,), items that are no class.
Returns losses float32 (B,), and the gradients of the sum of weight * loss: by queries (B, D), by items (N, D) or None without
`item_gradient`. A row of weight 0 has loss 0. kernel: as for top_n; all give the same bits, for every number of threads.)");

    m.def("_top_n_reference", [](const py::object &interests, const py::object &items, long long n, const py::object &exclude_indptr,
                                 const py::object &exclude_indices, const py::object &allowed) {
              return top_n(interests, items, n, exclude_indptr, exclude_indices, allowed, 1, "auto", true);
          },
          py::arg("interests"), py::arg("items"), py::arg("n"), py::kw_only(), py::arg("exclude_indptr") = py::none(),
          py::arg("exclude_indices") = py::none(), py::arg("allowed") = py::none(), "top_n by the plain loop, for tests.");

    m.def("_affinity_propagation_reference", [](const py::object &s, const py::object &preference, double damping, long long max_iter,
                                                long long convergence_iter) {
              return affinity_propagation(s, preference, damping, max_iter, convergence_iter, 1, true, 0, py::none(), true);
          },
          py::arg("s"), py::arg("preference"), py::kw_only(), py::arg("damping") = 0.5, py::arg("max_iter") = 200,
          py::arg("convergence_iter") = 15, "affinity_propagation on similarities by the plain loops, O(n^3) per iteration, for tests.");

    m.def("affinity_propagation_bytes", [](long long n, long long d) {
              if (n < 0 || d < 0) throw py::value_error("n and d must not be negative");
              return eimf_affinity_propagation_bytes(static_cast<size_t>(n), static_cast<size_t>(d));
          },
          py::arg("n"), py::arg("d"),
          "Work memory in bytes of affinity_propagation for n points of d dimensions at usual preferences. As memory_limit it suffices then; without a limit more "
          "may be taken, where that is faster.");

    m.def("kernels", [] {
              py::list names;
              for (const eimf_kernel kernel : KERNELS)
                  if (const char *name = eimf_kernel_name(kernel)) names.append(name);
              return names;
          },
          "Names of the scoring kernels this CPU can run, slowest first.");
}
