#include "quadratic/cpu_direct.hpp"

#include <cstdlib>

#include "common/native/matmul.hpp"

namespace linattn::LINATTN_ISA {

using namespace quadratic;

void direct_forward(const ForwardCall&) { std::abort(); }
void direct_backward(const BackwardCall&) { std::abort(); }

}  // namespace linattn::LINATTN_ISA
