// What the ranks of one communicator on one node share: for each rank a few lines that say how far it has come, slots
// for small contributions, and stages through which large private buffers pass.
//
// Every operation begins with an arrival: the rank writes down what it is about to do, as a signature, and everybody
// reads everybody's. So nothing is exchanged unless all mean the same, at no cost beside the data's own way.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "operation.h"

namespace bitring {

constexpr std::size_t kLine = 128;  // processors fetch pairs of cache lines

// What a rank says of itself when it comes to an operation; bits.
enum Flag : std::uint32_t {
    kNeedsLibrary = 1,  // it needs the MPI library's own call
    kBad = 2,           // its arguments are bad
    kOnlyArrives = 4,   // it agrees first and exchanges afterwards: one whose arrival brought its values comes along
    kTold = 8,          // for the others to learn; the caller's
    kGoesOn = 16,       // it does not wait for the others, and will not hear what they find
    kStrange = 32       // what it left is not values, but who does something else
};

// What a rank says when it comes to an operation. `words` of all ranks together become Verdict.
struct Intent {
    std::uint64_t signature = 0;  // its upper half is the function, the lower what else must be the same
    std::uint64_t where = 0;      // which shared memory the buffer lies in, and at which offset; 0: private
    std::uint32_t flags = 0;      // Flag
};

struct Verdict {
    bool same = true;           // all signatures are the same
    bool same_function = true;  // their upper halves are
    bool same_place = true;     // all `where` are the same, and none is private
    std::uint32_t flags = 0;    // Flag, of any rank

    // A rank that does something else and goes on, or will not answer, so that not all ranks hear what this one has
    // heard; and its signature. -1: none.
    int stranger = -1;
    std::uint64_t strange = 0;
    // Signatures of the calls that this rank has made one way since all ranks met; where they are not the same.
    std::vector<std::uint64_t> earlier;
};

class Node {
public:
    static constexpr std::size_t kInline = 32;           // bytes that travel in the arrival's own cache line
    static constexpr std::size_t kSmall = 64 << 10;      // bytes of a slot
    static constexpr std::size_t kStages = 3;            // stages a rank
    static constexpr std::size_t kStage = 512 << 10;     // bytes of a stage, at least
    static constexpr std::uint64_t kSlots = 8;           // slots a rank: so many operations less one it may be ahead

    // Bytes that each of `size` ranks shares.
    static std::size_t nbytes(int size);

    // `parts[r]` is what rank r shares, zeroed before anybody uses it; `keep` owns it. `names[r]` is what awaited() of an
    // operation calls rank r: its number in the communicator that the node is a part of.
    Node(int rank, std::vector<char*> parts, std::vector<int> names, std::shared_ptr<const void> keep);

    int rank() const { return rank_; }
    int size() const { return int(parts_.size()); }
    int name(int r) const { return r < 0 || r >= size() ? -1 : names_[std::size_t(r)]; }

    // Begin the next operation: `data` (nbytes <= kSmall) is left for the others to read.
    void arrive(const Intent& intent, const void* data, std::size_t nbytes);

    // As arrive(), for data in several pieces: room for `nbytes`, to be written before publish().
    char* prepare(const Intent& intent, std::size_t nbytes);
    void publish();

    // Between the two: the room again, for `nbytes`; and one more Flag.
    char* room(std::size_t nbytes) const { return data_of(rank_, nbytes); }
    void add_flag(Flag flag) { slot(rank_).flags |= flag; }

    // Whether all ranks have come to the operation that this one came to last; if not, awaited() has not.
    bool all_arrived() {
        while (next_ < int(parts_.size())) {
            if (next_ != rank_ && slot(next_).sequence.load(std::memory_order_acquire) < sequence_) return false;
            ++next_;
        }
        return true;
    }
    int awaited() const { return next_; }

    // As all_arrived(), of rank r.
    bool has_arrived(int r) const { return slot(r).sequence.load(std::memory_order_acquire) >= sequence_; }

    // Whether rank r, which has arrived, says what this one says; its signature and its flags.
    bool says_the_same(int r) const {
        const Slot &theirs = slot(r), &mine = slot(rank_);
        return theirs.signature == mine.signature && theirs.where == mine.where && theirs.flags == mine.flags;
    }
    std::uint64_t signature(int r) const { return slot(r).signature; }
    std::uint32_t flags(int r) const { return slot(r).flags; }

    // Whether this rank may come to another operation: its slots have been read. If not, `awaited` has not come so far.
    // To ask is for operations that may end before all have arrived, which these ask before they end.
    bool has_room(int* awaited) const {
        if (sequence_ + 2 < kSlots) return true;
        const std::uint64_t least = sequence_ + 2 - kSlots;
        for (int r = 0; r < size(); ++r) {
            if (r != rank_ && slots(r)[least % kSlots].sequence.load(std::memory_order_acquire) < least) {
                *awaited = r;
                return false;
            }
        }
        return true;
    }

    // What all ranks said, when all have arrived; what rank r left.
    Verdict verdict() const;
    const void* contribution(int r, std::size_t nbytes) const;

    // The first rank that has not said the same as rank 0, when all have arrived, and its signature; -1: none.
    int differing(std::uint64_t* signature) const {
        for (int r = 1; r < int(parts_.size()); ++r) {
            *signature = slot(r).signature;
            const bool same = *signature == slot(0).signature && slot(r).where == slot(0).where;
            if (!same || slot(r).flags != slot(0).flags) return r;
        }
        return -1;
    }

    // Steps inside an operation, counted over all operations: each rank reports its own, in order, and reads others'.
    // Three independent counts, so that three phases may overlap.
    static constexpr int kCounts = 3;
    void report(int count, std::uint64_t value) { counts(rank_)[count].value.store(value, std::memory_order_release); }
    bool reached(int count, std::uint64_t value, int* awaited) const {
        for (int r = 0; r < int(parts_.size()); ++r) {
            if (r != rank_ && counts(r)[count].value.load(std::memory_order_acquire) < value) {
                *awaited = r;
                return false;
            }
        }
        return true;
    }
    // As reached(), by rank r.
    bool reached_by(int r, int count, std::uint64_t value) const {
        return counts(r)[count].value.load(std::memory_order_acquire) >= value;
    }
    // Where the counts stand when no operation is under way; the same on all ranks.
    std::uint64_t steps = 0;

    char* stage(int r, std::size_t k) const { return parts_[std::size_t(r)] + stages_at_ + (k % kStages) * stage_; }
    std::size_t stage_nbytes() const { return stage_; }

private:
    struct alignas(kLine) Slot {
        std::atomic<std::uint64_t> sequence;
        std::uint64_t signature;
        std::uint64_t where;
        std::uint32_t flags;
        char data[kInline];
    };
    struct alignas(kLine) Count {
        std::atomic<std::uint64_t> value;
    };
    static_assert(offsetof(Slot, data) + kInline <= 64, "an arrival is one cache line");

    // A slot is used again when all ranks have come to the operation after its own.
    Slot* slots(int r) const { return reinterpret_cast<Slot*>(parts_[std::size_t(r)]); }
    Slot& slot(int r) const { return slots(r)[sequence_ % kSlots]; }
    Count* counts(int r) const { return reinterpret_cast<Count*>(parts_[std::size_t(r)] + kSlots * sizeof(Slot)); }
    char* data_of(int r, std::size_t nbytes) const {
        return nbytes <= kInline ? slot(r).data : parts_[std::size_t(r)] + small_at_ + sequence_ % kSlots * kSmall;
    }

    int rank_;
    std::vector<char*> parts_;
    std::vector<int> names_;
    std::shared_ptr<const void> keep_;
    std::size_t small_at_;
    std::size_t stages_at_;
    std::size_t stage_;
    std::uint64_t sequence_ = 0;
    int next_ = 0;
};

}  // namespace bitring
