#include "library_collective.h"

#include "mpi_abi.h"
#include "news.h"

namespace bitring {

namespace {

// A request that is made active, and asked about until it is complete.
template <class Handle>
class Requested : public LibraryCollective {
protected:
    explicit Requested(const MpiLibrary& library) : library_(library), test_(reinterpret_cast<Test>(library.test)) {}

    // Make `request_` active. An error code or 0.
    virtual int activate() = 0;

    void start() override {
        begun_ = false;
        error_ = 0;
    }

    Status step() override {
        if (!begun_) {
            if (News::of_process().unread_lately()) return Status::waiting;
            error_ = activate();
            if (error_ != 0) return Status::failed;
            begun_ = true;
        }
        int complete = 0;
        error_ = test_(&request_, &complete, reinterpret_cast<void*>(Abi<Handle>::statuses_ignore));
        if (error_ != 0) return Status::failed;
        return complete != 0 ? Status::done : Status::waiting;
    }

    MpiLibrary library_;
    Handle request_{};

private:
    using Test = int (*)(Handle*, int*, void*);

    Test test_;
    bool begun_ = false;
};

template <class Handle>
class Nonblocking final : public Requested<Handle> {
public:
    Nonblocking(const MpiLibrary& library, const LibraryCall& call) : Requested<Handle>(library), call_(call) {}

protected:
    int activate() override {
        const void* from = this->from_ == this->to_ ? reinterpret_cast<const void*>(call_.in_place) : this->from_;
        void* to = this->to_;
        Handle* request = &this->request_;
        const MpiLibrary& library = this->library_;
        const Handle type = Abi<Handle>::handle(call_.datatype), op = Abi<Handle>::handle(call_.op);
        const Handle comm = Abi<Handle>::handle(call_.comm);
        const int n = call_.count;
        switch (call_.collective) {
        case Collective::allreduce: return call(library.iallreduce, from, to, n, type, op, comm, request);
        case Collective::reduce: return call(library.ireduce, from, to, n, type, op, call_.root, comm, request);
        case Collective::broadcast: return call(library.ibcast, to, n, type, call_.root, comm, request);
        case Collective::allgather: return call(library.iallgather, from, n, type, to, n, type, comm, request);
        default: return call(library.ireduce_scatter_block, from, to, n, type, op, comm, request);
        }
    }

private:
    template <class... Arguments>
    static int call(void* function, Arguments... arguments) {
        return reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
    }

    LibraryCall call_;
};

template <class Handle>
class Persistent final : public Requested<Handle> {
public:
    Persistent(const MpiLibrary& library, std::uint64_t request) : Requested<Handle>(library) {
        this->request_ = Abi<Handle>::handle(request);
    }

protected:
    int activate() override { return reinterpret_cast<int (*)(Handle*)>(this->library_.start)(&this->request_); }
};

}  // namespace

std::shared_ptr<LibraryCollective> make_library_collective(const MpiLibrary& library, int handle_size,
                                                           const LibraryCall& call) {
    if (handle_size == 4) return std::make_shared<Nonblocking<int>>(library, call);
    if (handle_size == 8) return std::make_shared<Nonblocking<void*>>(library, call);
    throw unknown_abi(handle_size);
}

std::shared_ptr<LibraryCollective> make_persistent_collective(const MpiLibrary& library, int handle_size,
                                                              std::uint64_t request) {
    if (handle_size == 4) return std::make_shared<Persistent<int>>(library, request);
    if (handle_size == 8) return std::make_shared<Persistent<void*>>(library, request);
    throw unknown_abi(handle_size);
}

}  // namespace bitring
