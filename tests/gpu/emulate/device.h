// Just enough of CUDA to run the kernels of daemon/engine/kernels on the CPU, one block at a time: each thread of a block
// is a fiber that runs until it waits for others. Slow, exact, and without a card.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulated {
constexpr size_t STACK = 128 << 10, SHARED_MAX = 100 << 10;   // what every card since 2020 has

// Threads that wait for each other: a block, or a warp of it.
struct Group {
    unsigned size = 0, arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Dim thread;
    Group *warp;
    bool over;
};

inline Dim block, block_size;
inline Group block_group;
inline Fiber *current;
inline ucontext_t scheduler;
inline float exchanged[1024];
inline const std::function<void()> *body;

inline void wait(Group &group) {
    const unsigned generation = group.generation;
    if (++group.arrived == group.size) {
        group.arrived = 0;
        ++group.generation;
        return;
    }
    while (group.generation == generation) swapcontext(&current->context, &scheduler);
}

inline void enter() {
    (*body)();
    current->over = true;
    swapcontext(&current->context, &scheduler);
}

// Runs `kernel` for each thread of each block of `grid`.
inline void launch(Dim grid, unsigned threads, const std::function<void()> &kernel) {
    std::vector<Fiber> fibers(threads);
    std::vector<Group> warps((threads + 31) / 32);
    body = &kernel;
    block_size = {threads, 1, 1};
    for (block.z = 0; block.z < grid.z; ++block.z)
        for (block.y = 0; block.y < grid.y; ++block.y)
            for (block.x = 0; block.x < grid.x; ++block.x) {
                block_group = {threads, 0, 0};
                for (unsigned t = 0; t < threads; ++t) {
                    Fiber &fiber = fibers[t];
                    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(STACK);
                    fiber.thread = {t, 0, 0};
                    fiber.warp = &warps[t / 32];
                    *fiber.warp = {std::min(32u, threads - t / 32 * 32), 0, 0};
                    fiber.over = false;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.get();
                    fiber.context.uc_stack.ss_size = STACK;
                    fiber.context.uc_link = nullptr;
                    makecontext(&fiber.context, enter, 0);
                }
                for (unsigned left = threads, stuck = 0; left > 0;) {
                    const unsigned before = left;
                    const unsigned generation = block_group.generation;
                    unsigned warp_generations = 0, after = 0;
                    for (const Group &warp : warps) warp_generations += warp.generation;
                    for (Fiber &fiber : fibers) {
                        if (fiber.over) continue;
                        current = &fiber;
                        swapcontext(&scheduler, &fiber.context);
                        left -= fiber.over;
                    }
                    for (const Group &warp : warps) after += warp.generation;
                    const bool moved = left != before || block_group.generation != generation || after != warp_generations;
                    stuck = moved ? 0 : stuck + 1;
                    if (stuck > 2) {
                        std::fprintf(stderr, "threads of a block wait for each other without end\n");
                        std::exit(1);
                    }
                }
            }
}
}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block)
#define blockDim (emulated::block_size)

inline void __syncthreads() { emulated::wait(emulated::block_group); }

inline float __shfl_xor_sync(unsigned, float value, unsigned lane_mask) {
    const unsigned thread = threadIdx.x;
    emulated::exchanged[thread] = value;
    emulated::wait(*emulated::current->warp);
    const float other = emulated::exchanged[thread ^ lane_mask];
    emulated::wait(*emulated::current->warp);
    return other;
}

inline unsigned atomicMin(unsigned *to, unsigned value) {
    const unsigned before = *to;
    *to = std::min(before, value);
    return before;
}
