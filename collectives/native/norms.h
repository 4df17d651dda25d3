// Squared norms of what is encoded, and looks for NaN and Inf.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace bitring {

// Adds the squares of n values, and of each with its residual, in double precision. `values` are of a floating-point
// type, `residual` is float32, or float64 for float64 values. Any alignment.
using AddSquares = void (*)(const char* values, const char* residual, std::size_t n, double* of_values,
                            double* of_sums) noexcept;
AddSquares squares_adder(Type type) noexcept;

// Whether n values of a floating-point type hold neither NaN nor Inf.
bool all_finite(const void* values, Type type, std::size_t n) noexcept;

}  // namespace bitring
