// Memory that the processes of a node map together.
//
// Each process makes an anonymous file for what it shares and tells the others its process number and the file's
// descriptor; they open it as /proc/PID/fd/N. Nothing has a name, so nothing is left behind, whatever ends a process.
// Where /proc does not let them, a named file in /dev/shm is used instead, for the moment until all have opened it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace bitring {

class Memory {
public:
    // New memory of `nbytes`, all zero and really there: throws std::system_error when there is not enough.
    // `name` empty: anonymous; else a file /dev/shm/NAME that unlink() removes.
    static Memory make(std::size_t nbytes, const std::string& name);

    // The memory of another process: its anonymous file, or the named one. Throws std::system_error.
    static Memory open(std::size_t nbytes, int pid, int descriptor, const std::string& name);

    Memory() = default;
    Memory(Memory&& other) noexcept { *this = static_cast<Memory&&>(other); }
    Memory& operator=(Memory&& other) noexcept;
    ~Memory() { release(); }

    char* data() const { return data_; }
    std::size_t nbytes() const { return nbytes_; }
    int descriptor() const { return descriptor_; }

    // From now on the same addresses show `other`, of as many bytes; its own bytes are kept for show_own(). Throws
    // std::system_error. Nothing may use the memory meanwhile.
    void show(const Memory& other);

    // The addresses show its own bytes again, which take the values that were shown.
    void show_own();

    // Others have opened it: the descriptor is not needed any more.
    void close_descriptor();
    void unlink();

private:
    void map(std::size_t nbytes);
    void release();

    char* data_ = nullptr;
    char* own_ = nullptr;  // its own bytes, while it shows another's
    std::size_t nbytes_ = 0;
    int descriptor_ = -1;
    std::string name_;
};

}  // namespace bitring
