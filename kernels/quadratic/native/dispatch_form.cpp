// The kernels of one instruction set; the build compiles this file once for each (CMakeLists.txt).
#include "quadratic/native/chunked/chunked.hpp"
#include "quadratic/native/decode.hpp"
#include "quadratic/native/direct/direct.hpp"
#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::Form;
using linattn::quadratic::ForwardCall;

// A call with a state goes through the state in any form: in one pass if it has few tokens, else `direct` means one
// chunk.
void forward(const ForwardCall& call) {
    if (is_decoding(call)) {
        decode(call);
    } else if (call.form == Form::direct && call.before == nullptr) {
        direct_forward(call);
        if (call.after != nullptr) final_state(call);
    } else {
        chunked_forward(call);
    }
}

void backward(const BackwardCall& call) {
    if (call.form == Form::direct && call.before == nullptr && call.dafter == nullptr)
        direct_backward(call);
    else
        chunked_backward(call);
}

}  // namespace linattn::LINATTN_ISA::quadratic
