#include "store_packing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace bitring {

namespace {

constexpr std::size_t kFields = 4;  // of each piece, int64: parameter, rows (-1: all; -2 - first: a run), bytes, form

}  // namespace

std::vector<StorePiece> unpack(const Payload& payload, const std::vector<StorePart>& parts) {
    const auto check = [](bool fits) {
        if (!fits) throw std::invalid_argument("a store's message does not fit the shard");
    };
    const auto* words = reinterpret_cast<const std::int64_t*>(payload.memory.get());
    const std::size_t most = payload.nbytes / 8;
    check(most >= 1 && words[0] >= 0 && std::size_t(words[0]) <= (most - 1) / kFields);
    const auto count = std::size_t(words[0]);
    std::size_t at = 8 * (1 + kFields * count);
    std::vector<StorePiece> pieces;
    for (std::size_t k = 0; k < count; ++k) {
        const std::int64_t* fields = words + 1 + kFields * k;
        const auto part = std::lower_bound(parts.begin(), parts.end(), fields[0],
                                           [](const StorePart& p, std::int64_t number) { return p.parameter < number; });
        check(part != parts.end() && part->parameter == fields[0] && fields[2] >= 0);
        StorePiece piece{&*part, nullptr, part->rows, nullptr, std::size_t(fields[2]), StorePiece::Form(fields[3])};
        check(piece.form == StorePiece::Form::values ||
              (piece.form == StorePiece::Form::encoded && part->codec && fields[1] == -1));
        if (fields[1] >= 0) {
            piece.n = std::size_t(fields[1]);
            check(piece.n <= (payload.nbytes - at) / 8);
            piece.rows = reinterpret_cast<const std::int64_t*>(payload.memory.get() + at);
            at += 8 * piece.n;
            for (std::size_t i = 0; i < piece.n; ++i) {
                check(piece.rows[i] >= 0 && std::size_t(piece.rows[i]) < part->rows);
            }
        }
        if (fields[1] < -1) {
            const std::size_t row = part->row_nbytes();
            piece.first = std::size_t(-2 - fields[1]);
            piece.n = row == 0 ? 0 : piece.nbytes / row;
            check(piece.first <= part->rows && piece.n <= part->rows - piece.first);
        }
        check(piece.nbytes <= payload.nbytes - at && padded(piece.nbytes) <= payload.nbytes - at);
        piece.data = payload.memory.get() + at;
        at += padded(piece.nbytes);
        pieces.push_back(piece);
    }
    return pieces;
}

Payload pack(const std::vector<StorePiece>& pieces, const StoreMemory& memory) {
    const auto data_nbytes = [](const StorePiece& piece) {
        return piece.form == StorePiece::Form::encoded ? piece.nbytes : piece.n * piece.part->row_nbytes();
    };
    std::size_t nbytes = 8 * (1 + kFields * pieces.size());
    for (const StorePiece& piece : pieces) nbytes += (piece.rows == nullptr ? 0 : 8 * piece.n) + padded(data_nbytes(piece));
    Payload payload = memory(nbytes);
    auto* words = reinterpret_cast<std::int64_t*>(payload.memory.get());
    *words++ = std::int64_t(pieces.size());
    for (const StorePiece& piece : pieces) {
        *words++ = piece.part->parameter;
        *words++ = piece.rows == nullptr ? -1 : std::int64_t(piece.n);
        *words++ = std::int64_t(data_nbytes(piece));
        *words++ = std::int64_t(piece.form);
    }
    char* to = reinterpret_cast<char*>(words);
    for (const StorePiece& piece : pieces) {
        const std::size_t row = piece.part->row_nbytes(), data = data_nbytes(piece);
        if (piece.rows == nullptr) {
            if (data > 0) std::memcpy(to, piece.data, data);
        } else {
            std::memcpy(to, piece.rows, 8 * piece.n);
            to += 8 * piece.n;
            for (std::size_t i = 0; i < piece.n; ++i) {
                std::memcpy(to + i * row, piece.data + std::size_t(piece.rows[i]) * row, row);
            }
        }
        std::memset(to + data, 0, padded(data) - data);
        to += padded(data);
    }
    return payload;
}

Payload joined(const std::vector<Payload>& payloads, const StoreMemory& memory) {
    if (payloads.size() == 1) return payloads.front();
    std::size_t nbytes = 8;
    std::int64_t count = 0;
    const auto words_of = [](const Payload& payload) { return reinterpret_cast<const std::int64_t*>(payload.memory.get()); };
    for (const Payload& each : payloads) {
        nbytes += each.nbytes - 8;
        count += words_of(each)[0];
    }
    Payload payload = memory(nbytes);
    std::memcpy(payload.memory.get(), &count, 8);
    char* to = payload.memory.get() + 8;
    for (const bool table : {true, false}) {
        for (const Payload& each : payloads) {
            const std::size_t fields = 8 * kFields * std::size_t(words_of(each)[0]);
            const std::size_t first = table ? 8 : 8 + fields, size = table ? fields : each.nbytes - first;
            std::memcpy(to, each.memory.get() + first, size);
            to += size;
        }
    }
    return payload;
}

}  // namespace bitring
