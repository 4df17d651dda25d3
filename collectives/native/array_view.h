// Python's arrays, as code that knows no NumPy sees them.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bitring {

// What a buffer's format means, in the machine's byte order; false for anything else.
inline bool type_of(const char* format, Py_ssize_t itemsize, Type* type) {
    if (format == nullptr) return false;
    const auto integer = [&](bool is_signed) {
        static constexpr Type types[2][4] = {{Type::u8, Type::u16, Type::u32, Type::u64},
                                             {Type::i8, Type::i16, Type::i32, Type::i64}};
        const int k = itemsize == 1 ? 0 : itemsize == 2 ? 1 : itemsize == 4 ? 2 : 3;
        *type = types[is_signed][k];
        return true;
    };
    const char second = format[0] == '\0' ? '\0' : format[1];
    if (format[0] == 'Z' && second != '\0' && format[2] == '\0') {
        if (second == 'f') return *type = Type::c64, true;
        if (second == 'd') return *type = Type::c128, true;
        if (second == 'g') return *type = Type::clongdouble, true;
    }
    if (second != '\0') return false;
    switch (format[0]) {
    case 'f': return *type = Type::f32, true;
    case 'd': return *type = Type::f64, true;
    case 'e': return *type = Type::f16, true;
    case 'g': return *type = Type::longdouble, true;
    case '?': return *type = Type::b8, true;
    case 'b': case 'h': case 'i': case 'l': case 'q': return integer(true);
    case 'B': case 'H': case 'I': case 'L': case 'Q': return integer(false);
    default: return false;
    }
}

// A contiguous array's memory, for as long as this lives.
class ArrayView {
public:
    ArrayView() = default;
    ArrayView(const ArrayView&) = delete;
    ArrayView& operator=(const ArrayView&) = delete;
    ~ArrayView() {
        if (held_) PyBuffer_Release(&view_);
    }
    bool take(nanobind::handle array, bool writable) {
        const int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(array.ptr(), &view_, flags) != 0) {
            PyErr_Clear();
            return false;
        }
        held_ = true;
        return type_of(view_.format, view_.itemsize, &type);
    }
    void* data() const { return view_.buf; }
    std::size_t nbytes() const { return std::size_t(view_.len); }
    std::size_t itemsize() const { return std::size_t(view_.itemsize); }
    bool has_shape_of(const ArrayView& other) const {
        return view_.ndim == other.view_.ndim && std::equal(view_.shape, view_.shape + view_.ndim, other.view_.shape);
    }
    bool has_shape(const std::vector<std::int64_t>& shape) const {
        return std::equal(shape.begin(), shape.end(), view_.shape, view_.shape + view_.ndim);
    }
    bool overlaps(const ArrayView& other) const {
        const char *a = static_cast<const char*>(data()), *b = static_cast<const char*>(other.data());
        return a < b + other.nbytes() && b < a + nbytes();
    }
    Type type{};

private:
    Py_buffer view_{};
    bool held_ = false;
};

}  // namespace bitring
