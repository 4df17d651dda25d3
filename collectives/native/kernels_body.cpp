// The kernels for one instruction set, compiled once for each: BITRING_KERNELS names the one function defined here.
//
// Where two objects hold the same inline function the linker keeps either, and may so give AVX code to a processor
// without it. Hence everything else here is local, and nothing inline of the standard library is called.

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace bitring {

Reduce BITRING_KERNELS(Op op, Type type) noexcept;

namespace {

#if defined(__AVX512F__)
constexpr std::size_t width = 64;
#elif defined(__AVX2__)
constexpr std::size_t width = 32;
#else
constexpr std::size_t width = 16;
#endif

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(width)));
};

template <class T>
using V = typename VectorOf<T>::type;

// Long doubles, which no vector unit has, go through the same code as vectors of one value.
template <>
struct VectorOf<long double> {
    using type = long double;
};

// An operation has a vector type and combines two of them. Integers are unsigned where it matters not: they wrap.

template <class T>
struct Sum {
    using Vector = V<T>;
    static Vector apply(Vector a, Vector b) { return a + b; }
};

template <class T>
struct Product {
    using Vector = V<T>;
    static Vector apply(Vector a, Vector b) { return a * b; }
};

template <class T>
struct ComplexProduct {
    using Vector = V<T>;
    using Lanes = std::make_index_sequence<width / sizeof(T)>;
    static Vector apply(Vector a, Vector b) { return multiply(a, b, Lanes()); }

private:
    template <std::size_t... lane>
    static Vector multiply(Vector a, Vector b, std::index_sequence<lane...>) {
        const Vector re = {a[lane & ~std::size_t(1)]...}, im = {a[lane | 1]...}, swapped = {b[lane ^ 1]...};
        const Vector p = re * b, q = im * swapped, difference = p - q, sum = p + q;
        return Vector{(lane & 1 ? sum[lane] : difference[lane])...};
    }
};

template <>
struct ComplexProduct<long double> {
    struct Vector {
        long double re, im;
    };
    static Vector apply(Vector a, Vector b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
};

// NaN wins, the first of two.
template <class T>
struct Maximum {
    using Vector = V<T>;
    static Vector apply(Vector a, Vector b) { return (a >= b) | (a != a) ? a : b; }
};

template <class T>
struct Minimum {
    using Vector = V<T>;
    static Vector apply(Vector a, Vector b) { return (a <= b) | (a != a) ? a : b; }
};

// 16-bit floats are ordered as integers once the negative ones are turned over.
using Halves = V<std::int16_t>;

inline Halves ordered(Halves x) { return x ^ ((x >> 15) & 0x7fff); }

template <std::int16_t infinity>
inline Halves is_nan(Halves x) {
    return (x & 0x7fff) > infinity;
}

template <std::int16_t infinity>
struct HalfMaximum {
    using Vector = Halves;
    static Vector apply(Vector a, Vector b) {
        return is_nan<infinity>(a) | ((ordered(a) >= ordered(b)) & ~is_nan<infinity>(b)) ? a : b;
    }
};

template <std::int16_t infinity>
struct HalfMinimum {
    using Vector = Halves;
    static Vector apply(Vector a, Vector b) {
        return is_nan<infinity>(a) | ((ordered(a) <= ordered(b)) & ~is_nan<infinity>(b)) ? a : b;
    }
};

template <class T>
inline V<T> is_true(V<T> x) {
    return (x | -x) >> (8 * sizeof(T) - 1);
}

template <class T>
struct LogicalAnd {
    using Vector = V<T>;
    static Vector apply(Vector a, Vector b) { return is_true<T>(a) & is_true<T>(b); }
};

template <class T>
struct LogicalOr {
    using Vector = V<T>;
    static Vector apply(Vector a, Vector b) { return is_true<T>(a | b); }
};

template <class T>
struct LogicalXor {
    using Vector = V<T>;
    static Vector apply(Vector a, Vector b) { return is_true<T>(a) ^ is_true<T>(b); }
};

using Words = V<std::uint32_t>;
using Floats = V<float>;

struct And {
    using Vector = Words;
    static Vector apply(Vector a, Vector b) { return a & b; }
};

struct Or {
    using Vector = Words;
    static Vector apply(Vector a, Vector b) { return a | b; }
};

struct Xor {
    using Vector = Words;
    static Vector apply(Vector a, Vector b) { return a ^ b; }
};

// Two 16-bit floats a word, computed apart as the word's lower and upper half: nothing has to be packed.

struct Bfloat16 {
    static Floats lower(Words x) { return (Floats)(x << 16); }
    static Floats upper(Words x) { return (Floats)(x & 0xffff0000u); }
    static Words join(Floats lower, Floats upper) { return rounded(lower) >> 16 | (rounded(upper) & 0xffff0000u); }

private:
    // To nearest, ties to even, in the upper half. A NaN that two bfloat16 make has nothing below it to round.
    static Words rounded(Floats x) {
        const Words bits = (Words)x;
        return bits + 0x7fff + ((bits >> 16) & 1);
    }
};

// IEEE halves where no instruction converts them. All steps stay within normal float32 numbers: flushing those that
// are not to zero changes nothing.
struct Float16 {
    static Floats lower(Words x) { return widened(x & 0xffff); }
    static Floats upper(Words x) { return widened(x >> 16); }
    static Words join(Floats lower, Floats upper) { return narrowed(lower) | narrowed(upper) << 16; }

private:
    // Signed, as compared: SSE2 compares nothing else.
    using Integers = V<std::int32_t>;

    static Floats widened(Words half) {
        const Integers bits = (Integers)((half & 0x7fff) << 13);
        const Integers normal = bits + ((127 - 15) << 23);
        // The leading 1 that a subnormal lacks is put there and taken off again.
        const Integers subnormal = (Integers)((Floats)(bits + ((127 - 14) << 23)) - 0x1p-14f);
        const Integers special = bits + ((255 - 31) << 23);
        const Integers finite = bits < (1 << 23) ? subnormal : normal;
        return (Floats)((Words)(bits < (31 << 23) ? finite : special) | (half & 0x8000) << 16);
    }

    static Words narrowed(Floats x) {
        const Words sign = (Words)x >> 16 & 0x8000;
        const Integers bits = (Integers)x & 0x7fffffff;
        // The carry of rounding goes on into the exponent, as it must.
        const Integers normal = (bits - ((127 - 15) << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
        // Adding 0.5 leaves no more bits below it than a subnormal half has: float32's own rounding is the half's.
        const Integers subnormal = (Integers)((Floats)bits + 0.5f) - (126 << 23);
        const Integers special = 0x7c00 | (0x0200 & (bits > (255 << 23)));
        const Integers finite = bits < ((127 - 14) << 23) ? subnormal : normal;
        return sign | (Words)(bits < ((127 + 16) << 23) ? finite : special);
    }
};

template <class Format>
struct PairSum {
    using Vector = Words;
    static Vector apply(Vector a, Vector b) {
        return Format::join(Format::lower(a) + Format::lower(b), Format::upper(a) + Format::upper(b));
    }
};

template <class Format>
struct PairProduct {
    using Vector = Words;
    static Vector apply(Vector a, Vector b) {
        return Format::join(Format::lower(a) * Format::lower(b), Format::upper(a) * Format::upper(b));
    }
};

#if defined(__F16C__)
// A register of floats, half a register of halves.
struct ConvertedHalves {
#if defined(__AVX512F__)
    using Vector = __m256i;
    // The plain forms start from an undefined register, of which GCC warns.
    static Floats widened(Vector x) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, x); }
    static Vector narrowed(Floats x) { return _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#else
    using Vector = __m128i;
    static Floats widened(Vector x) { return (Floats)_mm256_cvtph_ps(x); }
    static Vector narrowed(Floats x) { return _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#endif
};
#elif defined(__aarch64__)
struct ConvertedHalves {
    typedef std::uint16_t Vector __attribute__((vector_size(8)));
    static Floats widened(Vector x) { return (Floats)vcvt_f32_f16((float16x4_t)x); }
    static Vector narrowed(Floats x) { return (Vector)vcvt_f16_f32((float32x4_t)x); }
};
#endif

#if defined(__F16C__) || defined(__aarch64__)
struct HalfSum : ConvertedHalves {
    static Vector apply(Vector a, Vector b) { return narrowed(widened(a) + widened(b)); }
};

struct HalfProduct : ConvertedHalves {
    static Vector apply(Vector a, Vector b) { return narrowed(widened(a) * widened(b)); }
};
#else
using HalfSum = PairSum<Float16>;
using HalfProduct = PairProduct<Float16>;
#endif

// The same for all: bytes in, bytes out.

// At any address, over any type. (GCC copies 16 bytes by way of general registers where memcpy says so.)
template <class Vector>
struct [[gnu::packed, gnu::may_alias]] Anywhere {
    Vector value;
};

template <class Vector>
inline Vector load(const void* from, std::size_t offset) {
    return reinterpret_cast<const Anywhere<Vector>*>(static_cast<const char*>(from) + offset)->value;
}

template <class Vector>
inline void store(void* to, std::size_t offset, Vector value) {
    reinterpret_cast<Anywhere<Vector>*>(static_cast<char*>(to) + offset)->value = value;
}

// One value of size bytes alone, in a vector that is zero but for it.
template <std::size_t size>
using Bits = std::conditional_t<
    size == 1, std::uint8_t,
    std::conditional_t<size == 2, std::uint16_t,
                       std::conditional_t<size == 4, std::uint32_t,
                                          std::conditional_t<size == 8, std::uint64_t, unsigned __int128>>>>;

template <class Vector, std::size_t size>
struct Lanes {
    typedef Bits<size> type __attribute__((vector_size(sizeof(Vector))));
};

template <class Vector, std::size_t size>
inline Vector load_one(const void* from, std::size_t offset) {
    const typename Lanes<Vector, size>::type lanes = {load<Bits<size>>(from, offset)};
    return (Vector)lanes;
}

template <class Vector, std::size_t size>
inline void store_one(void* to, std::size_t offset, Vector value) {
    store(to, offset, ((typename Lanes<Vector, size>::type)value)[0]);
}

// As many whole blocks as there are; returns their bytes. inputs and outputs are constants where the caller's are: then
// the loops over them vanish. Several vectors at once make those loops cheap where they stay; the sums are in registers
// until every input has been read, so an output may be an input. The next bytes are fetched so far ahead, if not 0.
template <class Operation, std::size_t ahead>
[[gnu::always_inline]] inline std::size_t reduce_blocks(std::size_t nbytes, std::size_t inputs, const void* const* in,
                                                        std::size_t outputs, void* const* out) {
    using Vector = typename Operation::Vector;
    constexpr std::size_t step = sizeof(Vector);
    std::size_t i = 0;
    for (; nbytes - i >= 4 * step; i += 4 * step) {
        if constexpr (ahead > 0) {
            for (std::size_t k = 0; k < inputs; ++k) {
                for (std::size_t next = i + ahead; next < i + ahead + 4 * step; next += 64) {
                    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(in[k]) + next));
                }
            }
        }
        Vector a = load<Vector>(in[0], i), b = load<Vector>(in[0], i + step);
        Vector c = load<Vector>(in[0], i + 2 * step), d = load<Vector>(in[0], i + 3 * step);
        for (std::size_t k = 1; k < inputs; ++k) {
            a = Operation::apply(a, load<Vector>(in[k], i));
            b = Operation::apply(b, load<Vector>(in[k], i + step));
            c = Operation::apply(c, load<Vector>(in[k], i + 2 * step));
            d = Operation::apply(d, load<Vector>(in[k], i + 3 * step));
        }
        for (std::size_t k = 0; k < outputs; ++k) {
            store(out[k], i, a);
            store(out[k], i + step, b);
            store(out[k], i + 2 * step, c);
            store(out[k], i + 3 * step, d);
        }
    }
    return i;
}

// From byte i on, less than a block.
template <class Operation, std::size_t size>
[[gnu::always_inline]] inline void reduce_rest(std::size_t i, std::size_t nbytes, std::size_t inputs,
                                               const void* const* in, std::size_t outputs, void* const* out) {
    using Vector = typename Operation::Vector;
    constexpr std::size_t step = sizeof(Vector);
    for (; nbytes - i >= step; i += step) {
        Vector a = load<Vector>(in[0], i);
        for (std::size_t k = 1; k < inputs; ++k) {
            a = Operation::apply(a, load<Vector>(in[k], i));
        }
        for (std::size_t k = 0; k < outputs; ++k) {
            store(out[k], i, a);
        }
    }
    if constexpr (size < step) {
        for (; i < nbytes; i += size) {
            Vector a = load_one<Vector, size>(in[0], i);
            for (std::size_t k = 1; k < inputs; ++k) {
                a = Operation::apply(a, load_one<Vector, size>(in[k], i));
            }
            for (std::size_t k = 0; k < outputs; ++k) {
                store_one<Vector, size>(out[k], i, a);
            }
        }
    }
}

void copy_bytes(std::size_t nbytes, const void* in, std::size_t outputs, void* const* out) {
    for (std::size_t k = 0; k < outputs; ++k) {
        if (out[k] != in) {
            __builtin_memcpy(out[k], in, nbytes);
        }
    }
}

// Beyond some streams through memory at once the processor prefetches none of them.
constexpr std::size_t most_streams = 16, group = 8;

// The same reduction, of a few inputs at a time into a block that stays in the cache.
void reduce_in_groups(Reduce reduce_few, std::size_t size, std::size_t nbytes, std::size_t inputs,
                      const void* const* in, std::size_t outputs, void* const* out) {
    alignas(64) char block[4096];
    void* const target = block;
    const void* sources[group];
    for (std::size_t i = 0, length; i < nbytes; i += length) {
        length = nbytes - i < sizeof block ? nbytes - i : sizeof block;
        for (std::size_t k = 0; k < inputs;) {
            std::size_t count = 0;
            if (k > 0) {
                sources[count++] = block;
            }
            while (count < group && k < inputs) {
                sources[count++] = static_cast<const char*>(in[k++]) + i;
            }
            reduce_few(length / size, count, sources, 1, &target);
        }
        for (std::size_t k = 0; k < outputs; ++k) {
            __builtin_memcpy(static_cast<char*>(out[k]) + i, block, length);
        }
    }
}

template <class Operation, std::size_t size, std::size_t ahead = 0>
void reduce(std::size_t n, std::size_t inputs, const void* const* in, std::size_t outputs,
            void* const* out) noexcept {
    const std::size_t nbytes = n * size;
    if (nbytes == 0) {
        return;
    }
    if (inputs == 1) {
        return copy_bytes(nbytes, in[0], outputs, out);
    }
    if (inputs > most_streams || outputs > most_streams) {
        return reduce_in_groups(reduce<Operation, size, ahead>, size, nbytes, inputs, in, outputs, out);
    }
    std::size_t done;
    if (inputs == 2 && outputs == 2) {
        const void* const sources[] = {in[0], in[1]};
        void* const targets[] = {out[0], out[1]};
        done = reduce_blocks<Operation, ahead>(nbytes, 2, sources, 2, targets);
    } else if (inputs == 2 && outputs == 1) {
        const void* const sources[] = {in[0], in[1]};
        void* const targets[] = {out[0]};
        done = reduce_blocks<Operation, ahead>(nbytes, 2, sources, 1, targets);
    } else {
        done = reduce_blocks<Operation, ahead>(nbytes, inputs, in, outputs, out);
    }
    reduce_rest<Operation, size>(done, nbytes, inputs, in, outputs, out);
}

// Of integers, signed or not.
template <template <class> class Operation>
Reduce of_integers(Type type) {
    switch (type) {
        case Type::i8:
        case Type::u8: return reduce<Operation<std::uint8_t>, 1>;
        case Type::i16:
        case Type::u16: return reduce<Operation<std::uint16_t>, 2>;
        case Type::i32:
        case Type::u32: return reduce<Operation<std::uint32_t>, 4>;
        case Type::i64:
        case Type::u64: return reduce<Operation<std::uint64_t>, 8>;
        default: return nullptr;
    }
}

template <class Operation>
Reduce of_bits(Type type) {
    switch (type) {
        case Type::i8:
        case Type::u8: return reduce<Operation, 1>;
        case Type::i16:
        case Type::u16: return reduce<Operation, 2>;
        case Type::i32:
        case Type::u32: return reduce<Operation, 4>;
        case Type::i64:
        case Type::u64: return reduce<Operation, 8>;
        default: return nullptr;
    }
}

template <template <class> class Operation>
Reduce of_floats(Type type) {
    switch (type) {
        case Type::f32: return reduce<Operation<float>, sizeof(float)>;
        case Type::f64: return reduce<Operation<double>, sizeof(double)>;
        case Type::longdouble: return reduce<Operation<long double>, sizeof(long double)>;
        default: return nullptr;
    }
}

template <template <class> class Operation, template <std::int16_t> class HalfOperation>
Reduce of_ordered(Type type) {
    switch (type) {
        case Type::i8: return reduce<Operation<std::int8_t>, 1>;
        case Type::i16: return reduce<Operation<std::int16_t>, 2>;
        case Type::i32: return reduce<Operation<std::int32_t>, 4>;
        case Type::i64: return reduce<Operation<std::int64_t>, 8>;
        case Type::f16: return reduce<HalfOperation<0x7c00>, 2>;
        case Type::bf16: return reduce<HalfOperation<0x7f80>, 2>;
        case Type::f32:
        case Type::f64:
        case Type::longdouble: return of_floats<Operation>(type);
        default: return of_integers<Operation>(type);
    }
}

// What 16-bit floats take to convert leaves the processor's own prefetching less room: this is a sixth faster.
constexpr std::size_t converted_ahead = 1024;

Reduce sum(Type type) {
    switch (type) {
        case Type::f16: return reduce<HalfSum, 2, converted_ahead>;
        case Type::bf16: return reduce<PairSum<Bfloat16>, 2, converted_ahead>;
        case Type::c64: return reduce<Sum<float>, 2 * sizeof(float)>;
        case Type::c128: return reduce<Sum<double>, 2 * sizeof(double)>;
        case Type::clongdouble: return reduce<Sum<long double>, 2 * sizeof(long double)>;
        case Type::f32:
        case Type::f64:
        case Type::longdouble: return of_floats<Sum>(type);
        default: return of_integers<Sum>(type);
    }
}

Reduce product(Type type) {
    switch (type) {
        case Type::f16: return reduce<HalfProduct, 2, converted_ahead>;
        case Type::bf16: return reduce<PairProduct<Bfloat16>, 2, converted_ahead>;
        case Type::c64: return reduce<ComplexProduct<float>, 2 * sizeof(float)>;
        case Type::c128: return reduce<ComplexProduct<double>, 2 * sizeof(double)>;
        case Type::clongdouble: return reduce<ComplexProduct<long double>, 2 * sizeof(long double)>;
        case Type::f32:
        case Type::f64:
        case Type::longdouble: return of_floats<Product>(type);
        default: return of_integers<Product>(type);
    }
}

// Of integers and bool.
template <template <class> class Operation>
Reduce logical(Type type) {
    return type == Type::b8 ? reduce<Operation<std::uint8_t>, 1> : of_integers<Operation>(type);
}

}  // namespace

Reduce BITRING_KERNELS(Op op, Type type) noexcept {
    switch (op) {
        case Op::sum: return sum(type);
        case Op::prod: return product(type);
        case Op::max: return of_ordered<Maximum, HalfMaximum>(type);
        case Op::min: return of_ordered<Minimum, HalfMinimum>(type);
        case Op::land: return logical<LogicalAnd>(type);
        case Op::lor: return logical<LogicalOr>(type);
        case Op::lxor: return logical<LogicalXor>(type);
        case Op::band: return of_bits<And>(type);
        case Op::bor: return of_bits<Or>(type);
        case Op::bxor: return of_bits<Xor>(type);
    }
    return nullptr;
}

}  // namespace bitring
