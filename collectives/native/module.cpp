// The extension bitring._native; src/bitring/_native.pyi is its interface, made by scripts/stub.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include <unistd.h>

#include "checked.h"
#include "thread_pool.h"
#include "watched_run.h"
#include "fast_path.h"
#include "hop_bindings.h"
#include "execution.h"
#include "kernels.h"
#include "lane_allreduce.h"
#include "leaders_collective.h"
#include "library_collective.h"
#include "memory.h"
#include "mpi_wire.h"
#include "news.h"
#include "node.h"
#include "node_collective.h"
#include "nodes_roll_call.h"
#include "owner_exchange.h"
#include "packing_bindings.h"
#include "presence.h"
#include "region.h"
#include "roll_call.h"
#include "shard_bindings.h"
#include "shared_allreduce.h"
#include "store_bindings.h"
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

// The columns of a program's table of messages.
const std::array<const char*, 10> message_fields{"sends", "reduces", "early", "peer", "start",
                                                 "stop",  "stream",  "tag",   "slot", "waits"};

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

std::shared_ptr<NodesRollCall> make_nodes_roll_call(std::shared_ptr<Node> node, const MpiLibrary& library,
                                                    int handle_size, std::uint64_t comm, std::uint64_t byte, int rank,
                                                    const std::vector<std::vector<int>>& nodes, int tag) {
    auto wire = make_mpi_wire(library, handle_size, comm, byte, NodesRollCall::kRoom);
    return std::make_shared<NodesRollCall>(std::move(node), std::move(wire), rank, nodes, tag);
}

// Of each piece, in order: its owner, the number of its segment, its first value and the one after its last, the most
// bytes of its payload, and the number of its codec.
std::shared_ptr<OwnerExchange> make_owner_exchange(
    const MpiLibrary& library, int handle_size, std::uint64_t comm, std::uint64_t byte, int rank, int size, Type type,
    std::vector<Codec> codecs, bool fixed_size, const Integers& owners, const Integers& numbers,
    const Integers& starts, const Integers& stops, const Integers& nbytes, const Integers& encoded_by,
    std::uintptr_t residual, std::uintptr_t owner_residual, std::int64_t owned_from, int to_owner_tag,
    int from_owner_tag) {
    std::vector<ExchangeSegment> segments;
    std::int64_t number = -1;
    for (std::size_t i = 0; i < owners.size(); ++i) {
        if (numbers(i) != number) segments.push_back(ExchangeSegment{int(owners(i)), {}});
        number = numbers(i);
        const auto codec = std::size_t(encoded_by(i));
        if (codec >= codecs.size()) throw std::invalid_argument("OwnerExchange: no codec has that number");
        segments.back().pieces.push_back(EncodedPiece{starts(i), stops(i), nbytes(i), codec});
    }
    auto wire = make_mpi_wire(library, handle_size, comm, byte, OwnerExchange::room(segments, rank, size));
    return std::make_shared<OwnerExchange>(std::move(wire), rank, size, type, std::move(codecs), fixed_size,
                                           std::move(segments),
                                           reinterpret_cast<void*>(residual), reinterpret_cast<void*>(owner_residual),
                                           owned_from, to_owner_tag, from_owner_tag);
}

// Asks a thread in drive() to come back, from its nap, too.
class Wake {
public:
    Wake() : descriptor_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}
    ~Wake() { close(descriptor_); }
    Wake(const Wake&) = delete;
    Wake& operator=(const Wake&) = delete;

    bool is_set() const { return set_.load(std::memory_order_relaxed); }
    void set() {
        if (!set_.exchange(true)) eventfd_write(descriptor_, 1);
    }
    void clear() {
        eventfd_t count;
        if (set_.exchange(false)) eventfd_read(descriptor_, &count);
    }
    int descriptor() const { return descriptor_; }

private:
    std::atomic<bool> set_{false};
    int descriptor_;
};

constexpr std::uint64_t kBusy = 4;

// Takes the first of `operations` that has something to do further, again and again, without Python's lock, until one
// is over (its index is returned), `seconds` have passed without anything moving, `wake` asks for a return, or there is
// something to be read before any of them sends (-1). Python, which may be to interrupt a wait, gets a look in any case
// after a few times as long, unless it is a `gentle` thread's.
int drive(const std::vector<Operation*>& operations, Wake& wake, double seconds, bool gentle) {
    nb::gil_scoped_release released;
    const ThreadPool::Waiting waiting(!gentle);
    const bool network = std::any_of(operations.begin(), operations.end(),
                                     [](const Operation* operation) { return operation->calls_library(); });
    Patience patience(gentle, network, wake.descriptor());
    const auto limit = std::uint64_t(seconds * 1e9);
    const std::uint64_t began = now_nanoseconds();
    while (!wake.is_set() && !News::of_process().unread_lately()) {
        bool moved = false;
        for (std::size_t k = 0; k < operations.size(); ++k) {
            const Status status = operations[k]->advance();
            if (is_over(status)) return int(k);
            moved |= status == Status::moved;
        }
        if (moved) {
            patience.moved();
            if (!gentle && now_nanoseconds() - began > kBusy * limit) return -1;
        } else {
            patience.rest();
            if (patience.idle_nanoseconds() > limit) return -1;
        }
    }
    return -1;
}

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

    // Under the names of NumPy's ufuncs and dtypes.
    nb::enum_<Op>(m, "Op")
        .value("add", Op::sum).value("multiply", Op::prod).value("maximum", Op::max).value("minimum", Op::min)
        .value("logical_and", Op::land).value("logical_or", Op::lor).value("logical_xor", Op::lxor)
        .value("bitwise_and", Op::band).value("bitwise_or", Op::bor).value("bitwise_xor", Op::bxor);
    nb::enum_<Type>(m, "Type")
        .value("bool", Type::b8)
        .value("int8", Type::i8).value("int16", Type::i16).value("int32", Type::i32).value("int64", Type::i64)
        .value("uint8", Type::u8).value("uint16", Type::u16).value("uint32", Type::u32).value("uint64", Type::u64)
        .value("float16", Type::f16).value("bfloat16", Type::bf16).value("float32", Type::f32)
        .value("float64", Type::f64).value("longdouble", Type::longdouble)
        .value("complex64", Type::c64).value("complex128", Type::c128).value("clongdouble", Type::clongdouble);
    nb::enum_<Collective>(m, "Collective")
        .value("allreduce", Collective::allreduce).value("reduce", Collective::reduce)
        .value("broadcast", Collective::broadcast).value("allgather", Collective::allgather)
        .value("reduce_scatter", Collective::reduce_scatter);
    nb::enum_<Outcome>(m, "Outcome")
        .value("done", Outcome::done).value("declined", Outcome::declined).value("disagree", Outcome::disagree)
        .value("unfinished", Outcome::unfinished).value("refused", Outcome::refused);

    m.def("instruction_set", &instruction_set);
    m.def("kernel", [](Op op, Type type) {
        return reinterpret_cast<std::uintptr_t>(reduce_kernel(op, type));
    }, "op"_a, "type"_a);
    m.def("reduce", [](std::uintptr_t kernel, std::size_t n, const std::vector<std::uintptr_t>& in,
                       const std::vector<std::uintptr_t>& out) {
        nb::gil_scoped_release released;
        reinterpret_cast<Reduce>(kernel)(n, in.size(), reinterpret_cast<const void* const*>(in.data()), out.size(),
                                         reinterpret_cast<void* const*>(out.data()));
    }, "kernel"_a, "n"_a, "inputs"_a, "outputs"_a);
    m.def("with_count", &with_count, "signature"_a, "count"_a);
    m.def("limit_threads", [](int threads) { ThreadPool::of_process().limit(threads); }, "threads"_a);
    m.def("set_crowded", [](bool value) { crowded() = value; }, "value"_a);
    m.def("set_neighbours", [](bool value) { has_neighbours() = value; }, "value"_a);
    m.def("news_comes_to", [](int descriptor) { News::of_process().comes_to(descriptor); }, "descriptor"_a);
    // The process ends when the interpreter has, before what was to follow: the MPI library's end.
    m.def("end_before_library", [] {
        return Py_AtExit(+[] {
            std::fflush(nullptr);
            _exit(0);
        }) == 0;
    });
    m.def("unread_news", [] { return News::of_process().unread(); });
    m.def("tell_death", [] { News::of_process().tell_death(); });
    m.def("heed_deaths", [] { News::of_process().heed_deaths(); });

    nb::class_<Memory>(m, "Memory")
        .def_static("make", &Memory::make, "nbytes"_a, "name"_a)
        .def_static("open", &Memory::open, "nbytes"_a, "pid"_a, "descriptor"_a, "name"_a)
        .def_prop_ro("address", [](const Memory& memory) { return reinterpret_cast<std::uintptr_t>(memory.data()); })
        .def_prop_ro("nbytes", &Memory::nbytes)
        .def_prop_ro("descriptor", &Memory::descriptor)
        .def("close_descriptor", &Memory::close_descriptor)
        .def("unlink", &Memory::unlink)
        .def("read", [](const Memory& memory, std::size_t n) { return nb::bytes(memory.data(), n); }, "n"_a)
        .def("write", [](Memory& memory, nb::bytes text) { std::memcpy(memory.data(), text.c_str(), text.size()); },
             "text"_a);

    nb::class_<Presence>(m, "Presence")
        .def_static("make", &Presence::make, "name"_a)
        .def_static("open", &Presence::open, "pid"_a, "descriptor"_a, "name"_a)
        .def_prop_ro("left", [](const Presence& presence) { return presence.liveness() == Presence::Liveness::left; })
        .def_prop_ro("dead", [](const Presence& presence) { return presence.liveness() == Presence::Liveness::dead; })
        .def("leave", &Presence::leave)
        .def_prop_ro("memory", &Presence::memory, nb::rv_policy::reference_internal);

    nb::class_<Wake>(m, "Wake")
        .def(nb::init<>())
        .def("set", &Wake::set)
        .def("clear", &Wake::clear);

    nb::class_<Verdict>(m, "Verdict")
        .def_ro("same", &Verdict::same)
        .def_ro("same_function", &Verdict::same_function)
        .def_prop_ro("library", [](const Verdict& verdict) { return (verdict.flags & kNeedsLibrary) != 0; })
        .def_prop_ro("bad", [](const Verdict& verdict) { return (verdict.flags & kBad) != 0; })
        .def_prop_ro("told", [](const Verdict& verdict) { return (verdict.flags & kTold) != 0; })
        .def_ro("stranger", &Verdict::stranger)
        .def_ro("strange", &Verdict::strange)
        .def_ro("earlier", &Verdict::earlier);

    // Whoever calls the MPI library waits for its lock, and must not hold Python's: a thread that waits in the library
    // polls bitring's requests with the one, and wants the other.
    using Released = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Operation>(m, "Operation")
        .def("begin", &Operation::begin, Released())
        .def("advance", [](Operation& operation) { operation.advance(); }, Released())
        .def_prop_ro("over", [](const Operation& operation) { return is_over(operation.status()); })
        .def_prop_ro("disagrees", [](const Operation& operation) { return operation.status() == Status::disagree; })
        .def_prop_ro("moves", &Operation::moves)
        .def_prop_ro("calls_library", &Operation::calls_library)
        .def_prop_ro("awaited", &Operation::awaited)
        .def_prop_ro("error", &Operation::error)
        .def_prop_ro("reason", [](const Operation& operation) { return operation.reason(); });

    m.def("drive", [](const std::vector<Operation*>& operations, Wake& wake, double seconds, bool gentle) {
        return drive(operations, wake, seconds, gentle);
    }, "operations"_a, "wake"_a, "seconds"_a, "gentle"_a);

    nb::class_<Region>(m, "Region", nb::is_weak_referenceable())
        .def("__init__", [](Region* self, int rank, std::uint64_t number, const std::vector<Memory*>& parts) {
            std::vector<Memory> memories;
            for (Memory* part : parts) memories.push_back(std::move(*part));
            new (self) Region(rank, number, std::move(memories));
        }, "rank"_a, "number"_a, "parts"_a)
        .def_prop_ro("nbytes", &Region::nbytes)
        .def_prop_ro("number", &Region::number)
        .def_prop_ro("rank", &Region::rank)
        .def("unite", &Region::unite, "rank"_a)
        .def("part_again", &Region::part_again)
        .def("address", [](const Region& region, int r) { return reinterpret_cast<std::uintptr_t>(region.part(r)); },
             "rank"_a)
        .def("holds", [](const Region& region, std::uintptr_t data, std::size_t nbytes) {
            return region.holds(reinterpret_cast<void*>(data), nbytes);
        }, "data"_a, "nbytes"_a)
        .def("where", [](const Region& region, std::uintptr_t data) {
            return region.where(reinterpret_cast<void*>(data));
        }, "data"_a);

    nb::class_<Node>(m, "Node")
        .def_static("nbytes", &Node::nbytes, "size"_a)
        .def("__init__", [](Node* self, std::shared_ptr<Region> region, std::vector<int> names) {
            std::vector<char*> parts;
            for (int r = 0; r < region->size(); ++r) parts.push_back(region->part(r));
            new (self) Node(region->rank(), std::move(parts), std::move(names), region);
        }, "region"_a, "names"_a)
        .def_prop_ro("rank", &Node::rank)
        .def_prop_ro("size", &Node::size);

    nb::class_<RollCall>(m, "RollCall")
        .def_prop_ro("calls_library", &RollCall::calls_library)
        .def("repeats", &RollCall::repeats, "signature"_a)
        .def_prop_ro("repeating", &RollCall::repeating);
    nb::class_<NodeRollCall, RollCall>(m, "NodeRollCall").def(nb::init<std::shared_ptr<Node>>(), "node"_a);
    nb::class_<NodesRollCall, RollCall>(m, "NodesRollCall")
        .def(nb::new_(&make_nodes_roll_call), nb::keep_alive<0, 3>(), "node"_a.none(), "library"_a, "handle_size"_a,
             "comm"_a, "byte"_a, "rank"_a, "nodes"_a, "tag"_a)
        .def_prop_ro("most", &NodesRollCall::most)
        .def("place", [](const NodesRollCall& roll_call) {
            const NodesRollCall::Place place = roll_call.place();
            return std::make_tuple(place.meetings, place.calls, place.meets);
        });

    nb::class_<Agreement, Operation>(m, "Agreement")
        .def("__init__", [](Agreement* self, std::shared_ptr<RollCall> roll_call, std::uint64_t signature, bool library,
                            bool bad, bool told) {
            const std::uint32_t flags = (library ? kNeedsLibrary : 0u) | (bad ? kBad : 0u) | (told ? kTold : 0u);
            new (self) Agreement(std::move(roll_call), Intent{signature, 0, flags | kOnlyArrives});
        }, "roll_call"_a, "signature"_a, "library"_a, "bad"_a, "told"_a)
        .def_prop_ro("verdict", &Agreement::verdict);

    nb::class_<Checked, Operation>(m, "Checked")
        .def("__init__", [](Checked* self, std::shared_ptr<RollCall> roll_call, std::uint64_t signature,
                            std::shared_ptr<Operation> next) {
            new (self) Checked(std::move(roll_call), Intent{signature, 0, kOnlyArrives}, std::move(next));
        }, "roll_call"_a, "signature"_a, "next"_a)
        .def("sign", &Checked::sign, "signature"_a)
        .def_prop_ro("verdict", &Checked::verdict);

    nb::class_<DirectCollective, Operation>(m, "DirectCollective")
        .def_prop_ro("verdict", &DirectCollective::verdict);
    nb::class_<NodeCollective, DirectCollective>(m, "NodeCollective")
        .def(nb::init<std::shared_ptr<Node>>(), "node"_a)
        .def_ro_static("most", &Node::kSmall);
    nb::class_<LeadersCollective, DirectCollective>(m, "LeadersCollective")
        .def("__init__", [](LeadersCollective* self, std::shared_ptr<NodesRollCall> roll_call, std::uint64_t signature,
                            Collective collective, std::uintptr_t from, std::uintptr_t to, std::size_t n,
                            std::size_t itemsize, std::uintptr_t kernel, int root, std::size_t stride) {
            const Carried carried{collective, reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), n,
                                  itemsize, reinterpret_cast<Reduce>(kernel), root, stride};
            new (self) LeadersCollective(std::move(roll_call), Intent{signature, 0, 0}, carried);
        }, "roll_call"_a, "signature"_a, "collective"_a, "source"_a, "target"_a, "n"_a, "itemsize"_a, "kernel"_a,
           "root"_a, "stride"_a)
        .def("sign", &LeadersCollective::sign, "signature"_a);

    nb::class_<SharedAllreduce, DirectCollective>(m, "SharedAllreduce")
        .def("__init__", [](SharedAllreduce* self, std::shared_ptr<Node> node, std::uint64_t signature,
                            const std::vector<std::tuple<std::uintptr_t, std::size_t, std::size_t, std::uintptr_t>>& operands,
                            std::shared_ptr<const Region> region) {
            Intent intent{signature, 0, 0};
            std::vector<Operand> made;
            for (const auto& [data, n, itemsize, kernel] : operands) {
                void* values = reinterpret_cast<void*>(data);
                made.push_back(Operand{values, values, n, itemsize, reinterpret_cast<Reduce>(kernel)});
            }
            if (region) intent.where = region->where(made[0].to);
            new (self) SharedAllreduce(std::move(node), intent, std::move(made), std::move(region));
        }, "node"_a, "signature"_a, "operands"_a, "region"_a.none())
        .def("sign", &SharedAllreduce::sign, "signature"_a)
        .def_static("small", &SharedAllreduce::small, "size"_a);

    nb::class_<Program>(m, "Program")
        .def(nb::new_(&make_program), "messages"_a, "unblocks_starts"_a, "unblocks"_a, "streams_starts"_a, "streams"_a,
             "slots"_a, "slot_values"_a, "window"_a)
        .def_prop_ro_static("message_fields", [](nb::handle) { return message_fields; });
    nb::class_<MpiLibrary>(m, "MpiLibrary").def(nb::init<const std::string&>(), "path"_a);

    nb::class_<BoundCollective, Operation>(m, "BoundCollective")
        .def("bind", [](BoundCollective& operation, std::uintptr_t from, std::uintptr_t to) {
            operation.bind(reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to));
        }, "source"_a, "target"_a);
    nb::class_<LibraryCollective, BoundCollective>(m, "LibraryCollective")
        .def_static("make", [](const MpiLibrary& library, int handle_size, Collective collective, std::uint64_t comm,
                               std::uint64_t datatype, std::uint64_t op, std::int64_t in_place, int count, int root) {
            return make_library_collective(library, handle_size,
                                           LibraryCall{collective, comm, datatype, op, in_place, count, root});
        }, "library"_a, "handle_size"_a, "collective"_a, "comm"_a, "datatype"_a, "op"_a, "in_place"_a, "count"_a,
           "root"_a)
        .def_static("persistent", &make_persistent_collective, "library"_a, "handle_size"_a, "request"_a);
    nb::class_<Execution, BoundCollective>(m, "Execution")
        .def(nb::new_(&make_execution), nb::keep_alive<0, 3>(), "program"_a, "library"_a, "handle_size"_a, "comm"_a,
             "byte"_a, "rank"_a, "itemsize"_a, "kernel"_a);

    nb::class_<LaneAllreduce, BoundCollective>(m, "LaneAllreduce")
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
        .def_static("chunk_start", &LaneAllreduce::chunk_start, "n"_a, "lanes"_a, "lane"_a);

    nb::class_<OwnerExchange::Norms>(m, "Norms")
        .def_ro("values", &OwnerExchange::Norms::values)
        .def_ro("sums", &OwnerExchange::Norms::sums)
        .def_ro("residual", &OwnerExchange::Norms::residual);

    nb::class_<OwnerExchange::RunStats>(m, "RunStats")
        .def_ro("nanoseconds", &OwnerExchange::RunStats::nanoseconds)
        .def_ro("encode", &OwnerExchange::RunStats::encode)
        .def_ro("decode", &OwnerExchange::RunStats::decode)
        .def_ro("bytes_sent", &OwnerExchange::RunStats::bytes_sent)
        .def_ro("norms", &OwnerExchange::RunStats::norms)
        .def_ro("owner_norms", &OwnerExchange::RunStats::owner_norms)
        .def_ro("finite", &OwnerExchange::RunStats::finite);

    // Addresses of the functions and settings of compression/kernels/functions.py.
    nb::class_<Codec>(m, "Codec")
        .def("__init__", [](Codec* self, std::uintptr_t encode, std::uintptr_t decode, std::uintptr_t encode_sum,
                            std::uintptr_t decode_sum, std::uintptr_t settings) {
            new (self) Codec{
                reinterpret_cast<Codec::Encode>(encode), reinterpret_cast<Codec::Encode>(encode_sum),
                reinterpret_cast<Codec::Decode>(decode), reinterpret_cast<Codec::Decode>(decode_sum),
                reinterpret_cast<const double*>(settings)};
        }, "encode"_a, "decode"_a, "encode_sum"_a, "decode_sum"_a, "settings"_a);

    nb::class_<OwnerExchange, Operation>(m, "OwnerExchange")
        .def(nb::new_(&make_owner_exchange), nb::keep_alive<0, 2>(), "library"_a, "handle_size"_a, "comm"_a, "byte"_a,
             "rank"_a, "size"_a, "type"_a, "codecs"_a, "fixed_size"_a, "owners"_a, "segments"_a, "starts"_a,
             "stops"_a, "nbytes"_a, "encoded_by"_a, "residual"_a, "owner_residual"_a, "owned_from"_a,
             "to_owner_tag"_a, "from_owner_tag"_a)
        .def("bind", [](OwnerExchange& exchange, std::uintptr_t buffer) {
            exchange.bind(reinterpret_cast<void*>(buffer));
        }, "buffer"_a)
        .def("prepare", &OwnerExchange::prepare, "run"_a, "seed"_a)
        .def("keep", [](OwnerExchange& exchange, std::uintptr_t residual, std::uintptr_t owner_residual) {
            exchange.keep(reinterpret_cast<void*>(residual), reinterpret_cast<void*>(owner_residual));
        }, "residual"_a, "owner_residual"_a)
        .def("forget", &OwnerExchange::forget)
        .def("bring_back", &OwnerExchange::bring_back)
        .def_prop_ro("stats", &OwnerExchange::stats, nb::rv_policy::copy);

    nb::class_<WatchedRun, Operation>(m, "WatchedRun")
        .def("__init__", [](WatchedRun* self, std::shared_ptr<DirectCollective> check, std::uintptr_t words) {
            new (self) WatchedRun(std::move(check), reinterpret_cast<WatchedRun::Words*>(words));
        }, "check"_a, "words"_a)
        .def("follow", &WatchedRun::follow, "operation"_a.none())
        .def("look_at", [](WatchedRun& run, std::uintptr_t values, std::size_t n, Type type, std::int64_t bad) {
            run.look_at(reinterpret_cast<const void*>(values), n, type, bad);
        }, "values"_a, "n"_a, "type"_a, "bad"_a)
        .def("prepare", [](WatchedRun& run, std::int64_t bad, std::int64_t state, std::int64_t wait, bool goes_on) {
            run.prepare({bad, state, wait}, goes_on);
        }, "bad"_a, "state"_a, "wait"_a, "goes_on"_a)
        .def_prop_ro("followed", &WatchedRun::followed)
        .def_prop_ro("waited", &WatchedRun::waited)
        .def_prop_ro("verdict", &WatchedRun::verdict);

    nb::class_<FastPath>(m, "FastPath")
        .def(nb::init<std::shared_ptr<DirectCollective>, std::shared_ptr<DirectCollective>, int, int, nb::object,
                      nb::object>(), "allreduce"_a, "others"_a, "rank"_a, "size"_a, "ndarray"_a, "in_place"_a)
        .def("serve", &FastPath::serve, "op"_a, "operation"_a, "type"_a, "signature"_a)
        .def("limit", &FastPath::limit, "least"_a, "most"_a)
        .def("add", &FastPath::add, "region"_a)
        .def("remove", &FastPath::remove, "number"_a)
        // As a number, like run() below: an enum's object costs as much as the rest of the call.
        .def("allreduce", [](FastPath& fast_path, nb::handle sendbuf, nb::handle recvbuf, nb::handle op) {
            return int(fast_path.allreduce(sendbuf, recvbuf, op));
        }, "sendbuf"_a.none(), "recvbuf"_a.none(), "op"_a.none())
        .def("remember", [](FastPath& fast_path, nb::object op, Type type, std::vector<std::int64_t> shape,
                            std::uint64_t signature, std::shared_ptr<BoundCollective> collective,
                            std::shared_ptr<Operation> checked) {
            fast_path.remember(op, type, std::move(shape), signature, {std::move(collective), std::move(checked)});
        }, "op"_a, "type"_a, "shape"_a, "signature"_a, "collective"_a.none(), "checked"_a.none())
        .def("reduce", [](FastPath& fast_path, nb::handle x, nb::handle out, nb::handle op) {
            return int(fast_path.reduce(x, out, op));
        }, "x"_a.none(), "out"_a.none(), "op"_a.none())
        .def("know", [](FastPath& fast_path, Collective collective, nb::object op, Type type, std::size_t n, int root,
                        std::uint64_t signature, std::shared_ptr<BoundCollective> bound,
                        std::shared_ptr<Operation> checked) {
            fast_path.know(collective, op, type, n, root, signature, {std::move(bound), std::move(checked)});
        }, "collective"_a, "op"_a.none(), "type"_a, "n"_a, "root"_a, "signature"_a, "bound"_a.none(),
           "checked"_a.none())
        .def("forget", &FastPath::forget, "bound"_a)
        .def("call", [](FastPath& fast_path, Collective collective, nb::handle sendbuf, nb::handle recvbuf,
                        nb::handle op, nb::handle root) {
            return int(fast_path.call(collective, sendbuf, recvbuf, op, root));
        }, "collective"_a, "sendbuf"_a.none(), "recvbuf"_a.none(), "op"_a.none(), "root"_a)
        .def("runs", [](std::shared_ptr<FastPath> fast_path, std::shared_ptr<Operation> operation, double seconds) {
            return FastPath::Runs{std::move(fast_path), std::move(operation), seconds};
        }, "operation"_a, "seconds"_a)
        .def_prop_ro("inside", &FastPath::inside)
        .def_prop_ro("doing", &FastPath::doing)
        .def("refuse", &FastPath::refuse)
        .def("taken_over", &FastPath::taken_over)
        .def("close", &FastPath::close)
        .def_prop_ro("operation", &FastPath::operation)
        .def("keep_to", &FastPath::keep_to, "busy"_a, "thread"_a);

    nb::class_<FastPath::Runs>(m, "Runs").def("run", [](FastPath::Runs& runs) {
        return int(runs.fast_path->run(*runs.operation, runs.seconds));
    });

    bind_packing(m);
    bind_shards(m);
    bind_stores(m);
    bind_hops(m);
}
