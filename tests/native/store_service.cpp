// Services of stores, each rank a thread: what reads see, that nothing is lost, and the end.
#include "store_service.h"

#include <sched.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_wire.h"

using namespace bitring;

namespace {

void check(bool ok, const std::string& message) {
    if (!ok) {
        std::fprintf(stderr, "%s\n", message.c_str());
        std::exit(1);
    }
}

// Encodes doubles that are whole numbers as float32, which leaves nothing.
std::int64_t encode(const void* values, void* residual, std::int64_t n, std::uint8_t* payload, std::int64_t capacity,
                    std::int64_t, const double*) {
    if (capacity < 4 * n) return -1;
    for (std::int64_t i = 0; i < n; ++i) {
        const auto value = float(static_cast<const double*>(values)[i] + static_cast<double*>(residual)[i]);
        std::memcpy(payload + 4 * i, &value, 4);
        static_cast<double*>(residual)[i] = 0;
    }
    return 4 * n;
}

std::int64_t decode(const std::uint8_t* payload, std::int64_t nbytes, void* out, std::int64_t n, std::int64_t accumulate,
                    const double*) {
    if (nbytes != 4 * n) return -1;
    for (std::int64_t i = 0; i < n; ++i) {
        float value;
        std::memcpy(&value, payload + 4 * i, 4);
        double& x = static_cast<double*>(out)[i];
        x = accumulate ? x + value : value;
    }
    return 0;
}

// A payload of pieces of doubles: (parameter, rows or none, values, whether they are encoded).
struct Piece {
    std::int64_t parameter;
    std::vector<std::int64_t> rows;
    std::vector<double> values;
    bool encoded = false;
};

Payload pack(const std::vector<Piece>& pieces) {
    std::vector<std::int64_t> words{std::int64_t(pieces.size())};
    for (const Piece& p : pieces) {
        const std::int64_t fields[]{p.parameter, p.rows.empty() ? -1 : std::int64_t(p.rows.size()),
                                    std::int64_t((p.encoded ? 4 : 8) * p.values.size()), p.encoded};
        words.insert(words.end(), fields, fields + 4);
    }
    for (const Piece& p : pieces) {
        words.insert(words.end(), p.rows.begin(), p.rows.end());
        if (p.encoded) {
            const std::size_t at = words.size(), n = p.values.size();
            words.resize(at + (n + 1) / 2);
            std::vector<double> left(n);
            auto* payload = reinterpret_cast<std::uint8_t*>(words.data() + at);
            encode(p.values.data(), left.data(), std::int64_t(n), payload, std::int64_t(4 * n), 0, nullptr);
            continue;
        }
        for (const double x : p.values) {
            words.emplace_back();
            std::memcpy(&words.back(), &x, 8);
        }
    }
    Payload payload{std::shared_ptr<char>(new char[8 * words.size()], std::default_delete<char[]>()), 8 * words.size()};
    std::memcpy(payload.memory.get(), words.data(), payload.nbytes);
    return payload;
}

// The first value of the only piece, of one row.
double first(const Payload& payload) {
    double value;
    std::memcpy(&value, payload.memory.get() + 8 * 6, 8);
    return value;
}

// A rank's shard and service: two parameters, of which the second travels encoded.
struct Rank {
    static constexpr std::size_t kRows = 3, kWidth = 700;
    std::vector<double> values = std::vector<double>(2 * kRows * kWidth);
    std::shared_ptr<StoreService> service;
    std::vector<MailMessage> answers;
    int rank, ranks, ticket = 0, pushes = 0;

    Rank(Network& network, int r, int p, std::optional<std::int64_t> staleness) : rank(r), ranks(p) {
        std::vector<StorePart> parts;
        for (int k = 0; k < 2; ++k) {
            auto* at = reinterpret_cast<char*>(values.data() + std::size_t(k) * kRows * kWidth);
            parts.push_back({k, at, nullptr, kRows, kWidth, Type::f64});
        }
        parts[1].codec = Codec{encode, encode, decode, decode, nullptr};
        parts[1].most = 4 * kRows * kWidth;
        StoreRule rule(1, false, staleness, false, std::vector<std::int64_t>(std::size_t(p)));
        UpdateSettings settings;
        settings.lr = 1;
        auto owner = std::make_shared<StoreOwner>(std::move(rule), p, parts, Rule::sgd, settings, true);
        service = std::make_shared<StoreService>(network.wire(r), r, p, std::move(owner));
        service->begin();
    }

    // As the training thread: it waits; what is rare is acted on.
    void advance() {
        service->wait(1e-3);
        check(service->error() == 0, service->reason() == nullptr ? "a service failed" : service->reason());
        for (MailMessage& message : service->take()) {
            if (message.kind == int(StoreKind::slots)) {
                service->post(message.source, int(StoreKind::are), message.serial, {}, {});
                service->resume();
            }
            answers.push_back(std::move(message));
        }
    }

    // As the progress thread, beside it.
    void drive() {
        while (!service->ended()) {
            if (is_over(service->advance()) && !service->ended()) service->begin();
            sched_yield();
        }
    }

    void tell(StoreKind kind, std::vector<double> numbers = {}, const Payload& payload = {}, int serial = 0) {
        for (int r = 0; r < ranks; ++r) service->post(r, int(kind), serial, numbers, payload);
    }

    // The answers of all owners, by rank.
    std::map<int, MailMessage> ask(StoreKind kind, StoreKind answer, std::vector<double> numbers, const Payload& payload) {
        tell(kind, numbers, payload, ++ticket);
        return answered(answer);
    }

    std::map<int, MailMessage> answered(StoreKind answer) {
        std::map<int, MailMessage> found;
        while (int(found.size()) < ranks) {
            advance();
            for (MailMessage& message : answers) {
                if (message.kind == int(answer) && message.serial == ticket) found[message.source] = std::move(message);
            }
            answers.clear();
        }
        return found;
    }
};

// What a rank knows of an owner's second parameter, which is the same everywhere in it.
struct Known {
    std::int64_t edition = -1;
    std::vector<double> values = std::vector<double>(Rank::kRows * Rank::kWidth);

    void take(const MailMessage& answer) {
        const auto* words = reinterpret_cast<const std::int64_t*>(answer.payload.memory.get());
        const char* data = answer.payload.memory.get() + 8 * (1 + 4 * words[0]);
        for (std::int64_t k = 0; k < words[0]; ++k) {
            const std::int64_t* fields = words + 1 + 4 * k;
            if (fields[0] == 1 && fields[3] == 1) {
                decode(reinterpret_cast<const std::uint8_t*>(data), fields[2], values.data(), std::int64_t(values.size()),
                       answer.numbers[3] != 0, nullptr);
            } else if (fields[0] == 1) {
                std::memcpy(values.data(), data, 8 * values.size());
            }
            data += (fields[2] + 7) / 8 * 8;
        }
        edition = std::int64_t(answer.numbers[2]);
        for (const double x : values) check(x == values[0], "half an update was read");
    }
};

constexpr int kSteps = 30;

void work(Rank& me, std::optional<std::int64_t> staleness) {
    std::mt19937 random(unsigned(me.rank) + 1);
    const Payload wanted = pack({{0, {2}, {}}});
    std::vector<Known> known(std::size_t(me.ranks));
    for (int c = 0; c < kSteps; ++c) {
        for (const auto& [r, answer] : me.ask(StoreKind::read, StoreKind::values, {NAN, -1}, wanted)) {
            const double seen = -first(answer.payload);
            const int least = staleness ? std::max(0, c - int(*staleness)) * (me.ranks - 1) : 0;
            check(seen >= least + c, "a read sees too little: " + std::to_string(seen) + " at clock " + std::to_string(c));
        }
        // Seldom on some ranks, so that they are behind.
        if (c % (1 + 9 * (me.rank % 3)) == 0) {
            ++me.ticket;
            for (int r = 0; r < me.ranks; ++r) {
                me.service->post(r, int(StoreKind::read), me.ticket, {NAN, double(known[std::size_t(r)].edition)}, {});
            }
            for (const auto& [r, answer] : me.answered(StoreKind::values)) {
                known[std::size_t(r)].take(answer);
                check(-known[std::size_t(r)].values[0] >= c, "a read misses own updates");
            }
        }
        const std::vector<double> ones(Rank::kRows * Rank::kWidth, 1.0);
        for (int r = 0; r < me.ranks; ++r) {
            const int number = me.pushes;
            if (random() % 3 == 0) {
                me.service->post(r, int(StoreKind::ahead), number, {}, pack({{1, {}, ones, true}}));
                me.service->post(r, int(StoreKind::push), number, {1, NAN}, pack({{0, {0, 1, 2}, ones}}));
            } else {
                me.service->post(r, int(StoreKind::push), number, {1, NAN}, pack({{0, {}, ones}, {1, {}, ones, true}}));
            }
        }
        ++me.pushes;
        me.tell(StoreKind::clock);
    }
    for (const auto& [r, answer] : me.ask(StoreKind::claim, StoreKind::claimed, {}, pack({{7, {}, {}}}))) {
        check(answer.numbers[0] >= 0 && answer.numbers[0] < me.ranks, "a claim of a wrong number");
    }
    for (const auto& [r, answer] : me.ask(StoreKind::rest, StoreKind::settled, {0, 0}, {})) {
        check(answer.numbers[0] == kSteps * me.ranks, "a wrong version");
        check(answer.numbers[5 + std::size_t(me.rank)] == kSteps, "a wrong clock");
    }
    me.ask(StoreKind::slots, StoreKind::are, {}, {});
    for (const double x : me.values) check(x == -double(kSteps * me.ranks), "updates were lost");
    me.tell(StoreKind::end);
    while (!me.service->ended()) me.advance();
}

void all(int ranks, std::optional<std::int64_t> staleness, unsigned seed, std::size_t eager) {
    Network network(seed, eager);
    std::vector<Rank> them;
    them.reserve(std::size_t(ranks));
    for (int r = 0; r < ranks; ++r) them.emplace_back(network, r, ranks, staleness);
    std::vector<std::thread> threads;
    for (Rank& each : them) {
        threads.emplace_back([&each, staleness] { work(each, staleness); });
        threads.emplace_back([&each] { each.drive(); });
    }
    for (auto& thread : threads) thread.join();
    check(network.left() == 0, "messages are left");
}

}  // namespace

int main() {
    for (int ranks = 1; ranks <= 4; ++ranks) {
        for (unsigned seed = 0; seed < 3; ++seed) {
            all(ranks, std::nullopt, seed, 1 << 20);
            all(ranks, 0, seed, 100);
            all(ranks, 2, seed, 0);
        }
    }
    return 0;
}
