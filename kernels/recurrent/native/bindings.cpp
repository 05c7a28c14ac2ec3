#include "recurrent/native/bindings.hpp"

#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>

#include "recurrent/native/recurrent.hpp"

namespace nb = nanobind;

namespace linattn::recurrent {
namespace {

// Addresses of tensors, which the caller keeps alive; 0 where there is none.
template <std::size_t n>
using Addresses = std::array<Index, n>;

float* numbers(Index address) { return reinterpret_cast<float*>(static_cast<std::uintptr_t>(address)); }

// shared: weight, lengths, h0, c0, all_h, cells, activations.
Call make_call(int cell, const std::array<Index, 3>& sizes, const Addresses<7>& shared, int threads) {
    Call call;
    call.cell = static_cast<Cell>(cell);
    call.B = sizes[0], call.T = sizes[1], call.H = sizes[2];
    call.weight = numbers(shared[0]);
    call.lengths = reinterpret_cast<const Index*>(static_cast<std::uintptr_t>(shared[1]));
    call.h0 = numbers(shared[2]), call.c0 = numbers(shared[3]);
    call.all_h = numbers(shared[4]), call.cells = numbers(shared[5]), call.activations = numbers(shared[6]);
    call.threads = threads;
    return call;
}

// projected: address, strides of B and T. last: last_h, last_c.
void run_forward(int cell, const std::array<Index, 3>& sizes, const Addresses<7>& shared, int threads,
                 const std::array<Index, 3>& projected, const Addresses<2>& last) {
    const ForwardCall call{make_call(cell, sizes, shared, threads),
                           numbers(projected[0]),
                           projected[1],
                           projected[2],
                           numbers(last[0]),
                           numbers(last[1])};
    const nb::gil_scoped_release released;
    forward(call);
}

// grad_outputs: dall_h, dlast_h, dlast_c. grad_inputs: dprojected, dh0, dc0.
void run_backward(int cell, const std::array<Index, 3>& sizes, const Addresses<7>& shared, int threads,
                  const Addresses<3>& grad_outputs, const Addresses<3>& grad_inputs) {
    const BackwardCall call{make_call(cell, sizes, shared, threads),
                            numbers(grad_outputs[0]),
                            numbers(grad_outputs[1]),
                            numbers(grad_outputs[2]),
                            numbers(grad_inputs[0]),
                            numbers(grad_inputs[1]),
                            numbers(grad_inputs[2])};
    const nb::gil_scoped_release released;
    backward(call);
}

}  // namespace

void define_ops(nb::module_& module) {
    module.def("recurrent_forward", &run_forward);
    module.def("recurrent_backward", &run_backward);
}

}  // namespace linattn::recurrent
