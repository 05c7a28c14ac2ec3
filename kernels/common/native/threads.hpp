// Threads and scratch memory. Parallel regions are OpenMP's, on the runtime that torch has loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace linattn {

// How many threads a region may use: the number asked for, or 1 in a child that was forked after a region had run,
// because the runtime's workers do not survive a fork and waiting for them would never end.
int usable_threads(int asked);

// Call work(thread, threads) once in each of `threads` threads. No exception may leave `work`.
template <class Work>
void in_parallel(int asked, const Work& work) {
    const int threads = usable_threads(asked);
    if (threads == 1) {
        work(0, 1);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
#endif
}

// All threads of the region wait for each other.
inline void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

// Numbers 0, 1, ... to whoever comes first.
class Queue {
public:
    __attribute__((always_inline)) std::int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }

private:
    std::int64_t next_ = 0;
};

// Memory of the calling thread that lives until the end of a scope and is kept for the next call: allocating anew costs
// some percent in page faults. 64-byte aligned, not initialised. Scopes nest.
class Scratch {
public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    __attribute__((always_inline)) T* take(std::size_t count) {
        return static_cast<T*>(take_bytes(count * sizeof(T)));
    }

private:
    void* take_bytes(std::size_t bytes);
    std::size_t blocks_before_, used_before_;
};

}  // namespace linattn
