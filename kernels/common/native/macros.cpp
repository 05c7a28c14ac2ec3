#include "common/native/macros.hpp"

#if defined(LINATTN_CHECKED)

#include <cstdio>
#include <cstdlib>

namespace linattn {

void fail_assertion(const char* condition, const char* file, int line) {
    std::fprintf(stderr, "%s:%d: precondition failed: %s\n", file, line, condition);
    std::abort();
}

}  // namespace linattn

#endif
