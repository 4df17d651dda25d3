// What an optimizer does to a run of values: the parameters' and the slot's, from the gradient's.
//
// Compiled for several instruction sets, as kernels.h says. Every step is rounded as NumPy rounds it, so the bits are those
// of `apply` in training/optimizers/NAME.py, which is each one's reference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kernels.h"

namespace bitring {

// Optimizers; what of their settings chooses another formula is part of the name.
enum class Rule : std::uint8_t { sgd, sgd_momentum, sgd_nesterov, adagrad };

struct UpdateSettings {
    double lr = 0;
    double momentum = 0;
    double weight_decay = 0;
    double eps = 0;
};

inline constexpr bool has_slot(Rule rule) { return rule != Rule::sgd; }

// Updates n values `w` and their slot in place from `g`; `slot` may be null without one. They overlap nowhere.
using Update = void (*)(std::size_t n, void* w, void* slot, const void* g, const UpdateSettings& settings) noexcept;

// For float32 and float64; null for other types.
Update update_kernel(Rule rule, Type type) noexcept;

// The same for one of the instruction sets of kernels.h; null also where the processor lacks it.
Update update_kernel(Rule rule, Type type, std::string_view instruction_set) noexcept;

// A kernel and its settings.
struct Updater {
    Rule rule;
    Type type;
    Update update;
    UpdateSettings settings;
};

}  // namespace bitring
