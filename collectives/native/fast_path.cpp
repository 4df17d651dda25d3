#include "fast_path.h"

#include <algorithm>
#include <utility>

#include "wait.h"

namespace nb = nanobind;

namespace bitring {

namespace {

bool type_of(const char* format, Py_ssize_t itemsize, Type* type) {
    if (format == nullptr) return false;
    const auto integer = [&](bool is_signed) {
        static constexpr Type types[2][4] = {{Type::u8, Type::u16, Type::u32, Type::u64},
                                             {Type::i8, Type::i16, Type::i32, Type::i64}};
        const int k = itemsize == 1 ? 0 : itemsize == 2 ? 1 : itemsize == 4 ? 2 : 3;
        *type = types[is_signed][k];
        return true;
    };
    const char second = format[0] == '\0' ? '\0' : format[1];
    if (format[0] == 'Z' && second != '\0' && format[2] == '\0') {
        if (second == 'f') return *type = Type::c64, true;
        if (second == 'd') return *type = Type::c128, true;
        if (second == 'g') return *type = Type::clongdouble, true;
    }
    if (second != '\0') return false;
    switch (format[0]) {
    case 'f': return *type = Type::f32, true;
    case 'd': return *type = Type::f64, true;
    case 'e': return *type = Type::f16, true;
    case 'g': return *type = Type::longdouble, true;
    case '?': return *type = Type::b8, true;
    case 'b': case 'h': case 'i': case 'l': case 'q': return integer(true);
    case 'B': case 'H': case 'I': case 'L': case 'Q': return integer(false);
    default: return false;
    }
}

// A contiguous array's memory, for as long as this lives.
class View {
public:
    ~View() {
        if (held_) PyBuffer_Release(&view_);
    }
    bool take(nb::handle array, bool writable) {
        const int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(array.ptr(), &view_, flags) != 0) {
            PyErr_Clear();
            return false;
        }
        held_ = true;
        return type_of(view_.format, view_.itemsize, &type);
    }
    void* data() const { return view_.buf; }
    std::size_t nbytes() const { return std::size_t(view_.len); }
    std::size_t itemsize() const { return std::size_t(view_.itemsize); }
    Type type{};

private:
    Py_buffer view_{};
    bool held_ = false;
};

}  // namespace

Status run_for(Operation& operation, double seconds) {
    Status status = operation.status();
    const int spins = operation.calls_library() ? 0 : crowded() ? 1 : 1000;
    for (int k = 0; k < spins; ++k) {
        status = operation.advance();
        if (is_over(status)) return status;
        if (status == Status::moved) break;  // large: not over in a moment
        pause_processor();
    }
    nb::gil_scoped_release released;
    Patience patience(false);
    const auto limit = std::uint64_t(seconds * 1e9);
    while (true) {
        status = operation.advance();
        if (is_over(status)) return status;
        if (status == Status::moved) {
            patience.moved();
            continue;
        }
        patience.rest();
        if (patience.idle_nanoseconds() > limit) return status;
    }
}

FastPath::FastPath(std::shared_ptr<DirectAllreduce> operation, nb::object ndarray, nb::object in_place)
    : ndarray_(std::move(ndarray)), in_place_(std::move(in_place)), operation_(std::move(operation)) {}

void FastPath::serve(nb::object op, Op operation, Type type, std::uint64_t signature) {
    for (Served& served : served_) {
        if (!served.op.is(op)) continue;
        served.signatures[std::size_t(type)] = signature;
        served.kernels[std::size_t(type)] = reduce_kernel(operation, type);
        return;
    }
    served_.emplace_back();
    served_.back().op = op;
    serve(op, operation, type, signature);
}

void FastPath::remove(std::uint64_t number) {
    regions_.erase(std::remove_if(regions_.begin(), regions_.end(),
                                  [&](const Region* region) { return region->number() == number; }),
                   regions_.end());
}

Outcome FastPath::allreduce(nb::handle sendbuf, nb::handle recvbuf, nb::handle op) {
    if (closed() || Py_TYPE(recvbuf.ptr()) != reinterpret_cast<PyTypeObject*>(ndarray_.ptr())) {
        return Outcome::declined;
    }
    View receive, send;
    if (!receive.take(recvbuf, true) || receive.nbytes() > to_ || receive.nbytes() < from_) return Outcome::declined;
    const void* from = receive.data();
    if (!sendbuf.is(in_place_) && !sendbuf.is_none()) {
        if (Py_TYPE(sendbuf.ptr()) != Py_TYPE(recvbuf.ptr()) || !send.take(sendbuf, false) ||
            send.type != receive.type || send.nbytes() != receive.nbytes()) {
            return Outcome::declined;
        }
        from = send.data();
    }
    const auto type = std::size_t(receive.type);
    for (const Served& served : served_) {
        if (!served.op.is(op)) continue;
        if (served.kernels[type] == nullptr) return Outcome::declined;
        const std::size_t n = receive.nbytes() / receive.itemsize();
        Intent intent;
        intent.signature = with_count(served.signatures[type], n);
        const Region* region = nullptr;
        if (from == receive.data()) {
            for (const Region* each : regions_) {
                if (!each->holds(from, receive.nbytes())) continue;
                region = each;
                intent.where = region->where(from);
            }
        }
        operation_->rebind(intent, Operand{from, receive.data(), n, receive.itemsize(), served.kernels[type]}, region);
        in_allreduce_ = true;
        return run_open(*operation_, 0.2);
    }
    return Outcome::declined;
}

Outcome FastPath::run_open(Operation& operation, double seconds) {
    inside_ = PyThread_get_thread_ident();
    operation.begin();  // which calls no library
    const Status status = run_for(operation, seconds);
    if (status == Status::done) {
        if (refused_) return Outcome::refused;
        inside_ = 0;
        return Outcome::done;
    }
    return status == Status::disagree ? Outcome::disagree : Outcome::unfinished;
}

}  // namespace bitring
