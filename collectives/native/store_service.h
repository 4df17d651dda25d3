// What a rank does for a store beside its computing, without Python: it carries messages, and is the owner of the rank's shard.
//
// As an operation it is over when Python is to look: there is what its training thread waits for, or what has to be acted on
// before other messages are heard; begun again it goes on. The training thread may take it further itself while it waits; one
// thread at a time does.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "mailbox.h"
#include "operation.h"
#include "store_owner.h"
#include "wait.h"

namespace bitring {

class StoreService : public Operation {
public:
    // `owner`: of this rank's shard; null: it has none.
    StoreService(std::unique_ptr<Wire> wire, int rank, int size, std::shared_ptr<StoreOwner> owner);

    // Leave a message to be sent, from any thread. After `end` there is none.
    void post(int rank, int kind, int serial, std::vector<double> numbers, Payload payload);

    // What has come and is not the owner's matter, in order, in any thread. Once a `use` or `slots` has been acted on: resume().
    std::vector<MailMessage> take();
    void resume() { blocked_.store(false); }

    // Take it further in a thread that waits for what is to be taken: until there is such, or for so long; 0: once.
    void wait(double seconds);

    // Whether Python is to hear at once how many updates have been taken over: it waits for that.
    void mind_room(bool minds);

    // Whether all ranks have ended, nothing is under way, and all has been taken.
    bool ended() const;
    std::uint64_t nbytes_sent() const { return mailbox_.nbytes_sent(); }

    int awaited() const override { return -1; }
    int error() const override { return error_.load(); }
    const char* reason() const override { return error() == 0 || reason_.empty() ? nullptr : reason_.c_str(); }
    bool calls_library() const override { return true; }

protected:
    void start() override {}
    Status step() override;

private:
    Status go_on();  // one thread at a time
    void hear(MailMessage& message);
    Status fail(int error, const char* reason);

    const int size_;
    std::mutex going_on_;  // over what is there for that
    Mailbox mailbox_;
    std::shared_ptr<StoreOwner> owner_;
    bool opened_ = false;
    bool says_end_ = false;  // this rank has said that it does nothing more
    int ends_ = 0;           // members that have
    std::vector<MailMessage> arrived_;
    std::size_t heard_ = 0;  // of those

    std::string reason_;  // there before error_ is
    std::atomic<int> error_{0};
    std::atomic<bool> ended_{false};
    std::atomic<bool> urgent_{false};   // Python is to look
    std::atomic<bool> blocked_{false};  // and nothing is heard before it has acted
    std::atomic<int> waits_{0};         // threads that wait for that

    mutable std::mutex mutex_;  // over what threads leave for each other
    bool minds_room_ = false;
    std::deque<MailMessage> posted_;  // `source`: to whom
    std::vector<MailMessage> inbox_;
};

}  // namespace bitring
