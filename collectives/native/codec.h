// An encoder's kernels, as compression/kernels/functions.py describes them.
#pragma once

#include <cstdint>

namespace bitring {

struct Codec {
    using Encode = std::int64_t (*)(const void* values, void* residual, std::int64_t n, std::uint8_t* payload,
                                    std::int64_t capacity, std::int64_t seed, const double* settings);
    using Decode = std::int64_t (*)(const std::uint8_t* payload, std::int64_t nbytes, void* out, std::int64_t n,
                                    std::int64_t accumulate, const double* settings);
    Encode encode;      // the buffer's values
    Encode encode_sum;  // sums, in the residual's type
    Decode decode;      // to the buffer
    Decode decode_sum;
    const double* settings;
};

}  // namespace bitring
