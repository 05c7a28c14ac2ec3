// linattn._native. This file and recurrent/bindings.cpp alone know nanobind.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <string>

#include "common/native/capability.hpp"
#include "common/native/machine.hpp"
#include "common/native/problem.hpp"
#include "feature_map/cpu.hpp"
#include "quadratic/cpu.hpp"
#include "recurrent/bindings.hpp"

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

using linattn::Index;

// Address, then the strides of B, H and T, in elements.
using Tensor = std::array<Index, 4>;

template <class T>
T* pointer(Index address) {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

linattn::Rows rows(const Tensor& t) { return {pointer<void>(t[0]), t[1], t[2], t[3]}; }

// kernels/common/cpu.py calls this, and keeps the tensors alive.
void make_problem(linattn::Problem* self, int dtype, const std::array<Index, 7>& sizes, const Tensor& q, const Tensor& k,
                  const Tensor& v, Index key_mask, Index cu_seqlens, Index sequences, bool is_causal, Index q_offset,
                  double scale, bool normalize, int threads) {
    const auto [B, H, Hkv, Tq, Tk, D, M] = sizes;
    new (self) linattn::Problem{static_cast<linattn::Dtype>(dtype), B, H, Hkv, Tq, Tk, D, M, rows(q), rows(k), rows(v),
                                pointer<bool>(key_mask), pointer<Index>(cu_seqlens), sequences, is_causal, q_offset,
                                static_cast<float>(scale), normalize, threads};
}

namespace quadratic {

using linattn::quadratic::State;

// n, k_sum, kk, v_sum, kv, kkv; all 0 if there is no state.
using Addresses = std::array<Index, 6>;

State state(const Addresses& a) {
    return {pointer<Index>(a[0]), pointer<float>(a[1]), pointer<float>(a[2]),
            pointer<float>(a[3]), pointer<float>(a[4]), pointer<float>(a[5])};
}

const State* if_any(const State& state) { return state.kkv == nullptr ? nullptr : &state; }

template <class Call>
Call make_call(const linattn::Problem& problem, const std::array<double, 3>& c, int form, Index chunk, const Tensor& out,
          Index l, const State& before) {
    Call call;
    call.problem = problem;
    call.c0 = c[0], call.c1 = c[1], call.c2 = c[2];
    call.form = static_cast<linattn::quadratic::Form>(form);
    call.chunk = chunk;
    call.out = rows(out);
    call.l = pointer<float>(l);
    call.before = if_any(before);
    return call;
}

void forward(const linattn::Problem& problem, const std::array<double, 3>& c, int form, Index chunk, const Tensor& out,
             Index l, const Addresses& before, const Addresses& after) {
    const State first = state(before), last = state(after);
    auto call = make_call<linattn::quadratic::ForwardCall>(problem, c, form, chunk, out, l, first);
    call.after = if_any(last);
    const nb::gil_scoped_release released;
    linattn::quadratic::forward(call);
}

void backward(const linattn::Problem& problem, const std::array<double, 3>& c, int form, Index chunk, const Tensor& out,
              Index l, const Addresses& before, const Tensor& dout, const Tensor& dq, const Tensor& dk,
              const Tensor& dv, const Addresses& dafter, const Addresses& dbefore) {
    const State first = state(before), dlast = state(dafter), dfirst = state(dbefore);
    auto call = make_call<linattn::quadratic::BackwardCall>(problem, c, form, chunk, out, l, first);
    call.dout = rows(dout);
    call.dq = rows(dq), call.dk = rows(dk), call.dv = rows(dv);
    call.dafter = if_any(dlast);
    call.dbefore = if_any(dfirst);
    const nb::gil_scoped_release released;
    linattn::quadratic::backward(call);
}

}  // namespace quadratic

namespace feature_map {

using linattn::feature_map::State;

// n, f_sum, fv; all 0 if there is no state.
using Addresses = std::array<Index, 3>;

State state(const Addresses& a) { return {pointer<Index>(a[0]), pointer<float>(a[1]), pointer<float>(a[2])}; }

const State* if_any(const State& state) { return state.fv == nullptr ? nullptr : &state; }

template <class Call>
Call make_call(const linattn::Problem& problem, int map, Index chunk, const Tensor& out, Index l, const State& before) {
    Call call;
    call.problem = problem;
    call.map = static_cast<linattn::feature_map::Map>(map);
    call.chunk = chunk;
    call.out = rows(out);
    call.l = pointer<float>(l);
    call.before = if_any(before);
    return call;
}

void forward(const linattn::Problem& problem, int map, Index chunk, const Tensor& out, Index l, const Addresses& before,
             const Addresses& after) {
    const State first = state(before), last = state(after);
    auto call = make_call<linattn::feature_map::ForwardCall>(problem, map, chunk, out, l, first);
    call.after = if_any(last);
    const nb::gil_scoped_release released;
    linattn::feature_map::forward(call);
}

void backward(const linattn::Problem& problem, int map, Index chunk, const Tensor& out, Index l,
              const Addresses& before, const Tensor& dout, const Tensor& dq, const Tensor& dk, const Tensor& dv,
              const Addresses& dafter, const Addresses& dbefore) {
    const State first = state(before), dlast = state(dafter), dfirst = state(dbefore);
    auto call = make_call<linattn::feature_map::BackwardCall>(problem, map, chunk, out, l, first);
    call.dout = rows(dout);
    call.dq = rows(dq), call.dk = rows(dk), call.dv = rows(dv);
    call.dafter = if_any(dlast);
    call.dbefore = if_any(dfirst);
    const nb::gil_scoped_release released;
    linattn::feature_map::backward(call);
}

}  // namespace feature_map
}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native part of linattn: the CPU kernels, and what there is to know about the machine.";
    module.def("capability", [] { return linattn::name(linattn::capability()); },
               "The instruction set that kernels run on: LINATTN_CPU_CAPABILITY, or the best that this machine has.");
    module.def("capabilities", &linattn::capabilities, "What LINATTN_CPU_CAPABILITY accepts on this machine.");
    nb::class_<linattn::Problem>(module, "Problem", "An attention call, as every op takes it.")
        .def("__init__", &make_problem);
    module.def("feature_map_forward", &feature_map::forward);
    module.def("feature_map_backward", &feature_map::backward);
    module.def("quadratic_forward", &quadratic::forward);
    module.def("quadratic_backward", &quadratic::backward);
    linattn::recurrent::define(module);
    module.def("instruction_sets", &linattn::instruction_sets,
               "Names of the instruction sets that this process may use, as Linux spells them.");
    module.def("hardware_threads", &linattn::hardware_threads, "How many threads this process may run at once.");
    module.def("build_info", &build_info, "Version, compiler, C++ standard, architecture, build type, stable ABI or not.");
}
