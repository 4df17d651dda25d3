// How gradients come into the buffer they travel in: scaled, and looked at on the way.
//
// Compiled for several instruction sets, as kernels.h says. A product is rounded as NumPy rounds it.
#pragma once

#include <cstddef>
#include <string_view>

#include "kernels.h"

namespace bitring {

// to[i] = from[i] * scale, a number of the values' type; whether none of n values is NaN or Inf. They do not overlap.
using Pack = bool (*)(std::size_t n, void* to, const void* from, double scale) noexcept;

// For float32 and float64; null for other types.
Pack pack_kernel(Type type) noexcept;

// The same for one of the instruction sets of kernels.h; null also where the processor lacks it.
Pack pack_kernel(Type type, std::string_view instruction_set) noexcept;

}  // namespace bitring
