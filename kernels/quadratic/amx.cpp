#include "quadratic/amx.hpp"

#include "quadratic/amx_chunked.hpp"
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

bool takes(const ForwardCall& call) {
    if (!suits(call) || call.after != nullptr) return false;
    return call.form == Form::direct || (call.form == Form::chunked && call.problem.D > 16 && call.problem.D <= 128);
}

bool takes(const BackwardCall& call) {
    return suits(call) && call.dafter == nullptr && call.dbefore == nullptr && call.form == Form::direct;
}

void forward(const ForwardCall& call) {
    if (call.form == Form::direct)
        direct_forward(call);
    else
        chunked_forward(call);
}

void backward(const BackwardCall& call) { direct_backward(call); }

}  // namespace linattn::isa_amx
