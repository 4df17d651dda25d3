// The extension bitring._native; _native.pyi is its interface.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "checked.h"
#include "crew.h"
#include "direct.h"
#include "execution.h"
#include "kernels.h"
#include "lane_allreduce.h"
#include "library_allreduce.h"
#include "memory.h"
#include "mpi_wire.h"
#include "news.h"
#include "node.h"
#include "owner_exchange.h"
#include "presence.h"
#include "region.h"
#include "shared_allreduce.h"
#include "wait.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitring {
namespace {

using Integers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::vector<std::vector<int>> ragged(const Integers& starts, const Integers& values) {
    std::vector<std::vector<int>> lists(starts.size() - 1);
    for (std::size_t k = 0; k < lists.size(); ++k) {
        lists[k].assign(values.data() + starts.data()[k], values.data() + starts.data()[k + 1]);
    }
    return lists;
}

std::shared_ptr<Program> make_program(const Table& messages, const Integers& unblocks_starts, const Integers& unblocks,
                                      const Integers& streams_starts, const Integers& streams, int slots,
                                      std::int64_t slot_values, int window) {
    auto program = std::make_shared<Program>();
    for (std::size_t i = 0; i < messages.shape(0); ++i) {
        const std::int64_t* m = messages.data() + i * messages.shape(1);
        program->messages.push_back(Message{m[0] != 0, m[1] != 0, m[2] != 0, int(m[3]), m[4], m[5], int(m[6]),
                                            int(m[7]), int(m[8]), int(m[9])});
    }
    program->unblocks = ragged(unblocks_starts, unblocks);
    program->streams = ragged(streams_starts, streams);
    program->slots = slots;
    program->slot_values = slot_values;
    program->window = window;
    return program;
}

std::shared_ptr<Execution> make_execution(std::shared_ptr<Program> program, const MpiLibrary& library, int handle_size,
                                          std::uint64_t comm, std::uint64_t byte, int rank, std::size_t itemsize,
                                          std::uintptr_t kernel) {
    auto wire = make_mpi_wire(library, handle_size, comm, byte, Execution::room(*program));
    return std::make_shared<Execution>(std::move(program), std::move(wire), rank, itemsize,
                                       reinterpret_cast<Reduce>(kernel));
}

// `functions`, five of each codec: of compression/kernels/functions.py, for the buffer's type, then for the residual's,
// then the settings'. `pieces`: rows of owner, number of the segment, start, stop, nbytes, number of the codec, ordered.
std::shared_ptr<OwnerExchange> make_owner_exchange(const MpiLibrary& library, int handle_size, std::uint64_t comm,
                                                   std::uint64_t byte, int rank, int size, int type,
                                                   const std::vector<std::uintptr_t>& functions, bool fixed,
                                                   const Table& pieces, std::uintptr_t residual,
                                                   std::uintptr_t owner_residual, std::int64_t owned, int to_owner_tag,
                                                   int from_owner_tag) {
    std::vector<Codec> codecs;
    for (std::size_t k = 0; k + 5 <= functions.size(); k += 5) {
        codecs.push_back(Codec{
            reinterpret_cast<Codec::Encode>(functions[k]), reinterpret_cast<Codec::Encode>(functions[k + 2]),
            reinterpret_cast<Codec::Decode>(functions[k + 1]), reinterpret_cast<Codec::Decode>(functions[k + 3]),
            reinterpret_cast<const double*>(functions[k + 4])});
    }
    std::vector<ExchangeSegment> segments;
    std::int64_t number = -1;
    for (std::size_t i = 0; i < pieces.shape(0); ++i) {
        const std::int64_t* p = pieces.data() + i * pieces.shape(1);
        if (p[1] != number) segments.push_back(ExchangeSegment{int(p[0]), {}});
        number = p[1];
        segments.back().pieces.push_back(EncodedPiece{p[2], p[3], p[4], std::size_t(p[5])});
        if (std::size_t(p[5]) >= codecs.size()) throw std::invalid_argument("OwnerExchange: no codec has that number");
    }
    auto wire = make_mpi_wire(library, handle_size, comm, byte, OwnerExchange::room(segments, rank, size));
    return std::make_shared<OwnerExchange>(std::move(wire), rank, size, Type(type), std::move(codecs), fixed,
                                           std::move(segments),
                                           reinterpret_cast<void*>(residual), reinterpret_cast<void*>(owner_residual),
                                           owned, to_owner_tag, from_owner_tag);
}

// Takes the first of `operations` that has something to do further, again and again, without Python's lock, until one
// is over (its index is returned), `seconds` have passed without anything moving, `wake` asks for a return, or there is
// something to be read before any of them sends (-1).
int drive(const std::vector<Operation*>& operations, std::atomic<int>& wake, double seconds, bool gentle) {
    nb::gil_scoped_release released;
    const Crew::Waiting waiting(!gentle);
    Patience patience(gentle);
    const auto limit = std::uint64_t(seconds * 1e9);
    while (wake.load(std::memory_order_relaxed) == 0 && !News::of_process().unread_lately()) {
        bool moved = false;
        for (std::size_t k = 0; k < operations.size(); ++k) {
            const Status status = operations[k]->advance();
            if (is_over(status)) return int(k);
            moved |= status == Status::moved;
        }
        if (moved) {
            patience.moved();
        } else {
            patience.rest();
            if (patience.idle_nanoseconds() > limit) return -1;
        }
    }
    return -1;
}

// Asks a thread in drive() to come back.
struct Wake {
    std::atomic<int> value{0};
};

}  // namespace
}  // namespace bitring

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // what hangs on communicators that are never freed lives as long as the process
    using namespace bitring;

    nb::register_exception_translator([](const std::exception_ptr& p, void*) {
        try {
            std::rethrow_exception(p);
        } catch (const std::system_error& error) {
            PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
        }
    });

    m.def("instruction_set", &instruction_set);
    m.def("kernel", [](int op, int type) {
        return reinterpret_cast<std::uintptr_t>(reduce_kernel(Op(op), Type(type)));
    });
    m.def("reduce", [](std::uintptr_t kernel, std::size_t n, const std::vector<std::uintptr_t>& in,
                       const std::vector<std::uintptr_t>& out) {
        nb::gil_scoped_release released;
        reinterpret_cast<Reduce>(kernel)(n, in.size(), reinterpret_cast<const void* const*>(in.data()), out.size(),
                                         reinterpret_cast<void* const*>(out.data()));
    });
    m.def("with_count", &with_count);
    m.def("limit_threads", [](int threads) { Crew::of_process().limit(threads); });
    m.def("set_crowded", [](bool value) { crowded() = value; });
    m.def("news_comes_to", [](int descriptor) { News::of_process().comes_to(descriptor); });
    m.def("unread_news", [] { return News::of_process().unread(); });

    nb::class_<Memory>(m, "Memory")
        .def_static("make", &Memory::make)
        .def_static("open", &Memory::open)
        .def_prop_ro("address", [](const Memory& memory) { return reinterpret_cast<std::uintptr_t>(memory.data()); })
        .def_prop_ro("nbytes", &Memory::nbytes)
        .def_prop_ro("descriptor", &Memory::descriptor)
        .def("close_descriptor", &Memory::close_descriptor)
        .def("unlink", &Memory::unlink)
        .def("read", [](const Memory& memory, std::size_t n) { return nb::bytes(memory.data(), n); })
        .def("write", [](Memory& memory, nb::bytes text) { std::memcpy(memory.data(), text.c_str(), text.size()); });

    nb::class_<Presence>(m, "Presence")
        .def_static("make", &Presence::make)
        .def_static("open", &Presence::open)
        .def_prop_ro("left", [](const Presence& presence) { return presence.state() == Presence::State::left; })
        .def_prop_ro("dead", [](const Presence& presence) { return presence.state() == Presence::State::dead; })
        .def("leave", &Presence::leave)
        .def_prop_ro("memory", &Presence::memory, nb::rv_policy::reference_internal);

    nb::class_<Wake>(m, "Wake")
        .def(nb::init<>())
        .def("set", [](Wake& wake) { wake.value.store(1, std::memory_order_relaxed); })
        .def("clear", [](Wake& wake) { wake.value.store(0, std::memory_order_relaxed); });

    nb::class_<Verdict>(m, "Verdict")
        .def_ro("same", &Verdict::same)
        .def_ro("same_function", &Verdict::same_function)
        .def_ro("same_place", &Verdict::same_place)
        .def_ro("flags", &Verdict::flags);

    // Whoever calls the MPI library waits for its lock, and must not hold Python's: a thread that waits in the library
    // polls bitring's requests with the one, and wants the other.
    using Released = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Operation>(m, "Operation")
        .def("begin", &Operation::begin, Released())
        .def("advance", [](Operation& operation) { operation.advance(); }, Released())
        .def_prop_ro("over", [](const Operation& operation) { return is_over(operation.status()); })
        .def_prop_ro("disagrees", [](const Operation& operation) { return operation.status() == Status::disagree; })
        .def_prop_ro("moves", &Operation::moves)
        .def_prop_ro("awaited", &Operation::awaited)
        .def_prop_ro("error", &Operation::error);

    m.def("drive", [](const std::vector<Operation*>& operations, Wake& wake, double seconds, bool gentle) {
        return drive(operations, wake.value, seconds, gentle);
    });

    nb::class_<Region>(m, "Region", nb::is_weak_referenceable())
        .def("__init__", [](Region* self, int rank, std::uint64_t number, const nb::list& parts) {
            std::vector<Memory> memories;
            for (nb::handle part : parts) memories.push_back(std::move(*nb::inst_ptr<Memory>(part)));
            new (self) Region(rank, number, std::move(memories));
        })
        .def_prop_ro("nbytes", &Region::nbytes)
        .def_prop_ro("number", &Region::number)
        .def_prop_ro("rank", &Region::rank)
        .def("address", [](const Region& region, int r) { return reinterpret_cast<std::uintptr_t>(region.part(r)); })
        .def("holds", [](const Region& region, std::uintptr_t data, std::size_t nbytes) {
            return region.holds(reinterpret_cast<void*>(data), nbytes);
        })
        .def("where", [](const Region& region, std::uintptr_t data) {
            return region.where(reinterpret_cast<void*>(data));
        });

    nb::class_<Node>(m, "Node")
        .def_static("nbytes", &Node::nbytes)
        .def("__init__", [](Node* self, std::shared_ptr<Region> region, std::vector<int> names) {
            std::vector<char*> parts;
            for (int r = 0; r < region->size(); ++r) parts.push_back(region->part(r));
            new (self) Node(region->rank(), std::move(parts), std::move(names), region);
        })
        .def_prop_ro("rank", &Node::rank)
        .def_prop_ro("size", &Node::size);

    nb::class_<Agreement, Operation>(m, "Agreement")
        .def("__init__", [](Agreement* self, std::shared_ptr<Node> node, std::uint64_t signature, std::uint64_t where,
                            std::uint32_t flags) {
            new (self) Agreement(*node, Intent{signature, where, flags});
        }, nb::keep_alive<1, 2>())
        .def_prop_ro("verdict", &Agreement::verdict);

    nb::class_<Checked, Operation>(m, "Checked")
        .def("__init__", [](Checked* self, std::shared_ptr<Node> node, std::uint64_t signature, std::uint32_t flags,
                            std::shared_ptr<Operation> next) {
            new (self) Checked(std::move(node), Intent{signature, 0, flags}, std::move(next));
        })
        .def_prop_ro("verdict", &Checked::verdict);

    nb::class_<SharedAllreduce, Operation>(m, "SharedAllreduce")
        .def("__init__", [](SharedAllreduce* self, std::shared_ptr<Node> node, std::uint64_t signature,
                            const std::vector<std::tuple<std::uintptr_t, std::size_t, std::size_t, std::uintptr_t>>& pieces,
                            std::shared_ptr<const Region> region) {
            Intent intent{signature, 0, 0};
            std::vector<Piece> made;
            for (const auto& [data, n, itemsize, kernel] : pieces) {
                void* values = reinterpret_cast<void*>(data);
                made.push_back(Piece{values, values, n, itemsize, reinterpret_cast<Reduce>(kernel)});
            }
            if (region) intent.where = region->where(made[0].to);
            new (self) SharedAllreduce(std::move(node), intent, std::move(made), std::move(region));
        }, "node"_a, "signature"_a, "pieces"_a, "region"_a.none())
        .def_prop_ro("verdict", &SharedAllreduce::verdict)
        .def_static("small", &SharedAllreduce::small);

    nb::class_<Program>(m, "Program").def(nb::new_(&make_program));
    nb::class_<MpiLibrary>(m, "MpiLibrary").def(nb::init<const std::string&>());

    nb::class_<LibraryAllreduce, Operation>(m, "LibraryAllreduce")
        .def_static("make", [](const MpiLibrary& library, int handle_size, std::uint64_t comm, std::uint64_t datatype,
                               std::uint64_t op, std::int64_t in_place, int count) {
            return make_library_allreduce(library, handle_size, LibraryCall{comm, datatype, op, in_place, count});
        })
        .def("bind", [](LibraryAllreduce& operation, std::uintptr_t buffer) {
            operation.bind(reinterpret_cast<void*>(buffer));
        });
    nb::class_<Execution, Operation>(m, "Execution")
        .def(nb::new_(&make_execution), nb::keep_alive<1, 3>())
        .def("bind", [](Execution& execution, std::uintptr_t buffer) {
            execution.bind(reinterpret_cast<void*>(buffer));
        });

    nb::class_<LaneAllreduce, Operation>(m, "LaneAllreduce")
        .def("__init__", [](LaneAllreduce* self, std::shared_ptr<Node> node, std::uint64_t signature,
                            std::uintptr_t buffer, std::size_t n, std::size_t itemsize, std::uintptr_t kernel,
                            std::shared_ptr<const Region> region, int lanes, std::shared_ptr<Operation> between) {
            new (self) LaneAllreduce(std::move(node), Intent{signature, 0, 0}, reinterpret_cast<void*>(buffer), n,
                                     itemsize, reinterpret_cast<Reduce>(kernel), std::move(region), lanes,
                                     std::move(between));
        }, "node"_a, "signature"_a, "buffer"_a, "n"_a, "itemsize"_a, "kernel"_a, "region"_a, "lanes"_a,
           "between"_a.none())
        .def_prop_ro("verdict", &LaneAllreduce::verdict)
        .def_prop_ro("lane_values", [](const LaneAllreduce& lanes) {
            return reinterpret_cast<std::uintptr_t>(lanes.lane_values());
        })
        .def_static("chunk_start", &LaneAllreduce::chunk_start);

    nb::class_<OwnerExchange::Norms>(m, "Norms")
        .def_ro("values", &OwnerExchange::Norms::values)
        .def_ro("sums", &OwnerExchange::Norms::sums)
        .def_ro("residual", &OwnerExchange::Norms::residual);

    nb::class_<OwnerExchange::Record>(m, "Record")
        .def_ro("nanoseconds", &OwnerExchange::Record::nanoseconds)
        .def_ro("encode", &OwnerExchange::Record::encode)
        .def_ro("decode", &OwnerExchange::Record::decode)
        .def_ro("bytes_sent", &OwnerExchange::Record::bytes_sent)
        .def_ro("norms", &OwnerExchange::Record::norms)
        .def_ro("owner_norms", &OwnerExchange::Record::owner_norms)
        .def_ro("finite", &OwnerExchange::Record::finite);

    nb::class_<OwnerExchange, Operation>(m, "OwnerExchange")
        .def(nb::new_(&make_owner_exchange), nb::keep_alive<1, 2>())
        .def("bind", [](OwnerExchange& exchange, std::uintptr_t buffer) {
            exchange.bind(reinterpret_cast<void*>(buffer));
        })
        .def("prepare", &OwnerExchange::prepare)
        .def("keep", [](OwnerExchange& exchange, std::uintptr_t residual, std::uintptr_t owner_residual) {
            exchange.keep(reinterpret_cast<void*>(residual), reinterpret_cast<void*>(owner_residual));
        })
        .def("forget", &OwnerExchange::forget)
        .def("bring_back", &OwnerExchange::bring_back)
        .def_prop_ro("record", &OwnerExchange::record, nb::rv_policy::copy);

    nb::class_<Direct>(m, "Direct")
        .def(nb::init<std::shared_ptr<Node>, nb::object, nb::object>())
        .def("serve", [](Direct& direct, nb::object op, int operation, int type, std::uint64_t signature) {
            direct.serve(std::move(op), Op(operation), Type(type), signature);
        })
        .def("limit", &Direct::limit)
        .def("add", &Direct::add)
        .def("remove", &Direct::remove)
        .def("allreduce", [](Direct& direct, nb::handle sendbuf, nb::handle recvbuf, nb::handle op) {
            return int(direct.allreduce(sendbuf, recvbuf, op));
        }, nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("runs", [](std::shared_ptr<Direct> direct, std::shared_ptr<Operation> operation, double seconds) {
            return Direct::Runs{std::move(direct), std::move(operation), seconds};
        })
        .def_prop_ro("inside", &Direct::inside)
        .def_prop_ro("in_allreduce", &Direct::in_allreduce)
        .def("refuse", &Direct::refuse)
        .def("taken_over", &Direct::taken_over)
        .def("close", &Direct::close)
        .def_prop_ro("operation", &Direct::operation)
        .def("keep_to", &Direct::keep_to);

    nb::class_<Direct::Runs>(m, "Runs").def("run", [](Direct::Runs& runs) {
        return int(runs.direct->run(*runs.operation, runs.seconds));
    });
}
