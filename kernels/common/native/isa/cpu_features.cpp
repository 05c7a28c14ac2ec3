#include "common/native/isa/cpu_features.hpp"

#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace linattn {
namespace {

#if defined(__x86_64__)

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros when the processor does not know the leaf.
Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// XCR0: the register files that the operating system saves on a context switch. Call only when CPUID reports OSXSAVE.
std::uint64_t saved_register_files() {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB tile register file per process, and only on request. Children inherit the grant.
bool request_amx_tiles() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM, absent from older headers
    constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

bool bit(std::uint64_t word, int index) { return (word >> index) & 1U; }

std::vector<std::string> detect() {
    const Registers basic = cpuid(1, 0);
    const Registers extended = cpuid(7, 0);
    const Registers extended_1 = cpuid(7, 1);
    const std::uint64_t saved = bit(basic.ecx, 27) ? saved_register_files() : 0;
    const bool saves_ymm = (saved & 0x06) == 0x06;               // SSE and AVX state
    const bool saves_zmm = saves_ymm && (saved & 0xe0) == 0xe0;  // opmask, upper halves, registers 16 to 31
    const bool saves_tiles = (saved & 0x60000) == 0x60000;       // tile configuration and data
    const bool amx = saves_tiles && bit(extended.edx, 24) && request_amx_tiles();

    std::vector<std::string> names;
    const auto add = [&names](const char* name, bool present) {
        if (present) names.emplace_back(name);
    };
    add("sse4_1", bit(basic.ecx, 19));
    add("sse4_2", bit(basic.ecx, 20));
    add("avx", saves_ymm && bit(basic.ecx, 28));
    add("f16c", saves_ymm && bit(basic.ecx, 29));
    add("fma", saves_ymm && bit(basic.ecx, 12));
    add("avx2", saves_ymm && bit(extended.ebx, 5));
    add("avx_vnni", saves_ymm && bit(extended_1.eax, 4));
    add("avx512f", saves_zmm && bit(extended.ebx, 16));
    add("avx512dq", saves_zmm && bit(extended.ebx, 17));
    add("avx512bw", saves_zmm && bit(extended.ebx, 30));
    add("avx512vl", saves_zmm && bit(extended.ebx, 31));
    add("avx512_vnni", saves_zmm && bit(extended.ecx, 11));
    add("avx512_bf16", saves_zmm && bit(extended_1.eax, 5));
    add("avx512_fp16", saves_zmm && bit(extended.edx, 23));
    add("amx_tile", amx);
    add("amx_bf16", amx && bit(extended.edx, 22));
    add("amx_int8", amx && bit(extended.edx, 25));
    return names;
}

#elif defined(__aarch64__) && defined(__linux__)

std::vector<std::string> detect() {
    const unsigned long first = getauxval(AT_HWCAP);
    const unsigned long second = getauxval(AT_HWCAP2);
    std::vector<std::string> names;
    const auto add = [&names](const char* name, unsigned long word, unsigned long flag) {
        if (word & flag) names.emplace_back(name);
    };
    add("asimd", first, HWCAP_ASIMD);
    add("asimdhp", first, HWCAP_ASIMDHP);
    add("asimddp", first, HWCAP_ASIMDDP);
    add("sve", first, HWCAP_SVE);
#if defined(HWCAP2_SVE2)
    add("sve2", second, HWCAP2_SVE2);
#endif
#if defined(HWCAP2_I8MM)
    add("i8mm", second, HWCAP2_I8MM);
#endif
#if defined(HWCAP2_BF16)
    add("bf16", second, HWCAP2_BF16);
#endif
    return names;
}

#elif defined(__aarch64__)

// Advanced SIMD is part of the base architecture.
std::vector<std::string> detect() { return {"asimd"}; }

#else

std::vector<std::string> detect() { return {}; }

#endif

}  // namespace

std::vector<std::string> cpu_features() {
    static const std::vector<std::string> names = detect();
    return names;
}

int hardware_threads() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count == 0 ? 1 : static_cast<int>(count);
}

}  // namespace linattn
