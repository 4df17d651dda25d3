// The optimizers' kernels for one instruction set, compiled once for each, under the rules of kernels_body.cpp:
// BITRING_KERNELS names the one function defined here, beside the one of that name there.

#include <cstddef>

#include "update_kernels.h"

namespace bitring {

Update BITRING_KERNELS(Rule rule, Type type) noexcept;

namespace {

// Settings are numbers of the values' type, as they are to NumPy.

template <class T, Rule rule, bool decays>
void sgd(std::size_t n, void* to, void* slot, const void* from, const UpdateSettings& settings) noexcept {
    T* __restrict w = static_cast<T*>(to);
    T* __restrict v = static_cast<T*>(slot);
    const T* __restrict gradient = static_cast<const T*>(from);
    const T lr = T(settings.lr), momentum = T(settings.momentum), weight_decay = T(settings.weight_decay);
    for (std::size_t i = 0; i < n; ++i) {
        T g = gradient[i];
        if constexpr (decays) g = w[i] * weight_decay + g;
        if constexpr (rule != Rule::sgd) {
            v[i] = v[i] * momentum + g;
            g = rule == Rule::sgd_nesterov ? v[i] * momentum + g : v[i];
        }
        w[i] -= g * lr;
    }
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

template <class T, bool decays>
void adagrad(std::size_t n, void* to, void* slot, const void* from, const UpdateSettings& settings) noexcept {
    T* __restrict w = static_cast<T*>(to);
    T* __restrict s = static_cast<T*>(slot);
    const T* __restrict gradient = static_cast<const T*>(from);
    const T lr = T(settings.lr), eps = T(settings.eps), weight_decay = T(settings.weight_decay);
    for (std::size_t i = 0; i < n; ++i) {
        T g = gradient[i];
        if constexpr (decays) g = w[i] * weight_decay + g;
        s[i] += g * g;
        w[i] -= g / (root(s[i]) + eps) * lr;
    }
}

// Without weight decay nothing is added: that would turn -0 into 0, and 0 times Inf into NaN.
template <class T, Rule rule>
void update(std::size_t n, void* w, void* slot, const void* g, const UpdateSettings& settings) noexcept {
    const bool decays = settings.weight_decay != 0;
    if constexpr (rule == Rule::adagrad) {
        (decays ? adagrad<T, true> : adagrad<T, false>)(n, w, slot, g, settings);
    } else {
        (decays ? sgd<T, rule, true> : sgd<T, rule, false>)(n, w, slot, g, settings);
    }
}

template <class T>
Update of_type(Rule rule) {
    switch (rule) {
        case Rule::sgd: return update<T, Rule::sgd>;
        case Rule::sgd_momentum: return update<T, Rule::sgd_momentum>;
        case Rule::sgd_nesterov: return update<T, Rule::sgd_nesterov>;
        case Rule::adagrad: return update<T, Rule::adagrad>;
    }
    return nullptr;
}

}  // namespace

Update BITRING_KERNELS(Rule rule, Type type) noexcept {
    switch (type) {
        case Type::f32: return of_type<float>(rule);
        case Type::f64: return of_type<double>(rule);
        default: return nullptr;
    }
}

}  // namespace bitring
