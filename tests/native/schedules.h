// Schedules, and their programs for one rank: collectives/schedules/program.py in small, for tests of what runs programs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "execution.h"

struct Transfer {
    bool sends;
    int peer;
    int first;  // chunks from first to last-1
    int last;
    bool reduces;
};

using Schedule = std::vector<std::vector<Transfer>>;

inline Schedule ring(int rank, int size) {
    Schedule rounds;
    const auto chunk = [size](int c) { return (c % size + size) % size; };
    for (int s = 0; s < 2 * (size - 1); ++s) {
        const int out = chunk(rank - s), in = chunk(rank - s - 1);
        rounds.push_back({{true, chunk(rank + 1), out, out + 1, false}, {false, chunk(rank - 1), in, in + 1, s < size - 1}});
    }
    return rounds;
}

// For powers of two.
inline Schedule recursive_doubling(int rank, int size) {
    Schedule rounds;
    for (int bit = 1; bit < size; bit *= 2) rounds.push_back({{true, rank ^ bit, 0, 1, false}, {false, rank ^ bit, 0, 1, true}});
    return rounds;
}

inline Schedule binary_tree(int rank, int size) {
    std::vector<Transfer> up, down;
    for (int child : {2 * rank + 1, 2 * rank + 2}) {
        if (child >= size) continue;
        up.push_back({false, child, 0, 1, true});
        down.push_back({true, child, 0, 1, false});
    }
    Schedule rounds;
    for (const Transfer& each : up) rounds.push_back({each});
    if (rank > 0) {
        rounds.push_back({{true, (rank - 1) / 2, 0, 1, false}});
        rounds.push_back({{false, (rank - 1) / 2, 0, 1, false}});
    }
    if (!down.empty()) rounds.push_back(down);
    return rounds;
}

// `shared_slots` scratch segments are used in turn by what is received in order.
inline std::shared_ptr<bitring::Program> compile(const Schedule& schedule, int chunks, std::int64_t n,
                                                 std::int64_t segment, int window, int shared_slots) {
    std::vector<std::int64_t> starts;
    std::vector<std::size_t> first_cell;
    for (std::int64_t c = 0; c < chunks; ++c) {
        first_cell.push_back(starts.size());
        for (std::int64_t at = n * c / chunks; at < n * (c + 1) / chunks; at += segment) starts.push_back(at);
    }
    first_cell.push_back(starts.size());
    const auto cell_stop = [&](std::size_t c, int last) {
        const std::int64_t chunk_stop = n * last / chunks;
        return std::min({starts[c] + segment, c + 1 < starts.size() ? starts[c + 1] : n, chunk_stop});
    };
    auto program = std::make_shared<bitring::Program>();
    program->window = window;
    program->slot_values = segment;
    std::vector<int> writer(starts.size(), -1);
    std::vector<std::vector<int>> readers(starts.size());
    std::map<std::pair<bool, int>, int> sequences;
    int shared = 0, own = 0;
    for (auto transfers : schedule) {
        std::stable_sort(transfers.begin(), transfers.end(), [](auto& a, auto& b) { return a.sends > b.sends; });
        const int round_start = int(program->messages.size());
        for (const Transfer& t : transfers) {
            const std::size_t begin = first_cell[std::size_t(t.first)], end = first_cell[std::size_t(t.last)];
            if (begin == end) continue;
            std::vector<std::set<int>> needs;
            bool aside = t.reduces, early = !t.sends;
            for (std::size_t c = begin; c < end; ++c) {
                needs.emplace_back();
                if (writer[c] >= 0) needs.back().insert(writer[c]);
                if (!t.sends) needs.back().insert(readers[c].begin(), readers[c].end());
                early = early && !needs.back().empty();
                for (int i : needs.back()) aside = aside || (!t.sends && i >= round_start);
            }
            const int base = own;
            if (aside && early) own += std::min(window, int(end - begin));
            std::vector<int> stream;
            for (std::size_t c = begin; c < end; ++c) {
                const int k = int(c - begin), index = int(program->messages.size());
                const int slot = !aside ? -1 : early ? shared_slots + base + k % window : shared++ % shared_slots;
                const auto& need = needs[std::size_t(k)];
                program->messages.push_back({t.sends, t.reduces, early, t.peer, starts[c], cell_stop(c, t.last),
                                             int(program->streams.size()), sequences[{t.sends, t.peer}]++, slot, int(need.size())});
                program->unblocks.emplace_back();
                for (int i : need) program->unblocks[std::size_t(i)].push_back(index);
                if (t.sends) {
                    readers[c].push_back(index);
                } else {
                    writer[c] = index;
                    readers[c].clear();
                }
                stream.push_back(index);
            }
            program->streams.push_back(stream);
        }
    }
    program->slots = shared_slots + own;
    return program;
}
