#include "quadratic/native/cpu.hpp"

#include "common/native/choose.hpp"
#if defined(LINATTN_X86)
#include "quadratic/native/amx.hpp"
#endif

LINATTN_DECLARE(void forward(const quadratic::ForwardCall&))
LINATTN_DECLARE(void backward(const quadratic::BackwardCall&))

namespace linattn::quadratic {

void forward(const ForwardCall& call) {
#if defined(LINATTN_X86)
    if (capability() >= Capability::amx && isa_amx::takes(call)) return isa_amx::forward(call);
#endif
    LINATTN_RUN(forward, call);
}

void backward(const BackwardCall& call) {
#if defined(LINATTN_X86)
    if (capability() >= Capability::amx && isa_amx::takes(call)) return isa_amx::backward(call);
#endif
    LINATTN_RUN(backward, call);
}

}  // namespace linattn::quadratic
