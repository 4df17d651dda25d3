#include "fast_path.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "array_view.h"
#include "news.h"
#include "thread_pool.h"
#include "wait.h"

namespace nb = nanobind;

namespace bitring {

namespace {

bool overlap(const void* a, std::size_t a_nbytes, const void* b, std::size_t b_nbytes) {
    return static_cast<const char*>(a) < static_cast<const char*>(b) + b_nbytes &&
           static_cast<const char*>(b) < static_cast<const char*>(a) + a_nbytes;
}

}  // namespace

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
    const ThreadPool::Waiting waiting(true);
    Patience patience(false, network);
    const auto limit = std::uint64_t(seconds * 1e9);
    while (true) {
        status = operation.advance();
        if (is_over(status)) return status;
        if (status == Status::moved) {
            patience.moved();
            // The answer to what was just sent takes a while; where ranks share a core it is that of another one.
            if (network) sched_yield();
            continue;
        }
        if (network && News::of_process().unread_lately()) return status;  // it sends nothing before that is read
        patience.rest();
        if (patience.idle_nanoseconds() > limit) return status;
    }
}

FastPath::FastPath(std::shared_ptr<DirectCollective> allreduce, std::shared_ptr<DirectCollective> others, int rank,
                   int size, nb::object ndarray, nb::object in_place)
    : ndarray_(std::move(ndarray)),
      in_place_(std::move(in_place)),
      allreduce_(std::move(allreduce)),
      others_(std::move(others)),
      last_(allreduce_),
      rank_(rank),
      size_(size) {}

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

bool FastPath::fits(const ArrayView& array) const { return array.nbytes() >= from_ && array.nbytes() <= to_; }

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
    ArrayView receive, send;
    if (!receive.take(recvbuf, true)) return Outcome::declined;
    const std::size_t n = receive.nbytes() / receive.itemsize();
    const Way* way = nullptr;
    if (!fits(receive)) {
        const Known* found = known(Collective::allreduce, op, receive.type, n, 0);
        if (found == nullptr || !found->way.checked) return Outcome::declined;
        way = &found->way;
    }
    const void* from = receive.data();
    if (!is_in_place(sendbuf)) {
        if (!is_array(sendbuf) || !send.take(sendbuf, false) || send.type != receive.type ||
            send.nbytes() != receive.nbytes()) {
            return Outcome::declined;
        }
        from = send.data();
    }
    if (way != nullptr) {
        const bool apart = from == receive.data() || !send.overlaps(receive);
        return apart ? go(*way, "Allreduce", from, receive.data()) : Outcome::declined;
    }
    std::uint64_t signature;
    const Reduce reduce = kernel(op, receive.type, &signature);
    if (reduce == nullptr) return Outcome::declined;
    return reduce_into(receive, from, reduce, with_count(signature, n));
}

void FastPath::remember(nb::object op, Type type, std::vector<std::int64_t> shape, std::uint64_t signature, Way way) {
    Remembered made{std::move(op), type, std::move(shape), signature, std::move(way)};
    for (Remembered& each : remembered_) {
        if (!each.op.is(made.op) || each.type != made.type || each.shape != made.shape) continue;
        each = std::move(made);
        return;
    }
    if (remembered_.size() < kRemembered) {
        remembered_.push_back(std::move(made));
    } else {
        remembered_[forgets_++ % kRemembered] = std::move(made);
    }
}

Outcome FastPath::reduce(nb::handle x, nb::handle out, nb::handle op) {
    if (closed() || !is_array(out) || !is_array(x)) return Outcome::declined;
    ArrayView receive, send;
    if (!receive.take(out, true) || !send.take(x, false) || send.type != receive.type ||
        !send.has_shape_of(receive)) {
        return Outcome::declined;
    }
    const bool fitting = fits(receive);
    for (const Remembered& each : remembered_) {
        if (!each.op.is(op) || each.type != receive.type || !receive.has_shape(each.shape)) continue;
        if (!fitting) {
            const bool apart = send.data() == receive.data() || !send.overlaps(receive);
            return each.way.checked && apart ? go(each.way, "allreduce", send.data(), receive.data()) : Outcome::declined;
        }
        std::uint64_t unused;
        const Reduce reduce = kernel(op, receive.type, &unused);
        return reduce == nullptr ? Outcome::declined : reduce_into(receive, send.data(), reduce, each.signature);
    }
    return Outcome::declined;
}

Outcome FastPath::reduce_into(const ArrayView& to, const void* from, Reduce kernel, std::uint64_t signature) {
    if (from != to.data() && overlap(from, to.nbytes(), to.data(), to.nbytes())) return Outcome::declined;
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
    Carried carried;
    carried.from = from;
    carried.to = to.data();
    carried.n = to.nbytes() / to.itemsize();
    carried.itemsize = to.itemsize();
    carried.reduce = kernel;
    allreduce_->rebind(intent, carried, region);
    doing_ = "Allreduce";
    last_ = allreduce_;
    return run_open(*allreduce_, 0.2);
}

void FastPath::know(Collective collective, nb::object op, Type type, std::size_t n, int root, std::uint64_t signature,
                    Way way) {
    if (known(collective, op, type, n, root) != nullptr) return;
    std::uint64_t unused;
    Reduce reduce = nullptr;
    if (collective != Collective::broadcast && collective != Collective::allgather) {
        reduce = kernel(op, type, &unused);
        if (reduce == nullptr) return;
    }
    Known made{collective, std::move(op), type, n, root, signature, reduce, std::move(way)};
    if (known_.size() < kRemembered) {
        known_.push_back(std::move(made));
    } else {
        known_[known_forgets_++ % kRemembered] = std::move(made);
    }
}

void FastPath::forget(const BoundCollective* collective) {
    const auto goes = [&](const auto& each) { return each.way.collective.get() == collective; };
    known_.erase(std::remove_if(known_.begin(), known_.end(), goes), known_.end());
    remembered_.erase(std::remove_if(remembered_.begin(), remembered_.end(), goes), remembered_.end());
}

const FastPath::Known* FastPath::known(Collective collective, nb::handle op, Type type, std::size_t n, int root) {
    for (std::size_t k = 0; k < known_.size(); ++k) {
        const std::size_t at = (known_last_ + k) % known_.size();
        const Known& each = known_[at];
        if (each.collective != collective || each.n != n || each.root != root) continue;
        if (each.kernel != nullptr && (each.type != type || !each.op.is(op))) continue;
        known_last_ = at;
        return &each;
    }
    return nullptr;
}

Outcome FastPath::call(Collective collective, nb::handle sendbuf, nb::handle recvbuf, nb::handle op, nb::handle root) {
    static constexpr const char* names[] = {"Allreduce", "Reduce", "Bcast", "Allgather", "Reduce_scatter_block"};
    if (closed() || known_.empty() || !PyLong_CheckExact(root.ptr())) return Outcome::declined;
    const long rooted = PyLong_AsLong(root.ptr());
    if (rooted < 0 || rooted >= size_) {
        PyErr_Clear();
        return Outcome::declined;
    }
    // All values, or as many as all are, lie in `whole`; what is sent or received beside them in `part`.
    const bool at_root = rank_ == int(rooted), blocks = collective >= Collective::allgather;
    const bool in_place = collective != Collective::broadcast && is_in_place(sendbuf);
    const bool sends = collective != Collective::broadcast && !in_place;
    const bool receives = collective != Collective::reduce || at_root;
    ArrayView send, receive;
    if (in_place && !receives) return Outcome::declined;
    if (receives && (!is_array(recvbuf) ||
                     !receive.take(recvbuf, collective != Collective::broadcast || !at_root))) {
        return Outcome::declined;
    }
    if (sends && (!is_array(sendbuf) || !send.take(sendbuf, false))) return Outcome::declined;
    const ArrayView& whole = collective == Collective::allgather || !sends ? receive : send;
    const ArrayView& part = collective == Collective::allgather ? send : receive;
    const std::size_t block = whole.nbytes() / std::size_t(size_);
    if (blocks && block * std::size_t(size_) != whole.nbytes()) return Outcome::declined;
    if (sends && receives) {
        if (send.type != receive.type || part.nbytes() != (blocks ? block : whole.nbytes())) return Outcome::declined;
        if (overlap(send.data(), send.nbytes(), receive.data(), receive.nbytes())) return Outcome::declined;
    }
    Carried carried;
    const bool moves = collective == Collective::broadcast || collective == Collective::allgather;
    carried.collective = collective;
    carried.itemsize = moves ? 1 : whole.itemsize();
    carried.n = whole.nbytes() / carried.itemsize;
    if (blocks && carried.n % std::size_t(size_) != 0) return Outcome::declined;
    const Known* found = known(collective, op, moves ? Type::u8 : whole.type, carried.n, int(rooted));
    if (found == nullptr) return Outcome::declined;
    carried.from = sends ? send.data() : receive.data();
    carried.to = receives ? receive.data() : nullptr;
    if (found->way.checked) return go(found->way, names[int(collective)], carried.from, carried.to);
    doing_ = names[int(collective)];
    carried.reduce = found->kernel;
    carried.root = int(rooted);
    carried.stride = blocks ? carried.n / std::size_t(size_) : 0;
    if (in_place && collective == Collective::allgather) {
        carried.from = static_cast<const char*>(carried.from) + std::size_t(rank_) * block;
    }
    Intent intent;
    intent.signature = found->signature;
    others_->rebind(intent, carried, nullptr);
    last_ = others_;
    return run_open(*last_, 0.2);
}

Outcome FastPath::go(const Way& way, const char* name, const void* from, void* to) {
    way.collective->bind(from, to);
    doing_ = name;
    last_ = way.checked;
    return run_open(*last_, 0.2);
}

Outcome FastPath::run_open(Operation& operation, double seconds) {
    inside_ = PyThread_get_thread_ident();
    News::of_process().heed_deaths();  // this is closed where one of them matters
    operation.begin();                 // which calls no library
    const Status status = run_for(operation, seconds);
    if (status == Status::done) {
        if (refused_) return Outcome::refused;
        inside_ = 0;
        return Outcome::done;
    }
    return status == Status::disagree ? Outcome::disagree : Outcome::unfinished;
}

}  // namespace bitring
