#include "library_allreduce.h"

#include "mpi_abi.h"
#include "news.h"

namespace bitring {

namespace {

template <class Handle>
class Iallreduce final : public LibraryAllreduce {
public:
    Iallreduce(const MpiLibrary& library, const LibraryCall& call)
        : iallreduce_(reinterpret_cast<Function>(library.iallreduce)),
          test_(reinterpret_cast<Test>(library.test)),
          call_(call) {}

protected:
    void start() override {
        begun_ = false;
        error_ = 0;
    }

    Status step() override {
        if (!begun_) {
            if (News::of_process().unread_lately()) return Status::waiting;
            error_ = iallreduce_(reinterpret_cast<void*>(call_.in_place), buffer_, call_.count,
                                 Abi<Handle>::handle(call_.datatype), Abi<Handle>::handle(call_.op),
                                 Abi<Handle>::handle(call_.comm), &request_);
            if (error_ != 0) return Status::failed;
            begun_ = true;
        }
        int complete = 0;
        error_ = test_(&request_, &complete, reinterpret_cast<void*>(Abi<Handle>::statuses_ignore));
        if (error_ != 0) return Status::failed;
        return complete != 0 ? Status::done : Status::waiting;
    }

private:
    using Function = int (*)(const void*, void*, int, Handle, Handle, Handle, Handle*);
    using Test = int (*)(Handle*, int*, void*);

    Function iallreduce_;
    Test test_;
    LibraryCall call_;
    Handle request_{};
    bool begun_ = false;
};

}  // namespace

std::shared_ptr<LibraryAllreduce> make_library_allreduce(const MpiLibrary& library, int handle_size,
                                                         const LibraryCall& call) {
    if (handle_size == 4) return std::make_shared<Iallreduce<int>>(library, call);
    if (handle_size == 8) return std::make_shared<Iallreduce<void*>>(library, call);
    throw unknown_abi(handle_size);
}

}  // namespace bitring
