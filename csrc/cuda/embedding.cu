// A block adds the rows of kRowsOfChunk ascending ids, in some columns: each reads as many rows,
// whatever the ids. The sum of an id that begins and ends in the chunk is written; that of one that
// comes from the chunk before, or goes on in the next, is a part. A second kernel adds these.
#include "embedding.h"

#include "bfloat16.h"
#include "launch.h"
#include "vector.h"

namespace stellarator {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 4;  // rows that are loaded before the first of them is added
constexpr int kPartsThreads = 256;
constexpr int64_t kNoId = -1;

// Columns [first, first + n) of a row that has C.
template <bool kAligned, int n>
__device__ inline void put(float* row, int first, int C, const float (&sum)[n], bool add) {
#pragma unroll
    for (int k = 0; k < n; k += 4) {
        if (kAligned) {
            Vector<float, 4> four = {};
            if (add) four = load<4>(row + first + k);
#pragma unroll
            for (int i = 0; i < 4; ++i) four.x[i] += sum[k + i];
            store(row + first + k, four);
        } else {
#pragma unroll
            for (int i = k; i < k + 4; ++i) {
                if (first + i < C) row[first + i] = sum[i] + (add ? row[first + i] : 0.0f);
            }
        }
    }
}

template <bool kAligned, int n>
__device__ inline void put(uint16_t* row, int first, int C, const float (&sum)[n], bool add) {
    Vector<uint16_t, n> rounded = {};
    if (add && kAligned) rounded = load<n>(row + first);
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (add && !kAligned && first + k < C) rounded.x[k] = row[first + k];
        rounded.x[k] = round_to_bfloat16(sum[k] + widen(rounded.x[k]));
        if (!kAligned && first + k < C) row[first + k] = rounded.x[k];
    }
    if (kAligned) store(row + first, rounded);
}

template <bool kAligned, typename Element>
__device__ inline Vector<Element, kInVector<Element>> load_columns(const Element* row, int first,
                                                                 int C) {
    constexpr int n = kInVector<Element>;
    if (kAligned) return load<n>(row + first);
    Vector<Element, n> columns = {};
#pragma unroll
    for (int k = 0; k < n; ++k) {
        if (first + k < C) columns.x[k] = row[first + k];
    }
    return columns;
}

template <typename Element, typename Sum, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    embedding_chunks_kernel(const EmbeddingBackward u, int tiles) {
    constexpr int n = kInVector<Element>;
    // Of the chunk, with the last one before it and the first one behind.
    __shared__ int64_t ids[kRowsOfChunk + 2];
    __shared__ int64_t order[kRowsOfChunk];
    const int64_t chunk = blockIdx.x / tiles, begin = chunk * kRowsOfChunk;
    for (int i = threadIdx.x; i < kRowsOfChunk + 2; i += kThreads) {
        const int64_t place = begin - 1 + i;
        ids[i] = place >= 0 && place < u.N ? u.ids[place] : kNoId;
        if (i < kRowsOfChunk && begin + i < u.N) order[i] = u.order[begin + i];
    }
    __syncthreads();
    const int C = u.C;
    const int first = (static_cast<int>(blockIdx.x % tiles) * kThreads + threadIdx.x) * n;
    if (first >= C) return;
    const int64_t left = u.N - begin;
    const int count = left < kRowsOfChunk ? static_cast<int>(left) : kRowsOfChunk;
    const Element* dy = static_cast<const Element*>(u.dy);
    Sum* sums = static_cast<Sum*>(u.sums);
    float* parts = u.parts + 2 * chunk * C;
    bool began_before = ids[0] == ids[1];
    float sum[n] = {};
    for (int i = 0; i < count; i += kAhead) {
        Vector<Element, n> rows[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            if (i + a < count) {
                rows[a] = load_columns<kAligned>(dy + order[i + a] * u.stride, first, C);
            }
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            if (i + a >= count) break;
#pragma unroll
            for (int k = 0; k < n; ++k) sum[k] += widen(rows[a].x[k]);
            const int64_t id = ids[i + a + 1];
            if (id == ids[i + a + 2]) continue;
            if (began_before) {
                put<kAligned>(parts, first, C, sum, false);
            } else {
                put<kAligned>(sums + id * C, first, C, sum, u.add);
            }
            began_before = false;
#pragma unroll
            for (int k = 0; k < n; ++k) sum[k] = 0.0f;
        }
    }
    if (ids[count] != ids[count + 1]) return;
    // The last id goes on. If it has the whole chunk, that is one part, else its first.
    put<kAligned>(began_before ? parts : parts + C, first, C, sum, false);
}

// A thread adds the parts of one column of the id that begins in a chunk and goes on behind it.
template <typename Sum>
__global__ void __launch_bounds__(kPartsThreads)
    embedding_parts_kernel(const EmbeddingBackward u, int tiles) {
    const int64_t chunk = blockIdx.x / tiles, begin = chunk * kRowsOfChunk;
    const int64_t end = begin + kRowsOfChunk;
    const int c = static_cast<int>(blockIdx.x % tiles) * kPartsThreads + threadIdx.x;
    if (end >= u.N || c >= u.C) return;
    const int64_t id = u.ids[end - 1];
    const bool began_before = begin > 0 && u.ids[begin - 1] == id;
    if (u.ids[end] != id || began_before) return;
    const float* part = u.parts + 2 * chunk * u.C + c;
    // How many of the chunks from `end` on begin with the id: ids ascend, so half of them is left
    // with each look. A whole text may be one id (padding, or those that another rank holds).
    int64_t more = 0, most = (u.N - end + kRowsOfChunk - 1) / kRowsOfChunk;
    while (more < most) {
        const int64_t middle = (more + most) / 2;
        if (u.ids[end + middle * kRowsOfChunk] == id) {
            more = middle + 1;
        } else {
            most = middle;
        }
    }
    float sum = part[u.C];
#pragma unroll 8
    for (int64_t i = 1; i <= more; ++i) sum += part[2 * u.C * i];
    Sum* const target = static_cast<Sum*>(u.sums) + id * u.C + c;
    *target = narrow<Sum>(sum + (u.add ? widen(*target) : 0.0f));
}

template <typename Element, typename Sum>
void backward(const EmbeddingBackward& u, void* stream) {
    const bool aligned = rows_aligned(u.dy, u.stride, sizeof(Element)) &&
                         rows_aligned(u.parts, u.C, sizeof(float)) &&
                         rows_aligned(u.sums, u.C, sizeof(Sum)) && u.C % kInVector<Element> == 0;
    const int64_t chunks = (u.N + kRowsOfChunk - 1) / kRowsOfChunk;
    const int columns = kThreads * kInVector<Element>, tiles = (u.C + columns - 1) / columns;
    launch("embedding",
           aligned ? embedding_chunks_kernel<Element, Sum, true>
                   : embedding_chunks_kernel<Element, Sum, false>,
           chunks * tiles, kThreads, stream, u, tiles);
    const int more = (u.C + kPartsThreads - 1) / kPartsThreads;
    launch("embedding", embedding_parts_kernel<Sum>, chunks * more, kPartsThreads, stream, u, more);
}

}  // namespace

void embedding_backward(const EmbeddingBackward& call, void* stream) {
    if (call.N == 0 || call.C == 0) return;
    if (!call.is_bfloat16) {
        backward<float, float>(call, stream);
    } else if (call.sums_are_bfloat16) {
        backward<uint16_t, uint16_t>(call, stream);
    } else {
        backward<uint16_t, float>(call, stream);
    }
}

}  // namespace stellarator
