// Threads and scratch memory. Parallel regions are OpenMP's, on the runtime that torch has loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/native/attention_problem.hpp"
#include "common/native/macros.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace linattn {

// How many threads a region may use: the number asked for, or 1 in a child that was forked after a region had run,
// because the runtime's workers do not survive a fork and waiting for them would never end.
int usable_threads(int asked);

// Call work(thread, threads) once in each of `threads` threads. No exception may leave `work`. (A template over the
// type of a lambda: no two instruction sets share an instance.)
template <class Work>
void run_parallel(int asked, const Work& work) {
    LINATTN_ASSERT(asked >= 1);
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
LINATTN_INLINE void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

// Numbers 0, 1, ... to whoever comes first.
class Queue {
public:
    LINATTN_INLINE Index pop() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }

private:
    Index next_ = 0;
};

// The threads that work on one task together: all of them call work(task, team) with the same task.
class Team {
public:
    struct Meeting;

    LINATTN_INLINE Team(Meeting* meeting, int team_member, int team_size)
        : member(team_member), size(team_size), meeting_(meeting) {}

    // Every member has come this far, and sees what the others wrote before.
    void wait();

    // The address that the first member gives.
    void* broadcast(void* mine);

    // This member's share of 0 .. count: from begin to end.
    template <class T>
    LINATTN_INLINE T begin(T count) const {
        return static_cast<T>(Index{count} * member / size);
    }
    template <class T>
    LINATTN_INLINE T end(T count) const {
        return static_cast<T>(Index{count} * (member + 1) / size);
    }

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
    alignas(64) Queue queue_;
};

// Call work(schedule, thread) in each of at most `asked` threads, which share a schedule of `tasks` tasks.
template <class Work>
void run_scheduled(int asked, Index tasks, const Work& work) {
    TeamSchedule* schedule = nullptr;
    run_parallel(asked, [&](int thread, int threads) {
        if (thread == 0) schedule = new TeamSchedule(threads, tasks);
        if (threads > 1) barrier();
        work(*schedule, thread);
    });
    delete schedule;
}

// Call work(task, team) for each of `tasks` tasks, in teams of at most `asked` threads together.
template <class Work>
void run_in_teams(int asked, Index tasks, const Work& work) {
    run_scheduled(asked, tasks, [&](TeamSchedule& schedule, int thread) {
        Team team = schedule.team(thread);
        Index done = 0;
        for (Index task = schedule.next(thread, done); task >= 0; task = schedule.next(thread, ++done))
            work(task, team);
    });
}

// Call work(team) once in each of at most `asked` threads, which are one team.
template <class Work>
void run_in_one_team(int asked, const Work& work) {
    run_scheduled(asked, 1, [&](TeamSchedule& schedule, int thread) {
        Team team = schedule.team(thread);
        work(team);
    });
}

// Memory of the calling thread that lives until the end of a scope and is kept for the next call: allocating anew costs
// some percent in page faults. 64-byte aligned, not initialised. Scopes nest.
class Scratch {
public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    LINATTN_INLINE T* allocate(Index count) {
        LINATTN_ASSERT(count >= 0);
        return static_cast<T*>(allocate_bytes(static_cast<std::size_t>(count) * sizeof(T)));
    }

private:
    void* allocate_bytes(std::size_t bytes);
    std::size_t blocks_before_, used_before_;
};

}  // namespace linattn
