// The rule of a store's shard: training/store/rule.py, the reference. The same events give the same actions.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <vector>

namespace bitring {

struct StoreAction {
    enum class Kind : std::uint8_t { apply, drop, serve, defer, claim, settle };
    struct Update {
        int member, number;
        double scale;
        std::int64_t staleness;
    };
    Kind kind;
    int member = -1;                // whose dropped update, read or claim; of `settle` it is in `members`
    int number = 0;                 // the dropped update's, or the ticket
    std::vector<Update> updates{};  // apply: the sum of these, each times its scale
    std::int64_t claimed = 0;       // claim
    std::vector<int> members{};     // defer: those that the read waits for; settle: those to answer
};

class StoreRule {
public:
    using Actions = std::vector<StoreAction>;

    // `gather`: so many updates are applied together. `drops`: it goes in rounds, and the late is dropped. `staleness`: of
    // reads, none: they wait for nobody. `inverse`: updates are divided by their staleness. `clocks`: those that members
    // begin with; with another one than 0 they are absent until their first read is served.
    StoreRule(std::size_t gather, bool drops, std::optional<std::int64_t> staleness, bool inverse,
              std::vector<std::int64_t> clocks);

    // Events. `round`: the version that an update was computed from, where it is not the one that its member read last.
    Actions push(int member, int number, double weight, std::optional<std::int64_t> round);
    Actions read(int member, int ticket, std::optional<std::int64_t> least);
    double begin(int member);  // a part of its next update has come: what that is to be multiplied by
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
        std::optional<std::int64_t> begun = std::nullopt;  // the version at which the application of its next update began
        bool at_work() const { return !(left || resting || ended || absent); }
    };
    struct Read {
        int member, ticket;
        std::int64_t least;  // all clocks must be at least this
    };
    struct Push {
        std::int64_t clock;
        int member, number;
        double weight;
        std::int64_t read;  // the version that it was computed from
    };
    static constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::min();

    std::size_t at(int member) const;
    bool may_be_served(const Read& read) const;
    void drop_read(int member);
    std::size_t expected() const;
    void apply(Actions& actions);
    void serve(const Read& read, Actions& actions);
    void proceed(Actions& actions);
    void settle(Actions& actions);

    std::size_t gather_;
    bool drops_;
    std::optional<std::int64_t> staleness_;
    bool inverse_;
    std::int64_t version_ = 0, settled_ = 0;
    std::vector<Member> members_;
    std::vector<Push> gathered_, early_;  // early: of rounds to come, as their members have seen another shard's
    std::vector<Read> waiting_;  // in the order in which they came
    std::map<std::vector<std::int64_t>, std::int64_t> claimed_;  // of each row, the number that was given last
};

}  // namespace bitring
