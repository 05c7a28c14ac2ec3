#include "recurrent/native/recurrent.hpp"

#include "common/native/isa_dispatch.hpp"

LINATTN_DECLARE_FOR_EACH_ISA(recurrent, void forward(const linattn::recurrent::ForwardCall&))
LINATTN_DECLARE_FOR_EACH_ISA(recurrent, void backward(const linattn::recurrent::BackwardCall&))

namespace linattn::recurrent {

void forward(const ForwardCall& call) { LINATTN_DISPATCH_ISA(recurrent::forward, call); }
void backward(const BackwardCall& call) { LINATTN_DISPATCH_ISA(recurrent::backward, call); }

}  // namespace linattn::recurrent
