#include "store_owner.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace bitring {

namespace {

template <class T>
void scale_values(char* values, std::size_t nbytes, double scale) {
    T* x = reinterpret_cast<T*>(values);
    for (std::size_t i = 0; i < nbytes / sizeof(T); ++i) x[i] *= T(scale);
}

template <class T>
void add_values(char* sum, const char* values, std::size_t nbytes) {
    T* total = reinterpret_cast<T*>(sum);
    const T* x = reinterpret_cast<const T*>(values);
    for (std::size_t i = 0; i < nbytes / sizeof(T); ++i) total[i] += x[i];
}

std::vector<double> numbers_of(const std::vector<int>& members) { return {members.begin(), members.end()}; }

}  // namespace

StoreOwner::StoreOwner(StoreRule state, int members, std::vector<StorePart> parts, Rule rule, const UpdateSettings& settings,
                       bool edits)
    : parts_(std::move(parts)),
      wanted_(std::size_t(members)),
      rests_(std::size_t(members)),
      troubles_(std::size_t(members)),
      taken_(std::size_t(members)),
      told_(std::size_t(members)),
      state_(std::move(state)) {
    if (edits) editions_.emplace(parts_);
    optimizers_.assign(std::size_t(members), checked(rule, settings));
}

StoreOwner::Optimizer StoreOwner::checked(Rule rule, const UpdateSettings& settings) const {
    for (const StorePart& part : parts_) {
        if (update_kernel(rule, part.type) == nullptr || (has_slot(rule) && part.slot == nullptr)) {
            throw std::invalid_argument("StoreOwner: no kernel for this optimizer's update of a shard");
        }
    }
    return {rule, settings};
}

void StoreOwner::use(int member, Rule rule, const UpdateSettings& settings) {
    optimizers_.at(std::size_t(member)) = checked(rule, settings);
}

StoreOwner::Seen StoreOwner::seen() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {state_.clocks(), applied_, dropped_, state_.waiting(), {staleness_.begin(), staleness_.end()}};
}

void StoreOwner::restart() {
    if (editions_) editions_->restart(state_.version());
}

// The values of a piece of an update times the scale: where they lie, or, of one that is encoded, in the room.
char* StoreOwner::gradient(const StorePiece& piece, double scale, Room& room) const {
    const StorePart& part = *piece.part;
    const std::size_t nbytes = piece.n * part.row_nbytes();
    char* values = piece.data;
    bool fits = piece.nbytes == nbytes;
    if (piece.form == StorePiece::Form::encoded) {
        room.resize(std::max(room.size(), padded(nbytes) / 8));
        values = reinterpret_cast<char*>(room.data());
        fits = part.codec->decode(reinterpret_cast<const std::uint8_t*>(piece.data), std::int64_t(piece.nbytes), values,
                                  part.size(), 0, part.codec->settings) == 0;
    }
    if (!fits) throw std::invalid_argument("StoreOwner: an update does not fit the shard");
    if (scale != 1) (part.type == Type::f64 ? scale_values<double> : scale_values<float>)(values, nbytes, scale);
    return values;
}

// Lets the optimizer see an update, or a part of one, times its scale.
void StoreOwner::apply(const Payload& payload, double scale, const Optimizer& optimizer) {
    for (const StorePiece& piece : unpack(payload, parts_)) {
        const char* g = gradient(piece, scale, decoded_);
        const StorePart& part = *piece.part;
        const std::size_t row = part.row_nbytes();
        const auto update = [&](std::size_t first, std::size_t rows, const char* values) {
            update_kernel(optimizer.rule, part.type)(rows * part.width, part.values + first * row,
                                                     part.slot == nullptr ? nullptr : part.slot + first * row, values,
                                                     optimizer.settings);
        };
        if (piece.rows == nullptr) {
            update(piece.first, piece.n, g);
            continue;
        }
        for (std::size_t i = 0; i < piece.n; ++i) update(std::size_t(piece.rows[i]), 1, g + i * row);
    }
}

// Lets the optimizer see the sum of several updates, each times its scale, added in this order.
void StoreOwner::apply_sum(const std::vector<StoreAction::Update>& updates, const Optimizer& optimizer) {
    std::map<const StorePart*, char*> sums;
    std::vector<Room> rooms;  // of sums that begin with rows, or with what was encoded
    for (const StoreAction::Update& update : updates) {
        for (const Payload& payload : updates_.at({update.member, update.number})) {
            for (const StorePiece& piece : unpack(payload, parts_)) {
                const StorePart& part = *piece.part;
                const auto add = part.type == Type::f64 ? add_values<double> : add_values<float>;
                if (piece.rows == nullptr && !piece.is_whole()) {
                    throw std::invalid_argument("StoreOwner: a part of an update does not wait for others");
                }
                char*& sum = sums[&part];
                const bool begins = sum == nullptr && piece.form == StorePiece::Form::encoded;
                char* g = gradient(piece, update.scale, begins ? rooms.emplace_back() : decoded_);
                if (piece.rows == nullptr) {
                    if (sum == nullptr) {
                        sum = g;
                    } else {
                        add(sum, g, part.nbytes());
                    }
                    continue;
                }
                if (sum == nullptr) sum = reinterpret_cast<char*>(rooms.emplace_back(padded(part.nbytes()) / 8 + 1).data());
                const std::size_t row = part.row_nbytes();
                for (std::size_t i = 0; i < piece.n; ++i) {
                    add(sum + std::size_t(piece.rows[i]) * row, g + i * row, row);
                }
            }
        }
    }
    for (const auto& [part, sum] : sums) {
        update_kernel(optimizer.rule, part->type)(part->rows * part->width, part->values, part->slot, sum, optimizer.settings);
    }
}

void StoreOwner::apply(const StoreAction& action) {
    const StoreAction::Update& first = action.updates.front();
    const Optimizer& optimizer = optimizers_[std::size_t(first.member)];
    if (action.updates.size() == 1) {
        for (const Payload& payload : updates_.at({first.member, first.number})) apply(payload, first.scale, optimizer);
    } else {
        apply_sum(action.updates, optimizer);
    }
    for (const StoreAction::Update& update : action.updates) updates_.erase({update.member, update.number});
}

Payload StoreOwner::read(const Payload& wanted, const StoreMemory& memory) const {
    std::vector<StorePiece> pieces;
    if (wanted.nbytes > 0) {
        pieces = unpack(wanted, parts_);
    } else {
        for (const StorePart& part : parts_) pieces.push_back({&part, nullptr, part.rows, nullptr, 0});
    }
    for (StorePiece& piece : pieces) {
        piece.data = piece.part->values;
        piece.form = StorePiece::Form::values;
    }
    return pack(pieces, memory);
}

// The numbers of an answer: version, updates taken, edition, whether they are changes, troubles; clocks, -1 - c: it has ended.
std::vector<double> StoreOwner::head(int member, bool changes) {
    told_[std::size_t(member)] = taken_[std::size_t(member)];
    double troubles = 0;
    for (const double each : troubles_) troubles += each;
    std::vector<double> numbers{double(state_.version()), double(taken_[std::size_t(member)]),
                                editions_ ? double(editions_->number()) : 0, double(changes), troubles};
    const std::vector<double> clocks = state_.clocks();
    numbers.insert(numbers.end(), clocks.begin(), clocks.end());
    for (const int m : state_.ended()) numbers[5 + std::size_t(m)] = -1 - numbers[5 + std::size_t(m)];
    return numbers;
}

StoreRule::Actions StoreOwner::event(const MailMessage& message) {
    const int member = message.source, serial = message.serial;
    const std::vector<double>& numbers = message.numbers;
    const auto given = [&numbers](std::size_t k) -> std::optional<std::int64_t> {  // NaN: it is not
        return k < numbers.size() && !std::isnan(numbers[k]) ? std::optional(std::int64_t(numbers[k])) : std::nullopt;
    };
    switch (StoreKind(message.kind)) {
        case StoreKind::push: return state_.push(member, serial, numbers.at(0), given(1));
        case StoreKind::read: return state_.read(member, serial, given(0));
        case StoreKind::clock: return state_.clock(member);
        case StoreKind::leave: return state_.leave(member);
        case StoreKind::rest: return state_.rest(member);
        case StoreKind::end: return state_.end(member);
        case StoreKind::go_on: state_.go_on(member); return {};
        case StoreKind::claim: {
            const auto* row = reinterpret_cast<const std::int64_t*>(message.payload.memory.get());
            return state_.claim(member, serial, {row, row + message.payload.nbytes / 8});
        }
        default: return {};
    }
}

void StoreOwner::hear(MailMessage& message, const Send& send, const StoreMemory& memory) {
    const int member = message.source;
    const auto m = std::size_t(member);
    const auto kind = StoreKind(message.kind);
    const auto settle = [&](const std::vector<int>& members) {
        restart();
        const Payload values = read({}, memory);
        for (const int each : members) send(each, StoreKind::settled, rests_[std::size_t(each)], head(each, false), values);
    };
    switch (kind) {
        case StoreKind::part: {
            double scale;
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                scale = state_.begin(member);
            }
            apply(message.payload, scale, optimizers_[m]);
            return;
        }
        case StoreKind::ahead:
            updates_[{member, message.serial}].push_back(std::move(message.payload));
            return;
        case StoreKind::forget: updates_.erase({member, message.serial}); return;
        case StoreKind::push:
            if (message.numbers.at(0) != 0) updates_[{member, message.serial}].push_back(std::move(message.payload));
            ++taken_[m];
            break;
        case StoreKind::read:
            wanted_[m] = {std::move(message.payload), std::int64_t(message.numbers.at(1))};
            break;
        case StoreKind::rest:
            rests_[m] = message.serial;
            troubles_[m] = message.numbers.at(0);
            if (message.numbers.at(1) < double(state_.settled())) {  // all have met when its wait for that was given up
                settle({member});
                return;
            }
            break;
        default: break;
    }
    StoreRule::Actions actions;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        actions = event(message);
        for (const StoreAction& action : actions) {
            dropped_ += action.kind == StoreAction::Kind::drop;
            for (const StoreAction::Update& update : action.updates) {
                ++applied_;
                ++staleness_[update.staleness];
            }
        }
    }
    for (const StoreAction& action : actions) {
        switch (action.kind) {
            case StoreAction::Kind::apply: apply(action); break;
            case StoreAction::Kind::drop:
                updates_.erase({action.member, action.number});
                send(action.member, StoreKind::dropped, action.number, {}, {});
                break;
            case StoreAction::Kind::serve: {
                const auto [wanted, edition] = std::move(wanted_[std::size_t(action.member)]);
                const bool edits = wanted.nbytes == 0 && editions_;
                auto [values, changes] = edits ? editions_->answer(edition, state_.version(), memory)
                                               : std::pair(read(wanted, memory), false);
                send(action.member, StoreKind::values, action.number, head(action.member, changes), std::move(values));
                break;
            }
            case StoreAction::Kind::claim: send(member, StoreKind::claimed, action.number, {double(action.claimed)}, {}); break;
            case StoreAction::Kind::defer:
                send(action.member, StoreKind::deferred, action.number, numbers_of(action.members), {});
                break;
            case StoreAction::Kind::settle: settle(action.members); break;
        }
    }
    if (kind == StoreKind::push && taken_[m] - told_[m] >= kWindow / 2) {
        told_[m] = taken_[m];
        send(member, StoreKind::taken, 0, {double(taken_[m])}, {});
    }
    if (kind == StoreKind::rest) {
        const std::vector<int> missing = state_.missing(), resting = state_.resting();
        if (resting.empty()) return;  // all have settled
        for (const int each : missing.size() == 1 ? resting : std::vector<int>{member}) {  // the last one is named to all
            send(each, StoreKind::deferred, rests_[std::size_t(each)], numbers_of(missing), {});
        }
    }
}

}  // namespace bitring
