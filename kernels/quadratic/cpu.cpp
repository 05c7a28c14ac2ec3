// Which instruction set computes a call.
#include "quadratic/cpu.hpp"

#include "common/native/capability.hpp"
#if defined(LINATTN_X86)
#include "quadratic/amx.hpp"
#endif

namespace linattn {

// One namespace for each instruction set (quadratic/cpu_kernels.cpp, compiled once for each).
#define LINATTN_DECLARE(isa)                        \
    namespace isa {                                 \
    void forward(const quadratic::ForwardCall&);    \
    void backward(const quadratic::BackwardCall&);  \
    }
LINATTN_DECLARE(isa_portable)
#if defined(LINATTN_X86)
LINATTN_DECLARE(isa_avx2)
LINATTN_DECLARE(isa_avx512)
#endif
#undef LINATTN_DECLARE

namespace quadratic {

void forward(const ForwardCall& call) {
#if defined(LINATTN_X86)
    if (capability() >= Capability::amx && isa_amx::takes(call)) return isa_amx::forward(call);
    if (capability() >= Capability::avx512) return isa_avx512::forward(call);
    if (capability() >= Capability::avx2) return isa_avx2::forward(call);
#endif
    isa_portable::forward(call);
}

void backward(const BackwardCall& call) {
#if defined(LINATTN_X86)
    if (capability() >= Capability::amx && isa_amx::takes(call)) return isa_amx::backward(call);
    if (capability() >= Capability::avx512) return isa_avx512::backward(call);
    if (capability() >= Capability::avx2) return isa_avx2::backward(call);
#endif
    isa_portable::backward(call);
}

}  // namespace quadratic
}  // namespace linattn
