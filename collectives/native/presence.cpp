#include "presence.h"

#include <fcntl.h>

#include <atomic>
#include <cerrno>
#include <system_error>

namespace bitring {

namespace {

constexpr std::size_t kNbytes = 4096;

// Beside the token that memory shared by processes begins with.
std::atomic<unsigned>& left(const Memory& memory) { return *reinterpret_cast<std::atomic<unsigned>*>(memory.data() + 64); }

struct flock first_byte() {
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = 0;
    lock.l_len = 1;
    return lock;
}

}  // namespace

Presence Presence::make(const std::string& name) {
    Presence presence;
    presence.memory_ = Memory::make(kNbytes, name);
    struct flock lock = first_byte();
    if (fcntl(presence.memory_.descriptor(), F_SETLK, &lock) != 0) {
        throw std::system_error(errno, std::generic_category(), "cannot lock shared memory");
    }
    return presence;
}

Presence Presence::open(int pid, int descriptor, const std::string& name) {
    Presence presence;
    presence.memory_ = Memory::open(kNbytes, pid, descriptor, name);
    return presence;
}

Presence::Liveness Presence::liveness() const {
    if (left(memory_).load(std::memory_order_acquire) != 0) return Liveness::left;
    struct flock lock = first_byte();
    // Where locks cannot be asked for, a silence is warned of all the same.
    if (fcntl(memory_.descriptor(), F_GETLK, &lock) != 0) return Liveness::here;
    return lock.l_type == F_UNLCK ? Liveness::dead : Liveness::here;
}

void Presence::leave() { left(memory_).store(1, std::memory_order_release); }

}  // namespace bitring
