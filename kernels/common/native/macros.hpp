// Attributes and checks of the C++ sources.
#pragma once

// An inline function that sources of several instruction sets share must be inlined: else the linker keeps one copy,
// and that may be the one with the larger set.
#define LINATTN_INLINE inline __attribute__((always_inline))

// Preconditions where functions begin. Checked in Debug builds and under the sanitizers (LINATTN_CHECKED,
// CMakeLists.txt), where a false one prints its place and aborts; free of cost elsewhere.
#if defined(LINATTN_CHECKED)
namespace linattn {
[[noreturn]] void fail_assertion(const char* condition, const char* file, int line);
}
#define LINATTN_ASSERT(condition) \
    (static_cast<bool>(condition) ? void() : ::linattn::fail_assertion(#condition, __FILE__, __LINE__))
#else
#define LINATTN_ASSERT(condition) static_cast<void>(true || (condition))
#endif
