#include "mailbox.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace bitring {

Mailbox::Mailbox(std::unique_ptr<Wire> wire, int rank, int size)
    : wire_(std::move(wire)), rank_(rank), size_(size), rooms_(std::size_t(size)), part_(std::size_t(size)) {}

int Mailbox::open() {
    for (int source = 0; source < size_; ++source) {
        if (source == rank_) continue;
        rooms_[std::size_t(source)].resize(kRoom);
        if (const int code = expect_head(source)) return code;
    }
    return 0;
}

std::vector<char> Mailbox::head_of(int kind, int serial, const std::vector<double>& numbers, std::size_t nbytes) const {
    if (numbers.size() > kMostNumbers) throw std::length_error("Mailbox: too many numbers");
    if (nbytes >= kMostPayload) throw std::length_error("Mailbox: too large a payload");
    const Head head{std::uint8_t(kind), nbytes > 0, 0, serial, std::int64_t(numbers.size())};
    const std::int64_t length = std::int64_t(nbytes);
    const std::size_t end = sizeof(head) + 8 * numbers.size();
    std::vector<char> bytes(end + (nbytes > 0 ? sizeof(length) : 0));
    std::memcpy(bytes.data(), &head, sizeof(head));
    if (!numbers.empty()) std::memcpy(bytes.data() + sizeof(head), numbers.data(), 8 * numbers.size());
    if (nbytes > 0) std::memcpy(bytes.data() + end, &length, sizeof(length));
    return bytes;
}

void Mailbox::send(int rank, int kind, int serial, const std::vector<double>& numbers, Payload payload) {
    if (rank == rank_) {
        own_.push_back(MailMessage{rank, kind, serial, numbers, std::move(payload)});
    } else {
        std::vector<char> head = head_of(kind, serial, numbers, payload.nbytes);
        held_.push_back(Held{rank, std::move(head), std::move(payload)});
    }
}

void Mailbox::close() {
    if (closed_) return;
    closed_ = true;
    for (int rank = 0; rank < size_; ++rank) {
        if (rank != rank_) held_.push_back(Held{rank, head_of(kFarewell, 0, {}, 0), {}});
    }
}

// A message's number for the wire: source, size + source for its payload, and from 2 size on those that are sent.
int Mailbox::start(int rank, int tag, Sent sent) {
    if (free_.empty()) {
        free_.push_back(int(sent_.size()));
        sent_.emplace_back();
    }
    const int number = free_.back();
    free_.pop_back();
    Sent& place = sent_[std::size_t(number)];
    place = std::move(sent);
    const bool head = place.payload.nbytes == 0;
    const std::size_t nbytes = head ? place.head.size() : place.payload.nbytes;
    ++sending_;
    moved_ = true;
    nbytes_sent_.fetch_add(nbytes, std::memory_order_relaxed);
    return wire_->start(true, head ? place.head.data() : place.payload.memory.get(), nbytes, rank, tag,
                        2 * size_ + number);
}

int Mailbox::expect_head(int source) {
    ++receiving_;
    return wire_->start(false, rooms_[std::size_t(source)].data(), kRoom, source, kHeadTag, source);
}

int Mailbox::arrive(int source, bool is_payload, std::vector<MailMessage>& arrived) {
    --receiving_;
    MailMessage& message = part_[std::size_t(source)];
    if (!is_payload) {
        const char* room = rooms_[std::size_t(source)].data();
        Head head;
        std::memcpy(&head, room, sizeof(head));
        if (head.kind == kFarewell) return 0;
        const std::size_t end = sizeof(head) + 8 * std::size_t(head.numbers);
        message = MailMessage{source, head.kind, head.serial, std::vector<double>(head.numbers), {}};
        if (head.numbers > 0) std::memcpy(message.numbers.data(), room + sizeof(head), 8 * std::size_t(head.numbers));
        if (head.has_payload) {
            std::int64_t length;
            std::memcpy(&length, room + end, sizeof(length));
            message.payload = pool_->get(std::size_t(length));
            ++receiving_;
            return wire_->start(false, message.payload.memory.get(), message.payload.nbytes, source, kPayloadTag,
                                size_ + source);
        }
    }
    arrived.push_back(std::move(message));
    return expect_head(source);
}

int Mailbox::flush() {
    while (!held_.empty()) {
        Held held = std::move(held_.front());
        held_.pop_front();
        if (const int code = start(held.rank, kHeadTag, Sent{std::move(held.head), {}})) return code;
        if (held.payload.nbytes == 0) continue;
        if (const int code = start(held.rank, kPayloadTag, Sent{{}, std::move(held.payload)})) return code;
    }
    return 0;
}

int Mailbox::advance(std::vector<MailMessage>& arrived) {
    moved_ = !own_.empty();
    if (const int code = flush()) return code;
    for (; !own_.empty(); own_.pop_front()) arrived.push_back(std::move(own_.front()));
    if (receiving_ + sending_ == 0) return 0;
    completed_.resize(std::size_t(receiving_ + sending_));
    int count = 0;
    if (const int code = wire_->complete(completed_.data(), int(completed_.size()), &count)) return code;
    moved_ |= count > 0;
    for (int k = 0; k < count; ++k) {
        const int number = completed_[std::size_t(k)];
        if (number >= 2 * size_) {
            sent_[std::size_t(number - 2 * size_)] = Sent{};
            free_.push_back(number - 2 * size_);
            --sending_;
        } else if (const int code = arrive(number % size_, number >= size_, arrived)) {
            return code;
        }
    }
    return 0;
}

}  // namespace bitring
