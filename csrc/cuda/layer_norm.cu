// A block holds a row in registers, eight elements in each thread, as they are stored. Forward: one
// row. Backward: every gridDim.x-th row, whose parts of dweight and dbias stay in registers; the
// next row of 16-bit elements is under way while the block adds up the sums of this one.
// Rows whose vectors are not aligned are read and written element by element.
#include "layer_norm.h"

#include "bfloat16.h"
#include "launch.h"
#include "vector.h"

namespace stellarator {
namespace {

constexpr int kWarp = 32;
constexpr int kElements = 8;  // of a row that a thread holds
constexpr int kMaxThreads = kWidestRow / kElements;  // which leaves each 80 registers
constexpr unsigned kAllLanes = 0xffffffffu;
// Of the kernel that adds the partial sums: columns, and groups of rows, of a block.
constexpr int kColumns = 32;
constexpr int kGroups = 8;

// What a thread holds of a row, zeros behind its end. In words as they are loaded: elements of 16
// bits the compiler would take apart at once, and so wait for what is read ahead.
template <typename Element>
struct Piece {
    static constexpr int kInWord = 4 / sizeof(Element);
    Vector<uint32_t, 4> parts[kElements / kInVector<Element>];

    __device__ uint32_t& word(int k) {
        return parts[k / kInVector<Element>].x[k % kInVector<Element> / kInWord];
    }
    __device__ float operator[](int k) const {
        const uint32_t word = const_cast<Piece*>(this)->word(k);
        if (kInWord == 1) return __uint_as_float(word);
        return __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
    __device__ void set(int k, float value) {
        if (kInWord == 1) {
            word(k) = __float_as_uint(value);
        } else {
            const uint32_t bits = round_to_bfloat16(value);
            const uint32_t other = word(k) & (k % 2 == 0 ? 0xffff0000u : 0xffffu);
            word(k) = other | bits << (k % 2 == 0 ? 0 : 16);
        }
    }
};

// The column of the k-th element that this thread holds.
template <typename Element>
__device__ inline int column(int k) {
    constexpr int n = kInVector<Element>;
    return (k / n * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * n + k % n;
}

template <bool kAligned, typename Element>
__device__ inline Piece<Element> load_piece(const Element* row, int C) {
    Piece<Element> piece = {};
#pragma unroll
    for (int k = 0; k < kElements; k += kAligned ? kInVector<Element> : 1) {
        const Element* from = row + column<Element>(k);
        if (column<Element>(k) >= C) continue;
        if (kAligned) {
            piece.parts[k / kInVector<Element>] = load<4>(reinterpret_cast<const uint32_t*>(from));
        } else {
            piece.set(k, widen(*from));
        }
    }
    return piece;
}

template <bool kAligned, typename Element>
__device__ inline void store_piece(Element* row, int C, const Piece<Element>& piece) {
#pragma unroll
    for (int k = 0; k < kElements; k += kAligned ? kInVector<Element> : 1) {
        Element* to = row + column<Element>(k);
        if (column<Element>(k) >= C) continue;
        if (kAligned) {
            store(reinterpret_cast<uint32_t*>(to), piece.parts[k / kInVector<Element>]);
        } else {
            *to = narrow<Element>(piece[k]);
        }
    }
}

struct Sums {
    float first, second;
};

__device__ inline Sums warp_sums(Sums own) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        own.first += __shfl_xor_sync(kAllLanes, own.first, distance);
        own.second += __shfl_xor_sync(kAllLanes, own.second, distance);
    }
    return own;
}

// The sums over the block, in all threads. `warps` may be used again behind the next barrier.
__device__ inline Sums block_sums(Sums own, Sums* warps) {
    const int lane = threadIdx.x % kWarp;
    own = warp_sums(own);
    if (lane == 0) warps[threadIdx.x / kWarp] = own;
    __syncthreads();
    const Sums none = {0.0f, 0.0f};
    return warp_sums(lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : none);
}

template <typename Element>
__device__ inline const Element* row_of(const LayerNormRows& rows, int64_t row) {
    return static_cast<const Element*>(rows.data) + row * rows.stride;
}

template <typename Element, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    layer_norm_forward_kernel(const LayerNormForward u) {
    __shared__ Sums warps[2][kWarp];
    const int64_t row = blockIdx.x;
    const int C = u.C;
    Piece<Element> x = load_piece<kAligned>(row_of<Element>(u.x, row), C);
    if (u.residual.data != nullptr) {
        const auto residual = load_piece<kAligned>(row_of<Element>(u.residual, row), C);
#pragma unroll
        for (int k = 0; k < kElements; ++k) x.set(k, x[k] + residual[k]);
        store_piece<kAligned>(static_cast<Element*>(u.summed) + row * C, C, x);
    }
    Sums sums = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kElements; ++k) sums.first += x[k];
    const float mean = block_sums(sums, warps[0]).first / C;
    sums.first = 0.0f;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
        const float centred = column<Element>(k) < C ? x[k] - mean : 0.0f;
        sums.first = fmaf(centred, centred, sums.first);
    }
    const float rstd = 1.0f / sqrtf(block_sums(sums, warps[1]).first / C + u.eps);
    const auto weight = load_piece<kAligned>(static_cast<const Element*>(u.weight), C);
    Piece<Element> bias = {};
    if (u.bias != nullptr) bias = load_piece<kAligned>(static_cast<const Element*>(u.bias), C);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
        x.set(k, fmaf((x[k] - mean) * rstd, weight[k], bias[k]));
    }
    store_piece<kAligned>(static_cast<Element*>(u.y) + row * C, C, x);
    if (threadIdx.x == 0) {
        u.mean[row] = mean;
        u.rstd[row] = rstd;
    }
}

// What the sums of a row are made of.
template <typename Element>
struct Gradients {
    Piece<Element> dy, summed;
    float statistic;  // of even lanes the mean, of odd ones rstd
};

template <bool kAligned, typename Element>
__device__ inline void load_gradients(const LayerNormBackward& u, int64_t row,
                                      Gradients<Element>& found) {
    found.dy = load_piece<kAligned>(row_of<Element>(u.dy, row), u.C);
    found.summed = load_piece<kAligned>(row_of<Element>(u.summed, row), u.C);
    // Were it the same value for all, the compiler would wait for it, for a uniform register.
    found.statistic = (threadIdx.x % 2 == 0 ? u.mean : u.rstd)[row];
}

template <typename Element, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    layer_norm_backward_kernel(const LayerNormBackward u) {
    constexpr bool kAhead = sizeof(Element) == 2 && kAligned;  // else there are no registers for it
    __shared__ Sums warps[2][kWarp];
    const int C = u.C;
    const Element* const weights = static_cast<const Element*>(u.weight);
    Piece<Element> weight;  // for all rows, if there are registers for it
    if (kAligned) weight = load_piece<kAligned>(weights, C);
    const float share = 1.0f / C;
    float dweight[kElements] = {}, dbias[kElements] = {};
    Gradients<Element> next = {};
    if (kAhead) load_gradients<kAligned>(u, blockIdx.x, next);
    int turn = 0;
    for (int64_t row = blockIdx.x; row < u.N; row += gridDim.x) {
        if (!kAligned) weight = load_piece<kAligned>(weights, C);
        if (!kAhead) load_gradients<kAligned>(u, row, next);
        const Gradients<Element> own = next;
        const float mean = __shfl_sync(kAllLanes, own.statistic, 0);
        const float rstd = __shfl_sync(kAllLanes, own.statistic, 1);
        if (kAhead && row + gridDim.x < u.N) load_gradients<kAligned>(u, row + gridDim.x, next);
        Piece<Element> dsummed = {};
        if (u.dsummed.data != nullptr) {
            dsummed = load_piece<kAligned>(row_of<Element>(u.dsummed, row), C);
        }
        Sums sums = {0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            const float n = (own.summed[k] - mean) * rstd, g = own.dy[k] * weight[k];
            dweight[k] = fmaf(own.dy[k], n, dweight[k]);
            dbias[k] += own.dy[k];
            sums.first += g;
            sums.second = fmaf(g, n, sums.second);
        }
        sums = block_sums(sums, warps[turn]);
        turn ^= 1;
        const float mean_g = sums.first * share, mean_gn = sums.second * share;
        Piece<Element> dx = {};
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            const float n = (own.summed[k] - mean) * rstd, g = own.dy[k] * weight[k];
            dx.set(k, fmaf(rstd, fmaf(-n, mean_gn, g - mean_g), dsummed[k]));
        }
        store_piece<kAligned>(static_cast<Element*>(u.dx) + row * C, C, dx);
    }
    if (u.partials == nullptr) return;
    float* own = u.partials + 2 * static_cast<int64_t>(blockIdx.x) * C;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
        if (const int c = column<Element>(k); c < C) {
            own[c] = dweight[k];
            own[C + c] = dbias[k];
        }
    }
}

// Each group adds every kGroups-th of the partial sums of its columns, then the first adds groups.
template <typename Element>
__global__ void __launch_bounds__(kColumns* kGroups)
    layer_norm_partials_kernel(const LayerNormBackward u) {
    __shared__ float groups[kGroups][kColumns];
    const int lane = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    const int c = static_cast<int>(blockIdx.x) * kColumns + lane;  // of dweight, then of dbias
    float sum = 0.0f;
    if (c < 2 * u.C) {
#pragma unroll 4
        for (int64_t i = group; i < u.blocks; i += kGroups) sum += u.partials[2 * u.C * i + c];
    }
    groups[group][lane] = sum;
    __syncthreads();
    if (group > 0 || c >= 2 * u.C) return;
    for (int i = 1; i < kGroups; ++i) sum += groups[i][lane];
    Element* const dweight = static_cast<Element*>(u.dweight);
    Element* const dbias = static_cast<Element*>(u.dbias);
    if (c < u.C) {
        dweight[c] = narrow<Element>(sum);
    } else if (dbias != nullptr) {
        dbias[c - u.C] = narrow<Element>(sum);
    }
}

int threads_of(int C) {
    return (C + kElements * kWarp - 1) / (kElements * kWarp) * kWarp;
}

template <typename Element>
void forward(const LayerNormForward& u, void* stream) {
    bool all = true;  // rows; the dense ones, of C elements, end there as well
    for (const LayerNormRows& x : {u.x, u.residual}) {
        all = all && rows_aligned(x.data, x.stride, sizeof(Element));
    }
    for (const void* x : {u.weight, u.bias, const_cast<const void*>(u.y),
                          const_cast<const void*>(u.summed)}) {
        all = all && rows_aligned(x, u.C, sizeof(Element));
    }
    launch("layer_norm",
           all ? layer_norm_forward_kernel<Element, true>
               : layer_norm_forward_kernel<Element, false>,
           u.N, threads_of(u.C), stream, u);
}

template <typename Element>
void backward(const LayerNormBackward& u, void* stream) {
    bool all = rows_aligned(u.weight, u.C, sizeof(Element)) &&
               rows_aligned(u.dx, u.C, sizeof(Element));
    for (const LayerNormRows& x : {u.dy, u.dsummed, u.summed}) {
        all = all && rows_aligned(x.data, x.stride, sizeof(Element));
    }
    launch("layer_norm",
           all ? layer_norm_backward_kernel<Element, true>
               : layer_norm_backward_kernel<Element, false>,
           u.blocks, threads_of(u.C), stream, u);
    if (u.partials == nullptr) return;
    launch("layer_norm", layer_norm_partials_kernel<Element>, (2 * u.C + kColumns - 1) / kColumns,
           kColumns * kGroups, stream, u);
}

}  // namespace

int64_t layer_norm_blocks(int64_t N, int C, int multiprocessors) {
    const int64_t most = static_cast<int64_t>(kMaxThreads / threads_of(C)) * multiprocessors;
    return N < most ? N : most;
}

void layer_norm_forward(const LayerNormForward& call, void* stream) {
    if (call.N == 0) return;
    call.is_bfloat16 ? forward<uint16_t>(call, stream) : forward<float>(call, stream);
}

void layer_norm_backward(const LayerNormBackward& call, void* stream) {
    if (call.N == 0) return;
    call.is_bfloat16 ? backward<uint16_t>(call, stream) : backward<float>(call, stream);
}

}  // namespace stellarator
