// AllReduce across nodes of uneven size, each rank a thread of this process.
#include "lane_allreduce.h"

#include <unistd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "fake_wire.h"
#include "schedules.h"

using namespace bitring;

namespace {

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
        if (operation.status() == Status::waiting) usleep(20);  // sched_yield waits for turns of all others
    }
    return operation.status();
}

void check(const std::vector<int>& nodes, std::size_t n, bool resident) {
    const int lanes = *std::min_element(nodes.begin(), nodes.end()), size = std::accumulate(nodes.begin(), nodes.end(), 0);
    const std::string what = std::to_string(nodes.size()) + " nodes, " + std::to_string(size) + " ranks, " +
                             std::to_string(n) + (resident ? " resident values" : " values");
    std::vector<std::unique_ptr<Network>> between;
    for (int l = 0; l < lanes; ++l) between.push_back(std::make_unique<Network>(unsigned(l) + 1, 64));
    std::vector<std::thread> threads;
    std::vector<std::vector<char*>> parts, regions;
    std::vector<Memory> memories;
    const auto take = [&](std::size_t nbytes) {
        memories.push_back(Memory::make(nbytes, ""));
        return memories.back().descriptor();
    };
    int first_rank = 0;
    for (std::size_t k = 0; k < nodes.size(); ++k) {
        std::vector<char*> shared;
        std::vector<int> ranks(static_cast<std::size_t>(nodes[k])), descriptors;
        std::iota(ranks.begin(), ranks.end(), first_rank);
        for (int r = 0; r < nodes[k]; ++r) {
            take(Node::nbytes(nodes[k]));
            shared.push_back(memories.back().data());
            descriptors.push_back(take((n + 3) * sizeof(std::int64_t)));
        }
        for (int r = 0; r < nodes[k]; ++r) {
            threads.emplace_back([=, &nodes, &between] {
                // Each rank has mappings of its own, as processes have.
                std::vector<Memory> mine;
                for (int d : descriptors) mine.push_back(Memory::open((n + 3) * sizeof(std::int64_t), getpid(), d, ""));
                const auto region = std::make_shared<const Region>(r, 3, std::move(mine));
                const auto node = std::make_shared<Node>(r, shared, ranks, nullptr);
                std::vector<std::int64_t> own(n + 1);
                std::int64_t* x = resident ? reinterpret_cast<std::int64_t*>(region->part(r)) + 2 : own.data();
                std::shared_ptr<Execution> lane;
                if (r < lanes) {
                    const std::size_t count = LaneAllreduce::chunk_start(n, lanes, r + 1) - LaneAllreduce::chunk_start(n, lanes, r);
                    const int peers = int(nodes.size()), me = int(k);
                    lane = std::make_shared<Execution>(compile(ring(me, peers), peers, std::int64_t(count), 500, 4, 8),
                                                       between[std::size_t(r)]->wire(me), me, 8, reduce_kernel(Op::sum, Type::i64));
                }
                LaneAllreduce operation(node, Intent{5, 0, 0}, x, n, 8, reduce_kernel(Op::sum, Type::i64), region, lanes, lane);
                if (lane) lane->bind(operation.lane_values(), operation.lane_values());
                for (int run = 0; run < 4; ++run) {
                    for (std::size_t i = 0; i < n; ++i) x[i] = value(run, first_rank + r, i);
                    x[n] = 42;
                    std::vector<std::int64_t> given(x, x + n);
                    if (!resident && run % 2 == 1) {
                        std::fill_n(x, n, 7);  // out of place: nobody must see these
                        operation.bind(given.data(), x);
                    } else if (!resident) {
                        operation.bind(x, x);
                    }
                    if (finish(operation) != Status::done) fail(what + ": not done");
                    for (std::size_t i = 0; i < n; ++i) {
                        std::int64_t sum = 0;
                        for (int q = 0; q < size; ++q) sum += value(run, q, i);
                        if (x[i] != sum) fail(what + ": value " + std::to_string(i) + " of run " + std::to_string(run));
                    }
                    if (x[n] != 42) fail(what + ": wrote past the end");
                    for (std::size_t i = 0; i < n; ++i) x[i] = -1;  // others must not see it
                }
                LaneAllreduce other(node, Intent{5 + std::uint64_t(r == 0), 0, 0}, x, n, 8, reduce_kernel(Op::sum, Type::i64), region, lanes, lane);
                if (nodes[k] > 1 && finish(other) != Status::disagree) fail(what + ": a difference was not seen");
            });
        }
        first_rank += nodes[k];
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& network : between) {
        if (network->left() != 0) fail(what + ": messages are left");
    }
}

}  // namespace

int main() {
    for (const std::vector<int>& nodes : {std::vector<int>{2, 3}, {1, 2, 2}, {2, 2}, {3}, {1, 1}}) {
        for (std::size_t n : {0, 1, 2, 63, 1009, 30011}) {
            check(nodes, n, false);
            check(nodes, n, true);
        }
    }
    return 0;
}
