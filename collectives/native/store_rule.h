// The rule of a store's shard whose updates are applied as they come and whose late ones count: training/store/rule.py, the
// reference, with gather=1 and late="keep". The same events give the same actions.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <vector>

namespace bitring {

struct StoreAction {
    enum class Kind : std::uint8_t { apply, serve, defer, claim, settle };
    Kind kind;
    int member = -1;               // whose update, read or claim; of `settle` it is in `members`
    int number = 0;                // the update's, or the ticket
    double scale = 1;              // apply
    std::int64_t staleness = 0;    // apply
    std::int64_t claimed = 0;      // claim
    std::vector<int> members{};    // defer: those that the read waits for; settle: those to answer
};

class StoreRule {
public:
    using Actions = std::vector<StoreAction>;

    // `staleness`: of reads, none: they wait for nobody. `inverse`: updates are divided by their staleness. `clocks`: those
    // that members begin with; with another one than 0 they are absent until their first read is served.
    StoreRule(std::optional<std::int64_t> staleness, bool inverse, std::vector<std::int64_t> clocks);

    // Events. `round`: the version that an update was computed from, where it is not the one that its member read last.
    Actions push(int member, int number, double weight, std::optional<std::int64_t> round);
    Actions read(int member, int ticket, std::optional<std::int64_t> least);
    Actions claim(int member, int ticket, const std::vector<std::int64_t>& row);
    Actions clock(int member);
    Actions leave(int member);
    Actions rest(int member);
    Actions end(int member);
    void go_on(int member) { members_[at(member)].resting = false; }

    // What can be told of it.
    std::int64_t version() const { return version_; }
    std::int64_t settled() const { return settled_; }
    std::vector<double> clocks() const;  // infinite for those who have left
    std::vector<int> ended() const;
    std::vector<int> resting() const;
    std::vector<int> missing() const;  // for whom those who rest wait
    std::size_t waiting() const { return waiting_.size(); }

private:
    struct Member {
        std::int64_t clock, seen = 0;  // the version that it was served last
        bool absent, left = false, resting = false, ended = false;
        bool at_work() const { return !(left || resting || ended || absent); }
    };
    struct Read {
        int member, ticket;
        std::int64_t least;  // all clocks must be at least this
    };
    static constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::min();

    std::size_t at(int member) const;
    bool may_be_served(const Read& read) const;
    void drop_read(int member);
    void proceed(Actions& actions);
    void settle(Actions& actions);

    std::optional<std::int64_t> staleness_;
    bool inverse_;
    std::int64_t version_ = 0, settled_ = 0;
    std::vector<Member> members_;
    std::vector<Read> waiting_;  // in the order in which they came
    std::map<std::vector<std::int64_t>, std::int64_t> claimed_;  // of each row, the number that was given last
};

}  // namespace bitring
