// Roll calls across nodes of uneven size, with values in them: each rank a thread of this process. Whatever ranks mean, all
// hear the same, no message is left, and where they differ nothing is written.
#include "leaders_allreduce.h"

#include <sched.h>

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

Status finish(Operation& operation) {
    operation.begin();
    while (!is_over(operation.advance())) {
        if (operation.status() == Status::waiting) sched_yield();
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
    for (int run = 0; run < 24; ++run) {
        const std::size_t n = counts[random() % std::size(counts)];
        std::vector<Deed> all(std::size_t(size), Deed{Deed::values, n, kFunction + n, 0});
        Deed& odd = all[random() % std::size_t(size)];
        switch (random() % 6) {
        case 0: odd = Deed{Deed::values, n + 1, kFunction + n + 1, 0}; break;                       // another count
        case 1: odd = Deed{Deed::values, 3 * most, (kFunction << 1) + 3 * most, 0}; break;           // another function
        case 2: odd = Deed{Deed::agrees, 0, kFunction + n, kOnlyArrives | kTold}; break;             // the slow way
        case 3: odd = Deed{Deed::agrees, 0, kFunction + 1'000'000, kOnlyArrives | kBad}; break;      // a bad argument
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
    std::vector<int> leaders, rank_of_node;
    std::vector<std::vector<char*>> parts;
    int first = 0;
    for (int count : nodes) {
        parts.emplace_back();
        for (int r = 0; r < count; ++r) {
            memories.push_back(Memory::make(Node::nbytes(count), ""));
            parts.back().push_back(memories.back().data());
            if (apart || r == 0) leaders.push_back(first + r);
        }
        first += count;
    }
    std::vector<std::thread> threads;
    first = 0;
    for (std::size_t k = 0; k < nodes.size(); first += nodes[k++]) {
        for (int r = 0; r < nodes[k]; ++r) {
            threads.emplace_back([&, k, r, rank = first + r, start = first] {
                std::vector<int> names(std::size_t(nodes[k]));
                std::iota(names.begin(), names.end(), start);
                auto node = apart ? nullptr : std::make_shared<Node>(r, parts[k], names, nullptr);
                auto roll_call = std::make_shared<NodesRollCall>(node, between.wire(rank), rank, leaders, 3);
                const Reduce add = reduce_kernel(Op::sum, Type::i64), bits = reduce_kernel(Op::bor, Type::i64);
                for (int run = 0; run < int(runs.size()); ++run) {
                    const Deed& deed = runs[std::size_t(run)][std::size_t(rank)];
                    const Verdict want = expected(runs[std::size_t(run)]);
                    const std::string where = what + ", run " + std::to_string(run) + ", rank " + std::to_string(rank);
                    std::vector<std::int64_t> x(deed.n + 1, -3), y(deed.n + 1, -5);
                    for (std::size_t i = 0; i < deed.n; ++i) x[i] = value(run, rank, i);
                    Verdict verdict;
                    if (deed.kind == Deed::agrees) {
                        Agreement agreement(roll_call, Intent{deed.signature, 0, deed.flags});
                        if (finish(agreement) != Status::done) fail(where + ": no agreement");
                        verdict = agreement.verdict();
                    } else {
                        // Every third run each rank gives a part of its own.
                        const bool moves = run % 3 == 2;
                        const std::size_t from = moves ? deed.n * std::size_t(rank) / std::size_t(size) : 0;
                        const std::size_t to = moves ? deed.n * std::size_t(rank + 1) / std::size_t(size) : deed.n;
                        LeadersAllreduce operation(roll_call, Intent{deed.signature, 0, 0},
                                                   Operand{x.data(), y.data(), deed.n, 8, moves ? bits : add}, from, to);
                        const Status status = finish(operation);
                        verdict = operation.verdict();
                        const bool agreed = want.same && want.flags == 0;
                        if (status != (agreed ? Status::done : Status::disagree)) fail(where + ": a wrong end");
                        for (std::size_t i = 0; i < deed.n; ++i) {
                            std::int64_t sum = 0;
                            for (int q = 0; q < size; ++q) {
                                const bool owns = !moves || (i >= deed.n * std::size_t(q) / std::size_t(size) &&
                                                             i < deed.n * std::size_t(q + 1) / std::size_t(size));
                                if (owns) sum += value(run, q, i);
                            }
                            if (y[i] != (agreed ? sum : -5)) fail(where + ": value " + std::to_string(i));
                            if (x[i] != value(run, rank, i)) fail(where + ": an input has changed");
                        }
                        if (y[deed.n] != -5) fail(where + ": wrote past the end");
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

}  // namespace

int main() {
    for (unsigned seed = 1; seed <= 8; ++seed) {
        for (const std::vector<int>& nodes :
             {std::vector<int>{1, 1}, {1, 1, 1}, {1, 1, 1, 1}, {1, 1, 1, 1, 1}, {2, 3}, {1, 2, 2}, {2, 1, 1, 2}}) {
            check(nodes, false, seed);
            check(nodes, true, seed);
        }
    }
    return 0;
}
