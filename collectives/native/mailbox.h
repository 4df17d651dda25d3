// Messages that have no common order, without Python; as runtime/mailbox.py, which is the reference, has them.
//
// One receive is posted for each source, never one from any source. A message's numbers come first; its payload is a second
// message, for which there is room when the first has come. A rank's messages to another arrive in their order.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "payload.h"
#include "wire.h"

namespace bitring {

struct MailMessage {
    int source;
    int kind;  // 0 to 253
    int serial;
    std::vector<double> numbers;
    Payload payload;
};

class Mailbox {
public:
    static constexpr std::size_t kMostNumbers = 2048;
    static constexpr std::size_t kMostPayload = std::size_t(1) << 31;  // fewer bytes than that: MPI counts in an int

    // That of rank `rank` of `size`; `wire` has nobody else's messages.
    Mailbox(std::unique_ptr<Wire> wire, int rank, int size);

    // Places that the wire needs to begin with.
    static int room(int size) { return 4 * size; }

    // Post the receives. Returns an MPI error code or 0, as advance() does.
    int open();

    // Send a message, to this rank itself, too. The payload stays as it is meanwhile.
    void send(int rank, int kind, int serial, const std::vector<double>& numbers, Payload payload);

    // Say farewell to all others: this rank sends nothing more.
    void close();

    // Whether all ranks have said farewell, and everything is sent.
    bool over() const { return closed_ && receiving_ == 0 && sending_ == 0 && own_.empty() && held_.empty(); }

    // Begin to send what is held. Returns an MPI error code or 0.
    int flush();

    // Take messages further as far as they go now, and put those that have come behind `arrived`.
    int advance(std::vector<MailMessage>& arrived);

    // Whether the last advance() has found or sent anything.
    bool moved() const { return moved_; }

    std::uint64_t nbytes_sent() const { return nbytes_sent_.load(std::memory_order_relaxed); }

    // Memory for the payload of a message to be sent.
    Payload memory(std::size_t nbytes) { return pool_->get(nbytes); }

private:
    struct Head {
        std::uint8_t kind;
        std::uint8_t has_payload;
        std::uint16_t era;  // 0: nobody is buried
        std::int32_t serial;
        std::int64_t numbers;
    };
    // A message under way to another rank: a head, or a payload.
    struct Sent {
        std::vector<char> head;
        Payload payload;
    };
    struct Held {
        int rank;
        std::vector<char> head;
        Payload payload;
    };

    static constexpr int kHeadTag = 1, kPayloadTag = 2;
    static constexpr int kFarewell = 255;
    static constexpr std::size_t kRoom = sizeof(Head) + 8 * kMostNumbers + 8;

    std::vector<char> head_of(int kind, int serial, const std::vector<double>& numbers, std::size_t nbytes) const;
    int start(int rank, int tag, Sent sent);
    int expect_head(int source);
    int arrive(int source, bool is_payload, std::vector<MailMessage>& arrived);

    std::unique_ptr<Wire> wire_;
    std::shared_ptr<PayloadPool> pool_ = std::make_shared<PayloadPool>();
    int rank_, size_;
    std::vector<std::vector<char>> rooms_;  // of each source's next head
    std::vector<MailMessage> part_;             // of each source, while its payload is under way
    std::deque<Held> held_;
    std::deque<MailMessage> own_;
    std::vector<Sent> sent_;       // by their number
    std::vector<int> free_;        // numbers that are
    std::vector<int> completed_;
    int receiving_ = 0, sending_ = 0;
    bool closed_ = false, moved_ = false;
    std::atomic<std::uint64_t> nbytes_sent_{0};
};

}  // namespace bitring
