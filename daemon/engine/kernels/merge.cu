// W[p] = round(f32(W0[p]) + sum_k w_kp A_k) for many rows of many matrices in one launch: the card's form of
// src/merge/kernel.rs.
//
// Every element is one chain of fused multiply-adds in the order of k, as on the CPU, so that both give the same bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Rows of one matrix that take the same adapters; src/merge/tiles.rs has the same structure.
struct Tile {
    const void *pristine;   // [m, columns] as stored
    void *live;             // [m, columns]
    unsigned columns;
    unsigned rows;          // 1 to ROWS
    unsigned first_row;     // in `rows`
    unsigned first_a;       // in `a`
    unsigned terms;         // rows of A; 0: the rows get the file's values
    unsigned first_w;       // in `w`, which has ROWS values for each term
};

constexpr unsigned ROWS = 8;

__device__ inline float read(float x) { return x; }
__device__ inline float read(__half x) { return __half2float(x); }
__device__ inline float read(__nv_bfloat16 x) { return __bfloat162float(x); }
// Rounds to nearest even.
__device__ inline void store(float x, float *to) { *to = x; }
__device__ inline void store(float x, __half *to) { *to = __float2half_rn(x); }
__device__ inline void store(float x, __nv_bfloat16 *to) { *to = __float2bfloat16_rn(x); }

template <typename S, typename T> struct Same { static constexpr bool value = false; };
template <typename S> struct Same<S, S> { static constexpr bool value = true; };

// One block for each tile. `not_finite` becomes the lowest index in `rows` of a row that did not stay finite.
template <typename S, typename T>
__device__ inline void merge(const Tile *tiles, const unsigned *rows, const float *const *a, const float *w,
                             unsigned *not_finite) {
    const Tile tile = tiles[blockIdx.x];
    const S *pristine[ROWS];
    T *live[ROWS];
    // Loops over ROWS are unrolled, so that all these arrays are registers; a short tile repeats its first row.
#pragma unroll
    for (unsigned r = 0; r < ROWS; ++r) {
        const size_t start = size_t(rows[tile.first_row + (r < tile.rows ? r : 0)]) * tile.columns;
        pristine[r] = static_cast<const S *>(tile.pristine) + start;
        live[r] = static_cast<T *>(tile.live) + start;
    }
    a += tile.first_a;
    w += tile.first_w;
    for (unsigned column = threadIdx.x; column < tile.columns; column += blockDim.x) {
        if (tile.terms == 0 && Same<S, T>::value) {
#pragma unroll
            for (unsigned r = 0; r < ROWS; ++r)
                if (r < tile.rows) live[r][column] = *reinterpret_cast<const T *>(pristine[r] + column);   // every bit
            continue;
        }
        float sum[ROWS];
#pragma unroll
        for (unsigned r = 0; r < ROWS; ++r)
            sum[r] = read(pristine[r][column]);
        for (unsigned k = 0; k < tile.terms; ++k) {
            const float x = a[k][column];
#pragma unroll
            for (unsigned r = 0; r < ROWS; ++r)
                sum[r] = fmaf(w[k * ROWS + r], x, sum[r]);
        }
#pragma unroll
        for (unsigned r = 0; r < ROWS; ++r) {
            if (r >= tile.rows) continue;
            T rounded;
            store(sum[r], &rounded);
            live[r][column] = rounded;
            // Infinite or NaN as stored.
            if (tile.terms > 0 && !(fabsf(read(rounded)) < INFINITY)) atomicMin(not_finite, tile.first_row + r);
        }
    }
}

#define MERGE(NAME, S, T)                                                                                              \
    extern "C" __global__ void NAME(const Tile *tiles, const unsigned *rows, const float *const *a, const float *w,    \
                                    unsigned *not_finite) {                                                            \
        merge<S, T>(tiles, rows, a, w, not_finite);                                                                    \
    }

// merge_STORED_LIVE
MERGE(merge_f32_f32, float, float)
MERGE(merge_f32_f16, float, __half)
MERGE(merge_f32_bf16, float, __nv_bfloat16)
MERGE(merge_f16_f32, __half, float)
MERGE(merge_f16_f16, __half, __half)
MERGE(merge_f16_bf16, __half, __nv_bfloat16)
MERGE(merge_bf16_f32, __nv_bfloat16, float)
MERGE(merge_bf16_f16, __nv_bfloat16, __half)
MERGE(merge_bf16_bf16, __nv_bfloat16, __nv_bfloat16)
