// The native executor over a network of this process, the ranks taken further one at a time in random order.
#include "execution.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "fake_wire.h"
#include "schedules.h"

using namespace bitring;

namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

using Make = Schedule (*)(int, int);

template <class Value>
void check(const std::string& name, Make make, bool in_chunks, int size, std::int64_t n, std::int64_t segment, int window,
           int slots, std::size_t eager, Type type) {
    const std::string what = name + ", " + std::to_string(size) + " ranks, " + std::to_string(n) + " values in segments of " +
                             std::to_string(segment) + ", window " + std::to_string(window) + ", " + std::to_string(slots) +
                             " slots, sends of up to " + std::to_string(eager) + " bytes eager";
    Network network(unsigned(n + size), eager);
    std::mt19937 random(unsigned(n * 7 + size));
    std::vector<std::unique_ptr<Execution>> ranks;
    std::vector<std::vector<Value>> x(static_cast<std::size_t>(size)), apart(x.size());
    for (int r = 0; r < size; ++r) {
        auto program = compile(make(r, size), in_chunks ? size : 1, n, segment, window, slots);
        ranks.push_back(std::make_unique<Execution>(program, network.wire(r), r, sizeof(Value), reduce_kernel(Op::sum, type)));
    }
    for (int run = 0; run < 3; ++run) {
        std::vector<double> sum(static_cast<std::size_t>(n));
        for (int r = 0; r < size; ++r) {
            auto& mine = x[std::size_t(r)];
            mine.resize(std::size_t(n) + 1);
            for (auto& v : mine) v = Value((double(random()) - 2e9) * (std::is_integral<Value>::value ? 1 : std::pow(10.0, r)));
            for (std::size_t i = 0; i < std::size_t(n); ++i) sum[i] += double(mine[i]);
            mine.back() = 42;
            auto& given = apart[std::size_t(r)];
            given = mine;
            const bool out_of_place = run % 2 == 1 && size > 1;
            if (out_of_place) std::fill_n(mine.begin(), n, Value(7));  // nobody must see these
            ranks[std::size_t(r)]->bind(out_of_place ? given.data() : mine.data(), mine.data());
            ranks[std::size_t(r)]->begin();
        }
        std::vector<int> waiting(ranks.size());
        for (int over = 0; over < size;) {
            const std::size_t r = random() % ranks.size();
            if (is_over(ranks[r]->status())) continue;
            const Status status = ranks[r]->advance();
            if (status == Status::failed) fail(what + ": error " + std::to_string(ranks[r]->error()));
            over += is_over(status);
            waiting[r] = status == Status::waiting ? waiting[r] + 1 : 0;
            if (waiting[r] > 100000) fail(what + ": rank " + std::to_string(r) + " waits for ever");
            if (status == Status::waiting && ranks[r]->awaited() < 0) fail(what + ": waits for nobody");
        }
        if (network.left() != 0) fail(what + ": messages are left");
        for (int r = 0; r < size; ++r) {
            const auto& mine = x[std::size_t(r)];
            if (n > 0 && std::memcmp(mine.data(), x[0].data(), std::size_t(n) * sizeof(Value)) != 0) fail(what + ": bits differ");
            for (std::size_t i = 0; i < std::size_t(n); ++i) {
                const double error = std::fabs(double(mine[i]) - sum[i]);
                if (error > (std::is_integral<Value>::value ? 0 : 1e-5 * 4e9 * std::pow(10.0, size))) fail(what + ": wrong sum");
            }
            if (mine.back() != 42) fail(what + ": wrote past the end");
        }
    }
}

// A wire whose library reports an error.
class Broken final : public Wire {
public:
    int start(bool, void*, std::size_t, int, int, int) override { return 0; }
    int complete(int*, int, int* count) override {
        *count = 0;
        return ++calls_ > 2 ? 17 : 0;
    }

private:
    int calls_ = 0;
};

}  // namespace

int main() {
    for (int size : {1, 2, 3, 4, 5, 8}) {
        for (std::int64_t n : {0, 1, 8, 61}) {
            for (std::int64_t segment : {1, 4, 100000}) {
                if (segment == 1 && size > 4) continue;
                for (int window : {1, 4}) {
                    for (int slots : {1, 8}) {
                        for (std::size_t eager : {std::size_t(0), std::size_t(64), std::size_t(1) << 20}) {
                            check<std::int64_t>("ring", ring, true, size, n, segment, window, slots, eager, Type::i64);
                            check<std::int64_t>("tree", binary_tree, false, size, n, segment, window, slots, eager, Type::i64);
                            if (size != 3 && size != 5) {
                                check<std::int64_t>("doubling", recursive_doubling, false, size, n, segment, window, slots,
                                                    eager, Type::i64);
                            }
                        }
                    }
                }
            }
        }
        check<float>("ring", ring, true, size, 1009, 50, 4, 8, 0, Type::f32);
        check<float>("tree", binary_tree, false, size, 1009, 50, 4, 8, 0, Type::f32);
        if (size != 3 && size != 5) check<float>("doubling", recursive_doubling, false, size, 1009, 50, 4, 8, 0, Type::f32);
    }

    Execution broken(compile(ring(0, 2), 2, 100, 10, 4, 8), std::make_unique<Broken>(), 0, 4, reduce_kernel(Op::sum, Type::f32));
    std::vector<float> x(100);
    broken.bind(x.data(), x.data());
    broken.begin();
    while (!is_over(broken.advance())) {
    }
    if (broken.status() != Status::failed || broken.error() != 17) fail("the library's error is lost");
    return 0;
}
