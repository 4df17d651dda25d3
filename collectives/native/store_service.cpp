#include "store_service.h"

#include <exception>
#include <utility>

namespace bitring {

StoreService::StoreService(std::unique_ptr<Wire> wire, int rank, int size, std::shared_ptr<StoreOwner> owner)
    : size_(size), mailbox_(std::move(wire), rank, size), owner_(std::move(owner)) {}

void StoreService::post(int rank, int kind, int serial, std::vector<double> numbers, Payload payload) {
    const std::lock_guard<std::mutex> lock(mutex_);
    posted_.push_back(MailMessage{rank, kind, serial, std::move(numbers), std::move(payload)});
}

std::vector<MailMessage> StoreService::take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    urgent_.store(false);
    return std::exchange(inbox_, {});
}

void StoreService::mind_room(bool minds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    minds_room_ = minds;
    if (minds && !inbox_.empty()) urgent_.store(true);
}

bool StoreService::ended() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ended_ && inbox_.empty();
}

void StoreService::hear(MailMessage& message) {
    const auto kind = StoreKind(message.kind);
    ends_ += kind == StoreKind::end;
    const bool rare = kind == StoreKind::use || kind == StoreKind::slots;
    if (kind < StoreKind::values && !rare) {
        const auto send = [this](int member, StoreKind what, int serial, std::vector<double> numbers, Payload payload) {
            mailbox_.send(member, int(what), serial, numbers, std::move(payload));
        };
        owner_->hear(message, send, [this](std::size_t nbytes) { return mailbox_.memory(nbytes); });
        if (kind != StoreKind::end) return;
    }
    bool urgent = kind != StoreKind::taken;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        urgent |= minds_room_;
        inbox_.push_back(std::move(message));
        if (urgent) urgent_.store(true);
        if (rare) blocked_.store(true);
    }
}

Status StoreService::fail(int error, const char* reason) {
    reason_ = reason;
    error_.store(error);
    return Status::failed;
}

Status StoreService::go_on() {
    try {
        if (error_ != 0) return Status::failed;
        if (!opened_) {
            opened_ = true;
            if (const int code = mailbox_.open()) return fail(code, "");
        }
        std::deque<MailMessage> posted;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            posted.swap(posted_);
        }
        for (MailMessage& each : posted) {
            mailbox_.send(each.source, each.kind, each.serial, each.numbers, std::move(each.payload));
            says_end_ |= StoreKind(each.kind) == StoreKind::end;
        }
        // Nobody asks this rank for anything any more.
        if (says_end_ && (owner_ == nullptr || ends_ == size_)) mailbox_.close();
        bool moved = !posted.empty();
        if (heard_ == arrived_.size()) {
            arrived_.clear();
            heard_ = 0;
            if (const int code = mailbox_.advance(arrived_)) return fail(code, "");
            moved |= mailbox_.moved();
        }
        for (; heard_ < arrived_.size() && !blocked_; moved = true) hear(arrived_[heard_++]);
        if (const int code = mailbox_.flush()) return fail(code, "");  // the owner's answers
        if (mailbox_.over() && heard_ == arrived_.size()) {
            ended_.store(true);
            return Status::done;
        }
        return moved ? Status::moved : Status::waiting;
    } catch (const std::exception& problem) {
        return fail(1, problem.what());
    }
}

Status StoreService::step() {
    if (waits_ > 0) return Status::waiting;  // whoever waits is quicker
    const std::unique_lock<std::mutex> lock(going_on_, std::try_to_lock);
    if (!lock.owns_lock()) return Status::waiting;
    const Status status = go_on();
    return !is_over(status) && urgent_ ? Status::done : status;
}

void StoreService::wait(double seconds) {
    const std::uint64_t until = now_nanoseconds() + std::uint64_t(seconds * 1e9);
    Patience patience(false, true);
    ++waits_;
    for (;;) {
        Status status = Status::waiting;
        if (const std::unique_lock<std::mutex> lock(going_on_, std::try_to_lock); lock.owns_lock()) status = go_on();
        if (urgent_ || is_over(status) || now_nanoseconds() >= until) break;
        if (status == Status::moved) {
            patience.moved();
        } else {
            patience.rest();
        }
    }
    --waits_;
}

}  // namespace bitring
