// Matrices of a warp: every lane keeps the whole of each.
#pragma once
#include <type_traits>
#include "device.h"

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void> struct fragment {
    static_assert(M == 16 && N == 16 && K == 16);
    T at[16][16];
};

// What the hardware asks of a matrix in memory: 32-byte alignment, rows of whole 16 bytes.
template <typename T> void check(const T *from, unsigned stride) {
    if (uintptr_t(from) % 32 != 0 || stride * sizeof(T) % 16 != 0) {
        std::fprintf(stderr, "a matrix at %p with rows of %zu bytes is not aligned\n", (const void *)from, stride * sizeof(T));
        std::exit(1);
    }
}

template <typename F> void fill_fragment(F &f, float value) {
    for (auto &row : f.at) std::fill(std::begin(row), std::end(row), value);
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *from, unsigned stride) {
    check(from, stride);
    emulated::wait(*emulated::current->warp);
    for (unsigned i = 0; i < 16; ++i)
        for (unsigned j = 0; j < 16; ++j)
            f.at[i][j] = std::is_same_v<Layout, col_major> ? from[j * stride + i] : from[i * stride + j];
    emulated::wait(*emulated::current->warp);
}

template <typename T>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, T> &f, const T *from, unsigned stride, layout_t) {
    check(from, stride);
    emulated::wait(*emulated::current->warp);
    for (unsigned i = 0; i < 16; ++i) std::copy(from + i * stride, from + i * stride + 16, f.at[i]);
    emulated::wait(*emulated::current->warp);
}

template <typename T>
void store_matrix_sync(T *to, const fragment<accumulator, 16, 16, 16, T> &f, unsigned stride, layout_t) {
    check(to, stride);
    emulated::wait(*emulated::current->warp);
    for (unsigned i = 0; i < 16; ++i) std::copy(f.at[i], f.at[i] + 16, to + i * stride);
    emulated::wait(*emulated::current->warp);
}

template <typename A, typename B>
void mma_sync(fragment<accumulator, 16, 16, 16, float> &d, const A &a, const B &b,
              const fragment<accumulator, 16, 16, 16, float> &c) {
    fragment<accumulator, 16, 16, 16, float> sum;
    for (unsigned i = 0; i < 16; ++i)
        for (unsigned j = 0; j < 16; ++j) {
            sum.at[i][j] = c.at[i][j];
            for (unsigned k = 0; k < 16; ++k) sum.at[i][j] += float(a.at[i][k]) * float(b.at[k][j]);
        }
    d = sum;
}
}  // namespace nvcuda::wmma
