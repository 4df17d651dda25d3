#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace bitring {

namespace {

constexpr std::size_t kHugePage = 2u << 20;

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

std::string path_of(const std::string& name) { return "/dev/shm/" + name; }

}  // namespace

Memory& Memory::operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(own_, other.own_);
    std::swap(nbytes_, other.nbytes_);
    std::swap(descriptor_, other.descriptor_);
    std::swap(name_, other.name_);
    return *this;
}

Memory Memory::make(std::size_t nbytes, const std::string& name) {
    // Taking pages until there are none would end this process or another, long before it fails.
    if (nbytes / std::size_t(sysconf(_SC_PAGESIZE)) >= std::size_t(sysconf(_SC_PHYS_PAGES))) {
        errno = ENOMEM;
        fail("cannot make " + std::to_string(nbytes) + " bytes of shared memory");
    }
    Memory memory;
    memory.descriptor_ = name.empty() ? memfd_create("bitring", MFD_CLOEXEC)
                                      : ::open(path_of(name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (memory.descriptor_ < 0) fail("cannot make shared memory");
    memory.name_ = name;
    if (nbytes > 0) {
        // Huge pages are asked for before the pages are there. Memory that is promised and then missing would end the
        // process when it is touched, so it is taken now.
        if (ftruncate(memory.descriptor_, off_t(nbytes)) != 0) fail("cannot make shared memory");
        memory.map(nbytes);
        int code;
        do {
            code = posix_fallocate(memory.descriptor_, 0, off_t(nbytes));
        } while (code == EINTR);
        if (code != 0) {
            errno = code;
            fail("cannot make " + std::to_string(nbytes) + " bytes of shared memory");
        }
    }
    return memory;
}

Memory Memory::open(std::size_t nbytes, int pid, int descriptor, const std::string& name) {
    Memory memory;
    const std::string path =
        name.empty() ? "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor) : path_of(name);
    memory.descriptor_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (memory.descriptor_ < 0) fail("cannot open the shared memory of process " + std::to_string(pid));
    struct stat status;
    if (fstat(memory.descriptor_, &status) != 0 || !S_ISREG(status.st_mode) || std::size_t(status.st_size) != nbytes) {
        errno = EBADF;  // the number belongs to something else here
        fail("cannot open the shared memory of process " + std::to_string(pid));
    }
    if (nbytes > 0) memory.map(nbytes);
    return memory;
}

void Memory::map(std::size_t nbytes) {
    // Aligned, so that huge pages fit: room for more is reserved, and the aligned part of it replaced.
    const auto page = std::size_t(sysconf(_SC_PAGESIZE));
    const std::size_t align = nbytes >= kHugePage ? kHugePage : page;
    void* room = mmap(nullptr, nbytes + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) fail("cannot map shared memory");
    const auto begin = reinterpret_cast<std::uintptr_t>(room);
    const std::uintptr_t aligned = (begin + align - 1) / align * align;
    void* data = mmap(reinterpret_cast<void*>(aligned), nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                      descriptor_, 0);
    if (data == MAP_FAILED) {
        const int error = errno;
        munmap(room, nbytes + align);
        errno = error;
        fail("cannot map shared memory");
    }
    const std::uintptr_t end = (aligned + nbytes + page - 1) / page * page;
    if (aligned > begin) munmap(room, aligned - begin);
    if (begin + nbytes + align > end) munmap(reinterpret_cast<void*>(end), begin + nbytes + align - end);
    madvise(data, nbytes, MADV_HUGEPAGE);  // fewer address translations; refused where huge pages are off
    data_ = static_cast<char*>(data);
    nbytes_ = nbytes;
}

void Memory::show(const Memory& other) {
    // An old size of 0 makes a second mapping of shared pages.
    void* own = mremap(data_, 0, nbytes_, MREMAP_MAYMOVE);
    if (own == MAP_FAILED) fail("cannot map shared memory twice");
    if (mremap(other.data_, 0, nbytes_, MREMAP_MAYMOVE | MREMAP_FIXED, data_) == MAP_FAILED) {
        const int error = errno;
        munmap(own, nbytes_);
        errno = error;
        fail("cannot map shared memory in another's place");
    }
    own_ = static_cast<char*>(own);
}

void Memory::show_own() {
    if (own_ == nullptr) return;
    std::memcpy(own_, data_, nbytes_);
    if (mremap(own_, nbytes_, nbytes_, MREMAP_MAYMOVE | MREMAP_FIXED, data_) == MAP_FAILED) {
        fail("cannot map shared memory back");
    }
    own_ = nullptr;
}

void Memory::close_descriptor() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
}

void Memory::unlink() {
    if (!name_.empty()) ::unlink(path_of(name_).c_str());
    name_.clear();
}

void Memory::release() {
    if (data_ != nullptr) munmap(data_, nbytes_);
    if (own_ != nullptr) munmap(own_, nbytes_);
    data_ = own_ = nullptr;
    close_descriptor();
    unlink();
}

}  // namespace bitring
