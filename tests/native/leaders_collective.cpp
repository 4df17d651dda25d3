// Roll calls across nodes of uneven size, with values in them: each rank a thread of this process. Whatever ranks mean, all
// hear the same, no message is left, and where they differ nothing is written.
#include "leaders_collective.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_wire.h"
#include "memory.h"

using namespace bitring;

namespace {

constexpr std::uint64_t kFunction = 7ull << 32;

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

std::int64_t value(int run, int rank, std::size_t i) {
    return std::int64_t(i * 7919 + std::size_t(rank) * 104729 + std::size_t(run)) % 1000003;
}

// On a busy machine a thread that gives way waits for whole turns of all others, one that sleeps does not.
Status finish(Operation& operation) {
    operation.begin();
    while (!is_over(operation.advance())) {
        if (operation.status() == Status::waiting) usleep(20);
    }
    return operation.status();
}

// What a rank does in a run.
struct Deed {
    enum { values, agrees } kind;
    std::size_t n;
    std::uint64_t signature;
    std::uint32_t flags;  // of one that only agrees
};

// The same on all ranks: who does what in each run.
std::vector<std::vector<Deed>> deeds(int size, unsigned seed, bool one_node_has_several) {
    std::mt19937 random(seed);
    std::vector<std::vector<Deed>> runs;
    const std::size_t most = (one_node_has_several ? Node::kSmall : NodesRollCall::kMost) / 8;
    const std::size_t counts[] = {0, 1, 2, 3, 5, 63, 1009, 1024, 1025, most, most + 1, 2 * most + 17};
    for (int run = 0; run < 30; ++run) {
        const std::size_t n = counts[random() % std::size(counts)];
        const std::uint64_t base = kFunction + std::uint64_t(run) * 1'000'000;  // no call is made twice
        std::vector<Deed> all(std::size_t(size), Deed{Deed::values, n, base + n, 0});
        Deed& odd = all[random() % std::size_t(size)];
        switch (random() % 6) {
        case 0: odd = Deed{Deed::values, n + 1, base + n + 1, 0}; break;                       // another count
        case 1: odd = Deed{Deed::values, 3 * most, (kFunction << 1) + 3 * most, 0}; break;           // another function
        case 2: odd = Deed{Deed::agrees, 0, base + n, kOnlyArrives | kTold}; break;             // the slow way
        case 3: odd = Deed{Deed::agrees, 0, base + 999'999, kOnlyArrives | kBad}; break;      // a bad argument
        default: break;
        }
        runs.push_back(all);
    }
    return runs;
}

Verdict expected(const std::vector<Deed>& all) {
    Verdict verdict;
    for (const Deed& deed : all) {
        verdict.same &= deed.signature == all[0].signature;
        verdict.same_function &= deed.signature >> 32 == all[0].signature >> 32;
        verdict.flags |= deed.flags;
    }
    return verdict;
}

void check(const std::vector<int>& nodes, bool apart, unsigned seed) {
    const int size = std::accumulate(nodes.begin(), nodes.end(), 0);
    const std::string what = std::to_string(nodes.size()) + " nodes, " + std::to_string(size) + " ranks, seed " +
                             std::to_string(seed) + (apart ? ", no shared memory" : "");
    const auto runs = deeds(size, seed, !apart);
    Network between(seed, 64);
    std::vector<Memory> memories;
    std::vector<std::vector<char*>> parts;
    // By odd seeds ranks are dealt to the nodes in turn, as far as these have room.
    std::vector<std::vector<int>> ranks(nodes.size()), alone;
    for (int rank = 0, k = 0; rank < size; ++k) {
        auto& mine = ranks[std::size_t(k) % nodes.size()];
        const int room = nodes[std::size_t(k) % nodes.size()] - int(mine.size());
        for (int r = 0; r < (seed % 2 != 0 ? std::min(room, 1) : room); ++r) mine.push_back(rank++);
    }
    for (int rank = 0; rank < size; ++rank) alone.push_back({rank});
    for (int count : nodes) {
        parts.emplace_back();
        for (int r = 0; r < count; ++r) {
            memories.push_back(Memory::make(Node::nbytes(count), ""));
            parts.back().push_back(memories.back().data());
        }
    }
    std::vector<std::thread> threads;
    for (std::size_t k = 0; k < nodes.size(); ++k) {
        for (int r = 0; r < nodes[k]; ++r) {
            threads.emplace_back([&, k, r, rank = ranks[k][std::size_t(r)]] {
                auto node = apart ? nullptr : std::make_shared<Node>(r, parts[k], ranks[k], nullptr);
                auto roll_call =
                    std::make_shared<NodesRollCall>(node, between.wire(rank), rank, apart ? alone : ranks, 3);
                const Reduce add = reduce_kernel(Op::sum, Type::i64);
                for (int run = 0; run < int(runs.size()); ++run) {
                    const Deed& deed = runs[std::size_t(run)][std::size_t(rank)];
                    const Verdict want = expected(runs[std::size_t(run)]);
                    const std::string where = what + ", run " + std::to_string(run) + ", rank " + std::to_string(rank);
                    const auto collective = Collective(run % 5);
                    const bool blocks = collective >= Collective::allgather;
                    const int root = run * 7 % size;
                    // Of blocks each rank has n values.
                    const std::size_t all = blocks ? deed.n * std::size_t(size) : deed.n;
                    const std::size_t given = collective == Collective::allgather ? deed.n : all;
                    const std::size_t got = collective == Collective::reduce_scatter ? deed.n : all;
                    std::vector<std::int64_t> x(given + 1, -3), y(got + 1, -5);
                    for (std::size_t i = 0; i < given; ++i) x[i] = value(run, rank, i);
                    Verdict verdict;
                    if (deed.kind == Deed::agrees) {
                        Agreement agreement(roll_call, Intent{deed.signature, 0, deed.flags});
                        if (finish(agreement) != Status::done) fail(where + ": no agreement");
                        verdict = agreement.verdict();
                    } else {
                        const Carried carried{collective, x.data(), y.data(), all, 8, add, root, deed.n};
                        LeadersCollective operation(roll_call, Intent{deed.signature, 0, 0}, carried);
                        const Status status = finish(operation);
                        verdict = operation.verdict();
                        const bool agreed = want.same && want.flags == 0;
                        if (status != (agreed ? Status::done : Status::disagree)) fail(where + ": a wrong end");
                        const bool gets = (collective != Collective::reduce || rank == root) &&
                                          (collective != Collective::broadcast || rank != root);
                        for (std::size_t i = 0; i < got; ++i) {
                            std::int64_t right = 0;
                            if (collective == Collective::broadcast) {
                                right = value(run, root, i);
                            } else if (collective == Collective::allgather) {
                                right = value(run, int(i / deed.n), i % deed.n);
                            } else {
                                const std::size_t from = collective == Collective::reduce_scatter ? deed.n * std::size_t(rank) : 0;
                                for (int q = 0; q < size; ++q) right += value(run, q, from + i);
                            }
                            if (y[i] != (agreed && gets ? right : -5)) fail(where + ": value " + std::to_string(i));
                        }
                        for (std::size_t i = 0; i < given; ++i) {
                            if (x[i] != value(run, rank, i)) fail(where + ": an input has changed");
                        }
                        if (y[got] != -5) fail(where + ": wrote past the end");
                    }
                    if (verdict.same != want.same || verdict.same_function != want.same_function ||
                        verdict.flags != want.flags) {
                        fail(where + ": another verdict");
                    }
                }
            });
        }
    }
    for (std::thread& thread : threads) thread.join();
    if (between.left() != 0) fail(what + ": messages are left");
}

// Broadcasts and reductions made again and again, from and to each root, among which some ranks may be far ahead.
void check_repeated(const std::vector<int>& nodes, unsigned seed) {
    const int size = std::accumulate(nodes.begin(), nodes.end(), 0);
    const std::string what = std::to_string(nodes.size()) + " nodes, " + std::to_string(size) + " ranks, repeated";
    Network between(seed, 1 << 20);
    std::vector<Memory> memories;
    std::vector<std::vector<char*>> parts;
    std::vector<std::vector<int>> ranks;
    for (int count : nodes) {
        parts.emplace_back();
        ranks.emplace_back();
        for (int r = 0; r < count; ++r) {
            memories.push_back(Memory::make(Node::nbytes(count), ""));
            parts.back().push_back(memories.back().data());
            ranks.back().push_back(int(memories.size()) - 1);
        }
    }
    std::vector<std::thread> threads;
    for (std::size_t k = 0; k < nodes.size(); ++k) {
        for (int r = 0; r < nodes[k]; ++r) {
            threads.emplace_back([&, k, r, rank = ranks[k][std::size_t(r)]] {
                auto node = std::make_shared<Node>(r, parts[k], ranks[k], nullptr);
                auto roll_call = std::make_shared<NodesRollCall>(node, between.wire(rank), rank, ranks, 3);
                const Reduce add = reduce_kernel(Op::sum, Type::i64);
                for (int run = 0; run < 300 * size; ++run) {
                    const auto collective = run / 150 % 2 == 0 ? Collective::broadcast : Collective::reduce;
                    const int root = run / 300;
                    const std::size_t n = run % 3 == 0 ? 1 : 7;
                    const std::string where = what + ", run " + std::to_string(run) + ", rank " + std::to_string(rank);
                    std::vector<std::int64_t> x(n), y(n, -5);
                    for (std::size_t i = 0; i < n; ++i) x[i] = value(run, rank, i);
                    const Carried carried{collective, x.data(), y.data(), n, 8, add, root, n};
                    const std::uint64_t signature = kFunction * (collective == Collective::reduce ? 2 : 1) + n;
                    LeadersCollective operation(roll_call, Intent{signature, 0, 0}, carried);
                    const bool one_way = roll_call->repeats(signature);
                    if (run % 150 > 5 && run % 150 < 100 && !one_way) fail(where + ": all are waited for");
                    if (finish(operation) != Status::done) fail(where + ": a wrong end");
                    for (std::size_t i = 0; i < n; ++i) {
                        std::int64_t right = -5;
                        if (collective == Collective::broadcast && rank != root) right = value(run, root, i);
                        if (collective == Collective::reduce && rank == root) {
                            right = 0;
                            for (int q = 0; q < size; ++q) right += value(run, q, i);
                        }
                        if (y[i] != right) fail(where + ": value " + std::to_string(i));
                    }
                }
                Agreement agreement(roll_call, Intent{kFunction, 0, kOnlyArrives});
                if (finish(agreement) != Status::done || !agreement.verdict().same) fail(what + ": no agreement");
            });
        }
    }
    for (std::thread& thread : threads) thread.join();
    if (between.left() != 0) fail(what + ": messages are left");
}

// The ranks of two nodes, {0, 1} and {2}, in one thread: each goes on when it is told to. All calls are of one value.
class Together {
public:
    static constexpr int kCalls = 40;

    Together(Collective collective, int root) : collective_(collective), root_(root), between_(1, 1 << 20) {
        const std::vector<std::vector<int>> nodes{{0, 1}, {2}};
        for (int rank = 0; rank < 3; ++rank) memories_.push_back(Memory::make(Node::nbytes(2), ""));
        const std::vector<char*> two{memories_[0].data(), memories_[1].data()}, one{memories_[2].data()};
        for (int rank = 0; rank < 3; ++rank) {
            auto node = std::make_shared<Node>(rank % 2, rank < 2 ? two : one, nodes[std::size_t(rank / 2)], nullptr);
            roll_calls_.push_back(std::make_shared<NodesRollCall>(node, between_.wire(rank), rank, nodes, 3));
        }
        for (int call = 0; call < kCalls; ++call) {
            for (int rank = 0; rank < 3; ++rank) x_[call][rank] = value(call, rank, 1), y_[call][rank] = -5;
        }
    }

    static std::uint64_t signature() { return kFunction << 3; }

    // Take the rank through calls, up to `most` in all, as far as it comes now. How many it has made.
    int go_on(int rank, int most) {
        auto& operation = operations_[rank];
        while (true) {
            for (int k = 0; k < 100 && operation && !is_over(operation->status()); ++k) operation->advance();
            if (operation && !is_over(operation->status())) return begun_[rank] - 1;
            if (operation && operation->status() != Status::done) fail("a call of all has another end");
            if (begun_[rank] == most) return most;
            const int call = begun_[rank]++;
            const Carried carried{collective_, &x_[call][rank], &y_[call][rank], 1, 8,
                                  reduce_kernel(Op::sum, Type::i64), root_, 1};
            operation = std::make_unique<LeadersCollective>(roll_calls_[std::size_t(rank)], Intent{signature(), 0, 0}, carried);
            operation->begin();
        }
    }

    // Take all ranks through `most` calls.
    void finish(int most) {
        for (int turn = 0, made = 0; made < 3 * most; ++turn) {
            if (turn == 1000) fail("calls of all do not end");
            made = go_on(0, most) + go_on(1, most) + go_on(2, most);
        }
        for (int call = 0; call < most; ++call) {
            for (int rank = 0; rank < 3; ++rank) {
                std::int64_t right = -5;
                if (collective_ == Collective::reduce && rank == root_) right = x_[call][0] + x_[call][1] + x_[call][2];
                if (collective_ == Collective::broadcast && rank != root_) right = x_[call][root_];
                if (y_[call][rank] != right) fail("call " + std::to_string(call) + ": a wrong value");
            }
        }
    }

    // What the rank hears when it comes to something else.
    Verdict comes_to_something_else(int rank) {
        Agreement agreement(roll_calls_[std::size_t(rank)], Intent{signature() + 1, 0, kOnlyArrives});
        agreement.begin();
        for (int k = 0; k < 1000 && !is_over(agreement.status()); ++k) agreement.advance();
        if (agreement.status() != Status::done) fail("who does something else hears nothing");
        return agreement.verdict();
    }

private:
    Collective collective_;
    int root_;
    Network between_;
    std::vector<Memory> memories_;
    std::vector<std::shared_ptr<NodesRollCall>> roll_calls_;
    std::unique_ptr<LeadersCollective> operations_[3];
    int begun_[3] = {0, 0, 0};
    std::int64_t x_[kCalls][3], y_[kCalls][3];
};

// Who only gives waits for nobody, but is ahead of the ranks of its node by less than there are slots.
void check_ahead(Collective collective, int root, int first) {
    Together ranks(collective, root);
    ranks.finish(1);
    const int made = ranks.go_on(first, Together::kCalls), most = first < 2 ? int(Node::kSlots) - 1 : Together::kCalls;
    if (made != most) fail("rank " + std::to_string(first) + " is " + std::to_string(made) + " calls ahead");
    ranks.finish(Together::kCalls);
}

// A rank has gone on, and another one of its node comes to something else.
void check_gone(Collective collective, int root, int first, int other) {
    Together ranks(collective, root);
    ranks.finish(1);
    ranks.go_on(first, 2);
    const Verdict verdict = ranks.comes_to_something_else(other);
    if (verdict.same || verdict.stranger != first || verdict.strange != Together::signature()) {
        fail("rank " + std::to_string(other) + " has not met rank " + std::to_string(first));
    }
}

}  // namespace

int main() {
    for (int root = 0; root < 3; ++root) check_ahead(Collective::broadcast, root, root);
    for (const auto& [root, first] : {std::pair{0, 1}, {2, 1}, {0, 2}, {1, 2}}) check_ahead(Collective::reduce, root, first);
    check_gone(Collective::broadcast, 0, 0, 1);
    check_gone(Collective::broadcast, 1, 1, 0);
    check_gone(Collective::reduce, 0, 1, 0);
    check_gone(Collective::reduce, 2, 1, 0);
    for (const std::vector<int>& nodes :
         {std::vector<int>{1, 1}, {1, 1, 1}, {1, 1, 1, 1}, {1, 1, 1, 1, 1, 1}, {2, 3}, {2, 1, 1, 2, 1}}) {
        check_repeated(nodes, 1);
    }
    for (unsigned seed = 1; seed <= 8; ++seed) {
        for (const std::vector<int>& nodes :
             {std::vector<int>{1, 1}, {1, 1, 1}, {1, 1, 1, 1}, {1, 1, 1, 1, 1}, {2, 3}, {1, 2, 2}, {2, 1, 1, 2}}) {
            check(nodes, false, seed);
            check(nodes, true, seed);
        }
    }
    return 0;
}
