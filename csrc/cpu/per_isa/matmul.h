// Small matrix products on packed operands: the inner loops of the kernels that multiply.
//
//   C (m x n, float32, row-major) = or += A (m x k, row-major) * B (k x n, in panels)
//
// An operand is `Work`: bfloat16 where the instruction set multiplies it (AMX, AVX-512-BF16), else
// float32, into which bfloat16 is widened while it is packed. A panel holds 16 columns of B; each
// of its rows holds `kPair` successive elements of k for each column: [k / kPair][16][kPair]. m and
// n are multiples of 16 and k is one of kDepth; packing fills up with zeros.
#pragma once

#include "vector.h"

namespace {

constexpr int kPanel = 16;  // columns

#if defined(__AVX512BF16__)
typedef uint16_t Narrow;  // what bfloat16 is multiplied as
#else
typedef float Narrow;
#endif

template <typename Work>
constexpr int kPair = 4 / sizeof(Work);
template <typename Work>
constexpr int kDepth = 16 * kPair<Work>;

// What an element of a tensor is multiplied as.
template <typename Element>
struct WorkOf;
template <>
struct WorkOf<float> {
    typedef float type;
};
template <>
struct WorkOf<uint16_t> {
    typedef Narrow type;
};

// Rows x Panels sums in registers, over the whole of k. They begin at zero and are added to C at
// the end: a sum over many products (all queries of 12 heads, say) is then one of sums of k terms,
// which rounds less often at its full size than a sum of single terms.
template <int Rows, int Panels>
inline void block(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t k,
                  bool accumulate) {
    constexpr int kParts = kPanel / kLanes;
    Floats sums[Rows][Panels * kParts] = {};
    for (int64_t i = 0; i < k; ++i) {
        Floats row[Panels * kParts];
        for (int p = 0; p < Panels; ++p) {
            for (int part = 0; part < kParts; ++part) {
                row[p * kParts + part] = load(b + (p * k + i) * kPanel + part * kLanes);
            }
        }
        for (int r = 0; r < Rows; ++r) {
            const Floats x = all(a[r * lda + i]);
            for (int p = 0; p < Panels * kParts; ++p) sums[r][p] += x * row[p];
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int p = 0; p < Panels * kParts; ++p) {
            float* to = c + r * ldc + p * kLanes;
            store(to, accumulate ? load(to) + sums[r][p] : sums[r][p]);
        }
    }
}

#if defined(__AVX512BF16__)
template <int Rows, int Panels>
inline void block(float* c, int64_t ldc, const uint16_t* a, int64_t lda, const uint16_t* b,
                  int64_t k, bool accumulate) {
    __m512 sums[Rows][Panels];
    for (int r = 0; r < Rows; ++r) {
        for (int p = 0; p < Panels; ++p) {
            sums[r][p] = accumulate ? _mm512_loadu_ps(c + r * ldc + p * kPanel)
                                    : _mm512_setzero_ps();
        }
    }
    for (int64_t i = 0; i < k; i += 2) {
        __m512i row[Panels];
        for (int p = 0; p < Panels; ++p) {
            row[p] = _mm512_loadu_si512(b + (p * k + i) * kPanel);
        }
        for (int r = 0; r < Rows; ++r) {
            int32_t pair;
            memcpy(&pair, a + r * lda + i, sizeof pair);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            for (int p = 0; p < Panels; ++p) {
                sums[r][p] = _mm512_dpbf16_ps(sums[r][p], x, (__m512bh)row[p]);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int p = 0; p < Panels; ++p) _mm512_storeu_ps(c + r * ldc + p * kPanel, sums[r][p]);
    }
}
#endif

#if defined(__AMX_BF16__)
// Registers 0 to 3 hold sums, 4 and 5 rows of A, 6 and 7 panels of B, 16 rows of 64 bytes each.
struct TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <int Rows, int Panels>  // in tiles: 1 or 2 each
inline void tile_block(float* c, int64_t ldc, const uint16_t* a, int64_t lda, const uint16_t* b,
                       int64_t k, bool accumulate) {
    const int64_t row_bytes = ldc * 4;
    if (accumulate) {
        _tile_loadd(0, c, row_bytes);
        if (Panels > 1) _tile_loadd(1, c + 16, row_bytes);
        if (Rows > 1) _tile_loadd(2, c + 16 * ldc, row_bytes);
        if (Rows > 1 && Panels > 1) _tile_loadd(3, c + 16 * ldc + 16, row_bytes);
    } else {
        _tile_zero(0);
        if (Panels > 1) _tile_zero(1);
        if (Rows > 1) _tile_zero(2);
        if (Rows > 1 && Panels > 1) _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += 32) {
        _tile_loadd(4, a + i, lda * 2);
        _tile_loadd(6, b + i * kPanel, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (Panels > 1) {
            _tile_loadd(7, b + (k + i) * kPanel, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (Rows > 1) {
            _tile_loadd(5, a + 16 * lda + i, lda * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (Panels > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, row_bytes);
    if (Panels > 1) _tile_stored(1, c + 16, row_bytes);
    if (Rows > 1) _tile_stored(2, c + 16 * ldc, row_bytes);
    if (Rows > 1 && Panels > 1) _tile_stored(3, c + 16 * ldc + 16, row_bytes);
}
#endif

// Sets the matrix unit up for this thread while it lives; nothing without AMX.
class MatrixUnit {
public:
#if defined(__AMX_BF16__)
    MatrixUnit() {
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~MatrixUnit() { _tile_release(); }
#else
    MatrixUnit() {}
    ~MatrixUnit() {}
#endif
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// C = A * B, or C += A * B. A MatrixUnit must live.
template <typename Work>
inline void multiply(float* c, int64_t ldc, const Work* a, int64_t lda, const Work* b, int64_t m,
                     int64_t n, int64_t k, bool accumulate) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(Work) == 2) {
        for (int64_t j = 0; j < n; j += 32) {
            const Work* panel = b + j * k;
            for (int64_t i = 0; i < m; i += 32) {
                float* to = c + i * ldc + j;
                const Work* from = a + i * lda;
                const bool two_rows = i + 16 < m, two_panels = j + 16 < n;
                if (two_rows && two_panels) {
                    tile_block<2, 2>(to, ldc, from, lda, panel, k, accumulate);
                } else if (two_rows) {
                    tile_block<2, 1>(to, ldc, from, lda, panel, k, accumulate);
                } else if (two_panels) {
                    tile_block<1, 2>(to, ldc, from, lda, panel, k, accumulate);
                } else {
                    tile_block<1, 1>(to, ldc, from, lda, panel, k, accumulate);
                }
            }
        }
        return;
    }
#endif
    constexpr int kRows = 4;
    constexpr int kPanels = kLanes == 16 ? 4 : 1;
    int64_t j = 0;
    for (; j + kPanels * kPanel <= n; j += kPanels * kPanel) {
        for (int64_t i = 0; i < m; i += kRows) {
            block<kRows, kPanels>(c + i * ldc + j, ldc, a + i * lda, lda, b + j * k, k, accumulate);
        }
    }
    for (; j < n; j += kPanel) {
        for (int64_t i = 0; i < m; i += kRows) {
            block<kRows, 1>(c + i * ldc + j, ldc, a + i * lda, lda, b + j * k, k, accumulate);
        }
    }
}

// to (16 x 16) = transposed from (16 x 16), 32 bits each; strides in elements.
inline void transpose_16x16(const uint32_t* from, int64_t from_stride, uint32_t* to,
                            int64_t to_stride) {
#if defined(__AVX512F__)
    __m512i x[16], y[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * from_stride);
    for (int i = 0; i < 8; ++i) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // x[4 * g + i] holds, in quarter q, rows 4g.. of column 4q + i
        const __m512i low01 = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
        y[i] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        y[8 + i] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        y[4 + i] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, y[i]);
#else
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) {  // the words may be floats or pairs of bfloat16
            memcpy(to + j * to_stride + i, from + i * from_stride + j, sizeof *to);
        }
    }
#endif
}

// Copies `rows` x `width` elements into `to` (full_rows x full_width), the rest zero.
template <typename Element, typename Work>
inline void copy_rows(const Element* from, int64_t stride, int64_t rows, int64_t width, Work* to,
                      int64_t full_rows, int64_t full_width) {
    for (int64_t r = 0; r < rows; ++r) {
        const Element* row = from + r * stride;
        Work* out = to + r * full_width;
        if constexpr (sizeof(Element) == sizeof(Work)) {
            memcpy(out, row, width * sizeof(Work));
        } else {
            int64_t i = 0;
            for (; i + kLanes <= width; i += kLanes) store(out + i, load(row + i));
            for (; i < width; ++i) {
                const uint32_t bits = static_cast<uint32_t>(row[i]) << 16;
                memcpy(out + i, &bits, sizeof bits);
            }
        }
        memset(out + width, 0, (full_width - width) * sizeof(Work));
    }
    memset(to + rows * full_width, 0, (full_rows - rows) * full_width * sizeof(Work));
}

// to[2c] = even[c], to[2c + 1] = odd[c] for the 16 columns of a panel.
inline void interleave(const uint16_t* even, const uint16_t* odd, uint16_t* to) {
#if defined(__AVX512F__)  // GCC 12 makes two halves of what is below
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
    for (int c = 0; c < kPanel; c += kLanes) {
        Halves first, second;
        memcpy(&first, even + c, sizeof first);
        memcpy(&second, odd + c, sizeof second);
        const Bits pairs = __builtin_convertvector(first, Bits) |
                           (__builtin_convertvector(second, Bits) << 16);
        memcpy(to + 2 * c, &pairs, sizeof pairs);
    }
#endif
}

// Panels of B from rows of k: B[i][j] = rows[i][j]. k rows of n elements, both filled up.
template <typename Work>
inline void pack_rows(const Work* rows, int64_t stride, int64_t k, int64_t n, Work* panels) {
    for (int64_t j = 0; j < n; j += kPanel) {
        for (int64_t i = 0; i < k; i += kPair<Work>) {
            Work* to = panels + (j * k) + i * kPanel;
            const Work* from = rows + i * stride + j;
            if constexpr (sizeof(Work) == 4) {
                memcpy(to, from, kPanel * sizeof(Work));
            } else {
                interleave(from, from + stride, to);
            }
        }
    }
}

// Panels of B from rows of n: B[i][j] = rows[j][i]. n rows of k elements, both filled up.
template <typename Work>
inline void pack_columns(const Work* rows, int64_t stride, int64_t k, int64_t n, Work* panels) {
    const int64_t words = k / kPair<Work>;
    for (int64_t j = 0; j < n; j += kPanel) {
        for (int64_t w = 0; w < words; w += 16) {
            transpose_16x16(reinterpret_cast<const uint32_t*>(rows + j * stride) + w,
                            stride / kPair<Work>,
                            reinterpret_cast<uint32_t*>(panels + j * k) + w * kPanel, kPanel);
        }
    }
}

// A from its transpose: to (n x k, row-major) = transposed rows (k x n); both filled up.
template <typename Work>
inline void transpose_rows(const Work* rows, int64_t stride, int64_t k, int64_t n, Work* to,
                           int64_t to_stride) {
    for (int64_t i = 0; i < k; i += kDepth<Work>) {
        for (int64_t j = 0; j < n; j += kPanel) {
            if constexpr (sizeof(Work) == 4) {
                transpose_16x16(reinterpret_cast<const uint32_t*>(rows + i * stride + j), stride,
                                reinterpret_cast<uint32_t*>(to + j * to_stride + i), to_stride);
            } else {
                alignas(64) Work pairs[16 * kPanel * 2];
                pack_rows(rows + i * stride + j, stride, int64_t{32}, int64_t{kPanel}, pairs);
                transpose_16x16(reinterpret_cast<const uint32_t*>(pairs), kPanel,
                                reinterpret_cast<uint32_t*>(to + j * to_stride + i), to_stride / 2);
            }
        }
    }
}

}  // namespace
