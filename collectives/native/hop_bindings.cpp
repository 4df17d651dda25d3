#include "hop_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "hop_exchange.h"
#include "mpi_wire.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitring {
namespace {

using Table = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The columns of the table of hops, and of that of moves, which are in the order of their hops.
const std::array<const char*, 4> hop_fields{"adds", "encoded", "result", "values"};
const std::array<const char*, 13> move_fields{"hop",      "sends",    "peer",        "tag",      "nbytes",
                                              "first",    "runs",     "run",         "stride",   "first_after",
                                              "runs_after", "run_after", "stride_after"};

std::shared_ptr<HopExchange> make_hop_exchange(const MpiLibrary& library, int handle_size, std::uint64_t comm,
                                               std::uint64_t byte, int rank, Type type, const Table& hops,
                                               const Table& moves, const Codec* codec, std::size_t wide_itemsize) {
    if (hops.shape(1) != hop_fields.size() || moves.shape(1) != move_fields.size()) {
        throw std::invalid_argument("HopExchange: hops or moves have other columns");
    }
    std::vector<Hop> made;
    for (std::size_t i = 0; i < hops.shape(0); ++i) {
        made.push_back(Hop{{}, {}, hops(i, 0) != 0, hops(i, 1) != 0, reinterpret_cast<void*>(hops(i, 2)), hops(i, 3)});
    }
    for (std::size_t i = 0; i < moves.shape(0); ++i) {
        const std::int64_t* m = moves.data() + i * moves.shape(1);
        Hop& hop = made.at(std::size_t(m[0]));
        (m[1] != 0 ? hop.sends : hop.arrivals)
            .push_back(HopMove{int(m[2]), int(m[3]), m[4], Runs{m[5], m[6], m[7], m[8]}, Runs{m[9], m[10], m[11], m[12]}});
    }
    auto wire = make_mpi_wire(library, handle_size, comm, byte, HopExchange::room(made, rank));
    return std::make_shared<HopExchange>(std::move(wire), rank, type, std::move(made), codec, wide_itemsize);
}

}  // namespace

void bind_hops(nb::module_& m) {
    using Released = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<HopExchange, Operation>(m, "HopExchange")
        .def(nb::new_(&make_hop_exchange), nb::keep_alive<0, 2>(), "library"_a, "handle_size"_a, "comm"_a, "byte"_a,
             "rank"_a, "type"_a, "hops"_a, "moves"_a, "codec"_a.none(), "wide_itemsize"_a)
        // As long as this lives the library may write to the results.
        .def("keep", [](HopExchange&, nb::handle) {}, nb::keep_alive<1, 2>(), "results"_a)
        .def("send", [](HopExchange& exchange, std::size_t hop, std::uintptr_t from) {
            exchange.send(hop, reinterpret_cast<const void*>(from));
        }, Released(), "hop"_a, "array"_a)
        .def("expect", [](HopExchange& exchange, std::size_t hop, std::uintptr_t from) {
            exchange.expect(hop, reinterpret_cast<const void*>(from));
        }, Released(), "hop"_a, "array"_a)
        .def("expect_sent", &HopExchange::expect_sent)
        .def_prop_ro_static("hop_fields", [](nb::handle) { return hop_fields; })
        .def_prop_ro_static("move_fields", [](nb::handle) { return move_fields; });
}

}  // namespace bitring
