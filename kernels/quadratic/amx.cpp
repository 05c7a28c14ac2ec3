#include "quadratic/amx.hpp"

#include "quadratic/amx_direct.hpp"
#include "quadratic/amx_scores.hpp"

namespace linattn::isa_amx {
namespace {

using quadratic::BackwardCall;
using quadratic::Form;
using quadratic::ForwardCall;

// Strips of 64 keys are what the tiles work on: many sequences much shorter than that would be mostly padding.
bool suits(const quadratic::Call& call) {
    const Problem& p = call.problem;
    return p.dtype == Dtype::bf16 && p.scale != 0 && call.before == nullptr && p.sequences * 32 <= p.Tk * p.B;
}

}  // namespace

bool takes(const ForwardCall& call) { return suits(call) && call.form == Form::direct && call.after == nullptr; }

bool takes(const BackwardCall&) { return false; }

void forward(const ForwardCall& call) { direct_forward(call); }

void backward(const BackwardCall&) {}

}  // namespace linattn::isa_amx
