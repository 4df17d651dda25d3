#include "shard_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>

#include <vector>

#include "shard.h"
#include "shared_words.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitring {

namespace {

using Starts = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<std::int64_t> vector_of(const Starts& starts) { return {starts.data(), starts.data() + starts.size()}; }

}  // namespace

void bind_shards(nb::module_& m) {
    using Released = nb::call_guard<nb::gil_scoped_release>;

    // Addresses; `keep` owns their memory.
    nb::class_<Shard>(m, "Shard")
        .def_static("locks_nbytes", &Shard::locks_nbytes, "nbytes"_a)
        .def("__init__", [](Shard* self, int rank, int size, std::uintptr_t values, std::uintptr_t slot, std::size_t n,
                            std::size_t itemsize, std::uintptr_t locks, nb::handle) {
            new (self) Shard(rank, size, reinterpret_cast<char*>(values), reinterpret_cast<char*>(slot), n, itemsize,
                             reinterpret_cast<char*>(locks));
        }, nb::keep_alive<1, 9>(), "rank"_a, "size"_a, "values"_a, "slot"_a, "n"_a, "itemsize"_a, "locks"_a, "keep"_a)
        .def("bury", &Shard::bury, "rank"_a);

    // `values` are an address; they stay where they are until the pass is over.
    nb::class_<ShardPass>(m, "ShardPass")
        .def_static("update", [](std::shared_ptr<Shard> shard, const Starts& starts, std::size_t width,
                                 std::uintptr_t values, bool locked, const Updater& updater) {
            return ShardPass(std::move(shard), vector_of(starts), width, reinterpret_cast<const void*>(values), locked,
                             updater.update, updater.settings);
        }, "shard"_a, "starts"_a, "width"_a, "values"_a, "locked"_a, "updater"_a)
        .def_static("read", [](std::shared_ptr<Shard> shard, const Starts& starts, std::size_t width,
                               std::uintptr_t values, bool locked) {
            return ShardPass(std::move(shard), vector_of(starts), width, reinterpret_cast<void*>(values), locked);
        }, "shard"_a, "starts"_a, "width"_a, "values"_a, "locked"_a)
        .def("run", &ShardPass::run, Released(), "seconds"_a);

    nb::class_<SharedWords>(m, "SharedWords")
        .def_static("nbytes", &SharedWords::nbytes, "words"_a)
        .def("__init__", [](SharedWords* self, int rank, int size, std::uintptr_t memory, nb::handle) {
            new (self) SharedWords(rank, size, reinterpret_cast<char*>(memory));
        }, nb::keep_alive<1, 5>(), "rank"_a, "size"_a, "memory"_a, "keep"_a)
        .def("acquire", &SharedWords::acquire, Released(), "seconds"_a)
        .def("release", &SharedWords::release)
        .def("bury", &SharedWords::bury, "rank"_a)
        .def_prop_ro("words", [](const SharedWords& words) { return reinterpret_cast<std::uintptr_t>(words.words()); })
        .def_prop_ro("bell", &SharedWords::bell)
        .def("ring", &SharedWords::ring)
        .def("wait", &SharedWords::wait, Released(), "seen"_a, "seconds"_a);
}

}  // namespace bitring
