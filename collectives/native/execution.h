// The native executor: a compiled program (collectives/schedules/program.py) run over a wire on a buffer in host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bound_collective.h"
#include "kernels.h"
#include "wire.h"

namespace bitring {

// One message; the fields of program.Message.
struct Message {
    bool sends;
    bool reduces;
    bool early;
    int peer;
    std::int64_t start;
    std::int64_t stop;
    int stream;
    int tag;
    int slot;
    int waits;
};

// program.Program: `unblocks[i]` wait for message i; `streams` are the messages of each transfer, in order.
struct Program {
    std::vector<Message> messages;
    std::vector<std::vector<int>> unblocks;
    std::vector<std::vector<int>> streams;
    int slots;  // scratch segments are numbered below this
    std::int64_t slot_values;
    int window;  // messages of one stream under way at once
};

// Runs the program as collectives/execution/portable.py does, which is its reference: the same messages, sums in the same order.
class Execution final : public BoundCollective {
public:
    // `reduce` may be null where no message reduces. `rank` is this rank's number among the messages' peers.
    Execution(std::shared_ptr<const Program> program, std::unique_ptr<Wire> wire, int rank, std::size_t itemsize,
              Reduce reduce);

    // As BoundCollective's; out of place only where the program changes all values, as an AllReduce's does.
    void bind(const void* from, void* to) override {
        given_ = static_cast<const char*>(from);
        buffer_ = static_cast<char*>(to);
    }

    int awaited() const override { return awaited_; }
    int error() const override { return error_; }
    bool calls_library() const override { return true; }

    // Messages under way at once, at most.
    static int room(const Program& program);

protected:
    void start() override;
    Status step() override;

private:
    bool may_begin(int index) const;
    void begin_stream(int stream);
    void finish(int index);
    void apply(int index);
    void find_untouched();
    char* at(std::int64_t value) { return buffer_ + std::size_t(value) * itemsize_; }
    // Where the message's values are, before it: those that no message has changed are where they were given.
    const char* source(int index) const {
        const bool as_given = untouched_[std::size_t(index)] != 0;
        return (as_given ? given_ : buffer_) + std::size_t(program_->messages[std::size_t(index)].start) * itemsize_;
    }
    char* scratch(int slot) { return scratch_.get() + std::size_t(slot) * std::size_t(program_->slot_values) * itemsize_; }

    std::shared_ptr<const Program> program_;
    std::unique_ptr<Wire> wire_;
    int rank_;
    std::size_t itemsize_;
    Reduce reduce_;
    std::unique_ptr<char[]> scratch_;
    const char* given_ = nullptr;
    char* buffer_ = nullptr;
    std::vector<char> untouched_;   // per message: it reads values that no message before it has changed
    std::int64_t copied_ = 0;       // out of place so many values, the first ones, are copied at the begin

    std::size_t unfinished_ = 0;
    std::size_t turn_ = 0;                   // the streams in_order_[:turn_] have begun all their receives
    std::vector<int> in_order_;              // streams that receive
    std::vector<int> waits_;                 // per message
    std::vector<char> arrived_;              // per message: received into scratch, waiting for its turn
    std::vector<std::size_t> position_;      // per stream: its next message that has not begun
    std::vector<int> under_way_;             // per stream
    std::vector<char> busy_;                 // per slot
    std::vector<std::vector<int>> wanting_;  // per slot: streams whose next message is received there
    std::vector<int> todo_;
    std::vector<int> finished_;
    std::vector<int> taken_;
    std::vector<int> landed_;
    std::vector<int> peers_;  // messages under way, by peer
    int awaited_ = -1;
    int error_ = 0;
};

}  // namespace bitring
