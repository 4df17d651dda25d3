#include "store_rule.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace bitring {

StoreRule::StoreRule(std::size_t gather, bool drops, std::optional<std::int64_t> staleness, bool inverse,
                     std::vector<std::int64_t> clocks)
    : gather_(gather), drops_(drops), staleness_(staleness), inverse_(inverse) {
    for (const std::int64_t clock : clocks) members_.push_back(Member{clock, 0, clock > 0});
}

std::size_t StoreRule::at(int member) const {
    if (member < 0 || std::size_t(member) >= members_.size()) throw std::out_of_range("StoreRule: no such member");
    return std::size_t(member);
}

StoreRule::Actions StoreRule::push(int member, int number, double weight, std::optional<std::int64_t> round) {
    Actions actions;
    const Member& pusher = members_[at(member)];
    const Push push{pusher.clock, member, number, weight, round.value_or(pusher.seen)};
    if (!drops_ || push.read == version_) {
        gathered_.push_back(push);
    } else if (push.read > version_) {
        early_.push_back(push);
    } else if (weight != 0) {
        actions.push_back(StoreAction{StoreAction::Kind::drop, member, number});
    }
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::read(int member, int ticket, std::optional<std::int64_t> least) {
    Actions actions;
    Member& reader = members_[at(member)];
    Read read{member, ticket, kAny};
    if (least) {
        read.least = *least;
    } else if (staleness_ && !reader.left) {
        read.least = reader.clock - *staleness_;
    }
    const auto earlier = std::find_if(waiting_.begin(), waiting_.end(), [&](const Read& r) { return r.member == member; });
    if (earlier == waiting_.end()) {
        waiting_.push_back(read);
    } else {
        *earlier = read;
    }
    proceed(actions);
    for (const Read& waits : waiting_) {
        if (waits.member != member) continue;
        StoreAction defer{StoreAction::Kind::defer, member, ticket};
        for (std::size_t m = 0; m < members_.size(); ++m) {
            const bool behind = drops_ ? int(m) != member : members_[m].clock < waits.least;
            if (members_[m].at_work() && behind) defer.members.push_back(int(m));
        }
        actions.push_back(std::move(defer));
    }
    return actions;
}

double StoreRule::begin(int member) {
    if (gather_ != 1 || drops_) throw std::invalid_argument("StoreRule: updates are not applied as they come");
    Member& pusher = members_[at(member)];
    if (!pusher.begun) pusher.begun = version_;
    return inverse_ ? 1 / double(std::max<std::int64_t>(1, *pusher.begun - pusher.seen)) : 1;
}

StoreRule::Actions StoreRule::claim(int member, int ticket, const std::vector<std::int64_t>& row) {
    StoreAction claim{StoreAction::Kind::claim, member, ticket};
    claim.claimed = claimed_.try_emplace(row, -1).first->second += 1;
    return {std::move(claim)};
}

StoreRule::Actions StoreRule::clock(int member) {
    Actions actions;
    ++members_[at(member)].clock;
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::leave(int member) {
    Actions actions;
    members_[at(member)].left = true;
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::rest(int member) {
    Actions actions;
    members_[at(member)].resting = true;
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::end(int member) {
    Actions actions;
    members_[at(member)].ended = true;
    drop_read(member);
    proceed(actions);
    return actions;
}

std::vector<double> StoreRule::clocks() const {
    std::vector<double> found;
    for (const Member& m : members_) found.push_back(m.left ? std::numeric_limits<double>::infinity() : double(m.clock));
    return found;
}

std::vector<int> StoreRule::ended() const {
    std::vector<int> found;
    for (std::size_t m = 0; m < members_.size(); ++m) {
        if (members_[m].ended) found.push_back(int(m));
    }
    return found;
}

std::vector<int> StoreRule::resting() const {
    std::vector<int> found;
    for (std::size_t m = 0; m < members_.size(); ++m) {
        if (members_[m].resting) found.push_back(int(m));
    }
    return found;
}

std::vector<int> StoreRule::missing() const {
    std::vector<int> found;
    for (std::size_t m = 0; m < members_.size(); ++m) {
        if (!members_[m].resting && !members_[m].ended) found.push_back(int(m));
    }
    return found;
}

bool StoreRule::may_be_served(const Read& read) const {
    const auto own = [&](const Push& push) { return push.member == read.member; };
    if (drops_ && (std::any_of(gathered_.begin(), gathered_.end(), own) || std::any_of(early_.begin(), early_.end(), own))) {
        return false;
    }
    return std::all_of(members_.begin(), members_.end(),
                       [&](const Member& m) { return !m.at_work() || m.clock >= read.least; });
}

void StoreRule::drop_read(int member) {
    waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), [&](const Read& r) { return r.member == member; }),
                   waiting_.end());
}

// How many members may have an update in what is gathered; those with one of a round to come have none more.
std::size_t StoreRule::expected() const {
    std::vector<bool> may(members_.size());
    for (std::size_t m = 0; m < members_.size(); ++m) may[m] = members_[m].at_work();
    if (!early_.empty()) {
        for (const Push& push : early_) may[std::size_t(push.member)] = false;
        for (const Push& push : gathered_) may[std::size_t(push.member)] = true;
    }
    return std::size_t(std::count(may.begin(), may.end(), true));
}

// Applies what is gathered, in the order of clocks and members; an update without samples counts for its round alone.
void StoreRule::apply(Actions& actions) {
    std::vector<Push> pushes;
    for (const Push& push : gathered_) {
        if (push.weight != 0) pushes.push_back(push);
    }
    std::sort(pushes.begin(), pushes.end(), [](const Push& a, const Push& b) {
        return std::tie(a.clock, a.member, a.number, a.weight, a.read) <
               std::tie(b.clock, b.member, b.number, b.weight, b.read);
    });
    double total = 0;
    for (const Push& push : pushes) total += push.weight;
    StoreAction action{StoreAction::Kind::apply};
    for (const Push& push : pushes) {
        const std::optional<std::int64_t> begun = std::exchange(members_[std::size_t(push.member)].begun, std::nullopt);
        const std::int64_t staleness = begun.value_or(version_) - push.read;
        double scale = push.weight / total;
        if (inverse_) scale /= double(std::max<std::int64_t>(1, staleness));
        action.updates.push_back({push.member, push.number, scale, staleness});
    }
    version_ += !pushes.empty() || drops_;
    gathered_.clear();
    if (!pushes.empty()) actions.push_back(std::move(action));
    const std::vector<Push> early = std::exchange(early_, {});
    for (const Push& push : early) {
        if (push.read == version_) {
            gathered_.push_back(push);
        } else if (push.read > version_) {
            early_.push_back(push);
        } else if (push.weight != 0) {
            actions.push_back(StoreAction{StoreAction::Kind::drop, push.member, push.number});
        }
    }
}

// A read may see what has come; what it must see is applied before.
void StoreRule::serve(const Read& read, Actions& actions) {
    const auto due = [&](const Push& push) { return push.clock < read.least; };
    if (std::any_of(gathered_.begin(), gathered_.end(), due)) apply(actions);
    Member& reader = members_[std::size_t(read.member)];
    reader.seen = version_;
    reader.absent = false;
    actions.push_back(StoreAction{StoreAction::Kind::serve, read.member, read.ticket});
}

void StoreRule::proceed(Actions& actions) {
    for (;;) {
        if (!gathered_.empty() && gathered_.size() >= std::min(gather_, std::max<std::size_t>(1, expected()))) {
            apply(actions);
            continue;
        }
        // Who is at work changes with what is served, for the next look.
        std::vector<Read> ready, others;
        for (const Read& read : waiting_) (may_be_served(read) ? ready : others).push_back(read);
        if (ready.empty()) break;
        waiting_ = std::move(others);
        for (const Read& read : ready) serve(read, actions);
    }
    const auto rests = [](const Member& m) { return m.resting; };
    if (std::any_of(members_.begin(), members_.end(), rests) && missing().empty()) settle(actions);
}

void StoreRule::settle(Actions& actions) {
    ++settled_;
    gathered_.insert(gathered_.end(), early_.begin(), early_.end());
    early_.clear();
    if (!gathered_.empty()) apply(actions);
    std::int64_t latest = kAny;
    for (const Member& m : members_) latest = std::max(latest, m.clock);
    StoreAction action{StoreAction::Kind::settle};
    for (std::size_t k = 0; k < members_.size(); ++k) {
        Member& m = members_[k];
        if (!m.left) m.clock = latest;
        if (m.ended) continue;
        m.resting = m.absent = false;
        m.seen = version_;
        drop_read(int(k));
        action.members.push_back(int(k));
    }
    actions.push_back(std::move(action));
}

}  // namespace bitring
