// Loops over the columns of a row, whole vectors and then what is left. For files in per_isa/ only.
#pragma once

#include "rows.h"
#include "vector.h"

namespace {

// Where row `row` begins.
template <typename Element>
inline const Element* row_of(const stellarator::Rows& rows, int64_t row) {
    return static_cast<const Element*>(rows.at) + row * rows.stride;
}

// How much of a vector lies in the row.
struct Whole {};
struct Part {
    int64_t count;  // the first lanes, at least one and not all
};

template <typename Element>
inline Floats load(const Element* from, Whole) {
    return load(from);
}

// Lanes outside the row are `fill`.
template <typename Element>
inline Floats load(const Element* from, Part part, float fill = 0.0f) {
    alignas(64) Element buffer[kLanes];
    store(buffer, all(fill));
    memcpy(buffer, from, part.count * sizeof(Element));
    return load(buffer);
}

template <typename Element>
inline void store(Element* to, Floats x, Whole) {
    store(to, x);
}

template <typename Element>
inline void store(Element* to, Floats x, Part part) {
    alignas(64) Element buffer[kLanes];
    store(buffer, x);
    memcpy(to, buffer, part.count * sizeof(Element));
}

// Zero in the lanes outside the row.
inline Floats inside(Floats x, Whole) { return x; }
inline Floats inside(Floats x, Part part) {
    alignas(64) float buffer[kLanes] = {};
    memcpy(buffer, &x, part.count * sizeof(float));
    return load(buffer);
}

// What a store to a tensor of this element leaves of x.
inline Floats rounded(Floats x, const float*) { return x; }
inline Floats rounded(Floats x, const uint16_t*) {
    alignas(64) uint16_t narrow[kLanes];
    store(narrow, x);
    return load(narrow);
}

// body(column, Whole or Part) for every vector of columns [begin, end).
template <typename Body>
inline __attribute__((always_inline)) void for_columns(int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, Whole{});
    if (i < end) body(i, Part{end - i});
}

}  // namespace
