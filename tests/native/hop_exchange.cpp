// Hops on random regions, each rank a thread of this process, against their definition; with and without a codec.
#include "hop_exchange.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_wire.h"

using namespace bitring;

namespace {

constexpr int kRanks = 3;
constexpr std::int64_t kRows = 5, kWidth = 7;

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

// A byte a value.
std::int64_t encode(const void* values, void* residual, std::int64_t n, std::uint8_t* payload, std::int64_t capacity,
                    std::int64_t, const double*) {
    const float* x = static_cast<const float*>(values);
    for (std::int64_t i = 0; i < n; ++i) {
        if (static_cast<float*>(residual)[i] != 0 || capacity < n) return -1;
        static_cast<float*>(residual)[i] = 1;  // it must be zero again for the next message
        payload[i] = std::uint8_t(std::int8_t(std::round(x[i])));
    }
    return n;
}

std::int64_t decode(const std::uint8_t* payload, std::int64_t nbytes, void* out, std::int64_t n, std::int64_t,
                    const double*) {
    if (nbytes != n) return -1;
    for (std::int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = float(std::int8_t(payload[i]));
    return 0;
}

// A region of an array (kRows, kWidth) that moves between two ranks, to the same place.
struct Moved {
    int source, to;
    std::int64_t row, rows, column, columns;
};

using HopOfAll = std::vector<Moved>;

std::vector<HopOfAll> random_hops(std::mt19937& random) {
    std::vector<HopOfAll> hops(4);
    for (std::size_t h = 0; h < hops.size(); ++h) {
        for (int k = 0; k < 9; ++k) {
            const std::int64_t row = random() % kRows, column = random() % kWidth;
            Moved moved{int(random() % kRanks), int(random() % kRanks), row, 1 + std::int64_t(random() % (kRows - row)),
                        column, 1 + std::int64_t(random() % (kWidth - column))};
            if (random() % 3 == 0) moved.column = 0, moved.columns = kWidth;  // whole rows
            hops[h].push_back(moved);
        }
    }
    // One whose regions do not overlap: it need not be added up.
    hops.push_back({});
    for (int to = 0; to < kRanks; ++to) {
        for (int source = 0; source < kRanks; ++source) hops.back().push_back({source, to, source, 1, 0, kWidth});
        hops.back().push_back({(to + 1) % kRanks, to, kRanks, kRows - kRanks, 0, 3});
        hops.back().push_back({to, to, kRanks, kRows - kRanks, 3, kWidth - 3});
    }
    return hops;
}

float value(int step, std::size_t hop, int rank, std::int64_t i) {
    return float((i * 7 + rank * 31 + std::int64_t(hop) * 13 + step * 5) % 19 - 9);
}

void work(int rank, Network& network, const std::vector<HopOfAll>& all, bool encoded) {
    std::vector<std::vector<float>> results(all.size(), std::vector<float>(kRows * kWidth, 99.0f));
    std::vector<Hop> hops;
    std::vector<std::vector<int>> sequences(kRanks, std::vector<int>(kRanks, 0));
    for (std::size_t h = 0; h < all.size(); ++h) {
        Hop hop{{}, {}, h + 1 < all.size(), encoded, results[h].data(), kRows * kWidth};
        for (const Moved& m : all[h]) {
            const Runs place{m.row * kWidth + m.column, m.rows, m.columns, kWidth};
            const std::int64_t nbytes = m.rows * m.columns * (encoded ? 1 : std::int64_t(sizeof(float)));
            const int tag = m.source == m.to ? -1 : sequences[std::size_t(m.source)][std::size_t(m.to)]++;
            if (m.source == rank && m.to != rank) hop.sends.push_back({m.to, tag, nbytes, place, {}});
            if (m.to == rank) hop.arrivals.push_back({m.source, tag, nbytes, place, place});
        }
        hops.push_back(hop);
    }
    const Codec codec{encode, encode, decode, decode, nullptr};
    HopExchange exchange(network.wire(rank), rank, Type::f32, hops, encoded ? &codec : nullptr, sizeof(float));
    const auto finish = [&] {
        while (!is_over(exchange.advance())) sched_yield();
        if (exchange.error() != 0) fail("error " + std::to_string(exchange.error()));
    };
    for (int step = 0; step < 3; ++step) {
        exchange.begin();
        for (std::size_t h = 0; h < all.size(); ++h) {
            std::vector<float> mine(kRows * kWidth);
            for (std::int64_t i = 0; i < kRows * kWidth; ++i) mine[std::size_t(i)] = value(step, h, rank, i);
            exchange.send(h, mine.data());
            exchange.expect(h, mine.data());
            finish();
            std::vector<float> wanted(kRows * kWidth, 0.0f);
            for (const Moved& m : all[h]) {
                for (std::int64_t r = m.row; m.to == rank && r < m.row + m.rows; ++r) {
                    for (std::int64_t c = m.column; c < m.column + m.columns; ++c) {
                        wanted[std::size_t(r * kWidth + c)] += value(step, h, m.source, r * kWidth + c);
                    }
                }
            }
            if (results[h] != wanted) fail("hop " + std::to_string(h) + " has another result");
        }
        exchange.expect_sent();
        finish();
    }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    for (unsigned seed = 0; seed < 24; ++seed) {
        const auto hops = random_hops(random);
        Network network(seed, seed % 2 == 0 ? 0 : 64);
        std::vector<std::thread> threads;
        for (int rank = 0; rank < kRanks; ++rank) {
            threads.emplace_back([&, rank] { work(rank, network, hops, seed % 3 == 0); });
        }
        for (auto& thread : threads) thread.join();
        if (network.left() != 0) fail("messages are left");
    }
    return 0;
}
