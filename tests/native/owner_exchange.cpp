// The owner exchange with a codec of a few lines, each rank a thread of this process, against all ranks in a row.
#include "owner_exchange.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "thread_pool.h"
#include "fake_wire.h"

using namespace bitring;

namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

// A byte a value, rounded; settings[0] != 0 leaves out the zeros at the end, and 99 is a payload that cannot be.
std::int64_t encode(const void* values, void* residual, std::int64_t n, std::uint8_t* payload, std::int64_t capacity,
                    std::int64_t, const double* settings) {
    const float* x = static_cast<const float*>(values);
    float* left = static_cast<float*>(residual);
    std::int64_t used = settings[0] != 0 ? 0 : n;
    if (capacity < n) return -1;
    for (std::int64_t i = 0; i < n; ++i) {
        const float v = x[i] + left[i];
        const auto code = std::int8_t(std::max(-100.0f, std::min(100.0f, std::round(v))));
        payload[i] = std::uint8_t(code);
        left[i] = v - float(code);
        if (code != 0) used = std::max(used, i + 1);
    }
    return used;
}

std::int64_t decode(const std::uint8_t* payload, std::int64_t nbytes, void* out, std::int64_t n, std::int64_t accumulate,
                    const double*) {
    float* x = static_cast<float*>(out);
    if (nbytes > n) return -1;
    for (std::int64_t i = 0; i < n; ++i) {
        const float value = i < nbytes ? float(std::int8_t(payload[i])) : 0.0f;
        if (value == 99) return -1;
        x[i] = accumulate ? x[i] + value : value;
    }
    return 0;
}

float gradient(int run, int rank, std::size_t i) {
    const auto hash = std::uint32_t(i * 2654435761u + std::uint32_t(rank) * 40503u + std::uint32_t(run) * 97u);
    return i % 3 == 0 ? 0.0f : float(hash % 1000) / 100.0f - 5.0f;
}

// `longest`: of a piece, in values.
void check(int size, std::int64_t n, unsigned longest, bool variable) {
    const std::string what = std::to_string(size) + " ranks, " + std::to_string(n) + (variable ? " values, cut short" : " values");
    // Two codecs: where lengths vary, the second one cuts payloads short.
    const double all[] = {0.0, 0.0, 1.0};
    const Codec codecs[] = {{encode, encode, decode, decode, all}, {encode, encode, decode, decode, &all[variable ? 2 : 1]}};
    std::mt19937 random{unsigned(n) + unsigned(size)};
    std::vector<ExchangeSegment> segments;
    std::vector<std::int64_t> begins;
    for (int owner = 0; owner < size; ++owner) {
        std::int64_t at = n * owner / size;
        const std::int64_t end = n * (owner + 1) / size;
        begins.push_back(at);
        while (at < end) {
            segments.push_back({owner, {}});
            for (unsigned k = 0; k <= random() % 3 && at < end; ++k) {
                const std::int64_t stop = std::min<std::int64_t>(end, at + 1 + std::int64_t(random() % longest));
                segments.back().pieces.push_back({at, stop, stop - at, random() % 2});
                at = stop;
            }
        }
    }
    begins.push_back(n);
    constexpr int kRuns = 5;
    const auto count = static_cast<std::size_t>(n);
    std::vector<std::vector<float>> expected(kRuns, std::vector<float>(count));
    std::vector<std::vector<float>> residual(static_cast<std::size_t>(size), std::vector<float>(count));
    std::vector<float> owed(count);
    std::vector<std::uint8_t> payload(count + 1);
    for (int run = 0; run < kRuns; ++run) {
        for (const ExchangeSegment& segment : segments) {
            for (const EncodedPiece& piece : segment.pieces) {
                const auto at = std::size_t(piece.start);
                const std::int64_t m = piece.stop - piece.start;
                const double* settings = codecs[piece.codec].settings;
                std::vector<float> sum(static_cast<std::size_t>(m)), x(static_cast<std::size_t>(m));
                for (int r = 0; r < size; ++r) {
                    for (std::size_t i = 0; i < x.size(); ++i) x[i] = gradient(run, r, at + i);
                    const auto used = encode(x.data(), &residual[std::size_t(r)][at], m, payload.data(), m, 0, settings);
                    decode(payload.data(), used, sum.data(), m, r > 0, settings);
                }
                const auto used = encode(sum.data(), &owed[at], m, payload.data(), m, 0, settings);
                decode(payload.data(), used, &expected[std::size_t(run)][at], m, 0, settings);
            }
        }
    }
    Network network(unsigned(n) + 1, 64);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
        threads.emplace_back([&, rank] {
            const ThreadPool::Waiting waiting(rank != 1);
            std::vector<float> x(count + 1), left(count + 1), owner_left(count + 1);
            OwnerExchange exchange(network.wire(rank), rank, size, Type::f32, {codecs[0], codecs[1]}, !variable, segments,
                                   left.data(), owner_left.data(), begins[std::size_t(rank)], 1, 2);
            exchange.bind(x.data());
            for (int run = 0; run < kRuns; ++run) {
                for (std::size_t i = 0; i < count; ++i) x[i] = gradient(run, rank, i);
                x[count] = 42;
                exchange.prepare(run, 0);
                exchange.begin();
                while (!is_over(exchange.advance())) {
                    if (exchange.status() == Status::waiting) usleep(20);  // sched_yield waits for turns of all others
                }
                if (exchange.status() != Status::done) fail(what + ": not done");
                const auto& sum = expected[std::size_t(run)];
                if (!std::equal(sum.begin(), sum.end(), x.begin())) fail(what + ": wrong sum");
                if (x[count] != 42) {
                    fail(what + ": wrote past the end");
                }
                const auto& stats = exchange.stats();
                if (n > 0 && size > 1 && stats.bytes_sent <= 0) fail(what + ": nothing was counted");
                for (const auto& norms : {stats.norms, stats.owner_norms}) {
                    if (norms.residual > norms.sums) fail(what + ": the residual is larger than what was encoded");
                }
                if (!stats.finite) fail(what + ": finite numbers passed for others");
            }
            const auto& mine = residual[std::size_t(rank)];
            if (!std::equal(mine.begin(), mine.end(), left.begin())) fail(what + ": residual");
        });
    }
    for (std::thread& thread : threads) thread.join();
    if (network.left() != 0) fail(what + ": messages are left");
}

void check_corrupt() {
    const double settings[] = {0};
    const Codec codec{encode, encode, decode, decode, settings};
    Network network(1, 64);
    float x[1] = {99}, left[1] = {}, owed[1] = {};
    OwnerExchange exchange(network.wire(0), 0, 1, Type::f32, {codec}, true, {{0, {{0, 1, 1}}}}, left, owed, 0, 1, 2);
    exchange.bind(x);
    exchange.begin();
    while (!is_over(exchange.advance())) {
    }
    if (exchange.status() != Status::failed || exchange.error() != OwnerExchange::kCorrupt) fail("corrupt: not seen");
}

// All of rank 0's.
std::vector<ExchangeSegment> of_one_piece(std::int64_t length, std::int64_t count) {
    std::vector<ExchangeSegment> segments;
    for (std::int64_t s = 0; s < count; ++s) segments.push_back({0, {{s * length, (s + 1) * length, length}}});
    return segments;
}

// In the middle of a batch of large segments.
void check_corrupt_with_helpers() {
    const double settings[] = {0};
    const Codec codec{encode, encode, decode, decode, settings};
    Network network(1, 64);
    constexpr std::int64_t kLength = 20000, kSegments = 6;
    std::vector<float> x(kLength * kSegments), left(x.size()), owed(x.size());
    const auto segments = of_one_piece(kLength, kSegments);
    x[4 * kLength + 1] = 99;
    const ThreadPool::Waiting waiting(true);
    OwnerExchange exchange(network.wire(0), 0, 1, Type::f32, {codec}, true, segments, left.data(), owed.data(), 0, 1, 2);
    exchange.bind(x.data());
    exchange.begin();
    while (!is_over(exchange.advance())) {
    }
    if (exchange.status() != Status::failed || exchange.error() != OwnerExchange::kCorrupt) fail("helped: not seen");
}

// Leaves the largest numbers of what is 1, and Inf of what is more; says on the way that something was invalid.
std::int64_t encode_largest(const void* values, void* residual, std::int64_t n, std::uint8_t* payload, std::int64_t,
                            std::int64_t, const double*) {
    const float* x = static_cast<const float*>(values);
    float* left = static_cast<float*>(residual);
    volatile float infinite = INFINITY;
    infinite = infinite - infinite;
    for (std::int64_t i = 0; i < n; ++i) {
        payload[i] = std::uint8_t(std::int8_t(x[i]));
        left[i] = x[i] * 3e38f;
    }
    return n;
}

// Also in a segment that the sample leaves out.
void check_not_finite() {
    const double settings[] = {0};
    const Codec codec{encode_largest, encode_largest, decode, decode, settings};
    Network network(1, 64);
    constexpr std::int64_t kLength = 64, kSegments = 40;
    std::vector<float> x(kLength * kSegments), left(x.size()), owed(x.size());
    const auto segments = of_one_piece(kLength, kSegments);
    OwnerExchange exchange(network.wire(0), 0, 1, Type::f32, {codec}, true, segments, left.data(), owed.data(), 0, 1, 2);
    exchange.bind(x.data());
    for (const std::int64_t at : {std::int64_t(-1), 5 * kLength + 3, std::int64_t(-1), 39 * kLength}) {
        std::fill(x.begin(), x.end(), 1.0f);
        if (at >= 0) x[std::size_t(at)] = 2;
        exchange.prepare(0, 0);
        exchange.begin();
        while (!is_over(exchange.advance())) {
        }
        if (exchange.stats().finite != (at < 0)) fail("not finite: " + std::to_string(at));
    }
}

void check_outgrown() {
    const double settings[] = {1};
    const Codec codec{encode, encode, decode, decode, settings};
    Network network(1, 64);
    float x[3] = {1, 2, 3}, left[3] = {}, owed[3] = {};
    // The second piece leaves room enough for the first, which must not take it.
    OwnerExchange exchange(network.wire(0), 0, 1, Type::f32, {codec}, false, {{0, {{0, 2, 1}, {2, 3, 2}}}}, left, owed, 0, 1, 2);
    exchange.bind(x);
    exchange.begin();
    while (!is_over(exchange.advance())) {
    }
    if (exchange.status() != Status::failed || exchange.error() != OwnerExchange::kOutgrew) fail("outgrown: not seen");
}

}  // namespace

int main() {
    ThreadPool::of_process().limit(3);
    for (const bool variable : {false, true}) check(2, 400000, 60000, variable);
    for (int size = 1; size <= 5; ++size) {
        for (const std::int64_t n : {0, 1, 3, 7, 1000, 4093}) {
            for (const bool variable : {false, true}) check(size, n, 40, variable);
        }
    }
    check_corrupt();
    check_corrupt_with_helpers();
    check_not_finite();
    check_outgrown();
}
