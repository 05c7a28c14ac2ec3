#include "quadratic/cpu_chunked.hpp"

#include <cstdlib>

#include "common/native/matmul.hpp"

namespace linattn::LINATTN_ISA {

using namespace quadratic;

void chunked_forward(const ForwardCall&) { std::abort(); }
void chunked_backward(const BackwardCall&) { std::abort(); }
void final_state(const ForwardCall&) { std::abort(); }

}  // namespace linattn::LINATTN_ISA
