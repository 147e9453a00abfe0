// Enough of CUDA to run gpu_histograms.cu on the CPU: blocks one after the other, the threads of a block as threads.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)

using std::max;
using std::min;

struct Index {
    unsigned int x;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

thread_local Index threadIdx;
Index blockIdx;
unsigned int bins[BINS];  // the dynamic shared memory
pthread_barrier_t of_block, of_warp[THREADS / 32];
unsigned int exchanged[THREADS];

template <typename To, typename From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

unsigned int __float_as_uint(float value) { return bits_as<unsigned int>(value); }
float __uint_as_float(unsigned int bits) { return bits_as<float>(bits); }
unsigned int __float2uint_rz(float value) {
    if (!(value > 0)) return 0;
    return value < 4294967296.0f ? static_cast<unsigned int>(value) : 0xffffffffu;
}
float4 __ldg(const float4* address) { return *address; }

template <typename T>
T atomicAdd(T* address, T value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename Better>
void replace(unsigned int* address, unsigned int value, Better better) {
    unsigned int old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (better(value, old) &&
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}
void atomicMin(unsigned int* address, unsigned int value) { replace(address, value, std::less<unsigned int>()); }
void atomicMax(unsigned int* address, unsigned int value) { replace(address, value, std::greater<unsigned int>()); }

void __syncthreads() { pthread_barrier_wait(&of_block); }
int __syncthreads_or(int here) {
    static int any;
    if (threadIdx.x == 0) any = 0;
    __syncthreads();
    if (here) __atomic_store_n(&any, 1, __ATOMIC_RELAXED);
    __syncthreads();
    int result = any;
    __syncthreads();
    return result;
}

template <typename T>
T __shfl_xor_sync(unsigned int, T value, int lane) {
    pthread_barrier_t* warp = of_warp + threadIdx.x / 32;
    exchanged[threadIdx.x] = bits_as<unsigned int>(value);
    pthread_barrier_wait(warp);
    T other = bits_as<T>(exchanged[threadIdx.x ^ static_cast<unsigned int>(lane)]);
    pthread_barrier_wait(warp);
    return other;
}

template <typename Kernel>
void launch(unsigned int blocks, Kernel kernel) {
    pthread_barrier_init(&of_block, nullptr, THREADS);
    for (auto& warp : of_warp) pthread_barrier_init(&warp, nullptr, 32);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        std::vector<std::thread> threads;
        for (unsigned int i = 0; i < THREADS; ++i)
            threads.emplace_back([i, &kernel] {
                threadIdx.x = i;
                kernel();
            });
        for (auto& thread : threads) thread.join();
    }
}
