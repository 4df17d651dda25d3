#include "fast_path.h"

#include <algorithm>
#include <utility>

#include "news.h"
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

}  // namespace

// A contiguous array's memory, for as long as this lives.
class FastPath::View {
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
    bool has_shape_of(const View& other) const {
        return view_.ndim == other.view_.ndim && std::equal(view_.shape, view_.shape + view_.ndim, other.view_.shape);
    }
    bool has_shape(const std::vector<std::int64_t>& shape) const {
        return std::equal(shape.begin(), shape.end(), view_.shape, view_.shape + view_.ndim);
    }
    Type type{};

private:
    Py_buffer view_{};
    bool held_ = false;
};

Status run_for(Operation& operation, double seconds) {
    Status status = operation.status();
    const bool network = operation.calls_library();
    const int spins = network ? 0 : crowded() ? 1 : 1000;
    for (int k = 0; k < spins; ++k) {
        status = operation.advance();
        if (is_over(status)) return status;
        if (status == Status::moved) break;  // large: not over in a moment
        pause_processor();
    }
    nb::gil_scoped_release released;
    Patience patience(false, network);
    const auto limit = std::uint64_t(seconds * 1e9);
    while (true) {
        status = operation.advance();
        if (is_over(status)) return status;
        if (status == Status::moved) {
            patience.moved();
            continue;
        }
        if (network && News::of_process().unread_lately()) return status;  // it sends nothing before that is read
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

bool FastPath::fits(const View& array) const { return array.nbytes() >= from_ && array.nbytes() <= to_; }

// The kernel of an operation that is served, and the signature without a count; null for any other.
Reduce FastPath::kernel(nb::handle op, Type type, std::uint64_t* signature) const {
    for (const Served& served : served_) {
        if (!served.op.is(op)) continue;
        *signature = served.signatures[std::size_t(type)];
        return served.kernels[std::size_t(type)];
    }
    return nullptr;
}

Outcome FastPath::allreduce(nb::handle sendbuf, nb::handle recvbuf, nb::handle op) {
    if (closed() || !is_array(recvbuf)) return Outcome::declined;
    View receive, send;
    if (!receive.take(recvbuf, true) || !fits(receive)) return Outcome::declined;
    const void* from = receive.data();
    if (!sendbuf.is(in_place_) && !sendbuf.is_none()) {
        if (!is_array(sendbuf) || !send.take(sendbuf, false) || send.type != receive.type ||
            send.nbytes() != receive.nbytes()) {
            return Outcome::declined;
        }
        from = send.data();
    }
    std::uint64_t signature;
    const Reduce reduce = kernel(op, receive.type, &signature);
    if (reduce == nullptr) return Outcome::declined;
    return reduce_into(receive, from, reduce, with_count(signature, receive.nbytes() / receive.itemsize()));
}

void FastPath::remember(nb::object op, Type type, std::vector<std::int64_t> shape, std::uint64_t signature) {
    for (const Remembered& each : remembered_) {
        if (each.op.is(op) && each.type == type && each.shape == shape) return;
    }
    Remembered made{std::move(op), type, std::move(shape), signature};
    if (remembered_.size() < kRemembered) {
        remembered_.push_back(std::move(made));
    } else {
        remembered_[forgets_++ % kRemembered] = std::move(made);
    }
}

Outcome FastPath::reduce(nb::handle x, nb::handle out, nb::handle op) {
    if (closed() || !is_array(out) || !is_array(x)) return Outcome::declined;
    View receive, send;
    if (!receive.take(out, true) || !fits(receive) || !send.take(x, false) || send.type != receive.type ||
        !send.has_shape_of(receive)) {
        return Outcome::declined;
    }
    for (const Remembered& each : remembered_) {
        if (!each.op.is(op) || each.type != receive.type || !receive.has_shape(each.shape)) continue;
        std::uint64_t unused;
        const Reduce reduce = kernel(op, receive.type, &unused);
        return reduce == nullptr ? Outcome::declined : reduce_into(receive, send.data(), reduce, each.signature);
    }
    return Outcome::declined;
}

Outcome FastPath::reduce_into(const View& to, const void* from, Reduce kernel, std::uint64_t signature) {
    const auto apart = [&](const void* a, const void* b) { return static_cast<const char*>(a) + to.nbytes() <= b; };
    if (from != to.data() && !apart(from, to.data()) && !apart(to.data(), from)) return Outcome::declined;
    Intent intent;
    intent.signature = signature;
    const Region* region = nullptr;
    if (from == to.data()) {
        for (const Region* each : regions_) {
            if (!each->holds(from, to.nbytes())) continue;
            region = each;
            intent.where = region->where(from);
        }
    }
    const Operand operand{from, to.data(), to.nbytes() / to.itemsize(), to.itemsize(), kernel};
    operation_->rebind(intent, operand, region);
    in_allreduce_ = true;
    return run_open(*operation_, 0.2);
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
