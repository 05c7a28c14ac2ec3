#include "common/native/threads.hpp"

#include <atomic>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace linattn {
namespace {

std::atomic<bool> used{false}, forked{false};

void watch_for_forks() {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        if (used) forked = true;
    });
    (void)registered;
#endif
}

constexpr int spin_limit = 4000;  // turns that a thread waits for its team before it lets others run
constexpr int largest_team = 8;   // beyond it, members of one team would have too little work between two meetings

// A block beyond the largest is given back when nothing uses it: one very long call must not hold its memory for ever.
constexpr std::size_t alignment = 64, smallest_block = std::size_t{1} << 20, largest_kept = std::size_t{1} << 26;

// Blocks never move while a scope uses them; a call that needs more gets a further block.
struct Arena {
    struct Block {
        std::byte* data;
        std::size_t size;
    };
    std::vector<Block> blocks;
    std::size_t current = 0, used = 0;

    ~Arena() { shrink(0); }

    void shrink(std::size_t kept) {
        std::vector<Block> left;
        for (const Block& block : blocks) {
            if (block.size <= kept)
                left.push_back(block);
            else
                ::operator delete(block.data, std::align_val_t(alignment));
        }
        blocks.swap(left);
    }
};

thread_local Arena arena;

}  // namespace

int usable_threads(int asked) {
#if defined(_OPENMP)
    if (asked <= 1 || forked) return 1;
    watch_for_forks();
    used = true;
    return asked;
#else
    (void)asked;
    return 1;
#endif
}

struct alignas(64) Team::Meeting {
    std::atomic<int> arrived{0}, round{0};
    void* address = nullptr;
};

void Team::wait() {
    if (size == 1) return;
    const int round = meeting_->round.load(std::memory_order_acquire);
    if (meeting_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        meeting_->arrived.store(0, std::memory_order_relaxed);
        meeting_->round.store(round + 1, std::memory_order_release);
        return;
    }
    // The others come soon, unless they have to share a core with this thread.
    for (int turns = 0; meeting_->round.load(std::memory_order_acquire) == round; ++turns)
        if (turns >= spin_limit) std::this_thread::yield();
}

void* Team::broadcast(void* mine) {
    if (member == 0) meeting_->address = mine;
    wait();
    void* given = meeting_->address;
    wait();  // before the next is given
    return given;
}

TeamSchedule::TeamSchedule(int threads, Index tasks) : threads_(threads), teams_(threads), tasks_(tasks) {
    const Index rounds = (tasks + threads - 1) / threads;
    if (tasks < threads)
        teams_ = tasks > 0 ? static_cast<int>(tasks) : 1;
    else if (threads <= largest_team && tasks * 10 < rounds * threads * 9)
        teams_ = 1;
    meetings_ = new Team::Meeting[teams_];
}

TeamSchedule::~TeamSchedule() { delete[] meetings_; }

// As many threads in each, give or take one.
int TeamSchedule::team_of(int thread) const {
    return static_cast<int>((static_cast<Index>(thread) + 1) * teams_ - 1) / threads_;
}

Team TeamSchedule::team(int thread) const {
    const int mine = team_of(thread);
    int first = thread, last = thread;
    while (first > 0 && team_of(first - 1) == mine) --first;
    while (last + 1 < threads_ && team_of(last + 1) == mine) ++last;
    return {meetings_ + mine, thread - first, last - first + 1};
}

Index TeamSchedule::next(int thread, Index done) {
    const bool single = teams_ == threads_;
    const Index task = single ? queue_.pop() : team_of(thread) + done * teams_;
    return task < tasks_ ? task : -1;
}

Scratch::Scratch() : blocks_before_(arena.current), used_before_(arena.used) {}

Scratch::~Scratch() {
    arena.current = blocks_before_;
    arena.used = used_before_;
    if (arena.current == 0 && arena.used == 0) arena.shrink(largest_kept);
}

void* Scratch::allocate_bytes(std::size_t bytes) {
    bytes = (bytes + alignment - 1) / alignment * alignment;
    Arena& a = arena;
    while (a.current < a.blocks.size() && a.used + bytes > a.blocks[a.current].size) {
        ++a.current;
        a.used = 0;
    }
    if (a.current == a.blocks.size()) {
        const std::size_t size = bytes > smallest_block ? bytes : smallest_block;
        a.blocks.push_back({static_cast<std::byte*>(::operator new(size, std::align_val_t(alignment))), size});
        a.used = 0;
    }
    void* taken = a.blocks[a.current].data + a.used;
    a.used += bytes;
    return taken;
}

}  // namespace linattn
