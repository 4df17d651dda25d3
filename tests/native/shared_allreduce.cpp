// AllReduce through shared memory, with threads of this process as the ranks: every way, every size that is near a
// limit, and long mixed sequences, in which slots, stages and counts are used again and again.
#include "roll_call.h"
#include "shared_allreduce.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace bitring;

namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

// Value i of rank r in an operation: sums of these are rounded, so that their order shows.
float value(std::uint32_t operation, int r, std::size_t i) {
    std::uint32_t h = (std::uint32_t(i) + 0x9e3779b9u * operation + 0x85ebca6bu * std::uint32_t(r + 1)) * 0xcc9e2d51u;
    h ^= h >> 15;
    return float(std::int32_t(h)) * (r % 2 ? 1e-6f : 1e-9f);
}

void fill(std::uint32_t operation, int r, float* x, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) x[i] = value(operation, r, i);
}

enum Way { small_way, pieces_way, staged, staged_out, resident, elsewhere, agreement, signatures, flagged, way_count };
const char* const names[] = {"small", "operands", "staged", "out of place", "resident", "resident elsewhere",
                             "agreement", "signatures differ", "flagged"};

struct Step {
    Way way;
    std::size_t n;
};

// One node of `size` threads. What they share has one address for all of them, so that ThreadSanitizer sees it all.
class Rig {
public:
    Rig(int size, std::size_t region_values) : size_(size) {
        for (int r = 0; r < size; ++r) {
            parts_.push_back(Memory::make(Node::nbytes(size), ""));
            resident_.push_back(Memory::make(region_values * sizeof(float), ""));
        }
    }

    std::shared_ptr<Node> node(int rank) const {
        std::vector<char*> parts;
        std::vector<int> names;
        for (int r = 0; r < size_; ++r) {
            parts.push_back(parts_[std::size_t(r)].data());
            names.push_back(10 + r);
        }
        return std::make_shared<Node>(rank, parts, names, nullptr);
    }

    // Borrows the memory, which outlives it: a Region owns its mappings, and here the ranks have them in common.
    std::shared_ptr<const Region> region(int rank) const {
        std::vector<Memory> parts(resident_.size());
        for (std::size_t r = 0; r < parts.size(); ++r) std::memcpy(static_cast<void*>(&parts[r]), &resident_[r], sizeof(Memory));
        auto* made = new Region(rank, 7, std::move(parts));
        static auto& kept = *new std::vector<Region*>;  // never ended, which would unmap
        static std::atomic_flag busy = ATOMIC_FLAG_INIT;
        while (busy.test_and_set(std::memory_order_acquire)) sched_yield();
        kept.push_back(made);
        busy.clear(std::memory_order_release);
        return {made, [](const Region*) {}};
    }

    void run(const std::vector<Step>& steps, unsigned seed) const {
        std::vector<std::thread> threads;
        for (int r = 0; r < size_; ++r) threads.emplace_back([=, &steps] { rank_of(r, steps, seed); });
        for (std::thread& thread : threads) thread.join();
    }

private:
    Status finish(Operation& operation, std::mt19937& random) const {
        operation.begin();
        for (std::size_t k = 0; !is_over(operation.advance()); ++k) {
            const int awaited = operation.awaited();
            if (awaited != -1 && (awaited < 10 || awaited >= 10 + size_)) fail("awaited() names no rank");
            if (operation.status() != Status::moved) sched_yield();
            if (random() % 512 == 0) usleep(random() % 60);
            if (k > 200000000) fail("an operation does not end");
        }
        return operation.status();
    }

    void rank_of(int rank, const std::vector<Step>& steps, unsigned seed) const {
        const auto shared = node(rank);
        const auto region = this->region(rank);
        const Reduce add = reduce_kernel(Op::sum, Type::f32);
        std::mt19937 random(seed * 31 + unsigned(rank));
        // One object is used for all private operations, as FastPath does; others are made anew, as plans do.
        SharedAllreduce again(shared, Intent{}, std::vector<Operand>(1), nullptr);
        std::uint32_t number = seed * 100003;
        for (const Step& step : steps) {
            ++number;
            const std::string what = std::string(names[step.way]) + ", " + std::to_string(step.n) + " values, rank " +
                                     std::to_string(rank) + " of " + std::to_string(size_);
            Intent intent{std::uint64_t(step.way + 1) << 32 | step.n, 0, 0};
            const bool last = rank == size_ - 1;
            if (step.way == agreement) {
                Agreement operation(std::make_shared<NodeRollCall>(shared), intent);
                if (finish(operation, random) != Status::done || !operation.verdict().same) fail(what);
                continue;
            }
            std::vector<float> x(step.n + 1), y(step.n + 1);
            float* at = x.data();
            if (step.way == resident || step.way == elsewhere) {
                // Not where the region begins, and elsewhere not at the same place on all ranks.
                const std::size_t offset = step.way == resident ? number % 5 : std::size_t(rank % 2);
                at = reinterpret_cast<float*>(region->part(rank)) + offset;
                intent.where = region->where(at);
            }
            fill(number, rank, at, step.n);
            x[step.n] = y[step.n] = 42;
            float* to = step.way == staged_out ? y.data() : at;
            Operand operand{at, to, step.n, sizeof(float), add};
            if (step.way == signatures && last) intent.signature ^= 1;
            if (step.way == flagged && last) intent.flags = kBad;
            std::vector<Operand> operands{operand};
            if (step.way == pieces_way) {
                const std::size_t a = step.n / 3, b = step.n / 2;
                operands = {{at, at, a, 4, add}, {at + a, at + a, b - a, 4, add}, {at + b, at + b, step.n - b, 4, add}};
            }
            Status status;
            Verdict verdict;
            if (operands.size() == 1 && number % 2) {
                Carried carried;
                carried.from = operand.from, carried.to = operand.to, carried.n = operand.n;
                carried.itemsize = operand.itemsize, carried.reduce = operand.reduce;
                again.rebind(intent, carried, intent.where ? region.get() : nullptr);
                status = finish(again, random);
                verdict = again.verdict();
            } else {
                SharedAllreduce operation(shared, intent, operands, intent.where ? region : nullptr);
                status = finish(operation, random);
                verdict = operation.verdict();
            }
            if (step.way == signatures || step.way == flagged) {
                const bool told = step.way == flagged ? verdict.same && verdict.flags == kBad
                                                      : !verdict.same && verdict.same_function && verdict.flags == 0;
                const bool disagrees = step.way == flagged || size_ > 1;
                if (status != (disagrees ? Status::disagree : Status::done)) fail(what + ": not seen");
                if (disagrees && !told) fail(what + ": wrong verdict");
                for (std::size_t i = 0; disagrees && i < step.n; ++i) {
                    if (at[i] != value(number, rank, i)) fail(what + ": something was exchanged");
                }
                continue;
            }
            if (status != Status::done) fail(what + ": not done");
            const std::size_t stride = step.n > 4096 ? 7 : 1;  // less than a chunk's least
            for (std::size_t i = number % stride; i < step.n; i += stride) {
                float sum = value(number, 0, i);
                for (int r = 1; r < size_; ++r) sum += value(number, r, i);
                if (std::memcmp(&sum, to + i, sizeof sum) != 0) fail(what + ": value " + std::to_string(i));
                if (step.way == staged_out && at[i] != value(number, rank, i)) fail(what + ": input changed");
            }
            if (x[step.n] != 42 || y[step.n] != 42) fail(what + ": wrote past the end");
            // A buffer may be changed as soon as its operation is over, and others must not see it.
            for (std::size_t i = 0; i < step.n; i += 17) at[i] = to[i] = -1;
        }
    }

    int size_;
    std::vector<Memory> parts_, resident_;
};

}  // namespace

int main() {
#if defined(__SANITIZE_THREAD__)
    const std::size_t often = 200;
#else
    const std::size_t often = 600;
#endif
    for (int size = 1; size <= 8; ++size) {
        const std::size_t limit = SharedAllreduce::small(size) / sizeof(float);
        const std::size_t stage = Rig(size, 1).node(0)->stage_nbytes() / sizeof(float) / std::size_t(size) * std::size_t(size);
        std::vector<std::size_t> sizes{0, 1, 7, 8, 9, 63, 64, 65, 1009, limit - 1, limit, limit + 1, stage - 1, stage, stage + 1};
        if (size == 2 || size == 3 || size == 5) {
            for (std::size_t n : {3 * stage, 3 * stage + 1, 4 * stage - 1, std::size_t(1000003)}) sizes.push_back(n);
        }
        std::vector<Step> steps;
        for (std::size_t n : sizes) {
            for (Way way : {small_way, pieces_way, staged, staged_out, resident, elsewhere, signatures, flagged}) {
                if ((way == pieces_way && n > limit) || (way == staged && n <= limit)) continue;
                if (n >= stage && way != staged && way != staged_out && way != resident) continue;
                steps.push_back({way, n});
            }
        }
        Rig(size, 1000003 + 8).run(steps, unsigned(size));
        if (size == 1) continue;

        std::mt19937 random{unsigned(size)};
        steps.clear();
        for (std::size_t k = 0; k < (size > 3 ? often / 3 : 2 * often); ++k) {
            const auto way = Way(random() % way_count);
            // Most are a few values; some need a stage, few several.
            const std::size_t n = random() % 16 ? random() % 300 : way == pieces_way ? limit : limit + random() % 3000;
            steps.push_back({way, random() % 400 || way == pieces_way ? n : 3 * stage + random() % (stage / 2)});
        }
        Rig(size, 1000003 + 8).run(steps, 100 + unsigned(size));
    }
    return 0;
}
