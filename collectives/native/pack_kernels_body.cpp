// Packing for one instruction set, compiled once for each, under the rules of kernels_body.cpp: BITRING_KERNELS names the
// one function defined here, beside those of that name there and in update_kernels_body.cpp.

#include <cstddef>
#include <cstdint>

#include "pack_kernels.h"

namespace bitring {

Pack BITRING_KERNELS(Type type) noexcept;

namespace {

// A value is NaN or Inf where all bits of its exponent are set: added to its bits without the sign, `one` carries then.
template <class T, class Word, Word magnitude, Word one>
bool pack(std::size_t n, void* to, const void* from, double scale) noexcept {
    T* __restrict out = static_cast<T*>(to);
    const T* __restrict values = static_cast<const T*>(from);
    const T factor = T(scale);
    Word carries = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const T value = values[i];
        Word word;
        __builtin_memcpy(&word, &value, sizeof word);
        carries |= (word & magnitude) + one;
        out[i] = value * factor;
    }
    return (carries & ~magnitude) == 0;
}

}  // namespace

Pack BITRING_KERNELS(Type type) noexcept {
    switch (type) {
        case Type::f32: return pack<float, std::uint32_t, 0x7fffffffu, 0x00800000u>;
        case Type::f64: return pack<double, std::uint64_t, 0x7fffffffffffffffull, 0x0010000000000000ull>;
        default: return nullptr;
    }
}

}  // namespace bitring
