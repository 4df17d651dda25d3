// An AllReduce that finds out itself whether all ranks mean the same, and serves one call after the other.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "node.h"
#include "operation.h"
#include "region.h"

namespace bitring {

// Values to reduce from `from` into `to`, which may be the same memory.
struct Operand {
    const void* from;
    void* to;
    std::size_t n;
    std::size_t itemsize;
    Reduce reduce;
};

class DirectAllreduce : public Operation {
public:
    // Use the object for another operand in the next run. `region`: see SharedAllreduce.
    virtual void rebind(const Intent& intent, const Operand& operand, const Region* region) = 0;

    virtual const Verdict& verdict() const = 0;
};

}  // namespace bitring
