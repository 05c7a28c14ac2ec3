#include "capability.hpp"

#include <algorithm>
#include <cstdlib>

#include "machine.hpp"

namespace linattn {
namespace {

constexpr Capability all[] = {Capability::portable, Capability::avx2, Capability::avx512, Capability::amx};

bool has(const std::vector<std::string>& wanted) {
    const std::vector<std::string> present = instruction_sets();
    return std::all_of(wanted.begin(), wanted.end(), [&](const std::string& one) {
        return std::find(present.begin(), present.end(), one) != present.end();
    });
}

bool runs(Capability capability) {
#if defined(__x86_64__)
    switch (capability) {
        case Capability::portable: return true;
        case Capability::avx2: return has({"avx2", "fma", "f16c"});
        case Capability::avx512: return has({"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"});
        case Capability::amx: return runs(Capability::avx512) && has({"avx512_bf16", "amx_tile", "amx_bf16"});
    }
#endif
    return capability == Capability::portable;
}

Capability best() {
    Capability found = Capability::portable;
    for (Capability one : all)
        if (runs(one)) found = one;
    return found;
}

Capability chosen() {
    const char* asked = std::getenv("LINATTN_CPU_CAPABILITY");
    if (asked == nullptr || *asked == '\0') return best();
    bool known = false;
    for (Capability one : all) {
        if (std::string(asked) != name(one)) continue;
        if (runs(one)) return one;
        known = true;
    }
    std::string accepted;
    for (const std::string& one : capabilities()) accepted += (accepted.empty() ? "" : ", ") + one;
    const std::string message =
        "LINATTN_CPU_CAPABILITY must be one that this machine has (" + accepted + "); given: " + asked;
    if (known) throw MissingInstructionSet(message);
    throw std::invalid_argument(message);
}

}  // namespace

Capability capability() {
    static const Capability value = chosen();
    return value;
}

const char* name(Capability capability) {
    switch (capability) {
        case Capability::portable: return "portable";
        case Capability::avx2: return "avx2";
        case Capability::avx512: return "avx512";
        case Capability::amx: return "amx";
    }
    return "";
}

std::vector<std::string> capabilities() {
    std::vector<std::string> names;
    for (Capability one : all)
        if (runs(one)) names.emplace_back(name(one));
    return names;
}

}  // namespace linattn
