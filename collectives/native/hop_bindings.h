// Python's way to the hops of split models, for module.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace bitring {

void bind_hops(nanobind::module_& m);

}  // namespace bitring
