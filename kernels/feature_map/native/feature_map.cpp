#include "feature_map/native/feature_map.hpp"

#include "common/native/isa/isa_dispatch.hpp"

LINATTN_DECLARE_FOR_EACH_ISA(feature_map, void forward(const linattn::feature_map::ForwardCall&))
LINATTN_DECLARE_FOR_EACH_ISA(feature_map, void backward(const linattn::feature_map::BackwardCall&))

namespace linattn::feature_map {

void forward(const ForwardCall& call) {
    check(call);
    LINATTN_DISPATCH_ISA(feature_map::forward, call);
}

void backward(const BackwardCall& call) {
    check(call);
    LINATTN_DISPATCH_ISA(feature_map::backward, call);
}

}  // namespace linattn::feature_map
