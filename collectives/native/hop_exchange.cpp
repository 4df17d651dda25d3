#include "hop_exchange.h"

#include <algorithm>
#include <cstring>

#include "copy.h"

namespace bitring {
namespace {

// Copy a region between two arrays, of which either may hold it packed.
void copy_runs(char* to, const Runs& there, const char* from, const Runs& here, std::size_t itemsize) {
    to += std::size_t(there.first) * itemsize;
    from += std::size_t(here.first) * itemsize;
    if (there.contiguous() && here.contiguous()) {
        copy_bytes(to, from, std::size_t(here.values()) * itemsize);
        return;
    }
    for (std::int64_t k = 0; k < here.runs; ++k) {
        copy_bytes(to + std::size_t(k * there.stride) * itemsize, from + std::size_t(k * here.stride) * itemsize,
                   std::size_t(here.run) * itemsize);
    }
}

void add_runs(char* to, const Runs& there, const char* from, const Runs& here, std::size_t itemsize, Reduce add) {
    to += std::size_t(there.first) * itemsize;
    from += std::size_t(here.first) * itemsize;
    const bool whole = there.contiguous() && here.contiguous();
    const std::int64_t runs = whole ? 1 : here.runs, run = whole ? here.values() : here.run;
    for (std::int64_t k = 0; k < runs; ++k) {
        void* target = to + std::size_t(k * there.stride) * itemsize;
        const void* operands[2] = {target, from + std::size_t(k * here.stride) * itemsize};
        add(std::size_t(run), 2, operands, 1, &target);
    }
}

// The same region, packed.
Runs packed(const Runs& runs) { return Runs{0, runs.runs, runs.run, runs.run}; }

}  // namespace

int HopExchange::room(const std::vector<Hop>& hops, int rank) {
    std::size_t room = 1;
    for (const Hop& hop : hops) {
        room += hop.sends.size();
        for (const HopMove& move : hop.arrivals) room += move.peer != rank;
    }
    return int(room);
}

HopExchange::HopExchange(std::unique_ptr<Wire> wire, int rank, Type type, std::vector<Hop> hops, const Codec* codec,
                         std::size_t wide_itemsize)
    : wire_(std::move(wire)),
      rank_(rank),
      itemsize_(size_of(type)),
      wide_itemsize_(wide_itemsize),
      add_(reduce_kernel(Op::sum, type)),
      hops_(std::move(hops)),
      codec_(codec != nullptr ? *codec : Codec{}),
      landed_(std::size_t(room(hops_, rank))) {
    for (const Hop& hop : hops_) {
        first_send_.push_back(buffers_.size());
        for (const HopMove& move : hop.sends) prepare(hop, move, true);
        arrival_.emplace_back();
        for (const HopMove& move : hop.arrivals) {
            arrival_.back().push_back(move.peer == rank_ ? -1 : int(buffers_.size()));
            if (move.peer != rank_) prepare(hop, move, false);
        }
    }
}

bool HopExchange::lands_in_result(const Hop& hop, const HopMove& move) const {
    return !hop.adds && !hop.encoded && move.to.contiguous();
}

void HopExchange::prepare(const Hop& hop, const HopMove& move, bool sends) {
    Buffer buffer;
    buffer.sends = sends;
    const std::int64_t values = sends ? move.from.values() : move.to.values();
    if (sends || !lands_in_result(hop, move)) buffer.values.reset(new char[std::size_t(values) * itemsize_]);
    if (hop.encoded) {
        buffer.payload.reset(new char[std::size_t(move.nbytes)]);
        residual_.resize(std::max(residual_.size(), std::size_t(values) * wide_itemsize_));
    }
    buffers_.push_back(std::move(buffer));
}

void HopExchange::start() {
    error_ = 0;
    awaited_ = -1;
    wanted_ = Wanted::nothing;
    unsent_ = 0;
    for (Buffer& buffer : buffers_) {
        buffer.there = false;
        unsent_ += buffer.sends;
    }
    for (std::size_t h = 0; h < hops_.size(); ++h) {
        const Hop& hop = hops_[h];
        for (std::size_t k = 0; k < hop.arrivals.size() && error_ == 0; ++k) {
            const int number = arrival_[h][k];
            if (number < 0) continue;
            const HopMove& move = hop.arrivals[k];
            const Buffer& buffer = buffers_[std::size_t(number)];
            char* memory = buffer.payload ? buffer.payload.get() : buffer.values.get();
            if (memory == nullptr) memory = static_cast<char*>(hop.result) + std::size_t(move.to.first) * itemsize_;
            error_ = wire_->start(false, memory, std::size_t(move.nbytes), move.peer, move.tag, number);
        }
    }
}

void HopExchange::send(std::size_t number, const void* from) {
    const Hop& hop = hops_[number];
    for (std::size_t k = 0; k < hop.sends.size() && error_ == 0; ++k) {
        const HopMove& move = hop.sends[k];
        const std::size_t message = first_send_[number] + k;
        Buffer& buffer = buffers_[message];
        copy_runs(buffer.values.get(), packed(move.from), static_cast<const char*>(from), move.from, itemsize_);
        char* memory = buffer.values.get();
        if (hop.encoded) {
            memory = buffer.payload.get();
            std::fill(residual_.begin(), residual_.end(), char(0));
            const std::int64_t used =
                codec_.encode(buffer.values.get(), residual_.data(), move.from.values(),
                              reinterpret_cast<std::uint8_t*>(memory), move.nbytes, 0, codec_.settings);
            if (used != move.nbytes) error_ = kCorrupt;
        }
        if (error_ == 0) {
            error_ = wire_->start(true, memory, std::size_t(move.nbytes), move.peer, move.tag, int(message));
        }
    }
}

void HopExchange::expect(std::size_t number, const void* from) {
    wanted_ = Wanted::result;
    hop_ = number;
    next_ = 0;
    from_ = static_cast<const char*>(from);
    const Hop& hop = hops_[number];
    if (hop.adds) std::memset(hop.result, 0, std::size_t(hop.values) * itemsize_);
}

void HopExchange::expect_sent() { wanted_ = Wanted::sent; }

const char* HopExchange::reason() const {
    return error_ == kCorrupt ? "a value that travels between ranks could not be encoded or decoded" : nullptr;
}

// Take over the next of the wanted hop's arrivals. Returns whether it was there.
bool HopExchange::take_next() {
    const Hop& hop = hops_[hop_];
    const HopMove& move = hop.arrivals[next_];
    const int number = arrival_[hop_][next_];
    char* result = static_cast<char*>(hop.result);
    const char* values = from_;
    Runs here = move.from;
    if (number >= 0) {
        const Buffer& buffer = buffers_[std::size_t(number)];
        if (!buffer.there) return false;
        if (lands_in_result(hop, move)) {
            ++next_;
            return true;
        }
        values = buffer.values.get();
        here = packed(move.to);
        if (hop.encoded &&
            codec_.decode(reinterpret_cast<const std::uint8_t*>(buffer.payload.get()), move.nbytes,
                          buffer.values.get(), move.to.values(), 0, codec_.settings) != 0) {
            error_ = kCorrupt;
            return false;
        }
    }
    if (hop.adds) {
        add_runs(result, move.to, values, here, itemsize_, add_);
    } else {
        copy_runs(result, move.to, values, here, itemsize_);
    }
    ++next_;
    return true;
}

Status HopExchange::step() {
    int count = 0;
    if (error_ == 0) error_ = wire_->complete(landed_.data(), int(landed_.size()), &count);
    for (int k = 0; k < count; ++k) {
        Buffer& buffer = buffers_[std::size_t(landed_[std::size_t(k)])];
        buffer.there = true;
        unsent_ -= buffer.sends;
    }
    awaited_ = -1;
    if (wanted_ == Wanted::result) {
        const auto& arrivals = hops_[hop_].arrivals;
        while (error_ == 0 && next_ < arrivals.size() && take_next()) {
        }
        if (error_ == 0 && next_ == arrivals.size()) return over(Status::done);
        if (next_ < arrivals.size()) awaited_ = arrivals[next_].peer;
    } else if (error_ == 0 && wanted_ == Wanted::sent && unsent_ == 0) {
        return over(Status::done);
    }
    if (error_ != 0) return over(Status::failed);
    return count > 0 ? Status::moved : Status::waiting;
}

}  // namespace bitring
