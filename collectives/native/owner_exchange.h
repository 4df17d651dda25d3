// The owner exchange of compression/exchange/owner_exchange.py, which is its reference: sums of what ranks encode, with a second
// residual at the owner of each chunk (Seide et al., 2014). Chunks are cut into segments, so that encoding, messages and
// decoding of different segments go on side by side; each sum is made in rank order whatever arrives first. Where cores
// are free, several segments are encoded, summed and decoded at once (thread_pool.h), which changes no bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec.h"
#include "kernels.h"
#include "operation.h"
#include "wire.h"

namespace bitring {

// Values from `start` to before `stop`, encoded in one call by codec number `codec`, in at most `nbytes`.
struct EncodedPiece {
    std::int64_t start, stop, nbytes;
    std::size_t codec = 0;
};

// What one message carries of the chunk that rank `owner` owns.
struct ExchangeSegment {
    int owner;
    std::vector<EncodedPiece> pieces;
};

class OwnerExchange final : public Operation {
public:
    // Squared norms: of values, of the values with their residual, and of the residual that encoding left behind.
    struct Norms {
        double values = 0, sums = 0, residual = 0;
    };

    // What one run took; the norms over a sample of the segments, for the rank's values and for the sums it owns;
    // whether all residuals left behind are finite.
    struct RunStats {
        std::int64_t nanoseconds = 0, encode = 0, decode = 0, bytes_sent = 0;
        Norms norms, owner_norms;
        bool finite = true;
    };

    // `segments` are the same on all ranks, ordered by owner. `fixed`: a piece's payload has always `nbytes` bytes.
    // `residual` has a value for each of the buffer's, `owner_residual` for each that this rank owns from `owned` on.
    OwnerExchange(std::unique_ptr<Wire> wire, int rank, int size, Type type, std::vector<Codec> codecs, bool fixed,
                  std::vector<ExchangeSegment> segments, void* residual, void* owner_residual, std::int64_t owned,
                  int to_owner_tag, int from_owner_tag);

    // Work on the values at `buffer` from the next begin() on.
    void bind(void* buffer) { buffer_ = static_cast<char*>(buffer); }

    // From now on residuals are copied, to arrays as large, before a run changes them for the first time since forget().
    void keep(void* residual, void* owner_residual) {
        kept_residual_ = static_cast<char*>(residual);
        kept_owner_residual_ = static_cast<char*>(owner_residual);
    }

    // What there is by now stays.
    void forget() {
        std::fill(kept_[0].begin(), kept_[0].end(), 0);
        std::fill(kept_[1].begin(), kept_[1].end(), 0);
    }

    // Copy back what was copied since forget(); not during a run.
    void bring_back();

    // The number of the next run, and what its random numbers depend on.
    void prepare(std::int64_t run, std::int64_t seed) { run_ = run, seed_ = seed; }

    int awaited() const override { return awaited_; }
    int error() const override { return error_; }
    bool calls_library() const override { return true; }
    const char* reason() const override;
    const RunStats& stats() const { return stats_; }

    // error(), where it is none of the MPI library's.
    static constexpr int kCorrupt = -1;  // a payload could not be decoded
    static constexpr int kOutgrew = -2;  // a payload was longer than it may be

    // Messages under way at once, at most.
    static int room(const std::vector<ExchangeSegment>& segments, int rank, int size);

protected:
    void start() override;
    Status step() override;

private:
    struct Posted {
        bool sends, summed;
        int segment, peer;
    };

    bool owns(std::size_t s) const { return segments_[s].owner == rank_; }
    // What can be done with one segment, without regard to any other that could be done now.
    struct Task {
        enum Kind { sum, encode, receive } kind;
        std::size_t s;      // the segment
        std::size_t k;      // its number among those that this rank owns, if it does
        std::size_t place;  // among the tasks that go on at once
        std::size_t nbytes = 0;  // encoded
        int error = 0;
        std::int64_t encode_nanoseconds = 0, decode_nanoseconds = 0;
        Norms norms;         // of what was encoded, where it is in the sample
        bool finite = true;  // what encoding left
    };

    std::size_t header(std::size_t s) const { return fixed_ ? 0 : segments_[s].pieces.size() * sizeof(std::uint32_t); }
    // Where the segment's residual is, or that of its sum, or the copy of either; and how many bytes it has.
    std::size_t residual_at(std::size_t s, bool sum, char** residual, char** kept);
    char* values(std::int64_t index) { return buffer_ + std::size_t(index) * itemsize_; }
    void send(std::size_t s, bool summed, int peer, std::vector<std::uint8_t>& payload, std::size_t nbytes);
    void encode(Task& task, bool sum, std::vector<std::uint8_t>& payload);
    bool decode(Task& task, bool sum, bool accumulate, const std::vector<std::uint8_t>& payload);
    void gather_tasks();
    void work(Task& task);
    void work_on_all();
    void finish(const Task& task);

    std::unique_ptr<Wire> wire_;
    int rank_, size_;
    Type type_;
    std::size_t itemsize_, wide_;
    std::vector<Codec> codecs_;
    bool fixed_;
    std::vector<ExchangeSegment> segments_;
    char* residual_;
    char* owner_residual_;
    char* kept_residual_ = nullptr;
    char* kept_owner_residual_ = nullptr;
    std::vector<char> kept_[2];  // by segment: whether its residual was copied; and that of its sum
    std::int64_t owned_;
    int tags_[2];

    std::vector<std::size_t> order_;                             // segments as they are encoded
    std::vector<std::size_t> mine_;                              // segments that this rank owns
    std::vector<std::vector<std::uint8_t>> encoded_;             // by segment
    std::vector<std::vector<std::uint8_t>> summed_;              // by segment
    std::vector<std::vector<std::vector<std::uint8_t>>> incoming_;  // by own segment, by rank
    std::vector<std::vector<char>> sums_;                        // of one segment, by place
    std::size_t most_ = 1;                                       // tasks that go on at once
    std::vector<Task> tasks_;
    std::vector<Posted> posted_;
    std::vector<int> landed_;
    std::vector<int> missing_;  // by own segment: payloads that have not come
    std::vector<int> from_;     // by rank: messages that have not come
    std::vector<std::size_t> arrived_;  // encoded sums, to be decoded

    char* buffer_ = nullptr;
    std::int64_t seed_ = 0;
    std::int64_t run_ = 0;
    std::size_t next_encode_ = 0, next_sum_ = 0, next_decode_ = 0;
    int sending_ = 0;
    int awaited_ = -1;
    int error_ = 0;
    std::int64_t began_ = 0;
    RunStats stats_;
};

}  // namespace bitring
