#include "common/native/isa/isa.hpp"

#include <algorithm>
#include <cstdlib>

#include "common/native/isa/cpu_features.hpp"

namespace linattn {
namespace {

constexpr Isa all[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx};

bool has_features(const std::vector<std::string>& required) {
    const std::vector<std::string> present = cpu_features();
    return std::all_of(required.begin(), required.end(), [&](const std::string& one) {
        return std::find(present.begin(), present.end(), one) != present.end();
    });
}

bool is_supported(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::portable: return true;
        case Isa::avx2: return has_features({"avx2", "fma", "f16c"});
        case Isa::avx512: return has_features({"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"});
        case Isa::amx: return is_supported(Isa::avx512) && has_features({"avx512_bf16", "amx_tile", "amx_bf16"});
    }
#endif
    return isa == Isa::portable;
}

Isa best_isa() {
    Isa found = Isa::portable;
    for (Isa one : all)
        if (is_supported(one)) found = one;
    return found;
}

Isa select_isa() {
    const char* asked = std::getenv("LINATTN_CPU_CAPABILITY");
    if (asked == nullptr || *asked == '\0') return best_isa();
    bool known = false;
    for (Isa one : all) {
        if (std::string(asked) != isa_name(one)) continue;
        if (is_supported(one)) return one;
        known = true;
    }
    std::string accepted;
    for (const std::string& one : supported_isas()) accepted += (accepted.empty() ? "" : ", ") + one;
    const std::string message =
        "LINATTN_CPU_CAPABILITY must be one that this machine has (" + accepted + "); given: " + asked;
    if (known) throw UnavailableIsa(message);
    throw std::invalid_argument(message);
}

}  // namespace

Isa selected_isa() {
    static const Isa value = select_isa();
    return value;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::amx: return "amx";
    }
    return "";
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (Isa one : all)
        if (is_supported(one)) names.emplace_back(isa_name(one));
    return names;
}

}  // namespace linattn
