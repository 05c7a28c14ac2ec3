#include "quadratic/native/quadratic.hpp"

#include "common/native/isa/isa_dispatch.hpp"
#if defined(LINATTN_X86)
#include "quadratic/native/amx/dispatch.hpp"
#endif

LINATTN_DECLARE_FOR_EACH_ISA(quadratic, void forward(const linattn::quadratic::ForwardCall&))
LINATTN_DECLARE_FOR_EACH_ISA(quadratic, void backward(const linattn::quadratic::BackwardCall&))

namespace linattn::quadratic {

void forward(const ForwardCall& call) {
    check(call);
#if defined(LINATTN_X86)
    if (selected_isa() >= Isa::amx && isa_amx::quadratic::supports(call)) return isa_amx::quadratic::forward(call);
#endif
    LINATTN_DISPATCH_ISA(quadratic::forward, call);
}

void backward(const BackwardCall& call) {
    check(call);
#if defined(LINATTN_X86)
    if (selected_isa() >= Isa::amx && isa_amx::quadratic::supports(call)) return isa_amx::quadratic::backward(call);
#endif
    LINATTN_DISPATCH_ISA(quadratic::backward, call);
}

}  // namespace linattn::quadratic
