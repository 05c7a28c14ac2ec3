// Run the kernels of the chosen instruction set. Each set has its own namespace (simd.hpp).
#pragma once

#include "capability.hpp"

// Declare `declaration`, a function, in the namespace of every set.
#if defined(LINATTN_X86)
#define LINATTN_DECLARE(declaration)       \
    namespace linattn::isa_portable {      \
    declaration;                           \
    }                                      \
    namespace linattn::isa_avx2 {          \
    declaration;                           \
    }                                      \
    namespace linattn::isa_avx512 {        \
    declaration;                           \
    }
// Call it in the namespace of the best set that may run.
#define LINATTN_RUN(function, ...)                                       \
    do {                                                                 \
        if (capability() >= Capability::avx512)                          \
            isa_avx512::function(__VA_ARGS__);                           \
        else if (capability() >= Capability::avx2)                       \
            isa_avx2::function(__VA_ARGS__);                             \
        else                                                             \
            isa_portable::function(__VA_ARGS__);                         \
    } while (false)
#else
#define LINATTN_DECLARE(declaration)       \
    namespace linattn::isa_portable {      \
    declaration;                           \
    }
#define LINATTN_RUN(function, ...) isa_portable::function(__VA_ARGS__)
#endif
