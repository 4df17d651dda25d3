// Which of the compiled instruction sets this processor runs.
#include "kernels.h"
#include "pack_kernels.h"
#include "update_kernels.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace bitring {

Reduce baseline_kernel(Op op, Type type) noexcept;
Update baseline_kernel(Rule rule, Type type) noexcept;
Pack baseline_kernel(Type type) noexcept;
#ifdef __x86_64__
Reduce avx2_kernel(Op op, Type type) noexcept;
Update avx2_kernel(Rule rule, Type type) noexcept;
Pack avx2_kernel(Type type) noexcept;
Reduce avx512_kernel(Op op, Type type) noexcept;
Update avx512_kernel(Rule rule, Type type) noexcept;
Pack avx512_kernel(Type type) noexcept;
#endif

namespace {

struct Variant {
    std::string_view name;
    Reduce (*kernel)(Op op, Type type) noexcept;
    Update (*update)(Rule rule, Type type) noexcept;
    Pack (*pack)(Type type) noexcept;
    bool (*runs)();
};

#ifdef __x86_64__
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && has_f16c(); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c();
}
#endif

// The best first.
constexpr Variant variants[] = {
#ifdef __x86_64__
    {"avx512", avx512_kernel, avx512_kernel, avx512_kernel, has_avx512},
    {"avx2", avx2_kernel, avx2_kernel, avx2_kernel, has_avx2},
#endif
    {"baseline", baseline_kernel, baseline_kernel, baseline_kernel, [] { return true; }},
};

const Variant& best() noexcept {
    static const Variant& chosen = [] () -> const Variant& {
        const Variant* variant = variants;
        while (!variant->runs()) {
            ++variant;
        }
        return *variant;
    }();
    return chosen;
}

}  // namespace

std::size_t size_of(Type type) noexcept {
    switch (type) {
        case Type::b8:
        case Type::i8:
        case Type::u8: return 1;
        case Type::i16:
        case Type::u16:
        case Type::f16:
        case Type::bf16: return 2;
        case Type::i32:
        case Type::u32:
        case Type::f32: return 4;
        case Type::i64:
        case Type::u64:
        case Type::f64:
        case Type::c64: return 8;
        case Type::c128: return 16;
        case Type::longdouble: return sizeof(long double);
        case Type::clongdouble: return 2 * sizeof(long double);
    }
    return 0;
}

Reduce reduce_kernel(Op op, Type type) noexcept { return best().kernel(op, type); }

Reduce reduce_kernel(Op op, Type type, std::string_view instruction_set) noexcept {
    for (const Variant& variant : variants) {
        if (variant.name == instruction_set && variant.runs()) {
            return variant.kernel(op, type);
        }
    }
    return nullptr;
}

Update update_kernel(Rule rule, Type type) noexcept { return best().update(rule, type); }

Update update_kernel(Rule rule, Type type, std::string_view instruction_set) noexcept {
    for (const Variant& variant : variants) {
        if (variant.name == instruction_set && variant.runs()) {
            return variant.update(rule, type);
        }
    }
    return nullptr;
}

Pack pack_kernel(Type type) noexcept { return best().pack(type); }

Pack pack_kernel(Type type, std::string_view instruction_set) noexcept {
    for (const Variant& variant : variants) {
        if (variant.name == instruction_set && variant.runs()) {
            return variant.pack(type);
        }
    }
    return nullptr;
}

std::string_view instruction_set() noexcept { return best().name; }

}  // namespace bitring
