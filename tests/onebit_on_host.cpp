// Runs the kernels of compression/kernels/onebit.cu on the host: a warp's 32 threads take turns, changing at each warp-wide call.
#include <cstring>
#include <ucontext.h>

#define __device__
#define __global__
struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

static ucontext_t scheduler, threads[32];
static char stacks[32][1 << 16];
static bool done[32];
static long long calls[32];
static double slots[2][32];  // of this warp-wide call and the one before, which a slower lane may still be reading

static const double* all_lanes(double mine) {
    const unsigned lane = threadIdx.x % 32;
    double* slot = slots[calls[lane]++ % 2];
    slot[lane] = mine;
    swapcontext(&threads[lane], &scheduler);
    return slot;
}

static unsigned __ballot_sync(unsigned, bool mine) {
    const double* lanes = all_lanes(mine);
    unsigned word = 0;
    for (int k = 0; k < 32; ++k) word |= (lanes[k] != 0 ? 1u : 0u) << k;
    return word;
}

static double __shfl_xor_sync(unsigned, double mine, int mask) {
    const double* lanes = all_lanes(mine);
    return lanes[(threadIdx.x % 32) ^ mask];
}

static int __popc(unsigned x) { return __builtin_popcount(x); }

static float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

extern "C" {
float float16_values[1 << 16];
unsigned short (*round_to_float16)(float);
}
static float float16_to_float(unsigned short bits) { return float16_values[bits]; }
static unsigned short float_to_float16(float x) { return round_to_float16(x); }

#include "../compression/kernels/onebit.cu"

static void (*kernel5)(const void*, void*, void*, long long, long long);
static void (*kernel4)(const void*, void*, long long, long long);
static void (*kernel8)(const void*, void*, void*, void*, long long, long long, long long, long long);
static void *a, *b, *c, *d;
static long long n, block, most, group;

static void thread() {
    if (most)
        kernel8(a, b, c, d, n, block, most, group);
    else if (c)
        kernel5(a, b, c, n, block);
    else
        kernel4(a, b, n, block);
    done[threadIdx.x % 32] = true;
}

// Runs a kernel of three arrays, or two if the third is null; with `most`, one of panels: of four arrays, which has
// columns instead of a block. Returns 0, or 1 if lanes of a warp made different numbers of warp-wide calls.
extern "C" int run(void* kernel, void* a_, void* b_, void* c_, void* d_, long long n_, long long block_,
                   long long most_, long long group_, int blocks, int warps) {
    std::memcpy(&kernel5, &kernel, sizeof kernel);
    std::memcpy(&kernel4, &kernel, sizeof kernel);
    std::memcpy(&kernel8, &kernel, sizeof kernel);
    a = a_, b = b_, c = c_, d = d_, n = n_, block = block_, most = most_, group = group_;
    gridDim.x = blocks;
    blockDim.x = 32 * warps;
    for (int warp = 0; warp < blocks * warps; ++warp) {
        blockIdx.x = warp / warps;
        for (int lane = 0; lane < 32; ++lane) {
            done[lane] = false;
            calls[lane] = 0;
            getcontext(&threads[lane]);
            threads[lane].uc_stack.ss_sp = stacks[lane];
            threads[lane].uc_stack.ss_size = sizeof stacks[lane];
            threads[lane].uc_link = &scheduler;
            makecontext(&threads[lane], thread, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (int lane = 0; lane < 32; ++lane) {
                if (done[lane]) continue;
                running = true;
                threadIdx.x = warp % warps * 32 + lane;
                swapcontext(&scheduler, &threads[lane]);
            }
        }
        for (int lane = 1; lane < 32; ++lane)
            if (calls[lane] != calls[0]) return 1;
    }
    return 0;
}
