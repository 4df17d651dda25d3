// Python's way to stores, for module.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace bitring {

void bind_stores(nanobind::module_& m);

}  // namespace bitring
