// Python's view of what a trainer's step does with host arrays: pack gradients, and update parameters, all in one call.
#pragma once

#include <nanobind/nanobind.h>

namespace bitring {

void bind_packing(nanobind::module_& m);

}  // namespace bitring
