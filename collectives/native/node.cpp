#include "node.h"

#include <algorithm>
#include <utility>

#include "copy.h"

namespace bitring {

namespace {

constexpr std::size_t kHead = 4096;  // slots and counts, in a page of their own

std::size_t stage_of(int size) { return std::max(Node::kStage, std::size_t(size) * 8192); }

}  // namespace

std::size_t Node::nbytes(int size) { return kHead + kSlots * kSmall + kStages * stage_of(size); }

Node::Node(int rank, std::vector<char*> parts, std::vector<int> names, std::shared_ptr<const void> keep)
    : rank_(rank),
      parts_(std::move(parts)),
      names_(std::move(names)),
      keep_(std::move(keep)),
      small_at_(kHead),
      stages_at_(kHead + kSlots * kSmall),
      stage_(stage_of(int(parts_.size()))) {
    static_assert(kSlots * sizeof(Slot) + kCounts * sizeof(Count) <= kHead, "the head is a page");
}

char* Node::prepare(const Intent& intent, std::size_t nbytes) {
    ++sequence_;
    next_ = 0;
    Slot& mine = slot(rank_);
    mine.signature = intent.signature;
    mine.where = intent.where;
    mine.flags = intent.flags;
    return data_of(rank_, nbytes);
}

void Node::publish() { slot(rank_).sequence.store(sequence_, std::memory_order_release); }

void Node::arrive(const Intent& intent, const void* data, std::size_t nbytes) {
    char* room = prepare(intent, nbytes);
    if (nbytes > 0) copy_bytes(room, data, nbytes);
    publish();
}

Verdict Node::verdict() const {
    const Slot& first = slot(0);
    Verdict verdict;
    verdict.same_place = first.where != 0;
    for (int r = 0; r < size(); ++r) {
        const Slot& other = slot(r);
        verdict.same &= other.signature == first.signature;
        verdict.same_function &= other.signature >> 32 == first.signature >> 32;
        verdict.same_place &= other.where == first.where;
        verdict.flags |= other.flags & ~std::uint32_t(kGoesOn);
        if ((other.flags & kGoesOn) == 0 || (slot(rank_).flags & kGoesOn) != 0 || verdict.stranger >= 0) continue;
        verdict.same = false;
        verdict.stranger = name(r);
        verdict.strange = other.signature;
    }
    return verdict;
}

const void* Node::contribution(int r, std::size_t nbytes) const { return data_of(r, nbytes); }

}  // namespace bitring
