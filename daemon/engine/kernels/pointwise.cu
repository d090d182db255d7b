// SiLU, GELU, quick-GELU and GEGLU on f32: the card's form of src/ops/elementwise.rs and src/ops/geglu.rs.

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
// The normal distribution's cumulative function.
__device__ inline float normal_cdf(float x) { return 0.5f * erfcf(-0.70710678f * x); }

__device__ inline size_t element() { return size_t(blockIdx.x) * blockDim.x + threadIdx.x; }

extern "C" __global__ void silu(const float *x, float *y, size_t n) {
    const size_t i = element();
    if (i < n) y[i] = x[i] * sigmoid(x[i]);
}

extern "C" __global__ void gelu(const float *x, float *y, size_t n) {
    const size_t i = element();
    if (i < n) y[i] = x[i] * normal_cdf(x[i]);
}

extern "C" __global__ void quick_gelu(const float *x, float *y, size_t n) {
    const size_t i = element();
    if (i < n) y[i] = x[i] * sigmoid(1.702f * x[i]);
}

// x [tokens, 2 width] -> y [tokens, width]; n = tokens * width.
extern "C" __global__ void geglu(const float *x, float *y, size_t n, size_t width) {
    const size_t i = element();
    if (i >= n) return;
    const float *token = x + i / width * 2 * width;
    const float value = token[i % width], gate = token[width + i % width];
    y[i] = value * (gate * normal_cdf(gate));
}
