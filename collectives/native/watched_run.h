// A run of a compressed sum: all ranks find out that they mean it and that it can be made, and then it is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "direct_collective.h"
#include "kernels.h"

namespace bitring {

class WatchedRun final : public Operation {
public:
    // What each rank says before a run; `check` leaves the largest of all ranks' there.
    struct Words {
        std::int64_t bad;    // larger than 0: its values must not be summed
        std::int64_t state;  // of its residuals; 0: nothing is the matter
        std::int64_t wait;
    };

    // `check` is bound to `words`, in place.
    WatchedRun(std::shared_ptr<DirectCollective> check, Words* words) : check_(std::move(check)), words_(words) {}

    // What is run where nothing is bad and what is the matter is bearable; null, as at first: nothing.
    void follow(std::shared_ptr<Operation> next) { next_ = std::move(next); }

    // From now on say `bad` where one of these values is NaN or Inf.
    void look_at(const void* values, std::size_t n, Type type, std::int64_t bad) {
        values_ = static_cast<const char*>(values);
        count_ = n;
        type_ = type;
        bad_ = bad;
    }

    // What this rank says in the next run, beside what it may find in the values; `goes_on`: whether what follows is run
    // by this, where it is to be run.
    void prepare(const Words& words, bool goes_on) {
        said_ = words;
        goes_on_ = goes_on;
    }

    // What ranks say is the matter and does not keep them from what follows.
    static constexpr std::int64_t kBearable = 1;

    int awaited() const override { return follows_ ? next_->awaited() : check_->awaited(); }
    int error() const override { return follows_ ? next_->error() : check_->error(); }
    const char* reason() const override { return follows_ ? next_->reason() : nullptr; }
    bool calls_library() const override { return check_->calls_library() || (next_ && next_->calls_library()); }
    const Verdict& verdict() const { return check_->verdict(); }

    // After the check: whether what follows was run; and, in nanoseconds, how long this rank waited for the others.
    bool followed() const { return follows_; }
    std::int64_t waited() const { return waited_; }

protected:
    void start() override;
    Status step() override;

private:
    enum class Phase : std::uint8_t { looking, checking, following };

    static constexpr std::size_t kLook = 1 << 18;  // values at once

    std::shared_ptr<DirectCollective> check_;
    Words* words_;
    std::shared_ptr<Operation> next_;
    const char* values_ = nullptr;
    std::size_t count_ = 0;
    Type type_ = Type::f32;
    std::int64_t bad_ = 0;
    Words said_{};
    bool goes_on_ = false;

    Phase phase_ = Phase::looking;
    std::size_t looked_ = 0;
    bool follows_ = false;
    std::int64_t began_ = 0, waited_ = 0;
};

}  // namespace bitring
