#include "feature_map/native/cpu.hpp"

#include "common/native/choose.hpp"

LINATTN_DECLARE(void forward(const feature_map::ForwardCall&))
LINATTN_DECLARE(void backward(const feature_map::BackwardCall&))

namespace linattn::feature_map {

void forward(const ForwardCall& call) { LINATTN_RUN(forward, call); }
void backward(const BackwardCall& call) { LINATTN_RUN(backward, call); }

}  // namespace linattn::feature_map
