// Compiled once per instruction set.
#include "column_sums.h"

#include "columns.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

template <typename Element>
void add(const ColumnSums& job, int64_t begin, int64_t end) {
    for_columns(begin, end, [&](int64_t i, auto part) {
        Floats sum = {};
        for (int64_t b = 0; b < job.blocks; ++b) sum += load(job.sums + b * job.stride + i, part);
        store(static_cast<Element*>(job.to) + i, sum, part);
    });
}

}  // namespace

void add_column_range(const ColumnSums& job, int64_t begin, int64_t end) {
    if (job.is_bfloat16) {
        add<uint16_t>(job, begin, end);
    } else {
        add<float>(job, begin, end);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator
