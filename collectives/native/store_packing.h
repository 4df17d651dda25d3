// What an update or an answer of a store is made of, in the bytes of one message: as training/store/packing.py has it, but
// for factors.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "codec.h"
#include "kernels.h"
#include "payload.h"

namespace bitring {

// The owner's rows of a parameter.
struct StorePart {
    std::int64_t parameter;  // its number
    char* values;
    char* slot;  // the optimizer's for them; null: it has none
    std::size_t rows, width;
    Type type;  // float32 or float64
    std::optional<Codec> codec = std::nullopt;  // what encodes them, and sums of them; none: they travel as they are
    std::size_t most = 0;                       // bytes that they take then

    std::size_t itemsize() const { return type == Type::f64 ? 8 : 4; }
    std::size_t row_nbytes() const { return width * itemsize(); }
    std::size_t nbytes() const { return rows * row_nbytes(); }
    std::int64_t size() const { return std::int64_t(rows * width); }
};

struct StorePiece {
    enum class Form : std::int64_t { values = 0, encoded = 1 };

    const StorePart* part;
    const std::int64_t* rows;  // null: all, or a run
    std::size_t n;             // rows
    char* data;
    std::size_t nbytes;  // of that
    Form form = Form::values;
    std::size_t first = 0;  // of a run

    bool is_whole() const { return rows == nullptr && n == part->rows; }
};

// Where memory for payloads comes from.
using StoreMemory = std::function<Payload(std::size_t)>;

// Places of pieces in a message, and of sums, begin at multiples of 8.
inline std::size_t padded(std::size_t nbytes) { return (nbytes + 7) / 8 * 8; }

// The pieces of a payload, where they are. `parts`: in the order of their parameters. Throws std::invalid_argument where
// they do not fit them; whether data has as many bytes as its rows is not looked at.
std::vector<StorePiece> unpack(const Payload& payload, const std::vector<StorePart>& parts);

// A payload of pieces. `data`, where they are values, is that of all rows of the part.
Payload pack(const std::vector<StorePiece>& pieces, const StoreMemory& memory);

// A payload of the pieces of all of these, none of which has rows.
Payload joined(const std::vector<Payload>& payloads, const StoreMemory& memory);

}  // namespace bitring
