#include "threads.hpp"

#include <atomic>
#include <new>
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

Scratch::Scratch() : blocks_before_(arena.current), used_before_(arena.used) {}

Scratch::~Scratch() {
    arena.current = blocks_before_;
    arena.used = used_before_;
    if (arena.current == 0 && arena.used == 0) arena.shrink(largest_kept);
}

void* Scratch::take_bytes(std::size_t bytes) {
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
