// 1-bit encode and decode on a GPU. What they compute: onebit.py, and for panels rank_one.py, bit for bit. Compile with
// --fmad=false.
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

__device__ double over_lanes(double sum) {
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
    return sum;
}

// The mean of `members` values, whose sum is spread over the lanes; all lanes get it.
__device__ float mean(double sum, long long members) {
    sum = over_lanes(sum);
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

// This lane's sum of the high values or of the others, added in float64: where it is not finite otherwise.
template <class T, class Wide>
__device__ double sum_in_doubles(const T* x, const Wide* r, long long count, int lane, bool of_high) {
    double sum = 0;
    for (long long at = lane; at < count; at += 32) {
        const Wide v = widen(x[at]) + r[at];
        if ((v >= 0) == of_high) sum += v;
    }
    return sum;
}

// The sums of a block's high values and of its others, one lane's part; how many are high; and their bits, written.
template <class Wide>
struct Classes {
    Wide low, high;
    long long highs;
};

template <class T, class Wide>
__device__ Classes<Wide> scan(const T* x, const Wide* r, unsigned char* bits, long long count, int lane) {
    Classes<Wide> sums = {0, 0, 0};
    const long long bits_nbytes = (count + 7) / 8;
    unsigned mine = 0;  // lane k keeps every 32nd word from word k on, until 32 words can be written at once
    for (long long group = 0; group * 32 < count; ++group) {
        const long long at = group * 32 + lane;
        const bool inside = at < count;
        const Wide v = inside ? widen(x[at]) + r[at] : (Wide)0;
        const bool high = inside && v >= 0;
        const unsigned word = __ballot_sync(ALL, high);
        sums.low += high ? (Wide)0 : v;
        sums.high += high ? v : (Wide)0;
        sums.highs += __popc(word);
        if (lane == (group & 31)) mine = word;
        const bool last = (group + 1) * 32 >= count;
        if (((group & 31) == 31 || last) && lane <= (group & 31)) {
            const long long to = 4 * ((group & ~31LL) + lane);
            put_word(bits + to, mine, bits_nbytes - to);
        }
    }
    return sums;
}

template <class T, class Wide>
__device__ void encode(const T* __restrict__ values, Wide* __restrict__ residual, unsigned char* __restrict__ payload,
                       long long n, long long block) {
    const Warp warp;
    for (long long index = warp.first; index * block < n; index += warp.step) {
        const T* x = values + index * block;
        Wide* r = residual + index * block;
        unsigned char* code = payload + index * (LEVELS_NBYTES + (block + 7) / 8);
        const long long count = n - index * block < block ? n - index * block : block;

        const Classes<Wide> sums = scan(x, r, code + LEVELS_NBYTES, count, warp.lane);
        const long long highs = sums.highs, lows = count - highs;
        float low_level = mean((double)sums.low, lows);
        float high_level = mean((double)sums.high, highs);
        if (!finite(low_level)) low_level = mean(sum_in_doubles(x, r, count, warp.lane, false), lows);
        if (!finite(high_level)) high_level = mean(sum_in_doubles(x, r, count, warp.lane, true), highs);
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
        const unsigned char* code = payload + index * (LEVELS_NBYTES + (block + 7) / 8);
        T* x = out + index * block;
        const long long count = n - index * block < block ? n - index * block : block;
        const Wide low = __uint_as_float(get_word(code, 4)), high = __uint_as_float(get_word(code + 4, 4));
        for (long long at = warp.lane; at < count; at += 32) {
            const Wide level = code[LEVELS_NBYTES + at / 8] >> (at % 8) & 1 ? high : low;
            narrow(accumulate ? widen(x[at]) + level : level, x[at]);
        }
    }
}

// Panels with levels of rank one. Encoding is four kernels: rows, columns, codes, and what is left. `scratch` has four
// doubles for each row, the sum and the count of its negative values, then of the others; after those of all rows, one
// for each column of each panel.

const int COLUMN_NBITS = 3, ROW_NBITS = 4, STEP = 22, ONE = 0x3F800000 >> STEP;

// One of the panels of `n` values, and where its parts are in the payload.
struct Panel {
    long long columns, rows, first_row, row_nbytes, row_group, column_group, codes_nbytes;
    unsigned char* code;

    __device__ Panel(long long index, unsigned char* payload, long long n, long long columns_, long long most,
                     long long group)
        : columns(columns_),
          rows(most),
          first_row(index * most),
          row_nbytes((columns_ + 7) / 8),
          row_group(1),
          column_group(group),
          codes_nbytes((COLUMN_NBITS * column_groups() + 7) / 8) {
        while (row_group * columns < 256) row_group *= 2;
        code = payload + index * nbytes();
        const long long left = n / columns - first_row;
        if (left < most) rows = left;
    }

    __device__ long long row_groups() const { return (rows + row_group - 1) / row_group; }
    __device__ long long column_groups() const { return (columns + column_group - 1) / column_group; }
    __device__ long long nbytes() const { return LEVELS_NBYTES + codes_nbytes + row_groups() + rows * row_nbytes; }
    __device__ unsigned char* column_codes() const { return code + LEVELS_NBYTES; }
    __device__ unsigned char* row_codes() const { return column_codes() + codes_nbytes; }
    __device__ unsigned char* bits(long long row) const { return row_codes() + row_groups() + row * row_nbytes; }
};

__device__ unsigned code_of(float ratio, int nbits) {
    if (!(ratio >= 1.0f / (1 << (1 << (nbits - 1))))) return 0;  // less than half of the smallest
    const int top = (1 << nbits) - 1;
    const int code = (int)((__float_as_uint(ratio) + (1u << (STEP - 1))) >> STEP) - ONE + top;
    return code < 1 ? 1 : code > top ? top : code;
}

__device__ float number_of(unsigned code, int nbits) {
    return code ? __uint_as_float((code - ((1u << nbits) - 1) + ONE) << STEP) : 0.0f;
}

__device__ float number_of_column(const Panel& panel, long long column) {
    const long long at = column / panel.column_group * COLUMN_NBITS;
    const unsigned char* from = panel.column_codes() + at / 8;
    unsigned word = from[0];
    if (at % 8 > 8 - COLUMN_NBITS) word |= (unsigned)from[1] << 8;
    return number_of(word >> (at % 8) & ((1u << COLUMN_NBITS) - 1), COLUMN_NBITS);
}

// The levels of a row, before its columns' numbers.
__device__ void levels_of_row(const Panel& panel, long long row, float* low, float* high) {
    const unsigned byte = panel.row_codes()[row / panel.row_group];
    *low = __uint_as_float(get_word(panel.code, 4)) * number_of(byte & ((1u << ROW_NBITS) - 1), ROW_NBITS);
    *high = __uint_as_float(get_word(panel.code + 4, 4)) * number_of(byte >> ROW_NBITS, ROW_NBITS);
}

// A warp takes a row: its bits, and sums.
template <class T, class Wide>
__device__ void panel_rows(const T* values, const Wide* residual, unsigned char* payload, double* scratch, long long n,
                           long long columns, long long most, long long group) {
    const Warp warp;
    for (long long row = warp.first; row * columns < n; row += warp.step) {
        const Panel panel(row / most, payload, n, columns, most, group);
        const T* x = values + row * columns;
        const Wide* r = residual + row * columns;
        const Classes<Wide> sums = scan(x, r, panel.bits(row - panel.first_row), columns, warp.lane);
        double low = over_lanes((double)sums.low), high = over_lanes((double)sums.high);
        if (low - low != 0) low = over_lanes(sum_in_doubles(x, r, columns, warp.lane, false));
        if (high - high != 0) high = over_lanes(sum_in_doubles(x, r, columns, warp.lane, true));
        if (warp.lane == 0) {
            double* to = scratch + 4 * row;
            to[0] = low, to[1] = (double)(columns - sums.highs), to[2] = high, to[3] = (double)sums.highs;
        }
    }
}

// A warp takes 32 columns of a panel.
template <class T, class Wide>
__device__ void panel_columns(const T* values, const Wide* residual, double* scratch, long long n, long long columns,
                              long long most) {
    const Warp warp;
    const long long rows = n / columns, panels = (rows + most - 1) / most, parts = (columns + 31) / 32;
    for (long long index = warp.first; index < panels * parts; index += warp.step) {
        const long long panel = index / parts, column = index % parts * 32 + warp.lane;
        const long long end = (panel + 1) * most < rows ? (panel + 1) * most : rows;
        if (column >= columns) continue;
        Wide sum = 0;
        for (long long row = panel * most; row < end; ++row) {
            const Wide v = widen(values[row * columns + column]) + residual[row * columns + column];
            sum += (v >= 0 ? v : -v) * (Wide)0.00390625;
        }
        scratch[4 * rows + panel * columns + column] = sum;
    }
}

template <class Wide>
__device__ Wide mean_of_columns(const Panel& panel, const double* sums, long long group) {
    const long long first = group * panel.column_group;
    const long long end = first + panel.column_group < panel.columns ? first + panel.column_group : panel.columns;
    Wide sum = 0;
    for (long long column = first; column < end; ++column) sum += (Wide)sums[column];
    return sum / (Wide)(end - first);
}

__device__ float mean_of_rows(const Panel& panel, const double* sums, long long group, int which) {
    const long long first = group * panel.row_group;
    const long long end = first + panel.row_group < panel.rows ? first + panel.row_group : panel.rows;
    double sum = 0, count = 0;
    for (long long row = first; row < end; ++row) {
        sum += sums[4 * row + 2 * which];
        count += sums[4 * row + 2 * which + 1];
    }
    const float mean = count > 0 ? (float)(sum / count) : 0.0f;
    return mean < 0 ? -mean : mean;
}

// The largest of all lanes'; 0 where one is not finite, which is told by `all_finite`.
__device__ double largest_of(double mine, bool is_finite, bool* all_finite) {
    *all_finite = __ballot_sync(ALL, !is_finite) == 0;
    for (int distance = 16; distance; distance /= 2) {
        const double other = __shfl_xor_sync(ALL, mine, distance);
        if (other > mine) mine = other;
    }
    return *all_finite ? mine : 0;
}

// A warp takes a panel: the codes of its columns and rows, and its levels.
template <class Wide>
__device__ void panel_codes(unsigned char* payload, const double* scratch, long long n, long long columns,
                            long long most, long long group) {
    const Warp warp;
    const long long rows = n / columns;
    for (long long index = warp.first; index * most < rows; index += warp.step) {
        const Panel panel(index, payload, n, columns, most, group);
        const double* sums = scratch + 4 * rows + index * columns;
        const long long groups = panel.column_groups();
        double mine = 0;
        bool is_finite = true, all_finite;
        for (long long group = warp.lane; group < groups; group += 32) {
            const double x = mean_of_columns<Wide>(panel, sums, group);
            is_finite = is_finite && x - x == 0;
            if (x > mine) mine = x;
        }
        const Wide largest = (Wide)largest_of(mine, is_finite, &all_finite);
        double total = 0;
        // 8 codes are 3 bytes.
        for (long long eight = warp.lane; eight * 8 < groups; eight += 32) {
            unsigned word = 0;
            for (long long group = eight * 8; group < groups && group < eight * 8 + 8; ++group) {
                const float ratio = largest > 0 ? (float)(mean_of_columns<Wide>(panel, sums, group) / largest) : 0.0f;
                const unsigned code = code_of(ratio, COLUMN_NBITS);
                const long long first = group * panel.column_group, left = columns - first;
                total += (double)number_of(code, COLUMN_NBITS) * (left < panel.column_group ? left : panel.column_group);
                word |= code << COLUMN_NBITS * (group - eight * 8);
            }
            const long long nbytes = panel.codes_nbytes - eight * 3;
            put_word(panel.column_codes() + eight * 3, word, nbytes < 3 ? nbytes : 3);
        }
        const double mean = over_lanes(total) / (double)columns;  // of few bits each: exact in any order
        const double* row_sums = scratch + 4 * panel.first_row;
        for (int which = 0; which < 2; ++which) {
            float most_of_rows = 0, odd = 0;
            is_finite = true;
            for (long long group = warp.lane; group < panel.row_groups(); group += 32) {
                const float x = mean_of_rows(panel, row_sums, group, which);
                if (!finite(x)) is_finite = false, odd = x;
                if (x > most_of_rows) most_of_rows = x;
            }
            const float top = (float)largest_of(most_of_rows, is_finite, &all_finite);
            const unsigned odds = __ballot_sync(ALL, odd != odd), infinite = __ballot_sync(ALL, !is_finite);
            for (long long group = warp.lane; group < panel.row_groups(); group += 32) {
                const float ratio = top > 0 ? mean_of_rows(panel, row_sums, group, which) / top : 0.0f;
                unsigned char* to = panel.row_codes() + group;
                const unsigned code = code_of(ratio, ROW_NBITS);
                *to = (unsigned char)(which ? *to | code << ROW_NBITS : code);
            }
            double level = (double)top / (mean > 0 ? mean : 1.0);
            if (level > 3.4028234663852886e38) level = 3.4028234663852886e38;
            if (odds) level = (double)__uint_as_float(0x7FC00000u);
            else if (infinite) level = (double)__uint_as_float(0x7F800000u);
            if (warp.lane == 0) put_word(panel.code + 4 * which, __float_as_uint((float)(which ? level : -level)), 4);
        }
    }
}

// A warp takes a row: residual = v - decoded.
template <class T, class Wide>
__device__ void panel_left(const T* values, Wide* residual, unsigned char* payload, long long n, long long columns,
                           long long most, long long group) {
    const Warp warp;
    for (long long row = warp.first; row * columns < n; row += warp.step) {
        const Panel panel(row / most, payload, n, columns, most, group);
        float low, high;
        levels_of_row(panel, row - panel.first_row, &low, &high);
        for (long long column = warp.lane; column < columns; column += 32) {
            const long long at = row * columns + column;
            const Wide v = widen(values[at]) + residual[at];
            const float level = (v >= 0 ? high : low) * number_of_column(panel, column);
            residual[at] = v - (Wide)level;
        }
    }
}

template <bool accumulate, class T>
__device__ void panel_decode(unsigned char* payload, T* out, long long n, long long columns, long long most,
                             long long group) {
    typedef typename WideOf<T>::type Wide;
    const Warp warp;
    for (long long row = warp.first; row * columns < n; row += warp.step) {
        const Panel panel(row / most, payload, n, columns, most, group);
        float low, high;
        levels_of_row(panel, row - panel.first_row, &low, &high);
        const unsigned char* bits = panel.bits(row - panel.first_row);
        for (long long column = warp.lane; column < columns; column += 32) {
            const bool is_high = bits[column / 8] >> (column % 8) & 1;
            const Wide level = (is_high ? high : low) * number_of_column(panel, column);
            T& x = out[row * columns + column];
            narrow(accumulate ? widen(x) + level : level, x);
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
    }                                                                                                                 \
    extern "C" __global__ void panel_rows_##name(const T* values, const WideOf<T>::type* residual,                   \
                                                 unsigned char* payload, double* scratch, long long n,               \
                                                 long long columns, long long most, long long group) {                \
        panel_rows(values, residual, payload, scratch, n, columns, most, group);                                      \
    }                                                                                                                 \
    extern "C" __global__ void panel_columns_##name(const T* values, const WideOf<T>::type* residual,                \
                                                    unsigned char*, double* scratch, long long n,                    \
                                                    long long columns, long long most, long long group) {             \
        panel_columns(values, residual, scratch, n, columns, most);                                                   \
    }                                                                                                                 \
    extern "C" __global__ void panel_codes_##name(const T*, const WideOf<T>::type*, unsigned char* payload,          \
                                                  double* scratch, long long n, long long columns,                   \
                                                  long long most, long long group) {                                  \
        panel_codes<WideOf<T>::type>(payload, scratch, n, columns, most, group);                                      \
    }                                                                                                                 \
    extern "C" __global__ void panel_left_##name(const T* values, WideOf<T>::type* residual, unsigned char* payload, \
                                                 double*, long long n, long long columns, long long most,             \
                                                 long long group) {                                                   \
        panel_left(values, residual, payload, n, columns, most, group);                                               \
    }                                                                                                                 \
    extern "C" __global__ void panel_decode_##name(T* out, void*, unsigned char* payload, double*, long long n,      \
                                                   long long columns, long long most, long long group) {              \
        panel_decode<false>(payload, out, n, columns, most, group);                                                   \
    }                                                                                                                 \
    extern "C" __global__ void panel_accumulate_##name(T* out, void*, unsigned char* payload, double*, long long n,  \
                                                       long long columns, long long most, long long group) {          \
        panel_decode<true>(payload, out, n, columns, most, group);                                                    \
    }

KERNELS(float16, Float16)
KERNELS(bfloat16, Bfloat16)
KERNELS(float32, float)
KERNELS(float64, double)
