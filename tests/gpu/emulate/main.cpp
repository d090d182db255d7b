// Runs the kernels of daemon/engine/kernels on the CPU and compares them with plain loops, on odd sizes.

#include <random>
#include <string>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "device.h"
#include "mma.h"

namespace merging {
#include "../../../daemon/engine/kernels/merge.cu"
}
namespace pointwise {
#include "../../../daemon/engine/kernels/pointwise.cu"
}
namespace norms {
#include "../../../daemon/engine/kernels/norm.cu"
}
namespace attending {
alignas(32) thread_local unsigned char memory[emulated::SHARED_MAX];
#include "../../../daemon/engine/kernels/attention.cu"
}

namespace {
std::mt19937 generator(0);
int failures = 0;

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

std::vector<float> random_values(size_t n) {
    std::vector<float> values(n);
    for (float &x : values) x = uniform(-2, 2);
    return values;
}

void expect(bool holds, const std::string &what) {
    if (holds) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
}

void expect_close(const std::vector<float> &got, const std::vector<double> &wanted, double tolerance, const std::string &what) {
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(got[i] - wanted[i]);
        worst = error <= worst ? worst : error;   // NaN stays
        if (std::isnan(error)) worst = NAN;
    }
    std::printf("%s: largest error %.2g\n", what.c_str(), worst);
    expect(worst <= tolerance, what + ": error " + std::to_string(worst));
}

// The definition that src/merge/kernel.rs gives, element by element.
template <typename S, typename T, typename Kernel> void test_merge(const char *name, Kernel kernel) {
    const unsigned m = 64, columns = 131, count = 5;
    std::vector<S> pristine(m * columns);
    for (S &x : pristine) merging::store(uniform(-2, 2), &x);
    std::vector<T> live(m * columns), wanted(m * columns);
    for (unsigned i = 0; i < m * columns; ++i) merging::store(merging::read(pristine[i]), &wanted[i]);
    const std::vector<T> untouched = live;
    const std::vector<float> a = random_values(count * columns);
    std::vector<unsigned> rows;
    std::vector<const float *> factors;
    std::vector<float> w;
    std::vector<merging::Tile> tiles;
    std::vector<bool> written(m, false);
    unsigned row = 1;
    // As many terms, and as many rows, as a tile may have and fewer; none are a row's restoration.
    for (unsigned n : {8u, 1u, 5u, 8u, 3u}) {
        const unsigned terms = tiles.size() % (count + 1);
        tiles.push_back({pristine.data(), live.data(), columns, n, unsigned(rows.size()), unsigned(factors.size()), terms, unsigned(w.size())});
        for (unsigned k = 0; k < terms; ++k) {
            factors.push_back(&a[k * columns]);
            for (unsigned r = 0; r < merging::ROWS; ++r) w.push_back(uniform(-1, 1));
        }
        for (unsigned r = 0; r < n; ++r, row += 1 + r % 3) {
            rows.push_back(row);
            written[row] = true;
            for (unsigned j = 0; terms > 0 && j < columns; ++j) {
                float sum = merging::read(pristine[row * columns + j]);
                for (unsigned k = 0; k < terms; ++k)
                    sum = std::fma(w[tiles.back().first_w + k * merging::ROWS + r], a[k * columns + j], sum);
                merging::store(sum, &wanted[row * columns + j]);
            }
        }
    }
    unsigned not_finite = ~0u;
    const auto run = [&] {
        emulated::launch({unsigned(tiles.size())}, 64, [&] { kernel(tiles.data(), rows.data(), factors.data(), w.data(), &not_finite); });
    };
    run();
    expect(not_finite == ~0u, std::string(name) + ": finite rows are reported");
    for (unsigned i = 0; i < m; ++i)
        expect(std::memcmp(&live[i * columns], written[i] ? &wanted[i * columns] : &untouched[i * columns], columns * sizeof(T)) == 0,
               std::string(name) + ": the bits of row " + std::to_string(i));
    // The third tile's second row overflows.
    w[tiles[2].first_w + 1] = INFINITY;
    run();
    expect(not_finite == tiles[2].first_row + 1, std::string(name) + ": the row that overflows");
}

double cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

void test_pointwise() {
    const unsigned width = 37, tokens = 9;
    const std::vector<float> x = random_values(2 * width * tokens);
    std::vector<float> y(x.size());
    std::vector<double> wanted(x.size());
    const auto one = [&](const char *name, auto kernel, auto function) {
        emulated::launch({unsigned((x.size() + 255) / 256)}, 256, [&] { kernel(x.data(), y.data(), x.size()); });
        for (size_t i = 0; i < x.size(); ++i) wanted[i] = function(double(x[i]));
        expect_close(y, wanted, 1e-6, name);
    };
    one("silu", pointwise::silu, [](double x) { return x / (1 + std::exp(-x)); });
    one("gelu", pointwise::gelu, [](double x) { return x * cdf(x); });
    one("quick_gelu", pointwise::quick_gelu, [](double x) { return x / (1 + std::exp(-1.702 * x)); });
    y.resize(width * tokens);
    wanted.resize(width * tokens);
    emulated::launch({unsigned((y.size() + 255) / 256)}, 256, [&] { pointwise::geglu(x.data(), y.data(), y.size(), width); });
    for (unsigned t = 0; t < tokens; ++t)
        for (unsigned i = 0; i < width; ++i) {
            const double value = x[t * 2 * width + i], gate = x[t * 2 * width + width + i];
            wanted[t * width + i] = value * gate * cdf(gate);
        }
    expect_close(y, wanted, 1e-6, "geglu");
}

void test_norm(const char *name, unsigned samples, unsigned channels, unsigned pixels, unsigned groups, bool with_silu) {
    const unsigned span = channels / groups * pixels;
    const std::vector<float> x = random_values(samples * channels * pixels), weight = random_values(channels), bias = random_values(channels);
    std::vector<float> y(x.size());
    std::vector<double> wanted(x.size());
    emulated::launch({samples * groups}, 256, [&] {
        norms::normalise(x.data(), weight.data(), bias.data(), y.data(), span, pixels, channels, 1e-5f, with_silu);
    });
    for (size_t start = 0; start < x.size(); start += span) {
        double mean = 0, variance = 0;
        for (unsigned i = 0; i < span; ++i) mean += x[start + i] / double(span);
        for (unsigned i = 0; i < span; ++i) variance += (x[start + i] - mean) * (x[start + i] - mean) / span;
        for (unsigned i = 0; i < span; ++i) {
            const size_t channel = (start + i) / pixels % channels;
            const double normed = (x[start + i] - mean) / std::sqrt(variance + 1e-5) * weight[channel] + bias[channel];
            wanted[start + i] = with_silu ? normed / (1 + std::exp(-normed)) : normed;
        }
    }
    expect_close(y, wanted, 1e-5, name);
}

void test_attention(unsigned samples, unsigned queries, unsigned keys, unsigned heads, unsigned depth, bool causal) {
    const unsigned width = heads * depth, padded = (depth + 15) / 16 * 16;
    const float scale = 1 / std::sqrt(float(depth));
    const auto halves = [](size_t n) {
        std::vector<__half> values(n);
        for (__half &x : values) x = __float2half_rn(uniform(-2, 2));
        return values;
    };
    const auto q = halves(samples * queries * width), k = halves(samples * keys * width), v = halves(samples * keys * width);
    std::vector<float> y(q.size(), NAN);
    std::vector<double> wanted(q.size());
    const size_t bytes = 2 * (attending::QUERIES * padded + attending::KEYS * padded + attending::QUERIES * attending::KEYS)
        + 4 * (attending::QUERIES * attending::KEYS + attending::QUERIES * padded);
    expect(bytes <= emulated::SHARED_MAX, "attention takes too much shared memory: " + std::to_string(bytes));
    std::memset(attending::memory, 0xff, sizeof attending::memory);   // NaN
    const unsigned blocks = (queries + attending::QUERIES - 1) / attending::QUERIES;
    emulated::launch({blocks, heads, samples}, attending::THREADS, [&] {
        attending::attention(q.data(), k.data(), v.data(), y.data(), queries, keys, heads, depth, padded, scale, causal);
    });
    for (unsigned b = 0; b < samples; ++b)
        for (unsigned h = 0; h < heads; ++h)
            for (unsigned i = 0; i < queries; ++i) {
                const auto at = [&](const auto &x, unsigned rows, unsigned row, unsigned d) {
                    return double(x[(size_t(b) * rows + row) * width + h * depth + d]);
                };
                const unsigned visible = causal ? i + 1 : keys;
                std::vector<double> weights(visible, 0.0);
                double total = 0;
                for (unsigned j = 0; j < visible; ++j) {
                    for (unsigned d = 0; d < depth; ++d) weights[j] += at(q, queries, i, d) * at(k, keys, j, d);
                    weights[j] = std::exp(weights[j] * scale);
                    total += weights[j];
                }
                for (unsigned d = 0; d < depth; ++d) {
                    double sum = 0;
                    for (unsigned j = 0; j < visible; ++j) sum += weights[j] * at(v, keys, j, d);
                    wanted[(size_t(b) * queries + i) * width + h * depth + d] = sum / total;
                }
            }
    expect_close(y, wanted, 2e-3, "attention " + std::to_string(samples) + " x " + std::to_string(queries) + " x "
        + std::to_string(keys) + ", " + std::to_string(heads) + " heads of " + std::to_string(depth) + (causal ? ", causal" : ""));
}
}  // namespace

int main() {
    using namespace merging;
    test_merge<float, float>("merge_f32_f32", merge_f32_f32);
    test_merge<float, __half>("merge_f32_f16", merge_f32_f16);
    test_merge<float, __nv_bfloat16>("merge_f32_bf16", merge_f32_bf16);
    test_merge<__half, float>("merge_f16_f32", merge_f16_f32);
    test_merge<__half, __half>("merge_f16_f16", merge_f16_f16);
    test_merge<__half, __nv_bfloat16>("merge_f16_bf16", merge_f16_bf16);
    test_merge<__nv_bfloat16, float>("merge_bf16_f32", merge_bf16_f32);
    test_merge<__nv_bfloat16, __half>("merge_bf16_f16", merge_bf16_f16);
    test_merge<__nv_bfloat16, __nv_bfloat16>("merge_bf16_bf16", merge_bf16_bf16);
    test_pointwise();
    test_norm("group norm", 2, 6, 35, 3, false);
    test_norm("group norm with silu", 2, 6, 35, 3, true);
    test_norm("group norm of one pixel", 3, 8, 1, 2, true);
    test_norm("layer norm", 7, 320, 1, 1, false);
    test_attention(2, 70, 77, 2, 40, false);
    test_attention(1, 64, 64, 1, 64, false);
    test_attention(1, 1, 1, 3, 8, false);
    test_attention(1, 130, 33, 1, 160, false);
    test_attention(1, 77, 77, 2, 64, true);
    if (failures == 0) std::puts("the kernels agree with plain loops");
    return failures != 0;
}
