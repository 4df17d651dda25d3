#include "owner_exchange.h"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>

#include "copy.h"
#include "norms.h"
#include "thread_pool.h"
#include "wait.h"

namespace bitring {

namespace {

// Of so many segments that are encoded, one is looked at for the norms of a run.
constexpr std::size_t kSample = 16;

// What the processor notes when finite numbers make Inf or NaN.
constexpr int kExceptions = FE_OVERFLOW | FE_INVALID;

// Segments of so many values on the average take longer to encode than a helper takes to wake up.
constexpr std::int64_t kLarge = 16384;

// Pieces encoded in one run have different random numbers.
std::int64_t piece_seed(std::int64_t seed, std::int64_t start) {
    return std::int64_t(std::uint64_t(seed) + 0x9E3779B97F4A7C15u * std::uint64_t(start + 1));
}

}  // namespace

int OwnerExchange::room(const std::vector<ExchangeSegment>& segments, int rank, int size) {
    const auto own = std::count_if(segments.begin(), segments.end(), [&](auto& s) { return s.owner == rank; });
    const auto others = std::int64_t(segments.size()) - own;
    return int(std::max<std::int64_t>(1, 2 * (others + own * (size - 1))));
}

OwnerExchange::OwnerExchange(std::unique_ptr<Wire> wire, int rank, int size, Type type, std::vector<Codec> codecs, bool fixed,
                             std::vector<ExchangeSegment> segments, void* residual, void* owner_residual,
                             std::int64_t owned, int to_owner_tag, int from_owner_tag)
    : wire_(std::move(wire)),
      rank_(rank),
      size_(size),
      type_(type),
      itemsize_(size_of(type)),
      wide_(type == Type::f64 ? 8 : 4),
      codecs_(std::move(codecs)),
      fixed_(fixed),
      segments_(std::move(segments)),
      residual_(static_cast<char*>(residual)),
      owner_residual_(static_cast<char*>(owner_residual)),
      owned_(owned),
      tags_{to_owner_tag, from_owner_tag},
      encoded_(segments_.size()),
      summed_(segments_.size()),
      landed_(std::size_t(room(segments_, rank, size))),
      from_(std::size_t(size)) {
    std::vector<std::vector<std::size_t>> by_owner(static_cast<std::size_t>(size));
    std::size_t longest = 0;
    std::int64_t most = 0, values = 0;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
        auto& owner = by_owner[std::size_t(segments_[s].owner)];
        owner.push_back(s);
        longest = std::max(longest, owner.size());
        std::size_t nbytes = header(s);
        std::int64_t n = 0;
        for (const EncodedPiece& piece : segments_[s].pieces) {
            nbytes += std::size_t(piece.nbytes);
            n += piece.stop - piece.start;
        }
        values += n;
        encoded_[s].resize(nbytes);
        summed_[s].resize(nbytes);
        if (owns(s)) {
            mine_.push_back(s);
            incoming_.emplace_back(std::size_t(size), std::vector<std::uint8_t>(nbytes));
            most = std::max(most, n);
        }
    }
    if (values >= kLarge * std::int64_t(segments_.size())) most_ = std::size_t(ThreadPool::of_process().limit());
    tasks_.reserve(most_);
    sums_.resize(std::min(most_, mine_.size()), std::vector<char>(std::size_t(most) * wide_));
    // All owners get their first segments first: each has something to add, and later to send, as early as can be.
    for (std::size_t k = 0; k < longest; ++k) {
        for (int turn = 1; turn <= size; ++turn) {
            const auto& owner = by_owner[std::size_t((rank + turn) % size)];
            if (k < owner.size()) order_.push_back(owner[k]);
        }
    }
    for (auto& kept : kept_) kept.resize(segments_.size());
    missing_.resize(mine_.size());
    arrived_.reserve(segments_.size());
    posted_.reserve(landed_.size());
}

void OwnerExchange::start() {
    began_ = std::int64_t(now_nanoseconds());
    stats_ = RunStats();
    next_encode_ = next_sum_ = next_decode_ = 0;
    sending_ = 0;
    awaited_ = -1;
    error_ = 0;
    posted_.clear();
    arrived_.clear();
    std::fill(from_.begin(), from_.end(), 0);
    std::fill(missing_.begin(), missing_.end(), size_);
    const auto receive = [&](std::size_t s, bool summed, int peer, std::vector<std::uint8_t>& to) {
        if (error_ != 0) return;
        posted_.push_back(Posted{false, summed, int(s), peer});
        ++from_[std::size_t(peer)];
        error_ = wire_->start(false, to.data(), to.size(), peer, tags_[summed], int(posted_.size()) - 1);
    };
    for (std::size_t k = 0; k < mine_.size(); ++k) {
        for (int r = 0; r < size_; ++r) {
            if (r != rank_) receive(k, false, r, incoming_[k][std::size_t(r)]);
        }
    }
    for (std::size_t s = 0; s < segments_.size(); ++s) {
        if (!owns(s)) receive(s, true, segments_[s].owner, summed_[s]);
    }
}

void OwnerExchange::send(std::size_t s, bool summed, int peer, std::vector<std::uint8_t>& payload, std::size_t nbytes) {
    if (error_ != 0) return;
    posted_.push_back(Posted{true, summed, int(s), peer});
    ++sending_;
    stats_.bytes_sent += std::int64_t(nbytes);
    error_ = wire_->start(true, payload.data(), nbytes, peer, tags_[summed], int(posted_.size()) - 1);
}

std::size_t OwnerExchange::residual_at(std::size_t s, bool sum, char** residual, char** kept) {
    const auto& pieces = segments_[s].pieces;
    const std::size_t at = std::size_t(pieces.front().start - (sum ? owned_ : 0)) * wide_;
    *residual = (sum ? owner_residual_ : residual_) + at;
    char* copy = sum ? kept_owner_residual_ : kept_residual_;
    *kept = copy == nullptr ? nullptr : copy + at;
    return std::size_t(pieces.back().stop - pieces.front().start) * wide_;
}

const char* OwnerExchange::reason() const {
    switch (error_) {
    case kCorrupt: return "a payload that came is not one of its values: it was damaged, or is of another encoder";
    case kOutgrew: return "the encoder made a payload that is longer than its nbytes";
    default: return nullptr;
    }
}

void OwnerExchange::bring_back() {
    for (const bool sum : {false, true}) {
        for (std::size_t s = 0; s < segments_.size(); ++s) {
            if (kept_[sum][s] == 0) continue;
            char *residual, *kept;
            const std::size_t nbytes = residual_at(s, sum, &residual, &kept);
            copy_bytes(residual, kept, nbytes);
        }
    }
    forget();
}

// Encode the task's segment of the buffer, or its sum.
void OwnerExchange::encode(Task& task, bool sum, std::vector<std::uint8_t>& payload) {
    const std::size_t every = std::min(kSample, order_.size());
    const bool sampled = task.s % every == std::size_t(run_) % every;
    const auto& pieces = segments_[task.s].pieces;
    const std::int64_t first = pieces.front().start;
    const auto n = std::size_t(pieces.back().stop - first);
    const char* whole = sum ? sums_[task.place].data() : values(first);
    char *residual, *kept;
    const std::size_t nbytes = residual_at(task.s, sum, &residual, &kept);
    const Type wide = type_ == Type::f64 ? Type::f64 : Type::f32, type = sum ? wide : type_;
    if (sampled) squares_adder(type)(whole, residual, n, &task.norms.values, &task.norms.sums);
    const auto begin = std::int64_t(now_nanoseconds());
    if (kept != nullptr && kept_[sum][task.s] == 0) {
        copy_past_cache(kept, residual, nbytes);  // and the residual is in the cache, where it is needed next
        kept_[sum][task.s] = 1;
    }
    std::size_t at = header(task.s);
    for (std::size_t k = 0; k < pieces.size(); ++k) {
        const EncodedPiece& piece = pieces[k];
        const void* from = whole + std::size_t(piece.start - first) * (sum ? wide_ : itemsize_);
        char* left = residual + std::size_t(piece.start - first) * wide_;
        const std::int64_t seed = piece_seed(sum ? ~seed_ : seed_, piece.start);
        const Codec& codec = codecs_[piece.codec];
        const std::int64_t used = (sum ? codec.encode_sum : codec.encode)(
            from, left, piece.stop - piece.start, payload.data() + at, piece.nbytes, seed, codec.settings);
        if (used < 0 || (fixed_ && used != piece.nbytes)) {
            task.error = kOutgrew;
            break;
        }
        if (!fixed_) {
            const auto length = std::uint32_t(used);
            std::memcpy(payload.data() + k * sizeof length, &length, sizeof length);
        }
        at += std::size_t(used);
    }
    task.nbytes = at;
    task.encode_nanoseconds += std::int64_t(now_nanoseconds()) - begin;
    double unused = 0;
    if (sampled) squares_adder(wide)(residual, residual, n, &task.norms.residual, &unused);
    // A look at all that was left costs a fifth of the exchange's time, so there must be a reason for it. Finite numbers
    // make no other without a word from the processor; what was none before, the sample finds.
    if (std::fetestexcept(kExceptions) != 0 || !std::isfinite(task.norms.residual)) {
        task.finite = all_finite(residual, wide, n);
    }
}

// Decode the task's segment to the buffer, or to its sum.
bool OwnerExchange::decode(Task& task, bool sum, bool accumulate, const std::vector<std::uint8_t>& payload) {
    const auto begin = std::int64_t(now_nanoseconds());
    const auto& pieces = segments_[task.s].pieces;
    std::size_t at = header(task.s);
    for (std::size_t k = 0; k < pieces.size() && task.error == 0; ++k) {
        const EncodedPiece& piece = pieces[k];
        std::size_t nbytes = std::size_t(piece.nbytes);
        if (!fixed_) {
            std::uint32_t length;
            std::memcpy(&length, payload.data() + k * sizeof length, sizeof length);
            nbytes = length;
        }
        if (nbytes > payload.size() - at) {
            task.error = kCorrupt;
            break;
        }
        void* to = sum ? sums_[task.place].data() + std::size_t(piece.start - pieces[0].start) * wide_
                       : values(piece.start);
        const Codec& codec = codecs_[piece.codec];
        const std::int64_t code = (sum ? codec.decode_sum : codec.decode)(
            payload.data() + at, std::int64_t(nbytes), to, piece.stop - piece.start, accumulate, codec.settings);
        if (code != 0) task.error = kCorrupt;
        at += nbytes;
    }
    task.decode_nanoseconds += std::int64_t(now_nanoseconds()) - begin;
    return task.error == 0;
}

void OwnerExchange::work(Task& task) {
    std::feclearexcept(kExceptions);
    switch (task.kind) {
    case Task::encode:
        encode(task, false, owns(task.s) ? incoming_[task.k][std::size_t(rank_)] : encoded_[task.s]);
        return;
    case Task::receive: decode(task, false, false, summed_[task.s]); return;
    case Task::sum:
        for (int r = 0; r < size_; ++r) {
            if (!decode(task, true, r > 0, incoming_[task.k][std::size_t(r)])) return;
        }
        encode(task, true, summed_[task.s]);
    }
}

// As many tasks as there are threads; what others wait for goes first.
void OwnerExchange::gather_tasks() {
    const std::size_t most = std::min(most_, std::size_t(ThreadPool::of_process().threads()));
    tasks_.clear();
    const auto add = [&](Task::Kind kind, std::size_t s, std::size_t k) {
        Task task{};
        task.kind = kind, task.s = s, task.k = k, task.place = tasks_.size();
        tasks_.push_back(task);
    };
    while (tasks_.size() < most && next_sum_ < mine_.size() && missing_[next_sum_] == 0) {
        add(Task::sum, mine_[next_sum_], next_sum_);
        ++next_sum_;
    }
    while (tasks_.size() < most && next_encode_ < order_.size()) {
        const std::size_t s = order_[next_encode_++];
        add(Task::encode, s, owns(s) ? std::size_t(std::find(mine_.begin(), mine_.end(), s) - mine_.begin()) : 0);
    }
    while (tasks_.size() < most && next_decode_ < arrived_.size()) add(Task::receive, arrived_[next_decode_++], 0);
}

void OwnerExchange::work_on_all() {
    const auto begin = std::int64_t(now_nanoseconds());
    ThreadPool::of_process().run(
        tasks_.size(),
        [](void* self, std::size_t i) {
            auto* exchange = static_cast<OwnerExchange*>(self);
            exchange->work(exchange->tasks_[i]);
        },
        this);
    const double took = double(std::int64_t(now_nanoseconds()) - begin);
    double encoding = 0, decoding = 0;
    for (const Task& task : tasks_) {
        encoding += double(task.encode_nanoseconds);
        decoding += double(task.decode_nanoseconds);
    }
    // What went on at once took no longer than the whole.
    const double part = std::min(1.0, took / std::max(1.0, encoding + decoding));
    stats_.encode += std::int64_t(part * encoding);
    stats_.decode += std::int64_t(part * decoding);
    for (const Task& task : tasks_) finish(task);
}

void OwnerExchange::finish(const Task& task) {
    Norms& norms = task.kind == Task::sum ? stats_.owner_norms : stats_.norms;
    norms.values += task.norms.values;
    norms.sums += task.norms.sums;
    norms.residual += task.norms.residual;
    stats_.finite &= task.finite;
    if (error_ == 0) error_ = task.error;
    if (task.kind == Task::sum) {
        for (int turn = 1; turn < size_; ++turn) send(task.s, true, (rank_ + turn) % size_, summed_[task.s], task.nbytes);
        arrived_.push_back(task.s);
    } else if (task.kind == Task::encode && owns(task.s)) {
        --missing_[task.k];
    } else if (task.kind == Task::encode) {
        send(task.s, false, segments_[task.s].owner, encoded_[task.s], task.nbytes);
    }
}

Status OwnerExchange::step() {
    int count = 0;
    if (error_ == 0) error_ = wire_->complete(landed_.data(), int(landed_.size()), &count);
    for (int i = 0; i < count; ++i) {
        const Posted& message = posted_[std::size_t(landed_[std::size_t(i)])];
        if (message.sends) {
            --sending_;
            continue;
        }
        --from_[std::size_t(message.peer)];
        if (message.summed) {
            arrived_.push_back(std::size_t(message.segment));
        } else {
            --missing_[std::size_t(message.segment)];
        }
    }
    if (error_ == 0) gather_tasks();
    if (error_ != 0) {
        // Over.
    } else if (!tasks_.empty()) {
        work_on_all();
    } else if (sending_ == 0 && arrived_.size() == segments_.size()) {
        stats_.nanoseconds = std::int64_t(now_nanoseconds()) - began_;
        return Status::done;
    } else if (count == 0) {
        const auto late = std::find_if(from_.begin(), from_.end(), [](int messages) { return messages > 0; });
        awaited_ = late == from_.end() ? -1 : int(late - from_.begin());
        return Status::waiting;
    }
    return error_ != 0 ? Status::failed : Status::moved;
}

}  // namespace bitring
