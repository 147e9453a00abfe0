// Histograms of float32 tensors in GPU memory: the counts of pipeline/calibration/histogram.py, value for value.
//
// Defined by the compiler's options: BINS (a power of two), LOG_BINS, THREADS (of a block, a multiple of 32).
// No static shared memory: BINS counters of 4 bytes are all that compute capability 7.5 has.

typedef unsigned long long Count;

// Values of one tensor for one block, at an address that is a multiple of 16.
struct Piece {
    const float* values;
    unsigned int size;
    unsigned int tensor;
};

// What is known of one tensor, beside its counts and the number of its values that are not finite.
struct State {
    unsigned int low;   // ordered() of the least finite value
    unsigned int high;  // ordered() of the greatest
    int exponent;       // the bins reach to 2**exponent
    unsigned int rest;  // magnitude of the least value that `count` left to `count_rest`; NOTHING: it left none
};

// What one thread saw.
struct Seen {
    float low, high;
    unsigned int first;    // values of bin 0: half of all values after ReLU, too many for atomics on one address
    unsigned int largest;  // magnitude
};

#define INFINITE 0x7f800000u
#define NOTHING 0xffffffffu

// The bits of |value|, which are ordered as |value| is; at least INFINITE where it is not finite.
__device__ __forceinline__ unsigned int magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// A key that is ordered as the values are, for atomicMin and atomicMax.
__device__ __forceinline__ unsigned int ordered(float value) {
    unsigned int bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(unsigned int key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// 2**exponent of a normal float32, -126 to 127.
__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<unsigned int>(exponent + 127) << 23);
}

// The least magnitude beyond bins that reach to 2**exponent; INFINITE for 128.
__device__ __forceinline__ unsigned int limit_of(int exponent) {
    return static_cast<unsigned int>(exponent + 127) << 23;
}

// The least exponent with magnitude < limit_of(exponent), as frexp gives it; of numbers below 2**-126 it is -126.
__device__ __forceinline__ int exponent_of(unsigned int magnitude) { return static_cast<int>(magnitude >> 23) - 126; }

// factor = 1 / width; the product is exact for all that reach beyond bin 0. Of values beyond the bins: anything.
__device__ __forceinline__ unsigned int bin_of(float value, float factor) {
    return __float2uint_rz(fabsf(value) * factor);
}

// Take note of a value, and count it where its magnitude is in [from, limit). Without branches but for the atomic.
__device__ __forceinline__ void
see(float value, float factor, unsigned int from, unsigned int limit, unsigned int* bins, Seen& seen) {
    unsigned int size = magnitude(value);
    unsigned int bin = bin_of(value, factor);
    bool inside = size >= from && size < limit;
    seen.low = fminf(seen.low, value);  // neither takes a NaN
    seen.high = fmaxf(seen.high, value);
    seen.largest = max(seen.largest, size);
    seen.first += inside && bin == 0;
    if (inside && bin) atomicAdd(bins + bin, 1u);
}

__device__ __forceinline__ void
see_four(float4 values, float factor, unsigned int from, unsigned int limit, unsigned int* bins, Seen& seen) {
    see(values.x, factor, from, limit, bins, seen);
    see(values.y, factor, from, limit, bins, seen);
    see(values.z, factor, from, limit, bins, seen);
    see(values.w, factor, from, limit, bins, seen);
}

__device__ __forceinline__ unsigned int sum_of_warp(unsigned int value) {
    for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

__device__ __forceinline__ float min_of_warp(float value) {
    for (int lane = 16; lane; lane /= 2) value = fminf(value, __shfl_xor_sync(0xffffffffu, value, lane));
    return value;
}

__device__ __forceinline__ float max_of_warp(float value) {
    for (int lane = 16; lane; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
    return value;
}

// One block counts one piece in shared memory, then adds that to the tensor's counts.
__device__ __forceinline__ Seen
count_piece(const Piece& piece, int exponent, unsigned int from, unsigned int limit, Count* counts) {
    extern __shared__ unsigned int bins[];
    for (unsigned int bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    float factor = power_of_two(LOG_BINS - exponent);
    Seen seen = {__uint_as_float(INFINITE), -__uint_as_float(INFINITE), 0, 0};
    const float4* vectors = reinterpret_cast<const float4*>(piece.values);
    unsigned int whole = piece.size / 4, i = threadIdx.x;
    for (; i + THREADS < whole; i += 2 * THREADS) {  // two at a time: a load waits for memory, not for the atomics
        float4 one = __ldg(vectors + i), two = __ldg(vectors + i + THREADS);
        see_four(one, factor, from, limit, bins, seen);
        see_four(two, factor, from, limit, bins, seen);
    }
    if (i < whole) see_four(__ldg(vectors + i), factor, from, limit, bins, seen);
    for (i = 4 * whole + threadIdx.x; i < piece.size; i += THREADS)
        see(piece.values[i], factor, from, limit, bins, seen);
    unsigned int first = sum_of_warp(seen.first);
    if (threadIdx.x % 32 == 0 && first) atomicAdd(bins, first);
    __syncthreads();
    for (unsigned int bin = threadIdx.x; bin < BINS; bin += THREADS)
        if (bins[bin]) atomicAdd(counts + bin, static_cast<Count>(bins[bin]));
    return seen;
}

// One block a piece: count what the bins reach, and find the range and the values that are not finite.
extern "C" __global__ void __launch_bounds__(THREADS)
count(const Piece* pieces, State* states, Count* counts, Count* not_finite) {
    Piece piece = pieces[blockIdx.x];
    State* state = states + piece.tensor;
    int exponent = state->exponent;
    Seen seen = count_piece(piece, exponent, 0, limit_of(exponent), counts + BINS * static_cast<Count>(piece.tensor));
    float low = min_of_warp(seen.low), high = max_of_warp(seen.high);
    unsigned int bad = 0;
    if (__syncthreads_or(seen.largest >= INFINITE))  // so rare that counting them in the loop is not worth it
        for (unsigned int i = threadIdx.x; i < piece.size; i += THREADS) bad += magnitude(piece.values[i]) >= INFINITE;
    bad = sum_of_warp(bad);
    if (threadIdx.x % 32) return;
    atomicMin(&state->low, ordered(low));
    atomicMax(&state->high, ordered(high));
    if (bad) atomicAdd(not_finite + piece.tensor, static_cast<Count>(bad));
}

// One block a tensor: where a value lies beyond the bins, merge neighbours until they reach it.
extern "C" __global__ void __launch_bounds__(THREADS) grow(State* states, Count* counts) {
    State* state = states + blockIdx.x;
    Count* own = counts + BINS * static_cast<Count>(blockIdx.x);
    int exponent = state->exponent;
    float largest = fmaxf(fmaxf(-unordered(state->low), unordered(state->high)), 0.0f);
    int needed = min(exponent_of(magnitude(largest)), 128);  // infinite values stay beyond the bins
    __syncthreads();  // all have read what the first thread changes
    if (threadIdx.x == 0) {
        state->exponent = max(exponent, needed);
        state->rest = needed > exponent ? limit_of(exponent) : NOTHING;
    }
    int doublings = min(needed - exponent, LOG_BINS);  // after LOG_BINS of them everything is in bin 0
    const int mine = BINS / 2 / THREADS;
    for (int doubling = 0; doubling < doublings; ++doubling) {
        Count sums[mine];
        for (int i = 0; i < mine; ++i) {
            int bin = threadIdx.x + i * THREADS;
            sums[i] = own[2 * bin] + own[2 * bin + 1];
        }
        __syncthreads();
        for (int i = 0; i < mine; ++i) {
            int bin = threadIdx.x + i * THREADS;
            own[bin] = sums[i];
            own[BINS / 2 + bin] = 0;
        }
        __syncthreads();
    }
}

// One block a piece: count what `count` could not, now that the bins reach it.
extern "C" __global__ void __launch_bounds__(THREADS) count_rest(const Piece* pieces, const State* states, Count* counts) {
    Piece piece = pieces[blockIdx.x];
    State state = states[piece.tensor];
    if (state.rest == NOTHING) return;
    count_piece(
        piece, state.exponent, state.rest, limit_of(state.exponent), counts + BINS * static_cast<Count>(piece.tensor)
    );
}
