#include "quadratic/native/amx/dispatch.hpp"

#include "quadratic/native/amx/chunked.hpp"
#include "quadratic/native/amx/direct.hpp"
#include "quadratic/native/amx/score_tile.hpp"

namespace linattn::isa_amx::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::Call;
using linattn::quadratic::Form;
using linattn::quadratic::ForwardCall;
namespace {

// Strips of 64 keys are what the tiles work on: many sequences much shorter than that would be mostly padding.
bool suits_tiles(const Call& call) {
    const AttentionProblem& p = call.problem;
    return p.dtype == Dtype::bf16 && p.scale != 0 && call.before == nullptr && p.sequences * 32 <= p.Tk * p.B;
}

// Below, half of the tiles would multiply padding; above, the state outgrows the caches.
bool suits_chunks(const AttentionProblem& p) { return p.D > 16 && p.D <= 128; }

}  // namespace

bool supports(const ForwardCall& call) {
    if (!suits_tiles(call) || call.after != nullptr) return false;
    return call.form == Form::direct || (call.form == Form::chunked && suits_chunks(call.problem));
}

// The chunked form gives each head to one thread, and its chunks begin at whole strips of queries.
bool supports(const BackwardCall& call) {
    if (!suits_tiles(call) || call.dafter != nullptr || call.dbefore != nullptr) return false;
    if (call.form == Form::direct) return true;
    const AttentionProblem& p = call.problem;
    return call.form == Form::chunked && suits_chunks(p) && (!p.is_causal || p.q_offset % 64 == 0) &&
           p.threads <= 2 * p.sequences * p.Hkv;
}

void forward(const ForwardCall& call) {
    if (call.form == Form::direct)
        direct_forward(call);
    else
        chunked_forward(call);
}

void backward(const BackwardCall& call) {
    if (call.form == Form::direct)
        direct_backward(call);
    else
        chunked_backward(call);
}

}  // namespace linattn::isa_amx::quadratic
