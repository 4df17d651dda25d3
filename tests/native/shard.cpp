// Shards and shared words, updated by threads that stand for the ranks of a node.
#include "shard.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"
#include "shared_words.h"

using namespace bitring;

namespace {

void check(bool ok, const std::string& message) {
    if (!ok) {
        std::fprintf(stderr, "%s\n", message.c_str());
        std::exit(1);
    }
}

template <class Work>
void on_ranks(int ranks, const Work& work) {
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks; ++r) threads.emplace_back([&work, r] { work(r); });
    for (auto& thread : threads) thread.join();
}

template <class T>
void finish(ShardPass& pass, int rank) {
    while (pass.run(rank % 2 ? 1e-5 : 1.0) >= 0) {
    }
}

constexpr Type type_of(float) { return Type::f32; }
constexpr Type type_of(double) { return Type::f64; }

// The formulas once more, one value at a time.
template <class T>
void plain(Rule rule, T& w, T& slot, T g, const UpdateSettings& s) {
    if (s.weight_decay != 0) g = w * T(s.weight_decay) + g;
    if (rule == Rule::adagrad) {
        slot += g * g;
        w -= g / (std::sqrt(slot) + T(s.eps)) * T(s.lr);
        return;
    }
    if (rule != Rule::sgd) {
        slot = slot * T(s.momentum) + g;
        g = rule == Rule::sgd_nesterov ? slot * T(s.momentum) + g : slot;
    }
    w -= g * T(s.lr);
}

template <class T>
void kernels_are_the_formulas() {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    const std::size_t n = 1003;
    for (const char* set : {"baseline", "avx2", "avx512"}) {
        for (Rule rule : {Rule::sgd, Rule::sgd_momentum, Rule::sgd_nesterov, Rule::adagrad}) {
            for (double weight_decay : {0.0, 0.1}) {
                const Update update = update_kernel(rule, type_of(T()), set);
                if (update == nullptr) continue;
                const UpdateSettings settings{0.05, 0.9, weight_decay, 1e-10};
                std::vector<T> w(n), slot(n), g(n), w2, slot2;
                for (std::size_t i = 0; i < n; ++i) w[i] = T(normal(random)), slot[i] = T(std::fabs(normal(random)));
                w2 = w, slot2 = slot;
                for (int step = 0; step < 3; ++step) {
                    for (std::size_t i = 0; i < n; ++i) {
                        g[i] = T(normal(random));
                        plain(rule, w2[i], slot2[i], g[i], settings);
                    }
                    update(n, w.data(), slot.data(), g.data(), settings);
                }
                check(std::memcmp(w.data(), w2.data(), n * sizeof(T)) == 0, std::string("other bits: ") + set);
                check(std::memcmp(slot.data(), slot2.data(), n * sizeof(T)) == 0, std::string("other bits: ") + set);
            }
        }
        check(update_kernel(Rule::sgd, Type::f16, set) == nullptr, "a kernel for halves");
    }
}

// Whole numbers: sums have no order, so nothing may be lost.
template <class T>
void nothing_is_lost(int ranks, std::size_t n, std::size_t width, std::size_t runs, int rounds) {
    const Memory memory = Memory::make(Shard::locks_nbytes(n * sizeof(T)) + 64, "");
    std::vector<T> values(n, T(7)), expected(n, T(7));
    std::vector<std::vector<std::int64_t>> starts(static_cast<std::size_t>(ranks));
    for (int r = 0; r < ranks; ++r) {
        std::mt19937 random{unsigned(r)};
        for (std::size_t k = 0; k < runs; ++k) {
            starts[std::size_t(r)].push_back(runs == 1 ? 0 : std::int64_t(random() % (n / width) * width));
        }
        std::sort(starts[std::size_t(r)].begin(), starts[std::size_t(r)].end());
        for (const std::int64_t start : starts[std::size_t(r)]) {
            for (std::size_t i = 0; i < width; ++i) expected[std::size_t(start) + i] -= T((r + 1) * rounds);
        }
    }
    on_ranks(ranks, [&](int r) {
        const auto shard = std::make_shared<Shard>(r, ranks, reinterpret_cast<char*>(values.data()), nullptr, n, sizeof(T),
                                                   memory.data());
        const std::vector<T> gradient(runs * width, T(r + 1));
        std::vector<T> seen(runs * width);
        for (int round = 0; round < rounds; ++round) {
            ShardPass push(shard, starts[std::size_t(r)], width, gradient.data(), true,
                           update_kernel(Rule::sgd, type_of(T())), UpdateSettings{1, 0, 0, 0});
            finish<T>(push, r);
            ShardPass read(shard, starts[std::size_t(r)], width, seen.data(), true);
            finish<T>(read, r);
        }
    });
    check(values == expected, "updates were lost: " + std::to_string(n) + " values in runs of " + std::to_string(width));
}

void reads_give_the_runs() {
    const std::size_t n = 50000;
    const Memory memory = Memory::make(Shard::locks_nbytes(n * sizeof(double)), "");
    std::vector<double> values(n);
    for (std::size_t i = 0; i < n; ++i) values[i] = double(i);
    for (int rank = 0; rank < 4; ++rank) {
        const auto shard = std::make_shared<Shard>(rank, 4, reinterpret_cast<char*>(values.data()), nullptr, n,
                                                   sizeof(double), memory.data());
        const std::vector<std::vector<std::int64_t>> cases = {
            {}, {0}, {8190}, {0, 8191, 8191, 30000, 49990}, {12495, 12500, 12505, 40000}};
        for (const auto& starts : cases) {
            std::vector<double> out(starts.size() * 10, -1.0);
            ShardPass read(shard, starts, 10, out.data(), true);
            while (read.run(0.0) >= 0) {
            }
            for (std::size_t k = 0; k < out.size(); ++k) {
                check(out[k] == double(starts[k / 10]) + double(k % 10), "a read gives other values");
            }
        }
        std::vector<double> all(n, -1.0);
        ShardPass read(shard, {0}, n, all.data(), false);
        while (read.run(1.0) >= 0) {
        }
        check(all == values, "a read of all gives other values");
        for (const std::vector<std::int64_t>& bad : {std::vector<std::int64_t>{5, 4}, {-1}, {std::int64_t(n) - 9}}) {
            bool refused = false;
            try {
                ShardPass(shard, bad, 10, all.data(), true);
            } catch (const std::invalid_argument&) {
                refused = true;
            }
            check(refused, "runs outside the shard were taken");
        }
    }
}

// A rank that died in a block: the others name it, and take the lock over when they know.
void a_dead_holder_is_named() {
    const std::size_t n = 40000;
    const Memory memory = Memory::make(Shard::locks_nbytes(n * sizeof(float)), "");
    std::vector<float> values(n), gradient(n, 1.0f);
    auto* lock = reinterpret_cast<SharedLock*>(memory.data() + 64);
    check(lock->try_acquire(2), "a new lock is held");
    const auto shard = std::make_shared<Shard>(0, 3, reinterpret_cast<char*>(values.data()), nullptr, n, sizeof(float),
                                               memory.data());
    ShardPass push(shard, {0}, n, gradient.data(), true, update_kernel(Rule::sgd, Type::f32), UpdateSettings{1, 0, 0, 0});
    check(push.run(0.01) == 2 && push.run(0.01) == 2, "the holder is not named");
    check(values[0] == -1 && values[20000] == 0 && values[39999] == -1, "other blocks were not updated");
    shard->bury(2);
    check(push.run(0.01) == -1 && values[20000] == -1 && lock->try_acquire(1), "the lock was not taken over");
}

void words_and_bell() {
    constexpr int ranks = 3;
    const Memory memory = Memory::make(SharedWords::nbytes(4), "");
    on_ranks(ranks, [&](int r) {
        SharedWords words(r, ranks, memory.data());
        for (int k = 0; k < 1000; ++k) {
            while (words.acquire(1e-4) >= 0) {
            }
            ++words.words()[0];
            words.release();
        }
        // Who comes last rings.
        for (;;) {
            const std::uint32_t seen = words.bell();
            while (words.acquire(1.0) >= 0) {
            }
            const bool last = words.words()[0] == ranks * 1000;
            words.release();
            if (last) break;
            words.wait(seen, 0.05);
        }
        words.ring();
    });
    SharedWords words(0, ranks, memory.data());
    check(words.words()[0] == ranks * 1000, "words were lost");
    const std::uint32_t seen = words.bell();
    check(!words.wait(seen, 0.001), "a bell that nobody rang");
    words.ring();
    check(words.wait(seen, 10.0), "a bell that was rung");
}

// One rank's memory in another's place, and back.
void memory_shows_another() {
    const std::size_t nbytes = 3 << 20;
    Memory mine = Memory::make(nbytes, "");
    const Memory other = Memory::make(nbytes, "");
    std::strcpy(mine.data() + 100, "mine");
    std::strcpy(other.data() + 100, "other");
    mine.show(other);
    check(std::strcmp(mine.data() + 100, "other") == 0, "it does not show the other's");
    std::strcpy(mine.data() + nbytes - 8, "both");
    check(std::strcmp(other.data() + nbytes - 8, "both") == 0, "the other has not what was written");
    mine.show_own();
    check(std::strcmp(mine.data() + nbytes - 8, "both") == 0, "the values shown were not taken over");
    std::strcpy(mine.data() + 100, "mine");
    check(std::strcmp(other.data() + 100, "other") == 0, "it still shows the other's");
}

}  // namespace

int main() {
    kernels_are_the_formulas<float>();
    kernels_are_the_formulas<double>();
    for (int ranks : {1, 2, 3, 5}) {
        nothing_is_lost<float>(ranks, 100003, 100003, 1, 20);
        nothing_is_lost<double>(ranks, 40000, 1, 500, 20);
        nothing_is_lost<float>(ranks, 60000, 300, 40, 20);
    }
    reads_give_the_runs();
    a_dead_holder_is_named();
    words_and_bell();
    memory_shows_another();
    return 0;
}
