// 1-bit encode and decode on a GPU. What they compute: onebit_reference.py, bit for bit. Compile with --fmad=false.
//
// A warp takes a quantization block: lane k has values k, k + 32, ..., so that a ballot is 32 bits of the payload, and
// the lanes' sums are the reference's. No headers are included: CuPy compiles this file at run time.

struct Float16 { unsigned short bits; };
struct Bfloat16 { unsigned short bits; };

// The type that values are computed in.
template <class T> struct WideOf { typedef float type; };
template <> struct WideOf<double> { typedef double type; };

#ifdef __CUDACC__  // else a test runs this file on the host, and brings its own
__device__ float float16_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ unsigned short float_to_float16(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

__device__ double widen(double x) { return x; }
__device__ float widen(float x) { return x; }
__device__ float widen(Float16 x) { return float16_to_float(x.bits); }
__device__ float widen(Bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ void narrow(double x, double& out) { out = x; }
__device__ void narrow(float x, float& out) { out = x; }
__device__ void narrow(float x, Float16& out) { out.bits = float_to_float16(x); }
__device__ void narrow(float x, Bfloat16& out) {
    unsigned bits = __float_as_uint(x);
    // To nearest, ties to even; a NaN stays one.
    out.bits = (x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

const unsigned ALL = 0xffffffffu;
const int LEVELS_NBYTES = 8;

// Payloads begin at any byte, so words go byte by byte.
__device__ void put_word(unsigned char* to, unsigned word, long long nbytes) {
    for (int k = 0; k < 4 && k < nbytes; ++k) to[k] = (unsigned char)(word >> (8 * k));
}

__device__ unsigned get_word(const unsigned char* from, long long nbytes) {
    unsigned word = 0;
    for (int k = 0; k < 4 && k < nbytes; ++k) word |= (unsigned)from[k] << (8 * k);
    return word;
}

// The mean of `members` values, whose sum is spread over the lanes; all lanes get it.
__device__ float mean(double sum, long long members) {
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
    return members ? (float)(sum / (double)members) : 0.0f;
}

__device__ bool finite(float x) { return x - x == 0; }

struct Warp {
    int lane;
    long long first, step;  // this warp's first quantization block, and the distance to its next one

    __device__ Warp() {
        lane = threadIdx.x & 31;
        first = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
        step = (long long)gridDim.x * (blockDim.x >> 5);
    }
};

// The mean of the high values or of the others, added in float64: for blocks whose sum is not finite otherwise.
template <class T, class Wide>
__device__ float mean_in_doubles(const T* x, const Wide* r, long long count, int lane, bool of_high, long long members) {
    double sum = 0;
    for (long long at = lane; at < count; at += 32) {
        const Wide v = widen(x[at]) + r[at];
        if ((v >= 0) == of_high) sum += v;
    }
    return mean(sum, members);
}

template <class T, class Wide>
__device__ void encode(const T* __restrict__ values, Wide* __restrict__ residual, unsigned char* __restrict__ payload,
                       long long n, long long block) {
    const Warp warp;
    for (long long index = warp.first; index * block < n; index += warp.step) {
        const T* x = values + index * block;
        Wide* r = residual + index * block;
        unsigned char* code = payload + index * (LEVELS_NBYTES + block / 8);
        const long long count = n - index * block < block ? n - index * block : block;
        const long long bits_nbytes = (count + 7) / 8;

        Wide low_sum = 0, high_sum = 0;
        long long highs = 0;
        unsigned mine = 0;  // lane k keeps every 32nd word from word k on, until 32 words can be written at once
        for (long long group = 0; group * 32 < count; ++group) {
            const long long at = group * 32 + warp.lane;
            const bool inside = at < count;
            const Wide v = inside ? widen(x[at]) + r[at] : (Wide)0;
            const bool high = inside && v >= 0;
            const unsigned word = __ballot_sync(ALL, high);
            low_sum += high ? (Wide)0 : v;
            high_sum += high ? v : (Wide)0;
            highs += __popc(word);
            if (warp.lane == (group & 31)) mine = word;
            const bool last = (group + 1) * 32 >= count;
            if (((group & 31) == 31 || last) && warp.lane <= (group & 31)) {
                const long long to = 4 * ((group & ~31LL) + warp.lane);
                put_word(code + LEVELS_NBYTES + to, mine, bits_nbytes - to);
            }
        }

        float low_level = mean((double)low_sum, count - highs);
        float high_level = mean((double)high_sum, highs);
        if (!finite(low_level)) low_level = mean_in_doubles(x, r, count, warp.lane, false, count - highs);
        if (!finite(high_level)) high_level = mean_in_doubles(x, r, count, warp.lane, true, highs);
        if (warp.lane == 0) {
            put_word(code, __float_as_uint(low_level), 4);
            put_word(code + 4, __float_as_uint(high_level), 4);
        }
        // v is made again, from what the first loop left in the cache, instead of being kept anywhere.
        for (long long at = warp.lane; at < count; at += 32) {
            const Wide v = widen(x[at]) + r[at];
            r[at] = v - (Wide)(v >= 0 ? high_level : low_level);
        }
    }
}

template <bool accumulate, class T>
__device__ void decode(const unsigned char* __restrict__ payload, T* __restrict__ out, long long n, long long block) {
    typedef typename WideOf<T>::type Wide;
    const Warp warp;
    for (long long index = warp.first; index * block < n; index += warp.step) {
        const unsigned char* code = payload + index * (LEVELS_NBYTES + block / 8);
        T* x = out + index * block;
        const long long count = n - index * block < block ? n - index * block : block;
        const Wide low = __uint_as_float(get_word(code, 4)), high = __uint_as_float(get_word(code + 4, 4));
        for (long long at = warp.lane; at < count; at += 32) {
            const Wide level = code[LEVELS_NBYTES + at / 8] >> (at % 8) & 1 ? high : low;
            narrow(accumulate ? widen(x[at]) + level : level, x[at]);
        }
    }
}

#define KERNELS(name, T)                                                                                              \
    extern "C" __global__ void encode_##name(const T* values, WideOf<T>::type* residual, unsigned char* payload,     \
                                             long long n, long long block) {                                         \
        encode(values, residual, payload, n, block);                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void decode_##name(const unsigned char* payload, T* out, long long n, long long block) {   \
        decode<false>(payload, out, n, block);                                                                        \
    }                                                                                                                 \
    extern "C" __global__ void accumulate_##name(const unsigned char* payload, T* out, long long n, long long block) { \
        decode<true>(payload, out, n, block);                                                                         \
    }

KERNELS(float16, Float16)
KERNELS(bfloat16, Bfloat16)
KERNELS(float32, float)
KERNELS(float64, double)
