// Call the function of an operation that was compiled for the selected instruction set. Each set has a namespace of its
// own, and in it each operation (simd.hpp).
#pragma once

#include "common/native/isa/isa.hpp"

#if defined(LINATTN_X86)

// Declare `declaration`, a function, in linattn::<set>::operation for every set.
#define LINATTN_DECLARE_FOR_EACH_ISA(operation, declaration) \
    namespace linattn::isa_portable::operation {             \
    declaration;                                             \
    }                                                        \
    namespace linattn::isa_avx2::operation {                 \
    declaration;                                             \
    }                                                        \
    namespace linattn::isa_avx512::operation {               \
    declaration;                                             \
    }

// Call it in the best set that may run. Only inside of namespace linattn.
#define LINATTN_DISPATCH_ISA(function, ...)      \
    do {                                         \
        if (selected_isa() >= Isa::avx512)       \
            isa_avx512::function(__VA_ARGS__);   \
        else if (selected_isa() >= Isa::avx2)    \
            isa_avx2::function(__VA_ARGS__);     \
        else                                     \
            isa_portable::function(__VA_ARGS__); \
    } while (false)

#else

#define LINATTN_DECLARE_FOR_EACH_ISA(operation, declaration) \
    namespace linattn::isa_portable::operation {             \
    declaration;                                             \
    }
#define LINATTN_DISPATCH_ISA(function, ...) isa_portable::function(__VA_ARGS__)

#endif
