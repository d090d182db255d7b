// softmax(scale q k^T) v on tensor cores without the matrix of scores: some queries and some keys at a time, with a
// running softmax (Dao et al., 2022, "FlashAttention"). The card's form of src/ops/attention.rs.
//
// q [B, T, heads * d], k and v [B, S, heads * d] in f16 -> y [B, T, heads * d] in f32; sums are f32. One block of four
// warps takes QUERIES queries of one head of one sample; each warp has 16 of them to itself.

#include <cuda_fp16.h>
#include <mma.h>

using namespace nvcuda;

constexpr unsigned WARPS = 4, THREADS = 32 * WARPS, EDGE = 16, QUERIES = WARPS * EDGE, KEYS = 32;

using Left = wmma::fragment<wmma::matrix_a, EDGE, EDGE, EDGE, __half, wmma::row_major>;
using Right = wmma::fragment<wmma::matrix_b, EDGE, EDGE, EDGE, __half, wmma::row_major>;
using RightTransposed = wmma::fragment<wmma::matrix_b, EDGE, EDGE, EDGE, __half, wmma::col_major>;
using Sum = wmma::fragment<wmma::accumulator, EDGE, EDGE, EDGE, float>;

// Rows first..first + count of one head as [count, padded], zeros beyond its end and its width.
__device__ inline void load(const __half *from, unsigned first, unsigned count, unsigned end, unsigned width,
                            unsigned depth, unsigned padded, __half *to) {
    for (unsigned i = threadIdx.x; i < count * padded; i += THREADS) {
        const unsigned row = first + i / padded, column = i % padded;
        to[i] = row < end && column < depth ? from[size_t(row) * width + column] : __float2half_rn(0.0f);
    }
}

// `padded` is d rounded up to a multiple of 16. Shared memory, in this order: q [QUERIES, padded], k and then v
// [KEYS, padded], e^scores [QUERIES, KEYS] in f16; scores [QUERIES, KEYS], sums [QUERIES, padded] in f32.
extern "C" __global__ void attention(const __half *q, const __half *k, const __half *v, float *y, unsigned queries,
                                     unsigned keys, unsigned heads, unsigned depth, unsigned padded, float scale,
                                     unsigned causal) {
    extern __shared__ __align__(32) unsigned char memory[];
    __half *const q_tile = reinterpret_cast<__half *>(memory);
    __half *const kv_tile = q_tile + QUERIES * padded;
    __half *const weights = kv_tile + KEYS * padded;
    float *const scores = reinterpret_cast<float *>(weights + QUERIES * KEYS);
    float *const sums = scores + QUERIES * KEYS;

    const unsigned first = blockIdx.x * QUERIES, head = blockIdx.y, sample = blockIdx.z;
    const unsigned width = heads * depth, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    q += size_t(sample) * queries * width + head * depth;
    k += size_t(sample) * keys * width + head * depth;
    v += size_t(sample) * keys * width + head * depth;
    y += size_t(sample) * queries * width + head * depth;

    // What this warp has to itself. Two lanes share a query's row of scores: each has every other key.
    __half *const my_q = q_tile + warp * EDGE * padded, *const my_weights = weights + warp * EDGE * KEYS;
    float *const my_scores = scores + warp * EDGE * KEYS, *const my_sums = sums + warp * EDGE * padded;
    const unsigned my_row = lane / 2, query = first + warp * EDGE + my_row;
    float maximum = -INFINITY, total = 0.0f;

    load(q, first, QUERIES, queries, width, depth, padded, q_tile);
    for (unsigned i = threadIdx.x; i < QUERIES * padded; i += THREADS) sums[i] = 0.0f;

    // Keys that some query of this block sees.
    const unsigned end = causal ? min(keys, first + QUERIES) : keys;
    for (unsigned key = 0; key < end; key += KEYS) {
        __syncthreads();
        load(k, key, KEYS, keys, width, depth, padded, kv_tile);
        __syncthreads();
        for (unsigned column = 0; column < KEYS; column += EDGE) {
            Sum sum;
            wmma::fill_fragment(sum, 0.0f);
            for (unsigned d = 0; d < padded; d += EDGE) {
                Left left;
                RightTransposed right;
                wmma::load_matrix_sync(left, my_q + d, padded);
                wmma::load_matrix_sync(right, kv_tile + column * padded + d, padded);
                wmma::mma_sync(sum, left, right, sum);
            }
            wmma::store_matrix_sync(my_scores + column, sum, KEYS, wmma::mem_row_major);
        }
        __syncthreads();
        load(v, key, KEYS, keys, width, depth, padded, kv_tile);

        // The running softmax: weights = e^(score - maximum), with what was summed before brought to the same maximum.
        float largest = maximum;
        for (unsigned i = lane % 2; i < KEYS; i += 2) {
            const bool visible = key + i < keys && (!causal || key + i <= query);
            float &score = my_scores[my_row * KEYS + i];
            score = visible ? score * scale : -INFINITY;
            largest = fmaxf(largest, score);
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        const float shrink = maximum > -INFINITY ? expf(maximum - largest) : 0.0f;
        float added = 0.0f;
        for (unsigned i = lane % 2; i < KEYS; i += 2) {
            const float score = my_scores[my_row * KEYS + i];
            // As it enters the product, so that the weights used add up to the total.
            const __half weight = __float2half_rn(score == -INFINITY ? 0.0f : expf(score - largest));
            my_weights[my_row * KEYS + i] = weight;
            added += __half2float(weight);
        }
        added += __shfl_xor_sync(0xffffffffu, added, 1);
        total = total * shrink + added;
        maximum = largest;
        if (shrink != 1.0f)
            for (unsigned d = lane % 2; d < padded; d += 2) my_sums[my_row * padded + d] *= shrink;
        __syncthreads();

        for (unsigned d = 0; d < padded; d += EDGE) {
            Sum sum;
            wmma::load_matrix_sync(sum, my_sums + d, padded, wmma::mem_row_major);
            for (unsigned column = 0; column < KEYS; column += EDGE) {
                Left left;
                Right right;
                wmma::load_matrix_sync(left, my_weights + column, KEYS);
                wmma::load_matrix_sync(right, kv_tile + column * padded + d, padded);
                wmma::mma_sync(sum, left, right, sum);
            }
            wmma::store_matrix_sync(my_sums + d, sum, padded, wmma::mem_row_major);
        }
    }
    __syncthreads();
    if (query < queries)
        for (unsigned d = lane % 2; d < depth; d += 2) y[size_t(query) * width + d] = my_sums[my_row * padded + d] / total;
}
