// Every kernel of every instruction set that this processor has, against plain code value by value.
#include "kernels.h"

#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

using namespace bitring;

namespace {

const char* const op_names[op_count] = {"sum", "prod", "max", "min", "land", "lor", "lxor", "band", "bor", "bxor"};
const char* const type_names[type_count] = {"b8",  "i8",  "i16",  "i32", "i64", "u8",         "u16", "u32",  "u64",
                                            "f16", "bf16", "f32", "f64", "longdouble", "c64", "c128", "clongdouble"};

void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

void check(bool ok, const std::string& message) {
    if (!ok) {
        fail(message);
    }
}

// The 16-bit formats, each by its count of stored significand bits and its bias, computed in exact steps of float64.

struct Format {
    int significand, bias;
    int infinity() const { return ((1 << 15) - 1) >> significand << significand; }
};

constexpr Format half = {10, 15}, brain = {7, 127};

double decode(std::uint16_t bits, Format format) {
    const int magnitude = bits & 0x7fff, exponent = magnitude >> format.significand;
    const int fraction = magnitude & ((1 << format.significand) - 1);
    double value;
    if (magnitude >= format.infinity()) {
        value = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
        value = std::ldexp(fraction, 1 - format.bias - format.significand);
    } else {
        value = std::ldexp(fraction + (1 << format.significand), exponent - format.bias - format.significand);
    }
    return bits & 0x8000 ? -value : value;
}

std::uint16_t encode(double value, Format format) {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    value = std::fabs(value);
    if (std::isnan(value)) {
        return static_cast<std::uint16_t>(sign | format.infinity() | 1 << (format.significand - 1));
    }
    if (value == 0 || std::isinf(value)) {
        return static_cast<std::uint16_t>(sign | (value == 0 ? 0 : format.infinity()));
    }
    int exponent;
    std::frexp(value, &exponent);
    exponent = std::max(exponent - 1, 1 - format.bias);  // of the leading bit; subnormals have the least
    const double steps = std::nearbyint(std::ldexp(value, format.significand - exponent));
    // Counting on from the least exponent's first value goes through all finite values, and then to infinity.
    const double bits = steps + std::ldexp(exponent + format.bias - 1, format.significand);
    return static_cast<std::uint16_t>(sign | static_cast<int>(std::fmin(bits, format.infinity())));
}

// One step of one value. A type is its value's type, and Half and Brain for the 16-bit floats.

struct Half {
    std::uint16_t bits;
};
struct Brain {
    std::uint16_t bits;
};

template <class T>
T integer_step(Op op, T a, T b) {
    const auto x = static_cast<std::uint64_t>(a), y = static_cast<std::uint64_t>(b);
    switch (op) {
        case Op::sum: return static_cast<T>(x + y);
        case Op::prod: return static_cast<T>(x * y);
        case Op::max: return a < b ? b : a;
        case Op::min: return b < a ? b : a;
        case Op::land: return a && b;
        case Op::lor: return a || b;
        case Op::lxor: return !a != !b;
        case Op::band: return static_cast<T>(x & y);
        case Op::bor: return static_cast<T>(x | y);
        case Op::bxor: return static_cast<T>(x ^ y);
    }
    std::abort();
}

template <class T>
T float_step(Op op, T a, T b) {
    switch (op) {
        case Op::sum: return a + b;
        case Op::prod: return a * b;
        case Op::max: return std::isnan(a) ? a : std::isnan(b) ? b : a < b ? b : a;
        case Op::min: return std::isnan(a) ? a : std::isnan(b) ? b : b < a ? b : a;
        default: std::abort();
    }
}

template <class T>
std::complex<T> step(Op op, std::complex<T> a, std::complex<T> b) {
    if (op == Op::sum) {
        return {a.real() + b.real(), a.imag() + b.imag()};
    }
    // Products apart and stored: no compiler may contract them.
    volatile T rr = a.real() * b.real(), ii = a.imag() * b.imag(), ri = a.real() * b.imag(), ir = a.imag() * b.real();
    return {rr - ii, ri + ir};
}

std::uint16_t step16(Op op, std::uint16_t a, std::uint16_t b, Format format) {
    const auto x = static_cast<float>(decode(a, format)), y = static_cast<float>(decode(b, format));
    return encode(float_step(op, x, y), format);
}

Half step(Op op, Half a, Half b) { return {step16(op, a.bits, b.bits, half)}; }
Brain step(Op op, Brain a, Brain b) { return {step16(op, a.bits, b.bits, brain)}; }

template <class T>
T step(Op op, T a, T b) {
    if constexpr (std::numeric_limits<T>::is_integer) {
        return integer_step(op, a, b);
    } else {
        return float_step(op, a, b);
    }
}

// The sign of a zero is free in a maximum or minimum, a NaN's bits are free.

template <class T>
bool same_float(Op op, T a, T b) {
    if (std::isnan(a) || std::isnan(b)) {
        return std::isnan(a) && std::isnan(b);
    }
    return a == b && (std::signbit(a) == std::signbit(b) || op == Op::max || op == Op::min);
}

template <class T>
bool same(Op op, std::complex<T> a, std::complex<T> b) {
    return same_float(op, a.real(), b.real()) && same_float(op, a.imag(), b.imag());
}

bool same(Op op, Half a, Half b) { return same_float(op, decode(a.bits, half), decode(b.bits, half)); }
bool same(Op op, Brain a, Brain b) { return same_float(op, decode(a.bits, brain), decode(b.bits, brain)); }

template <class T>
bool same(Op op, T a, T b) {
    if constexpr (std::numeric_limits<T>::is_integer) {
        return a == b;
    } else {
        return same_float(op, a, b);
    }
}

// Values: any bits, small numbers, and special ones.

using Random = std::mt19937_64;

template <class T>
T random_float(Random& random) {
    using Limits = std::numeric_limits<T>;
    static const T special[] = {0,
                                1,
                                Limits::min(),
                                Limits::min() / 2,
                                Limits::denorm_min(),
                                Limits::max(),
                                Limits::max() / 2,
                                Limits::epsilon(),
                                Limits::infinity(),
                                Limits::quiet_NaN()};
    const T sign = random() % 2 ? -1 : 1;
    switch (random() % 4) {
        case 0: return sign * special[random() % (sizeof special / sizeof *special)];
        case 1: return sign * static_cast<T>(random() % 16) / 4;
        case 2: return sign * std::ldexp(static_cast<T>(random()), static_cast<int>(random() % 100) - 110);
        default: return sign * std::ldexp(static_cast<T>(random()), Limits::min_exponent / 2 - 40);
    }
}

template <class T>
void draw(Random& random, T& value) {
    if constexpr (std::numeric_limits<T>::is_integer) {
        const T special[] = {0, 1, std::numeric_limits<T>::max(), std::numeric_limits<T>::min()};
        value = random() % 2 ? static_cast<T>(random()) : special[random() % 4];
    } else {
        value = random_float<T>(random);
    }
}

template <class T>
void draw(Random& random, std::complex<T>& value) {
    value = {random_float<T>(random), random_float<T>(random)};
}

std::uint16_t draw16(Random& random, Format format) {
    return random() % 2 ? static_cast<std::uint16_t>(random())
                        : encode(static_cast<double>(random() % 64) / 4 - 8, format);
}

void draw(Random& random, Half& value) { value.bits = draw16(random, half); }
void draw(Random& random, Brain& value) { value.bits = draw16(random, brain); }

// An array that begins at any address and ends where its block of memory does, where a sanitizer looks further, or else
// before bytes that must stay.
class Buffer {
public:
#ifdef __SANITIZE_ADDRESS__
    static constexpr std::size_t after = 0;
#else
    static constexpr std::size_t after = 64;
#endif

    Buffer(std::size_t offset, std::size_t nbytes, const void* content)
        : offset_(offset), nbytes_(nbytes), bytes_(offset + nbytes + after, guard) {
        if (content && nbytes) {
            std::memcpy(data(), content, nbytes);
        }
    }

    char* data() { return bytes_.data() + offset_; }

    bool guards_intact() const {
        static const std::string guards(256, guard);
        return bytes_.empty() || (std::memcmp(bytes_.data(), guards.data(), offset_) == 0 &&
                                  std::memcmp(bytes_.data() + offset_ + nbytes_, guards.data(), after) == 0);
    }

private:
    static constexpr char guard = 0x5a;
    std::size_t offset_, nbytes_;
    std::vector<char> bytes_;
};

constexpr std::size_t most = 19;  // inputs, and outputs
enum class Outputs { apart, first_inputs, last_input };

template <class T>
class Pair {
public:
    Pair(Op op, Type type, std::string_view set, std::vector<T> const (&inputs)[most],
         std::vector<T> const (&expected)[most])
        : op_(op), kernel_(reduce_kernel(op, type, set)), inputs_(inputs), expected_(expected),
          name_(std::string(op_names[static_cast<int>(op)]) + " of " + type_names[static_cast<int>(type)] + ", " +
                std::string(set)) {
        check(kernel_, name_ + ": no kernel");
    }

    // Offsets in bytes differ from buffer to buffer.
    void run(std::size_t n, std::size_t inputs, std::size_t outputs, Outputs where, std::size_t offset) const {
        std::vector<Buffer> sources, targets;
        const void* in[most];
        void* out[most];
        sources.reserve(most);
        targets.reserve(most);
        for (std::size_t k = 0; k < inputs; ++k) {
            sources.emplace_back(offset + k * 3, n * sizeof(T), inputs_[k].data());
            in[k] = sources[k].data();
        }
        std::vector<bool> written(inputs);
        for (std::size_t k = 0; k < outputs; ++k) {
            if (where == Outputs::first_inputs && k < inputs) {
                out[k] = sources[k].data();
                written[k] = true;
            } else if (where == Outputs::last_input && k == 0) {
                out[k] = sources[inputs - 1].data();
                written[inputs - 1] = true;
            } else {
                targets.emplace_back(offset + k * 5, n * sizeof(T), nullptr);
                out[k] = targets.back().data();
            }
        }

        kernel_(n, inputs, in, outputs, out);

        const auto require = [&](bool ok, const char* what) {
            if (!ok) {
                fail(name_ + ": " + std::to_string(n) + " values at " + std::to_string(offset) + ", " +
                     std::to_string(inputs) + " inputs, " + std::to_string(outputs) + " outputs: " + what);
            }
        };
        for (std::size_t k = 0; k < outputs; ++k) {
            require(is_expected(static_cast<const char*>(out[k]), n, expected_[inputs - 1]), "wrong result");
        }
        for (std::size_t k = 0; k < inputs; ++k) {
            require(written[k] || n == 0 || std::memcmp(in[k], inputs_[k].data(), n * sizeof(T)) == 0,
                    "an input changed");
            require(sources[k].guards_intact(), "wrote beside an input");
        }
        for (const Buffer& target : targets) {
            require(target.guards_intact(), "wrote beside an output");
        }
    }

private:
    bool is_expected(const char* got, std::size_t n, const std::vector<T>& expected) const {
        if (n == 0 || std::memcmp(got, expected.data(), n * sizeof(T)) == 0) {
            return true;
        }
        for (std::size_t i = 0; i < n; ++i) {
            T value;
            std::memcpy(&value, got + i * sizeof(T), sizeof(T));
            if (!same(op_, value, expected[i])) {
                std::fprintf(stderr, "value %zu: got %s, expected %s\n", i, hex(value).c_str(),
                             hex(expected[i]).c_str());
                return false;
            }
        }
        return true;
    }

    static std::string hex(const T& value) {
        unsigned char bytes[sizeof(T)];
        std::memcpy(bytes, &value, sizeof(T));
        std::string text = "0x";
        for (std::size_t i = sizeof(T); i-- > 0;) {
            char digits[3];
            std::snprintf(digits, sizeof digits, "%02x", bytes[i]);
            text += digits;
        }
        return text;
    }

    Op op_;
    Reduce kernel_;
    std::vector<T> const (&inputs_)[most];
    std::vector<T> const (&expected_)[most];
    std::string name_;
};

template <class T>
void test_pair(Op op, Type type, const std::vector<std::string_view>& sets) {
    constexpr std::size_t longest = 4099;
    Random random(static_cast<std::size_t>(op) * type_count + static_cast<std::size_t>(type));
    std::vector<T> inputs[most], expected[most];
    for (std::size_t k = 0; k < most; ++k) {
        inputs[k].resize(longest);
        for (T& value : inputs[k]) {
            draw(random, value);
        }
        expected[k] = inputs[k];
        for (std::size_t i = 0; k && i < longest; ++i) {
            expected[k][i] = step(op, expected[k - 1][i], inputs[k][i]);
        }
    }
    for (const std::string_view set : sets) {
        const Pair<T> pair(op, type, set, inputs, expected);
        for (const std::size_t n : {0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127}) {
            for (const Outputs where : {Outputs::apart, Outputs::first_inputs, Outputs::last_input}) {
                for (std::size_t count = 0; count < 25; ++count) {
                    pair.run(n, 1 + count / 5, 1 + count % 5, where, count);
                }
            }
        }
        for (const std::size_t n : {1000, 4099}) {
            pair.run(n, 2, 1, Outputs::first_inputs, 1);
            pair.run(n, 2, 2, Outputs::first_inputs, 2);
            pair.run(n, 2, 1, Outputs::apart, 16);
            pair.run(n, 2, 2, Outputs::last_input, 0);
            pair.run(n, 3, 1, Outputs::apart, 3);
            pair.run(n, 4, 4, Outputs::first_inputs, 32);
            pair.run(n, 5, 2, Outputs::last_input, 7);
            pair.run(n, 16, 16, Outputs::first_inputs, 4);
            pair.run(n, 17, 17, Outputs::first_inputs, 5);
            pair.run(n, 19, 1, Outputs::last_input, 6);
            pair.run(n, 2, 17, Outputs::apart, 8);
        }
        for (std::size_t offset = 0; offset <= 64; ++offset) {
            pair.run(67, 2, 1, Outputs::last_input, offset);
            pair.run(67, 2, 2, Outputs::first_inputs, offset);
        }
    }
}

// Whether the pair is in MPI's table: logical and bitwise operations are the integers', logical ones bool's too.
bool is_defined(Op op, Type type) {
    const bool is_arithmetic = op <= Op::min, is_logical = op >= Op::land && op <= Op::lxor;
    switch (type) {
        case Type::b8: return is_logical;
        case Type::i8:
        case Type::i16:
        case Type::i32:
        case Type::i64:
        case Type::u8:
        case Type::u16:
        case Type::u32:
        case Type::u64: return true;
        case Type::f16:
        case Type::bf16:
        case Type::f32:
        case Type::f64:
        case Type::longdouble: return is_arithmetic;
        case Type::c64:
        case Type::c128:
        case Type::clongdouble: return op == Op::sum || op == Op::prod;
    }
    return false;
}

void test_type(Op op, Type type, const std::vector<std::string_view>& sets) {
    switch (type) {
        case Type::b8:
        case Type::u8: return test_pair<std::uint8_t>(op, type, sets);
        case Type::i8: return test_pair<std::int8_t>(op, type, sets);
        case Type::i16: return test_pair<std::int16_t>(op, type, sets);
        case Type::i32: return test_pair<std::int32_t>(op, type, sets);
        case Type::i64: return test_pair<std::int64_t>(op, type, sets);
        case Type::u16: return test_pair<std::uint16_t>(op, type, sets);
        case Type::u32: return test_pair<std::uint32_t>(op, type, sets);
        case Type::u64: return test_pair<std::uint64_t>(op, type, sets);
        case Type::f16: return test_pair<Half>(op, type, sets);
        case Type::bf16: return test_pair<Brain>(op, type, sets);
        case Type::f32: return test_pair<float>(op, type, sets);
        case Type::f64: return test_pair<double>(op, type, sets);
        case Type::longdouble: return test_pair<long double>(op, type, sets);
        case Type::c64: return test_pair<std::complex<float>>(op, type, sets);
        case Type::c128: return test_pair<std::complex<double>>(op, type, sets);
        case Type::clongdouble: return test_pair<std::complex<long double>>(op, type, sets);
    }
}

// Every 16-bit float, with partners that make it itself, round it up, down and to even, and overflow it.
template <class T>
void test_all_values(Type type, Format format, const std::vector<std::string_view>& sets) {
    constexpr std::size_t n = 1 << 16;
    std::vector<T> all(n), partner(n), expected(n), got(n);
    for (std::size_t i = 0; i < n; ++i) {
        all[i].bits = static_cast<std::uint16_t>(i);
    }
    const int bits[] = {0, 0x8000, 1, 0x3c00, 0x3f80, 0x3555, 0x0400, 0x1234, 0x7bff, format.infinity()};
    for (const int fixed : bits) {
        for (T& value : partner) {
            value.bits = static_cast<std::uint16_t>(fixed);
        }
        for (const Op op : {Op::sum, Op::prod, Op::max, Op::min}) {
            for (std::size_t i = 0; i < n; ++i) {
                expected[i] = step(op, all[i], partner[i]);
            }
            for (const std::string_view set : sets) {
                const void* const in[] = {all.data(), partner.data()};
                void* const out[] = {got.data()};
                reduce_kernel(op, type, set)(n, 2, in, 1, out);
                for (std::size_t i = 0; i < n; ++i) {
                    if (got[i].bits != expected[i].bits && !same(op, got[i], expected[i])) {
                        fail(std::string(op_names[static_cast<int>(op)]) + " of " +
                             type_names[static_cast<int>(type)] + ", " + std::string(set) + ": wrong for " +
                             std::to_string(i) + " and " + std::to_string(fixed));
                    }
                }
            }
        }
    }
}

}  // namespace

int main() {
    std::vector<std::string_view> sets;
    for (const std::string_view set : {"baseline", "avx2", "avx512"}) {
        if (reduce_kernel(Op::sum, Type::f32, set)) {
            sets.push_back(set);
        }
    }
    check(!sets.empty() && sets.back() == instruction_set(), "the best instruction set is not the one in use");
    check(!reduce_kernel(Op::sum, Type::f32, "none"), "a kernel for an unknown instruction set");

    const std::size_t sizes[type_count] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, sizeof(long double),
                                           8, 16, 2 * sizeof(long double)};
    for (std::size_t t = 0; t < type_count; ++t) {
        const auto type = static_cast<Type>(t);
        check(size_of(type) == sizes[t], std::string("size of ") + type_names[t]);
        for (std::size_t o = 0; o < op_count; ++o) {
            const auto op = static_cast<Op>(o);
            check(reduce_kernel(op, type) == reduce_kernel(op, type, instruction_set()), "not the best kernel");
            if (is_defined(op, type)) {
                test_type(op, type, sets);
            } else {
                for (const std::string_view set : sets) {
                    check(!reduce_kernel(op, type, set), std::string(op_names[o]) + " of " + type_names[t]);
                }
            }
        }
    }
    test_all_values<Half>(Type::f16, half, sets);
    test_all_values<Brain>(Type::bf16, brain, sets);

    for (const std::string_view set : sets) {
        std::printf("%s ", std::string(set).c_str());
    }
    std::printf("kernels are right\n");
    return 0;
}
