// Python's view of the recurrent kernels.
#pragma once

#include <nanobind/nanobind.h>

namespace linattn::recurrent {

void define_ops(nanobind::module_& module);

}  // namespace linattn::recurrent
