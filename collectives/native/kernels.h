// Reductions of arrays element by element: every predefined MPI operation on every numeric type.
//
// Each kernel is compiled for several instruction sets; the best that the processor has is chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace bitring {

enum class Op : std::uint8_t { sum, prod, max, min, land, lor, lxor, band, bor, bxor };
inline constexpr std::size_t op_count = 10;

// NumPy's numeric types; b8 is its bool, f16 the IEEE half, bf16 bfloat16, longdouble the machine's long double.
enum class Type : std::uint8_t {
    b8, i8, i16, i32, i64, u8, u16, u32, u64, f16, bf16, f32, f64, longdouble, c64, c128, clongdouble
};
inline constexpr std::size_t type_count = 17;

std::size_t size_of(Type type) noexcept;

// out[k][i] = ((in[0][i] op in[1][i]) op in[2][i]) op ..., for n values and every k: each step is rounded to the type,
// 16-bit floats are added in float32 and rounded once a step. At least one input. Bits are NumPy's (add, multiply,
// maximum, minimum, logical_*, bitwise_*), but for the sign of a zero and the payload of a NaN. Any alignment; an
// output is the same memory as one of the inputs, or overlaps none. Never allocates.
using Reduce = void (*)(std::size_t n, std::size_t inputs, const void* const* in, std::size_t outputs,
                        void* const* out) noexcept;

// Null for what MPI does not define (max of complex numbers, bitwise operations on floats, ...).
Reduce reduce_kernel(Op op, Type type) noexcept;

// The same for one of the instruction sets below; null also where the processor lacks it.
Reduce reduce_kernel(Op op, Type type, std::string_view instruction_set) noexcept;

// "baseline", "avx2" or "avx512": what reduce_kernel's are compiled for.
std::string_view instruction_set() noexcept;

}  // namespace bitring
