// Group and layer normalisation on f32, with SiLU if asked: the card's form of src/ops/norm.rs.
//
// One block for each span of elements that are normalised together; `pixels` neighbours share a channel's scale.

constexpr unsigned THREADS = 256;

// The sum over the block, given to every thread.
__device__ inline float block_sum(float x, float *shared) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    const float sum = shared[0];
    __syncthreads();
    return sum;
}

extern "C" __global__ void normalise(const float *x, const float *weight, const float *bias, float *y,
                                     unsigned span, unsigned pixels, unsigned channels, float eps, unsigned with_silu) {
    __shared__ float shared[THREADS];
    const size_t start = size_t(blockIdx.x) * span;
    const unsigned first_channel = unsigned(start / pixels % channels);
    x += start;
    y += start;
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < span; i += THREADS) sum += x[i];
    const float mean = block_sum(sum, shared) / span;
    sum = 0.0f;
    for (unsigned i = threadIdx.x; i < span; i += THREADS) sum += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / sqrtf(block_sum(sum, shared) / span + eps);
    for (unsigned i = threadIdx.x; i < span; i += THREADS) {
        const unsigned channel = first_channel + i / pixels;
        const float normed = fmaf((x[i] - mean) * inverse, weight[channel], bias[channel]);
        y[i] = with_silu ? normed / (1.0f + expf(-normed)) : normed;
    }
}
