// Which of the compiled instruction sets runs: the best that the machine has, or the one that LINATTN_CPU_CAPABILITY
// names.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace linattn {

// The variable names a set that is compiled in and that this machine lacks.
class UnavailableIsa : public std::invalid_argument {
public:
    using std::invalid_argument::invalid_argument;
};

// In order: each one also has everything before it. portable: 128-bit vectors of the base architecture (SSE2, NEON).
// amx: AVX-512 throughout, and bf16 products by tiles.
enum class Isa { portable, avx2, avx512, amx };

// What the process computes with. Read once, at the first call. Throws std::invalid_argument when the variable names
// something unknown, UnavailableIsa when it names something this machine lacks.
Isa selected_isa();

const char* isa_name(Isa isa);

// The names of all that this machine can run, worst first.
std::vector<std::string> supported_isas();

}  // namespace linattn
