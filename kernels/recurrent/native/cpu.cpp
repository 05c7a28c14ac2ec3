#include "recurrent/native/cpu.hpp"

#include "common/native/choose.hpp"

LINATTN_DECLARE(void forward(const recurrent::ForwardCall&))
LINATTN_DECLARE(void backward(const recurrent::BackwardCall&))

namespace linattn::recurrent {

void forward(const ForwardCall& call) { LINATTN_RUN(forward, call); }
void backward(const BackwardCall& call) { LINATTN_RUN(backward, call); }

}  // namespace linattn::recurrent
