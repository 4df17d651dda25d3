#include "store_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "mpi_wire.h"
#include "store_service.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitring {

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Objects whose memory is sent. Whoever has sent it may not have Python's lock, so they are given back by those who have.
class Lent {
public:
    ~Lent() { give_back(); }

    static Payload payload(const std::shared_ptr<Lent>& lent, nb::handle object) {
        const auto bytes = nb::cast<Bytes>(object);
        PyObject* held = object.inc_ref().ptr();
        const auto back = [lent, held](char*) {
            const std::lock_guard<std::mutex> lock(lent->mutex_);
            lent->back_.push_back(held);
        };
        return {std::shared_ptr<char>(const_cast<char*>(reinterpret_cast<const char*>(bytes.data())), back), bytes.size()};
    }

    void give_back() {
        std::vector<PyObject*> back;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            back.swap(back_);
        }
        for (PyObject* object : back) Py_DECREF(object);
    }

private:
    std::mutex mutex_;
    std::vector<PyObject*> back_;
};

// The service as Python has it.
class PythonService final : public StoreService {
public:
    using StoreService::StoreService;
    std::shared_ptr<Lent> lent = std::make_shared<Lent>();
};

template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> owned(T* data, std::size_t n, nb::capsule owner) {
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(data, {n}, owner);
}

nb::tuple tuple_of(MailMessage&& given) {
    auto* message = new MailMessage(std::move(given));
    const nb::capsule owner(message, [](void* p) noexcept { delete static_cast<MailMessage*>(p); });
    auto* payload = reinterpret_cast<std::uint8_t*>(message->payload.memory.get());
    return nb::make_tuple(message->source, message->kind, message->serial,
                          owned(message->numbers.data(), message->numbers.size(), owner),
                          owned(payload, message->payload.nbytes, owner));
}

nb::tuple tuple_of(const StoreAction& action) {
    switch (action.kind) {
        case StoreAction::Kind::apply: {
            nb::list updates;
            for (const auto& [member, number, scale, staleness] : action.updates) {
                updates.append(nb::make_tuple(member, number, scale, staleness));
            }
            return nb::make_tuple("apply", updates);
        }
        case StoreAction::Kind::drop: return nb::make_tuple("drop", action.member, action.number);
        case StoreAction::Kind::serve: return nb::make_tuple("serve", action.member, action.number);
        case StoreAction::Kind::defer: return nb::make_tuple("defer", action.member, action.number, action.members);
        case StoreAction::Kind::claim: return nb::make_tuple("claim", action.member, action.number, action.claimed);
        case StoreAction::Kind::settle: return nb::make_tuple("settle", action.members);
    }
    return {};
}

using Tuples = nb::typed<nb::list, nb::typed<nb::tuple, nb::any, nb::ellipsis>>;

Tuples list_of(const StoreRule::Actions& actions) {
    Tuples list;
    for (const StoreAction& action : actions) list.append(tuple_of(action));
    return list;
}

// Parameter, addresses of its values and of the slot, 0 for none, rows, values of a row, their type; what encodes them, if
// anything does, and the bytes that they take then.
using Part = std::tuple<std::int64_t, std::uintptr_t, std::uintptr_t, std::size_t, std::size_t, Type, std::optional<Codec>,
                        std::size_t>;

std::shared_ptr<StoreOwner> make_owner(const StoreRule& state, int members, const std::vector<Part>& parts, Rule rule,
                                       double lr, double momentum, double weight_decay, double eps,
                                       bool edits, nb::handle /*keep*/) {
    std::vector<StorePart> made;
    for (const auto& [parameter, values, slot, rows, width, type, codec, most] : parts) {
        made.push_back({parameter, reinterpret_cast<char*>(values), reinterpret_cast<char*>(slot), rows, width, type, codec,
                        most});
    }
    return std::make_shared<StoreOwner>(state, members, std::move(made), rule,
                                        UpdateSettings{lr, momentum, weight_decay, eps}, edits);
}

// What the owner does with a message, and what it sends then: to whom, and as messages are.
Tuples hear(StoreOwner& owner, int member, int kind, int serial, std::vector<double> numbers, std::optional<Bytes> payload) {
    const auto memory = [](std::size_t nbytes) {
        return Payload{std::shared_ptr<char>(new char[nbytes], std::default_delete<char[]>()), nbytes};
    };
    MailMessage message{member, kind, serial, std::move(numbers), {}};
    if (payload) {
        message.payload = memory(payload->size());
        std::copy_n(payload->data(), payload->size(), message.payload.memory.get());
    }
    Tuples sent;
    const auto send = [&sent](int to, StoreKind what, int number, std::vector<double> told, Payload values) {
        sent.append(tuple_of(MailMessage{to, int(what), number, std::move(told), std::move(values)}));
    };
    owner.hear(message, send, memory);
    return sent;
}

std::shared_ptr<PythonService> make_service(const MpiLibrary& library, int handle_size, std::uint64_t comm,
                                            std::uint64_t byte, int rank, int size, std::shared_ptr<StoreOwner> owner) {
    auto wire = make_mpi_wire(library, handle_size, comm, byte, Mailbox::room(size));
    return std::make_shared<PythonService>(std::move(wire), rank, size, std::move(owner));
}

}  // namespace

void bind_stores(nb::module_& m) {
    using Released = nb::call_guard<nb::gil_scoped_release>;
    // By the names of training/store/owner.py.
    nb::enum_<StoreKind>(m, "StoreKind")
        .value("push", StoreKind::push).value("clock", StoreKind::clock).value("leave", StoreKind::leave)
        .value("rest", StoreKind::rest).value("end", StoreKind::end).value("read", StoreKind::read)
        .value("use", StoreKind::use).value("slots", StoreKind::slots).value("claim", StoreKind::claim)
        .value("go_on", StoreKind::go_on).value("ahead", StoreKind::ahead).value("forget", StoreKind::forget)
        .value("part", StoreKind::part)
        .value("values", StoreKind::values).value("deferred", StoreKind::deferred).value("taken", StoreKind::taken)
        .value("dropped", StoreKind::dropped).value("settled", StoreKind::settled).value("are", StoreKind::are)
        .value("claimed", StoreKind::claimed).value("trouble", StoreKind::trouble);

    // Actions are tuples of a name and what the classes of training/store/rule.py have.
    nb::class_<StoreRule>(m, "StoreRule")
        .def(nb::init<std::size_t, bool, std::optional<std::int64_t>, bool, std::vector<std::int64_t>>(), "gather"_a,
             "drops"_a, "staleness"_a.none(), "inverse"_a, "clocks"_a)
        .def("push", [](StoreRule& rule, int member, int number, double weight, std::optional<std::int64_t> round) {
            return list_of(rule.push(member, number, weight, round));
        }, "member"_a, "number"_a, "weight"_a, "round"_a.none())
        .def("read", [](StoreRule& rule, int member, int ticket, std::optional<std::int64_t> least) {
            return list_of(rule.read(member, ticket, least));
        }, "member"_a, "ticket"_a, "least"_a.none())
        .def("claim", [](StoreRule& rule, int member, int ticket, const std::vector<std::int64_t>& row) {
            return list_of(rule.claim(member, ticket, row));
        }, "member"_a, "ticket"_a, "row"_a)
        .def("clock", [](StoreRule& rule, int member) { return list_of(rule.clock(member)); }, "member"_a)
        .def("leave", [](StoreRule& rule, int member) { return list_of(rule.leave(member)); }, "member"_a)
        .def("rest", [](StoreRule& rule, int member) { return list_of(rule.rest(member)); }, "member"_a)
        .def("end", [](StoreRule& rule, int member) { return list_of(rule.end(member)); }, "member"_a)
        .def("go_on", &StoreRule::go_on, "member"_a)
        .def("begin", &StoreRule::begin, "member"_a)
        .def_prop_ro("version", &StoreRule::version)
        .def_prop_ro("settled", &StoreRule::settled)
        .def_prop_ro("common_clocks", &StoreRule::clocks)
        .def_prop_ro("ended", &StoreRule::ended)
        .def_prop_ro("resting", &StoreRule::resting)
        .def_prop_ro("missing", &StoreRule::missing)
        .def_prop_ro("waiting", &StoreRule::waiting);

    // `keep` owns the memory of the parts.
    nb::class_<StoreOwner>(m, "StoreOwner")
        .def(nb::new_(&make_owner), nb::keep_alive<0, 11>(), "state"_a, "members"_a, "parts"_a, "rule"_a, "lr"_a,
             "momentum"_a, "weight_decay"_a, "eps"_a, "edits"_a, "keep"_a)
        .def_ro_static("window", &StoreOwner::kWindow)
        .def("use", [](StoreOwner& owner, int member, Rule rule, double lr, double momentum, double weight_decay,
                       double eps) { owner.use(member, rule, UpdateSettings{lr, momentum, weight_decay, eps}); },
             "member"_a, "rule"_a, "lr"_a, "momentum"_a, "weight_decay"_a, "eps"_a)
        .def("hear", &hear, "member"_a, "kind"_a, "serial"_a, "numbers"_a, "payload"_a.none())
        .def("restart", &StoreOwner::restart)
        // Clocks, updates applied and dropped, reads that wait, and (staleness, how many) of updates.
        .def("seen", [](const StoreOwner& owner) {
            StoreOwner::Seen seen = [&] {
                const nb::gil_scoped_release released;
                return owner.seen();
            }();
            return std::make_tuple(std::move(seen.clocks), seen.applied, seen.dropped, seen.waiting, std::move(seen.staleness));
        });

    // As messages of the runtime's mailbox.py: whom to, or from, kind, serial number, numbers, payload.
    nb::class_<PythonService, Operation>(m, "StoreService")
        .def(nb::new_(&make_service), "library"_a, "handle_size"_a, "comm"_a, "byte"_a, "rank"_a, "size"_a,
             "owner"_a.none())
        .def("post", [](PythonService& service, int rank, int kind, int serial, std::vector<double> numbers,
                        nb::handle payload) {
            service.lent->give_back();
            Payload bytes;
            if (!payload.is_none()) bytes = Lent::payload(service.lent, payload);
            service.post(rank, kind, serial, std::move(numbers), std::move(bytes));
        }, "rank"_a, "kind"_a, "serial"_a, "numbers"_a, "payload"_a.none())
        .def("take", [](PythonService& service) {
            service.lent->give_back();
            Tuples list;
            for (MailMessage& message : service.take()) list.append(tuple_of(std::move(message)));
            return list;
        })
        .def_prop_ro_static("most_payload", [](nb::handle) { return Mailbox::kMostPayload; })
        .def("resume", &PythonService::resume)
        .def("wait", &PythonService::wait, Released(), "seconds"_a)
        .def("mind_room", &PythonService::mind_room, "minds"_a)
        .def_prop_ro("ended", &PythonService::ended)
        .def_prop_ro("nbytes_sent", &PythonService::nbytes_sent)
        // What moves is for others, too: whether this rank's own waits go on is not told by that.
        .def_prop_ro("moves", [](const PythonService&) { return 0; });
}

}  // namespace bitring
