// How an MPI library passes handles: MPICH's ABI has integers of 4 bytes, Open MPI's and the MPI 5 standard's pointers.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bitring {

template <class Handle>
struct Abi;

template <>
struct Abi<int> {
    static constexpr std::uintptr_t statuses_ignore = 1;  // MPI_STATUS_IGNORE, too
    static int handle(std::uint64_t value) { return int(value); }
};

template <>
struct Abi<void*> {
    static constexpr std::uintptr_t statuses_ignore = 0;
    static void* handle(std::uint64_t value) { return reinterpret_cast<void*>(value); }
};

inline std::runtime_error unknown_abi(int handle_size) {
    return std::runtime_error("MPI handles of " + std::to_string(handle_size) + " bytes are not known");
}

}  // namespace bitring
