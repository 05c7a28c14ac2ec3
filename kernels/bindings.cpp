// linattn._native. Only this file and kernels/recurrent/native/bindings.{hpp,cpp} know nanobind.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "common/native/attention_problem.hpp"
#include "common/native/isa/cpu_features.hpp"
#include "common/native/isa/isa.hpp"
#include "feature_map/native/feature_map.hpp"
#include "quadratic/native/quadratic.hpp"
#include "recurrent/native/bindings.hpp"

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
    info["cxx_standard"] = __cplusplus;
    info["architecture"] = architecture();
    info["build_type"] = LINATTN_BUILD_TYPE;
#if defined(Py_LIMITED_API)
    info["stable_abi"] = true;
#else
    info["stable_abi"] = false;
#endif
    return info;
}

using linattn::Index;

// Address, then the strides of B, H, T and the last dimension (which is 1), in elements.
using StridedTensor = std::array<Index, 5>;

// Of a state's tensors, n first; none if there is no state.
using Addresses = std::vector<Index>;

template <class T>
T* pointer(Index address) {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

linattn::TensorView tensor_view(const StridedTensor& t) { return {pointer<void>(t[0]), t[1], t[2], t[3]}; }

// kernels/common/native/binding.py calls this, and keeps the tensors alive.
void make_problem(linattn::AttentionProblem* self, int dtype, const std::array<Index, 7>& sizes, const StridedTensor& q,
                  const StridedTensor& k, const StridedTensor& v, Index key_mask, Index cu_seqlens, Index sequences,
                  bool is_causal, Index q_offset, double scale, bool normalize, int threads) {
    const auto [B, H, Hkv, Tq, Tk, D, M] = sizes;
    new (self) linattn::AttentionProblem{static_cast<linattn::Dtype>(dtype),
                                         B,
                                         H,
                                         Hkv,
                                         Tq,
                                         Tk,
                                         D,
                                         M,
                                         tensor_view(q),
                                         tensor_view(k),
                                         tensor_view(v),
                                         pointer<bool>(key_mask),
                                         pointer<Index>(cu_seqlens),
                                         sequences,
                                         is_causal,
                                         q_offset,
                                         static_cast<float>(scale),
                                         normalize,
                                         threads};
}

void make_quadratic_options(linattn::quadratic::Options* self, double c0, double c1, double c2, int form, Index chunk) {
    new (self) linattn::quadratic::Options{c0, c1, c2, static_cast<linattn::quadratic::Form>(form), chunk};
}

void make_feature_map_options(linattn::feature_map::Options* self, int map, Index chunk) {
    new (self) linattn::feature_map::Options{static_cast<linattn::feature_map::Map>(map), chunk};
}

// A call's state, if it has one: n, and pointers to sums for the rest of its fields.
template <class State>
class OptionalState {
public:
    explicit OptionalState(const Addresses& a) : present_(!a.empty()) {
        if (present_) set(a, std::make_index_sequence<sizeof(State) / sizeof(float*) - 1>{});
    }
    const State* get() const { return present_ ? &state_ : nullptr; }

private:
    template <std::size_t... field>
    void set(const Addresses& a, std::index_sequence<field...>) {
        state_ = {pointer<Index>(a.at(0)), pointer<float>(a.at(field + 1))...};
    }

    bool present_;
    State state_;
};

// The functions `<op>_forward` and `<op>_backward`.
template <class Options, class State>
void define_op(nb::module_& module, const std::string& op,
               void (*forward)(const linattn::AttentionForwardCall<Options, State>&),
               void (*backward)(const linattn::AttentionBackwardCall<Options, State>&)) {
    using linattn::AttentionProblem;
    module.def((op + "_forward").c_str(),
               [forward](const AttentionProblem& problem, const Options& options, const StridedTensor& out, Index l,
                         const Addresses& before, const Addresses& after) {
                   const OptionalState<State> first(before), last(after);
                   const nb::gil_scoped_release released;
                   forward({{options, problem, tensor_view(out), pointer<float>(l), first.get()}, last.get()});
               });
    module.def(
        (op + "_backward").c_str(),
        [backward](const AttentionProblem& problem, const Options& options, const StridedTensor& out, Index l,
                   const Addresses& before, const StridedTensor& dout, const StridedTensor& dq, const StridedTensor& dk,
                   const StridedTensor& dv, const Addresses& dafter, const Addresses& dbefore) {
            const OptionalState<State> first(before), dlast(dafter), dfirst(dbefore);
            const nb::gil_scoped_release released;
            backward({{options, problem, tensor_view(out), pointer<float>(l), first.get()},
                      tensor_view(dout),
                      tensor_view(dq),
                      tensor_view(dk),
                      tensor_view(dv),
                      dlast.get(),
                      dfirst.get()});
        });
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native part of linattn: the CPU kernels, and what there is to know about the machine.";
    module.def(
        "capability", [] { return linattn::isa_name(linattn::selected_isa()); },
        "The instruction set that kernels run on: LINATTN_CPU_CAPABILITY, or the best that this machine has.");
    module.def("capabilities", &linattn::supported_isas, "What LINATTN_CPU_CAPABILITY accepts on this machine.");
    nb::class_<linattn::AttentionProblem>(module, "AttentionProblem", "An attention call, as every op takes it.")
        .def("__init__", &make_problem);
    nb::class_<linattn::quadratic::Options>(module, "QuadraticOptions").def("__init__", &make_quadratic_options);
    nb::class_<linattn::feature_map::Options>(module, "FeatureMapOptions").def("__init__", &make_feature_map_options);
    define_op(module, "quadratic", linattn::quadratic::forward, linattn::quadratic::backward);
    define_op(module, "feature_map", linattn::feature_map::forward, linattn::feature_map::backward);
    linattn::recurrent::define_ops(module);
    module.def("instruction_sets", &linattn::cpu_features,
               "Names of the instruction sets that this process may use, as Linux spells them.");
    module.def("hardware_threads", &linattn::hardware_threads, "How many threads this process may run at once.");
    module.def("build_info", &build_info,
               "Version, compiler, C++ standard, architecture, build type, stable ABI or not.");
}
