// What the sources share: errors that become status codes, work memory, threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "eimf.h"

namespace eimf {

// Thrown inside the library only; `guarded` turns it into a status at the C boundary.
struct Failure {
    eimf_status status;
    eimf_error error;
};

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
[[noreturn]] inline void fail(eimf_status status, const char *format, ...) {
    Failure failure{status, {}};
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(failure.error.message, sizeof failure.error.message, format, arguments);
    va_end(arguments);
    throw failure;
}

// Run `body`; no exception leaves.
template <class Body>
eimf_status guarded(eimf_error *error, Body body) noexcept {
    Failure failure{EIMF_OK, {}};
    try {
        body();
    } catch (const Failure &caught) {
        failure = caught;
    } catch (const std::bad_alloc &) {
        failure.status = EIMF_ERROR_MEMORY;
        std::snprintf(failure.error.message, sizeof failure.error.message, "out of memory");
    } catch (const std::exception &caught) {
        failure.status = EIMF_ERROR_INTERNAL;
        std::snprintf(failure.error.message, sizeof failure.error.message, "internal error: %s", caught.what());
    } catch (...) {
        failure.status = EIMF_ERROR_INTERNAL;
        std::snprintf(failure.error.message, sizeof failure.error.message, "internal error");
    }
    if (error) *error = failure.error;
    return failure.status;
}

inline size_t checked_product(size_t a, size_t b) {
    if (b != 0 && a > std::numeric_limits<size_t>::max() / b)
        fail(EIMF_ERROR_MEMORY, "a buffer of %zu x %zu elements does not fit the address space", a, b);
    return a * b;
}

// `name`, an array of so many elements, may be NULL only if that is none.
inline void check_pointer(const void *pointer, const char *name, size_t elements = 1) {
    if (!pointer && elements) fail(EIMF_ERROR_ARGUMENT, "%s is NULL; expected a pointer", name);
}

// The caller's allocator with a limit and a high-water mark. Thread-safe.
class Memory {
public:
    Memory(const eimf_allocator &allocator, size_t limit) : allocator_(allocator), limit_(limit) {
        if (!allocator.allocate != !allocator.release) fail(EIMF_ERROR_ARGUMENT, "only one of allocator.allocate and allocator.release is NULL; expected both or none");
    }

    void *allocate(size_t bytes) {
        const size_t now = held_.fetch_add(bytes) + bytes;
        if (limit_ && now > limit_) {
            held_ -= bytes;
            fail(EIMF_ERROR_MEMORY, "%zu bytes of work memory are needed, memory_limit is %zu; use the sparse form or a sample",
                 now, limit_);
        }
        void *memory = allocator_.allocate ? allocator_.allocate(allocator_.context, bytes) : std::malloc(bytes);
        if (!memory) {
            held_ -= bytes;
            fail(EIMF_ERROR_MEMORY, "could not allocate %zu bytes (%zu held already)", bytes, held_.load());
        }
#if defined(__linux__)
        // Large pages, as NumPy asks for: fewer faults, and fewer misses of the address cache. A hint, so failure does not matter.
        constexpr uintptr_t page = 4096;
        const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
        if (bytes >= size_t{4} << 20) madvise(reinterpret_cast<void *>(first), bytes - page, MADV_HUGEPAGE);
#endif
        for (size_t seen = peak_; seen < now && !peak_.compare_exchange_weak(seen, now);) {}
        return memory;
    }

    void release(void *memory, size_t bytes) {
        held_ -= bytes;
        if (allocator_.release) allocator_.release(allocator_.context, memory, bytes);
        else std::free(memory);
    }

    // From now on. The high-water mark starts anew.
    void limit(size_t limit) {
        limit_ = limit;
        peak_ = held_.load();
    }

    // May so many bytes more be held?
    bool allows(size_t bytes) const { return !limit_ || (held_ <= limit_ && bytes <= limit_ - held_); }
    size_t peak() const { return peak_; }

private:
    eimf_allocator allocator_;
    size_t limit_;
    std::atomic<size_t> held_{0}, peak_{0};
};

// A fixed-size array of plain values from a Memory; 64-byte aligned, not initialised unless filled.
template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(Memory &memory, size_t size) : memory_(&memory), size_(size), bytes_(checked_product(size, sizeof(T)) + 64) {
        raw_ = memory.allocate(bytes_);
        data_ = reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t{63});
    }
    Buffer(Memory &memory, size_t size, T value) : Buffer(memory, size) {
        for (size_t i = 0; i < size; ++i) data_[i] = value;
    }
    Buffer(Buffer &&other) noexcept { swap(other); }
    Buffer &operator=(Buffer &&other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer() {
        if (raw_) memory_->release(raw_, bytes_);
    }
    void swap(Buffer &other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(raw_, other.raw_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(bytes_, other.bytes_);
    }
    T *data() { return data_; }
    const T *data() const { return data_; }
    size_t size() const { return size_; }
    T &operator[](size_t i) { return data_[i]; }
    const T &operator[](size_t i) const { return data_[i]; }
    T *begin() { return data_; }
    T *end() { return data_ + size_; }

private:
    Memory *memory_ = nullptr;
    void *raw_ = nullptr;
    T *data_ = nullptr;
    size_t size_ = 0, bytes_ = 0;
};

// Threads that live as long as the object and run one loop after another; the calling thread is one of them.
// Which thread runs which index is not fixed, so indices must not share anything that they write.
class Team {
public:
    explicit Team(size_t n_threads) {
        if (n_threads == 0) n_threads = std::thread::hardware_concurrency();
        if (n_threads > 1024) n_threads = 1024;
        threads_.reserve(n_threads);  // before any is started: a failure later would end the process, not only this call
        try {
            for (size_t t = 1; t < n_threads; ++t) threads_.emplace_back([this] { work(); });
        } catch (const std::exception &) {
            // The system gives no more threads, or no memory for them: go on with those there are.
        }
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto &thread : threads_) thread.join();
    }
    Team(const Team &) = delete;

    size_t size() const { return threads_.size() + 1; }

    // body(index) for all indices in [0, count). The first exception is rethrown here when all threads are done.
    void run(size_t count, const std::function<void(size_t)> &body) {
        if (threads_.empty() || count <= 1) {
            for (size_t i = 0; i < count; ++i) body(i);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = &body;
            count_ = count;
            next_ = 0;
            running_ = threads_.size();
            failure_ = nullptr;
            ++round_;
        }
        wake_.notify_all();
        loop();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        if (failure_) std::rethrow_exception(failure_);
    }

private:
    void loop() {
        try {
            for (size_t i; (i = next_.fetch_add(1)) < count_;) (*body_)(i);
        } catch (...) {
            next_ = count_;
            std::lock_guard<std::mutex> lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }
    void work() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stop_ || round_ != seen; });
            if (stop_) return;
            seen = round_;
            lock.unlock();
            loop();
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(size_t)> *body_ = nullptr;
    size_t count_ = 0, running_ = 0;
    std::atomic<size_t> next_{0};
    std::exception_ptr failure_;
    uint64_t round_ = 0;
    bool stop_ = false;
};

}  // namespace eimf
