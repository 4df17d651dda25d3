#include "norms.h"

#include <cstdint>
#include <cstring>

namespace bitring {

namespace {

float widened_half(std::uint16_t half) {
    // Shifted into float32's place; multiplying corrects the exponent, also of subnormal numbers.
    const std::uint32_t bits = std::uint32_t(half & 0x7fff) << 13 | std::uint32_t(half & 0x8000) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x * 0x1p112f;
}

template <Type type>
double value_at(const char* values, std::size_t i) {
    const auto get = [&](auto x) {
        std::memcpy(&x, values + i * sizeof x, sizeof x);
        return x;
    };
    if constexpr (type == Type::f32) return double(get(0.0f));
    if constexpr (type == Type::f64) return get(0.0);
    if constexpr (type == Type::f16) return double(widened_half(get(std::uint16_t(0))));
    const std::uint32_t bits = std::uint32_t(get(std::uint16_t(0))) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return double(x);
}

// Sums in separate places, of which the compiler makes vectors.
constexpr std::size_t kLanes = 4;

template <Type type>
void add_squares(const char* values, const char* residual, std::size_t n, double* of_values, double* of_sums) noexcept {
    constexpr Type wide = type == Type::f64 ? Type::f64 : Type::f32;
    double g[kLanes] = {}, v[kLanes] = {};
    const auto add = [&](std::size_t i, double* of_value, double* of_sum) {
        const double x = value_at<type>(values, i), sum = x + value_at<wide>(residual, i);
        *of_value += x * x;
        *of_sum += sum * sum;
    };
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) add(i + lane, &g[lane], &v[lane]);
    }
    for (; i < n; ++i) add(i, of_values, of_sums);
    for (std::size_t lane = 0; lane < kLanes; ++lane) *of_values += g[lane], *of_sums += v[lane];
}

// Whether none of these words, of a number each, has all bits of the exponent set.
template <class Word, Word exponent>
bool finite(const char* numbers, std::size_t n) {
    Word found = 0;
    for (std::size_t i = 0; i < n; ++i) {
        Word word;
        std::memcpy(&word, numbers + i * sizeof word, sizeof word);
        found |= Word((word & exponent) == exponent);
    }
    return found == 0;
}

}  // namespace

AddSquares squares_adder(Type type) noexcept {
    switch (type) {
    case Type::f16: return add_squares<Type::f16>;
    case Type::bf16: return add_squares<Type::bf16>;
    case Type::f64: return add_squares<Type::f64>;
    default: return add_squares<Type::f32>;
    }
}

bool all_finite(const void* values, Type type, std::size_t n) noexcept {
    const auto* numbers = static_cast<const char*>(values);
    switch (type) {
    case Type::f16: return finite<std::uint16_t, 0x1fu << 10>(numbers, n);
    case Type::bf16: return finite<std::uint16_t, 0xffu << 7>(numbers, n);
    case Type::f64: return finite<std::uint64_t, 0x7ffull << 52>(numbers, n);
    default: return finite<std::uint32_t, 0xffu << 23>(numbers, n);
    }
}

}  // namespace bitring
