// Python's way to shards, for module.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace bitring {

void bind_shards(nanobind::module_& m);

}  // namespace bitring
