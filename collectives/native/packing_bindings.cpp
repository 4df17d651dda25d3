#include "packing_bindings.h"

#include <nanobind/stl/vector.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "array_view.h"
#include "pack_kernels.h"
#include "update_kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitring {

namespace {

// Beyond so many values other threads of Python may run meanwhile.
constexpr std::size_t kLarge = 1 << 15;

using Shape = std::vector<std::int64_t>;
using List = nb::typed<nb::list, nb::object>;

// Contiguous arrays of one type, for as long as this lives; `values`: of all of them.
class Views {
public:
    // `shapes`: those that the arrays must have; null: any.
    bool take(const List& arrays, Type type, bool writable, const std::vector<Shape>* shapes = nullptr) {
        if (shapes != nullptr && shapes->size() != arrays.size()) return false;
        for (nb::handle array : arrays) {
            views_.emplace_back();
            ArrayView& view = views_.back();
            if (!view.take(array, writable) || view.type != type) return false;
            if (shapes != nullptr && !view.has_shape((*shapes)[views_.size() - 1])) return false;
            values += view.nbytes() / view.itemsize();
        }
        return true;
    }
    std::size_t size() const { return views_.size(); }
    const ArrayView& operator[](std::size_t k) const { return views_[k]; }
    std::size_t values = 0;

private:
    std::deque<ArrayView> views_;
};

// One array behind the other, in memory of its own.
struct Packer {
    Pack pack;
    Type type;
    char* to;
    std::vector<Shape> shapes;

    // Whether all values are finite; none where the arrays are not contiguous, of the type and shapes: nothing is done.
    std::optional<bool> run(const List& arrays, double scale) const {
        Views views;
        if (!views.take(arrays, type, false, &shapes)) return std::nullopt;
        std::optional<nb::gil_scoped_release> released;
        if (views.values > kLarge) released.emplace();
        bool finite = true;
        char* at = to;
        for (std::size_t k = 0; k < views.size(); ++k) {
            const ArrayView& view = views[k];
            finite &= pack(view.nbytes() / view.itemsize(), at, view.data(), scale);
            at += view.nbytes();
        }
        return finite;
    }
};

// Whether the arrays were updated: not where any is not contiguous, of the type, as large as its
// neighbours and apart from them.
bool run(const Updater& updater, const List& parameters, const List& slots, const List& gradients) {
    Views w, s, g;
    const bool has_slots = has_slot(updater.rule);
    if (!w.take(parameters, updater.type, true) || !s.take(slots, updater.type, true) ||
        !g.take(gradients, updater.type, false) || g.size() != w.size() || s.size() != (has_slots ? w.size() : 0)) {
        return false;
    }
    for (std::size_t k = 0; k < w.size(); ++k) {
        if (g[k].nbytes() != w[k].nbytes() || (has_slots && s[k].nbytes() != w[k].nbytes())) return false;
        if (g[k].overlaps(w[k]) || (has_slots && g[k].overlaps(s[k]))) return false;
    }
    std::optional<nb::gil_scoped_release> released;
    if (w.values > kLarge) released.emplace();
    for (std::size_t k = 0; k < w.size(); ++k) {
        updater.update(w[k].nbytes() / w[k].itemsize(), w[k].data(), has_slots ? s[k].data() : nullptr, g[k].data(),
                       updater.settings);
    }
    return true;
}

}  // namespace

void bind_packing(nb::module_& m) {
    // `to` is an address; `keep` owns its memory. `pack` returns 1 where all is finite, 0 where it is not, -1 where
    // nothing was done.
    nb::class_<Packer>(m, "Packer")
        .def("__init__", [](Packer* self, Type type, std::uintptr_t to, std::vector<Shape> shapes, nb::handle) {
            const Pack pack = pack_kernel(type);
            if (pack == nullptr) throw std::invalid_argument("Packer: no kernel for values of this type");
            new (self) Packer{pack, type, reinterpret_cast<char*>(to), std::move(shapes)};
        }, nb::keep_alive<1, 5>(), "type"_a, "to"_a, "shapes"_a, "keep"_a)
        .def("pack", [](const Packer& packer, const List& arrays, double scale) {
            const std::optional<bool> finite = packer.run(arrays, scale);
            return finite ? int(*finite) : -1;
        }, "arrays"_a, "scale"_a);

    // Names that training/optimizers/NAME.py gives.
    nb::enum_<Rule>(m, "Rule")
        .value("sgd", Rule::sgd).value("sgd_momentum", Rule::sgd_momentum).value("sgd_nesterov", Rule::sgd_nesterov)
        .value("adagrad", Rule::adagrad);

    nb::class_<Updater>(m, "Updater")
        .def("__init__", [](Updater* self, Rule rule, Type type, double lr, double momentum, double weight_decay, double eps) {
            const Update update = update_kernel(rule, type);
            if (update == nullptr) throw std::invalid_argument("Updater: no kernel for values of this type");
            new (self) Updater{rule, type, update, UpdateSettings{lr, momentum, weight_decay, eps}};
        }, "rule"_a, "type"_a, "lr"_a, "momentum"_a, "weight_decay"_a, "eps"_a)
        .def("run", &run, "parameters"_a, "slots"_a, "gradients"_a);
}

}  // namespace bitring
