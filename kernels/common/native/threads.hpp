// Threads and scratch memory. Parallel regions are OpenMP's, on the runtime that torch has loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_problem.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace linattn {

// How many threads a region may use: the number asked for, or 1 in a child that was forked after a region had run,
// because the runtime's workers do not survive a fork and waiting for them would never end.
int usable_threads(int asked);

// Call work(thread, threads) once in each of `threads` threads. No exception may leave `work`.
template <class Work>
void run_parallel(int asked, const Work& work) {
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

// The threads that work on one task together: all of them call work(task, team) with the same task.
class Team {
public:
    struct Meeting;

    Team(Meeting* meeting, int member, int size) : member(member), size(size), meeting_(meeting) {}

    // Every member has come this far, and sees what the others wrote before.
    void wait();

    // What the first member gives.
    void* broadcast(void* mine);

    const int member, size;

private:
    Meeting* meeting_;
};

// Tasks handed out to teams of a region's threads. Fewer tasks than threads: a team each. More: teams of one thread,
// which take the next task when they are done, or one team of all for each task in turn where the last round of single
// threads would leave many without work.
class TeamSchedule {
public:
    TeamSchedule(int threads, Index tasks);
    ~TeamSchedule();
    TeamSchedule(const TeamSchedule&) = delete;
    TeamSchedule& operator=(const TeamSchedule&) = delete;

    Team team(int thread) const;
    // The team's next task, or -1. `done` counts the team's tasks so far.
    Index next(int thread, Index done);

private:
    int team_of(int thread) const;

    int threads_, teams_;
    Index tasks_;
    Team::Meeting* meetings_;
};

// Call work(task, team) for each of `tasks` tasks, in teams of at most `asked` threads together.
template <class Work>
void run_in_teams(int asked, Index tasks, const Work& work) {
    TeamSchedule* teams = nullptr;
    run_parallel(asked, [&](int thread, int threads) {
        if (thread == 0) teams = new TeamSchedule(threads, tasks);
        if (threads > 1) barrier();
        Team team = teams->team(thread);
        Index done = 0;
        for (Index task = teams->next(thread, done); task >= 0; task = teams->next(thread, ++done)) work(task, team);
    });
    delete teams;
}

// Numbers 0, 1, ... to whoever comes first.
class Queue {
public:
    __attribute__((always_inline)) std::int64_t pop() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }

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
    __attribute__((always_inline)) T* allocate(std::size_t count) {
        return static_cast<T*>(allocate_bytes(count * sizeof(T)));
    }

private:
    void* allocate_bytes(std::size_t bytes);
    std::size_t blocks_before_, used_before_;
};

}  // namespace linattn
