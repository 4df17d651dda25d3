#include "store_editions.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace bitring {

namespace {

template <class T>
void subtract(std::int64_t n, const char* from, const void* what, void* difference) {
    const T* x = reinterpret_cast<const T*>(from);
    const T* y = static_cast<const T*>(what);
    T* z = static_cast<T*>(difference);
    for (std::int64_t i = 0; i < n; ++i) z[i] = x[i] - y[i];
}

}  // namespace

StoreEditions::StoreEditions(const std::vector<StorePart>& parts) : parts_(parts) {
    std::size_t most = 0;
    for (const StorePart& part : parts_) {
        known_.emplace_back(padded(part.nbytes()) / 8);
        std::memcpy(known_.back().data(), part.values, part.nbytes());
        nbytes_ += part.nbytes();
        if (part.codec) most = std::max(most, padded(part.nbytes()) / 8);
    }
    change_.resize(most);
    left_.resize(most);
}

void StoreEditions::restart(std::int64_t version) {
    ++number_;
    version_ = version;
    changes_.clear();
    for (std::size_t k = 0; k < parts_.size(); ++k) std::memcpy(known_[k].data(), parts_[k].values, parts_[k].nbytes());
}

std::pair<Payload, bool> StoreEditions::answer(std::int64_t reader, std::int64_t version, const StoreMemory& memory) {
    if (version != version_) publish(version, memory);
    std::vector<Payload> wanted;
    std::size_t nbytes = 0;
    const std::int64_t missing = std::max<std::int64_t>(0, number_ - reader);
    if (missing <= kMost) {
        for (auto change = changes_.upper_bound(reader); change != changes_.end(); ++change) {
            wanted.push_back(change->second.payload);
            nbytes += change->second.nbytes;
        }
    }
    if (std::int64_t(wanted.size()) == missing && nbytes <= nbytes_) return {joined(wanted, memory), true};
    std::vector<StorePiece> all;
    for (std::size_t k = 0; k < parts_.size(); ++k) {
        all.push_back({&parts_[k], nullptr, parts_[k].rows, reinterpret_cast<char*>(known_[k].data()), 0});
    }
    return {pack(all, memory), false};
}

// The next edition.
void StoreEditions::publish(std::int64_t version, const StoreMemory& memory) {
    std::vector<StorePiece> pieces;
    std::vector<Payload> rooms;
    Change change{{}, 0};
    for (std::size_t k = 0; k < parts_.size(); ++k) {
        const StorePart& part = parts_[k];
        auto* known = reinterpret_cast<char*>(known_[k].data());
        StorePiece piece{&part, nullptr, part.rows, known, part.nbytes()};
        if (part.codec) {
            const Codec& codec = *part.codec;
            (part.type == Type::f64 ? subtract<double> : subtract<float>)(part.size(), part.values, known, change_.data());
            std::memset(left_.data(), 0, part.nbytes());
            rooms.push_back(memory(part.most));
            auto* payload = reinterpret_cast<std::uint8_t*>(rooms.back().memory.get());
            const std::int64_t used = codec.encode_sum(change_.data(), left_.data(), part.size(), payload,
                                                       std::int64_t(part.most), version, codec.settings);
            if (used < 0) throw std::runtime_error("a store's answer outgrew its room");
            if (codec.decode(payload, used, known, part.size(), 1, codec.settings) != 0) {
                throw std::runtime_error("a store's answer cannot be decoded");
            }
            piece.data = rooms.back().memory.get();
            piece.nbytes = std::size_t(used);
            piece.form = StorePiece::Form::encoded;
        } else {
            std::memcpy(known, part.values, part.nbytes());
        }
        change.nbytes += piece.nbytes;
        pieces.push_back(piece);
    }
    change.payload = pack(pieces, memory);
    ++number_;
    version_ = version;
    changes_[number_] = std::move(change);
    changes_.erase(number_ - kMost);
}

}  // namespace bitring
