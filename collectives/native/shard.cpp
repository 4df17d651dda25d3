#include "shard.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "copy.h"
#include "wait.h"

namespace bitring {

ShardPass::ShardPass(std::shared_ptr<Shard> shard, std::vector<std::int64_t> starts, std::size_t width,
                     const void* values, bool locked, Update update, const UpdateSettings& settings)
    : ShardPass(std::move(shard), std::move(starts), width, const_cast<void*>(values), locked) {
    update_ = update;
    settings_ = settings;
}

ShardPass::ShardPass(std::shared_ptr<Shard> shard, std::vector<std::int64_t> starts, std::size_t width, void* values,
                     bool locked)
    : shard_(std::move(shard)),
      starts_(std::move(starts)),
      width_(width),
      values_(static_cast<char*>(values)),
      locked_(locked),
      update_(nullptr),
      block_values_(shard_->block_values()) {
    if (width_ == 0) starts_.clear();
    std::int64_t last = 0;
    for (const std::int64_t start : starts_) {
        if (start < last) throw std::invalid_argument("ShardPass: starts must ascend and be >= 0");
        last = start;
    }
    if (!starts_.empty() && std::size_t(last) + width_ > shard_->n_) {
        throw std::invalid_argument("ShardPass: a run ends behind the shard");
    }
    // This rank's own place: a whole number of blocks into the values.
    const std::size_t blocks = (shard_->n_ + block_values_ - 1) / block_values_;
    begin_ = at_ = place_of(blocks * std::size_t(shard_->rank_) / std::size_t(shard_->size_) * block_values_);
}

// The first place at `value` or behind it.
ShardPass::Place ShardPass::place_of(std::size_t value) const {
    const auto behind = std::upper_bound(starts_.begin(), starts_.end(), std::int64_t(value));
    const auto run = std::size_t(behind - starts_.begin());
    if (run > 0 && std::size_t(starts_[run - 1]) + width_ > value) return {run - 1, value - std::size_t(starts_[run - 1])};
    return {run, 0};
}

void ShardPass::touch(std::size_t first, std::size_t n, char* values) {
    const std::size_t itemsize = shard_->itemsize_;
    char* w = shard_->values_ + first * itemsize;
    if (update_ == nullptr) {
        copy_bytes(values, w, n * itemsize);
    } else {
        update_(n, w, shard_->slot_ == nullptr ? nullptr : shard_->slot_ + first * itemsize, values, settings_);
    }
}

ShardPass::Place ShardPass::pass(Place place, Place stop, bool does) {
    const std::size_t block = block_at(place), end = (block + 1) * block_values_;
    do {
        const std::size_t first = std::size_t(starts_[place.run]) + place.offset;
        const std::size_t n = std::min(width_ - place.offset, end - first);
        if (does) touch(first, n, values_ + (place.run * width_ + place.offset) * shard_->itemsize_);
        place.offset += n;
        if (place.offset == width_) place = {place.run + 1, 0};
    } while (!at_end(place) && !(place == stop) && block_at(place) == block);
    return place;
}

int ShardPass::run(double seconds) {
    const std::uint64_t until = now_nanoseconds() + std::uint64_t(seconds * 1e9);
    // First whatever is free, from this rank's place to the end and from the beginning to its place.
    while (!first_lap_over_) {
        if (at_end(at_) && !wrapped_) {
            wrapped_ = true;
            at_ = {0, 0};
        }
        if (wrapped_ && (at_ == begin_ || at_end(at_))) {
            first_lap_over_ = true;
            break;
        }
        SharedLock* lock = locked_ ? &shard_->locks_[block_at(at_)].lock : nullptr;
        if (lock == nullptr || lock->try_acquire(shard_->rank_)) {
            at_ = pass(at_, begin_, true);
            if (lock != nullptr) lock->release();
        } else {
            held_.push_back(at_);
            at_ = pass(at_, begin_, false);
        }
        if (now_nanoseconds() >= until) return shard_->rank_;
    }
    while (!held_.empty()) {
        SharedLock& lock = shard_->locks_[block_at(held_.back())].lock;
        const int holder = lock.acquire(shard_->rank_, until, shard_->dead_);
        if (holder >= 0) return holder;
        pass(held_.back(), begin_, true);
        lock.release();
        held_.pop_back();
        if (now_nanoseconds() >= until && !held_.empty()) return shard_->rank_;
    }
    return -1;
}

}  // namespace bitring
