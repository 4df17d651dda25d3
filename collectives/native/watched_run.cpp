#include "watched_run.h"

#include <algorithm>

#include "norms.h"
#include "wait.h"

namespace bitring {

void WatchedRun::start() {
    phase_ = Phase::looking;
    looked_ = 0;
    follows_ = false;
    *words_ = said_;
    began_ = std::int64_t(now_nanoseconds());
}

Status WatchedRun::step() {
    if (phase_ == Phase::looking) {
        const std::size_t n = std::min(kLook, count_ - looked_);
        if (n > 0 && !all_finite(values_ + looked_ * size_of(type_), type_, n)) words_->bad = bad_;
        looked_ = words_->bad != 0 ? count_ : looked_ + n;
        if (looked_ < count_) return Status::moved;
        phase_ = Phase::checking;
        check_->begin();
    }
    if (phase_ == Phase::checking) {
        const Status status = check_->advance();
        if (status == Status::disagree || status == Status::done) {
            waited_ = std::int64_t(now_nanoseconds()) - began_;
        }
        if (status != Status::done) return status;
        follows_ = goes_on_ && next_ && words_->bad == 0 && words_->state <= kBearable;
        if (!follows_) return Status::done;
        phase_ = Phase::following;
        next_->begin();
    }
    return next_->advance();
}

}  // namespace bitring
