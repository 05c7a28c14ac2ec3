// linattn._native: the only file that knows nanobind.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "machine.hpp"

namespace nb = nanobind;

namespace {

std::string compiler() {
#if defined(__clang__)
    return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
    return "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#else
    return "unknown";
#endif
}

const char* architecture() {
#if defined(__x86_64__)
    return "x86_64";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "other";
#endif
}

nb::dict build_info() {
    nb::dict info;
    info["version"] = LINATTN_VERSION;
    info["compiler"] = compiler();
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["architecture"] = architecture();
    info["build_type"] = LINATTN_BUILD_TYPE;
#if defined(Py_LIMITED_API)
    info["stable_abi"] = true;
#else
    info["stable_abi"] = false;
#endif
    return info;
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native part of linattn: answers questions about the machine.";
    module.def("instruction_sets", &linattn::instruction_sets,
               "Names of the instruction sets that this process may use, as Linux spells them.");
    module.def("hardware_threads", &linattn::hardware_threads, "How many threads this process may run at once.");
    module.def("build_info", &build_info, "Version, compiler, C++ standard, architecture, build type, stable ABI or not.");
}
