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

// A payload of pieces of doubles: (parameter, rows or none, values).
struct Piece {
    std::int64_t parameter;
    std::vector<std::int64_t> rows;
    std::vector<double> values;
};

Payload pack(const std::vector<Piece>& pieces) {
    std::vector<std::int64_t> words{std::int64_t(pieces.size())};
    for (const Piece& p : pieces) {
        const std::int64_t fields[]{p.parameter, p.rows.empty() ? -1 : std::int64_t(p.rows.size()),
                                    std::int64_t(8 * p.values.size()), 0};
        words.insert(words.end(), fields, fields + 4);
    }
    for (const Piece& p : pieces) {
        words.insert(words.end(), p.rows.begin(), p.rows.end());
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

// A rank's shard and service: two parameters, each one row of every rank with its number.
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
        StoreRule rule(1, false, staleness, false, std::vector<std::int64_t>(std::size_t(p)));
        UpdateSettings settings;
        settings.lr = 1;
        auto owner = std::make_shared<StoreOwner>(std::move(rule), p, parts, Rule::sgd, settings);
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

constexpr int kSteps = 30;

void work(Rank& me, std::optional<std::int64_t> staleness) {
    std::mt19937 random(unsigned(me.rank) + 1);
    const Payload wanted = pack({{0, {2}, {}}});
    for (int c = 0; c < kSteps; ++c) {
        for (const auto& [r, answer] : me.ask(StoreKind::read, StoreKind::values, {NAN, -1}, wanted)) {
            const double seen = -first(answer.payload);
            const int least = staleness ? std::max(0, c - int(*staleness)) * (me.ranks - 1) : 0;
            check(seen >= least + c, "a read sees too little: " + std::to_string(seen) + " at clock " + std::to_string(c));
        }
        const std::vector<double> ones(Rank::kRows * Rank::kWidth, 1.0), row(Rank::kWidth, 1.0);
        for (int r = 0; r < me.ranks; ++r) {
            const int number = me.pushes;
            if (random() % 3 == 0) {
                me.service->post(r, int(StoreKind::ahead), number, {}, pack({{1, {}, ones}}));
                me.service->post(r, int(StoreKind::push), number, {1, NAN}, pack({{0, {0, 1, 2}, ones}}));
            } else {
                me.service->post(r, int(StoreKind::push), number, {1, NAN}, pack({{0, {}, ones}, {1, {}, ones}}));
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
