#include "payload.h"

namespace bitring {

Payload PayloadPool::get(std::size_t nbytes) {
    if (nbytes <= kSmall) return {std::shared_ptr<char>(new char[nbytes], std::default_delete<char[]>()), nbytes};
    Block found{nullptr, 0};
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (std::size_t k = 0; k < kept_.blocks.size(); ++k) {
            Block& block = kept_.blocks[k];
            if (block.nbytes < nbytes || block.nbytes / 2 > nbytes) continue;
            found = block;
            block = kept_.blocks.back();
            kept_.blocks.pop_back();
            kept_.nbytes -= found.nbytes;
            break;
        }
    }
    if (found.memory == nullptr) found = {new char[nbytes], nbytes};
    const std::weak_ptr<PayloadPool> pool = weak_from_this();
    return {std::shared_ptr<char>(found.memory,
                                  [pool, found](char*) {
                                      if (const auto there = pool.lock()) {
                                          there->give_back(found);
                                      } else {
                                          delete[] found.memory;
                                      }
                                  }),
            nbytes};
}

void PayloadPool::give_back(Block block) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (kept_.nbytes + block.nbytes <= kMost) {
            kept_.blocks.push_back(block);
            kept_.nbytes += block.nbytes;
            return;
        }
    }
    delete[] block.memory;
}

}  // namespace bitring
