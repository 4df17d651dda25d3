// Runs past the engine, in the thread that calls: of plans, and collectives of plain NumPy arrays, with nothing of Python
// between the call and the exchange.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "bound_collective.h"
#include "direct_collective.h"

namespace bitring {

class ArrayView;

// What became of a call.
enum class Outcome : int {
    done = 0,
    declined = 1,    // not for this way; nothing was done
    disagree = 2,    // the ranks' arrival said that they do not mean the same; the operation has the verdict
    unfinished = 3,  // still waiting for a rank; the operation is under way
    refused = 4      // done; meanwhile another thread came and was refused
};

// The way past the engine, for one thread at a time. Python's lock is held wherever this changes.
class FastPath {
public:
    // An AllReduce is `allreduce`'s, other collectives of small arrays are `others`'. This is `rank` of `size`.
    FastPath(std::shared_ptr<DirectCollective> allreduce, std::shared_ptr<DirectCollective> others, int rank, int size,
             nanobind::object ndarray, nanobind::object in_place);

    // `op`, the very object, means `operation`; ranks that reduce `type` under it say `signature` (and the count).
    void serve(nanobind::object op, Op operation, Type type, std::uint64_t signature);

    // Arrays of at most `nbytes` are declined below `from` and served up to `to`.
    void limit(std::size_t from, std::size_t to) {
        from_ = from;
        to_ = to;
    }

    // Until remove(), which must come before its end, arrays in `region` are reduced there.
    void add(const Region* region) { regions_.push_back(region); }
    void remove(std::uint64_t number);

    Outcome allreduce(nanobind::handle sendbuf, nanobind::handle recvbuf, nanobind::handle op);

    // What makes a call whose values do not travel with the ranks' arrival: `collective`, in `checked`, once all have
    // said the same.
    struct Way {
        std::shared_ptr<BoundCollective> collective;
        std::shared_ptr<Operation> checked;
    };

    // From now on ranks that reduce() arrays of `type` and this shape under `op` say `signature`, and those of a size
    // that is not served go this `way`, if that is not null. Of many shapes those that came last are known.
    void remember(nanobind::object op, Type type, std::vector<std::int64_t> shape, std::uint64_t signature, Way way);

    // As allreduce(), of an array into one of the same shape, as remember() knows them.
    Outcome reduce(nanobind::handle x, nanobind::handle out, nanobind::handle op);

    // From now on ranks that call() `collective` under `op` on `n` values (of a type that has `itemsize`, in all; of
    // broadcasts and allgathers they are bytes, and `type` is Type::u8) say `signature`. The values travel with their
    // arrival, or go this `way`, if that is not null, as those of an allreduce() that is not served do. Of many calls
    // those that came last are known.
    void know(Collective collective, nanobind::object op, Type type, std::size_t n, int root, std::uint64_t signature,
              Way way);

    // Nothing goes the way of this collective any more; another one may have taken its place on other ranks.
    void forget(const BoundCollective* collective);

    // As allreduce(), of any other collective that know() has told of. A broadcast has no sendbuf.
    Outcome call(Collective collective, nanobind::handle sendbuf, nanobind::handle recvbuf, nanobind::handle op,
                 nanobind::handle root);

    // Run an operation of all ranks from its begin for up to `seconds`. After any outcome but done and declined this
    // stays closed until the thread that called has said taken_over().
    Outcome run(Operation& operation, double seconds) {
        if (closed()) return Outcome::declined;
        doing_ = "a run of a plan";
        return run_open(operation, seconds);
    }

    // As run(), of one operation, with as little around it as can be.
    struct Runs {
        std::shared_ptr<FastPath> fast_path;
        std::shared_ptr<Operation> operation;
        double seconds;
    };

    // The thread that is inside; 0: none.
    std::uint64_t inside() const { return inside_; }

    // As inside(); whoever is inside will be told.
    std::uint64_t refuse() {
        refused_ = inside_ != 0;
        return inside_;
    }

    // The thread inside goes on by the engine, which has closed this.
    void taken_over() {
        inside_ = 0;
        refused_ = false;
    }

    // What the thread inside runs, in words; and what arrays were given to last.
    const char* doing() const { return doing_; }
    std::shared_ptr<Operation> operation() const { return last_; }

    // Calls are declined while `busy`, when the engine is at work or has given up, as it is until it says
    // otherwise; and those of any other thread but `thread`, if that is not 0.
    void keep_to(bool busy, std::uint64_t thread) {
        busy_ = busy;
        thread_ = thread;
    }

    // Give the memory back, that of a run under way at its end; it stays busy from now on.
    void close() {
        if (inside_ != 0) return;
        allreduce_.reset();
        others_.reset();
        last_.reset();
        known_.clear();
        remembered_.clear();
    }

private:
    struct Served {
        nanobind::object op;
        std::array<std::uint64_t, type_count> signatures{};
        std::array<Reduce, type_count> kernels{};
    };

    struct Remembered {
        nanobind::object op;
        Type type;
        std::vector<std::int64_t> shape;
        std::uint64_t signature;
        Way way;
    };
    static constexpr std::size_t kRemembered = 64;

    struct Known {
        Collective collective;
        nanobind::object op;
        Type type;
        std::size_t n;
        int root;
        std::uint64_t signature;
        Reduce kernel;
        Way way;
    };

    bool is_array(nanobind::handle array) const {
        return Py_TYPE(array.ptr()) == reinterpret_cast<PyTypeObject*>(ndarray_.ptr());
    }
    bool fits(const ArrayView& array) const;
    Reduce kernel(nanobind::handle op, Type type, std::uint64_t* signature) const;
    bool is_in_place(nanobind::handle buffer) const { return buffer.is_none() || buffer.is(in_place_); }
    const Known* known(Collective collective, nanobind::handle op, Type type, std::size_t n, int root);
    Outcome reduce_into(const ArrayView& to, const void* from, Reduce kernel, std::uint64_t signature);
    bool closed() const {
        return busy_ || inside_ != 0 || (thread_ != 0 && thread_ != PyThread_get_thread_ident());
    }
    Outcome go(const Way& way, const char* name, const void* from, void* to);
    Outcome run_open(Operation& operation, double seconds);

    nanobind::object ndarray_;
    nanobind::object in_place_;
    std::vector<Served> served_;
    std::vector<Remembered> remembered_;
    std::size_t forgets_ = 0;  // the one that is forgotten next
    std::vector<const Region*> regions_;
    std::vector<Known> known_;
    std::size_t known_last_ = 0;  // the one that was called last
    std::size_t known_forgets_ = 0;
    std::shared_ptr<DirectCollective> allreduce_, others_;
    std::shared_ptr<Operation> last_;
    int rank_, size_;
    std::size_t from_ = 0, to_ = 0;
    bool busy_ = true;
    std::uint64_t thread_ = 0;
    std::uint64_t inside_ = 0;
    const char* doing_ = "";
    bool refused_ = false;
};

// The signature of `count` values of what `signature` names.
inline std::uint64_t with_count(std::uint64_t signature, std::uint64_t count) {
    std::uint64_t h = (signature ^ count) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
    return (signature & 0xffffffff00000000u) | (h & 0xffffffffu);
}

// Run the operation in this thread for up to `seconds`; Python's lock is given up when it takes longer than microseconds.
Status run_for(Operation& operation, double seconds);

}  // namespace bitring
