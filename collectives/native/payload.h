// The bytes that a message brings beside its numbers.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace bitring {

// Memory that several messages may share; how it is given back is its deleter's matter.
struct Payload {
    std::shared_ptr<char> memory;
    std::size_t nbytes = 0;
};

// Memory for payloads, taken again when nobody needs it any more: new memory costs a page fault for every 4 KiB.
class PayloadPool : public std::enable_shared_from_this<PayloadPool> {
public:
    // Of nbytes bytes, their values undefined; aligned for any numbers. May be given back in any thread.
    Payload get(std::size_t nbytes);

private:
    static constexpr std::size_t kSmall = 4096;     // such blocks the allocator has at hand
    static constexpr std::size_t kMost = 64 << 20;  // bytes are kept

    struct Block {
        char* memory;
        std::size_t nbytes;
    };
    struct Kept {
        std::vector<Block> blocks;
        std::size_t nbytes = 0;
        ~Kept() {
            for (const Block& block : blocks) delete[] block.memory;
        }
    };

    void give_back(Block block);

    std::mutex mutex_;
    Kept kept_;
};

}  // namespace bitring
