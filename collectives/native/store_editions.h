// What readers of a shard know of it, where answers travel encoded: Editions of training/store/codec.py, the reference, with
// the same bits.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "store_packing.h"

namespace bitring {

class StoreEditions {
public:
    // Of parts that outlive it. Readers know nothing.
    explicit StoreEditions(const std::vector<StorePart>& parts);

    std::int64_t number() const { return number_; }

    // Readers are given the shard's values as they are, of this version.
    void restart(std::int64_t version);

    // For a reader of the edition `reader`, of the shard at this version: changes, or all values; whether they are changes.
    std::pair<Payload, bool> answer(std::int64_t reader, std::int64_t version, const StoreMemory& memory);

private:
    static constexpr std::int64_t kMost = 16;  // editions whose changes are kept

    struct Change {
        Payload payload;
        std::size_t nbytes;  // of its pieces' data
    };

    void publish(std::int64_t version, const StoreMemory& memory);

    const std::vector<StorePart>& parts_;
    std::int64_t number_ = 0, version_ = 0;
    std::vector<std::vector<std::int64_t>> known_;  // values of parts; as words, which suit any type
    std::size_t nbytes_ = 0;                        // of all values
    std::vector<std::int64_t> change_, left_;       // of the part that is encoded, and what that leaves
    std::map<std::int64_t, Change> changes_;        // of editions
};

}  // namespace bitring
