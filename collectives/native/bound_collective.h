// A collective that serves one call after the other, each on memory of its own, once all ranks mean the same.
#pragma once

#include "operation.h"

namespace bitring {

class BoundCollective : public Operation {
public:
    // Work on the values at `from` and `to` from the next begin() on; the same means in place.
    virtual void bind(const void* from, void* to) = 0;
};

}  // namespace bitring
