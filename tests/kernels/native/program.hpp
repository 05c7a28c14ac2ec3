// How the test programs end.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "common/native/isa/isa.hpp"

namespace test {

constexpr int failed = 1, skipped = 77;  // CMakeLists.txt: SKIP_RETURN_CODE

// Argument `index` of a program, a number; `otherwise` if it is not there.
inline unsigned argument(int count, char** words, int index, unsigned otherwise) {
    return count > index ? static_cast<unsigned>(std::strtoul(words[index], nullptr, 10)) : otherwise;
}

// The exit status of a program that computes `wrong()`, the number of wrong calls: skipped where the machine lacks the
// instruction set that is asked for, failed where something is wrong or an error comes out.
template <class Wrong>
int exit_status(const Wrong& wrong) {
    try {
        linattn::selected_isa();
        return wrong() == 0 ? 0 : failed;
    } catch (const linattn::UnavailableIsa& missing) {
        std::printf("skipped: %s\n", missing.what());
        return skipped;
    } catch (const std::exception& error) {
        std::printf("failed: %s\n", error.what());
        return failed;
    }
}

}  // namespace test
