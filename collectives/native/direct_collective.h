// A collective that finds out itself whether all ranks mean the same, and serves one call after the other.
#pragma once

#include <cstddef>

#include "carried.h"
#include "node.h"
#include "operation.h"
#include "region.h"

namespace bitring {

class DirectCollective : public Operation {
public:
    // Use the object for other values in the next run. `region`: see SharedAllreduce; null for any other.
    virtual void rebind(const Intent& intent, const Carried& carried, const Region* region) = 0;

    virtual const Verdict& verdict() const = 0;
};

}  // namespace bitring
