#include "recurrent/native/recurrent.hpp"

#include "common/native/isa/isa_dispatch.hpp"

LINATTN_DECLARE_FOR_EACH_ISA(recurrent, void forward(const linattn::recurrent::ForwardCall&))
LINATTN_DECLARE_FOR_EACH_ISA(recurrent, void backward(const linattn::recurrent::BackwardCall&))

namespace linattn::recurrent {
namespace {

void check(const Call& call) {
    LINATTN_ASSERT(call.B >= 1 && call.T >= 1 && call.H >= 1 && call.threads >= 1);
    LINATTN_ASSERT(call.weight != nullptr && call.all_h != nullptr);
    LINATTN_ASSERT((call.cells == nullptr) == (call.activations == nullptr));
}

}  // namespace

void forward(const ForwardCall& call) {
    check(call);
    LINATTN_ASSERT(call.projected != nullptr && call.last_h != nullptr);
    LINATTN_DISPATCH_ISA(recurrent::forward, call);
}

void backward(const BackwardCall& call) {
    check(call);
    LINATTN_ASSERT(call.dprojected != nullptr && call.dh0 != nullptr);
    LINATTN_DISPATCH_ISA(recurrent::backward, call);
}

}  // namespace linattn::recurrent
