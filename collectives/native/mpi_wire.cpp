#include "mpi_wire.h"

#include <dlfcn.h>

#include <deque>
#include <stdexcept>
#include <vector>

#include "mpi_abi.h"
#include "news.h"

namespace bitring {

MpiLibrary::MpiLibrary(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) throw std::runtime_error(path + " is not loaded");
    const auto find = [&](const char* name) {
        void* address = dlsym(library, name);
        if (address == nullptr) throw std::runtime_error(path + " has no " + name);
        return address;
    };
    isend = find("MPI_Isend");
    irecv = find("MPI_Irecv");
    testsome = find("MPI_Testsome");
    test = find("MPI_Test");
    start = find("MPI_Start");
    iallreduce = find("MPI_Iallreduce");
    ireduce = find("MPI_Ireduce");
    ibcast = find("MPI_Ibcast");
    iallgather = find("MPI_Iallgather");
    ireduce_scatter_block = find("MPI_Ireduce_scatter_block");
}

namespace {

// To send so many bytes takes longer than a look for news.
constexpr std::size_t kLarge = 8192;

template <class Handle>
class MpiWire final : public Wire {
public:
    MpiWire(const MpiLibrary& library, Handle comm, Handle byte, int room)
        : isend_(reinterpret_cast<Isend>(library.isend)),
          irecv_(reinterpret_cast<Irecv>(library.irecv)),
          testsome_(reinterpret_cast<Testsome>(library.testsome)),
          comm_(comm),
          byte_(byte),
          requests_(std::size_t(room)),
          messages_(std::size_t(room)),
          indices_(std::size_t(room)) {}

    int start(bool sends, void* memory, std::size_t nbytes, int peer, int tag, int message) override {
        const Started started{memory, nbytes, peer, tag, message};
        if (!sends) return begin(false, started);
        if (!held_.empty() || told(nbytes)) {
            held_.push_back(started);  // messages must not overtake each other
            return 0;
        }
        return begin(true, started);
    }

    int complete(int* messages, int room, int* count) override {
        *count = 0;
        while (!held_.empty() && !told(held_.front().nbytes)) {
            const int code = begin(true, held_.front());
            if (code != 0) return code;
            held_.pop_front();
        }
        if (active_ == 0) return 0;
        int found = 0;
        const int code = testsome_(active_, requests_.data(), &found, indices_.data(),
                                   reinterpret_cast<void*>(Abi<Handle>::statuses_ignore));
        if (code != 0) return code;
        if (found > room) found = room;  // cannot be: room is what was made room for
        for (int k = 0; k < found; ++k) {
            messages[k] = messages_[std::size_t(indices_[std::size_t(k)])];
            messages_[std::size_t(indices_[std::size_t(k)])] = -1;
        }
        *count = found;
        int kept = 0;
        for (int k = 0; found > 0 && k < active_; ++k) {
            if (messages_[std::size_t(k)] < 0) continue;
            requests_[std::size_t(kept)] = requests_[std::size_t(k)];
            messages_[std::size_t(kept++)] = messages_[std::size_t(k)];
        }
        if (found > 0) active_ = kept;
        return 0;
    }

private:
    using Isend = int (*)(const void*, int, Handle, int, int, Handle, Handle*);
    using Irecv = int (*)(void*, int, Handle, int, int, Handle, Handle*);
    using Testsome = int (*)(int, Handle*, int*, int*, void*);

    struct Started {
        void* memory;
        std::size_t nbytes;
        int peer, tag, message;
    };

    // Whether there is something to be read before a message of `nbytes` is sent: its receiver may be dead.
    static bool told(std::size_t nbytes) {
        News& news = News::of_process();
        return nbytes < kLarge ? news.unread_lately() : news.unread();
    }

    int begin(bool sends, const Started& m) {
        if (std::size_t(active_) == requests_.size()) {
            requests_.resize(2 * requests_.size());
            messages_.resize(requests_.size());
            indices_.resize(requests_.size());
        }
        Handle* request = &requests_[std::size_t(active_)];
        const int code = sends ? isend_(m.memory, int(m.nbytes), byte_, m.peer, m.tag, comm_, request)
                               : irecv_(m.memory, int(m.nbytes), byte_, m.peer, m.tag, comm_, request);
        if (code == 0) messages_[std::size_t(active_++)] = m.message;
        return code;
    }

    Isend isend_;
    Irecv irecv_;
    Testsome testsome_;
    Handle comm_;
    Handle byte_;
    std::vector<Handle> requests_;
    std::vector<int> messages_;
    std::vector<int> indices_;
    std::deque<Started> held_;  // to be sent when what has come is read, and this goes on
    int active_ = 0;
};

}  // namespace

std::unique_ptr<Wire> make_mpi_wire(const MpiLibrary& library, int handle_size, std::uint64_t comm, std::uint64_t byte,
                                    int room) {
    if (handle_size == 4) {
        return std::make_unique<MpiWire<int>>(library, Abi<int>::handle(comm), Abi<int>::handle(byte), room);
    }
    if (handle_size == 8) {
        return std::make_unique<MpiWire<void*>>(library, Abi<void*>::handle(comm), Abi<void*>::handle(byte), room);
    }
    throw unknown_abi(handle_size);
}

}  // namespace bitring
