// Activations to int8, one scale a token, written as the products read them (kernels/layout.py): one block a token.
//
// Before the rounding, what stands between two products of a transformer, in the roundings of the plain modules:
//   PLAIN   x
//   RMS     rmsnorm(x) * gain                 ADD: x + residual first, the sum is written back to the residual
//   LAYER   layernorm(x) * gain + shift       (likewise)
//   SILU    silu(x[:, :I]) * x[:, I:]
// GATHER: then channels are split, merged and permuted (gather.cuh).
//
// Compile-time settings: KIND (0 plain, 1 rms, 2 layer, 3 silu), ADD, IN (0 bfloat16, 1 float16, 2 float32),
// PIECES (pieces of 8 inputs a thread holds), OUT_PIECES (of what is rounded, other than PIECES only if GATHER), THREADS,
// GATHER, ROUTED (rows sorted by expert, of which `position` says where each
// choice of a token has its row: 1 reads tokens and writes each to all its rows; 2 reads and writes rows, one a choice).

#include "ptx.cuh"
#include "rows.cuh"

struct Arguments {
    const void* x;
    void* residual;         // ADD: read and written
    const void* gain;
    const void* shift;      // or null
    u8* codes;
    float* scale;
    int* sum;
    const int* position;    // ROUTED: negative for none
    int tokens, inputs, slabs;
    int choices;            // of a token, ROUTED == 1
    float epsilon;
    const int* index;       // GATHER: see gather.cuh
    const float* index_gain;
    const int* more_start;
    const int* more_index;
    const float* more_gain;
    int gathered;           // channels that are rounded; `inputs` unless GATHER
};

struct AddFloat {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct AddInt {
    __device__ int operator()(int a, int b) const { return a + b; }
};
struct MaxBits {
    __device__ u32 operator()(u32 a, u32 b) const { return a > b ? a : b; }
};

template <class Value, class Operator>
__device__ __forceinline__ Value reduce(Value value, Operator combine, Value* scratch) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFF, value, offset));
    if (THREADS == 32) return value;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) value = combine(value, scratch[i]);
    return value;
}

#if GATHER
#include "gather.cuh"
#endif

// Eight codes of a row, from input `first` on.
__device__ __forceinline__ void store_codes(const Arguments& a, long long row, int first, uint2 codes) {
    int slot = static_cast<int>(row % 8);
    long long block = static_cast<long long>(first / 128) * a.slabs + row / 8;
    u8* target = a.codes + block * 1024 + slot * 128 + ((first % 128 / 16) ^ slot) * 16 + first % 16;
    *reinterpret_cast<uint2*>(target) = codes;
}

// Codes of 8 values, round(value / scale), in order of their bytes. Dividing is slow, so the quotient is first taken by
// the reciprocal, wrong by a few parts in 10^7; where that might round to another integer, or is no number, it is divided.
__device__ __forceinline__ uint2 codes8(const float (&x)[8], float scale, float reciprocal) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    u32 bits[8];
    bool sure = true;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float quotient = x[i] * reciprocal, shifted = __fadd_rn(quotient, SHIFT);
        sure &= fabsf(__fsub_rn(quotient, __fsub_rn(shifted, SHIFT))) < 0.4999f;
        bits[i] = __float_as_uint(shifted);
    }
    if (!sure) {
#pragma unroll
        for (int i = 0; i < 8; i++) bits[i] = max(-127, min(127, __float2int_rn(__fdiv_rn(x[i], scale))));
    }
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = __byte_perm(bits[2 * i], bits[2 * i + 1], 0x0040);
    return make_uint2(__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410));
}

__device__ __forceinline__ void quantize_token(const Arguments& a, long long token, u32* scratch) {
#if ROUTED == 2
    token = a.position[token];
    if (token < 0) return;
#endif
    long long row = token * a.inputs;
    float x[PIECES][8];
#if KIND != 3
    float total = 0;
#endif
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        int first = (p * THREADS + threadIdx.x) * 8, count = a.inputs - first;
#if KIND == 3
        float up[8];
        load8(x[p], a.x, 2 * row + first, count);
        load8(up, a.x, 2 * row + a.inputs + first, count);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float gate = rounded(__fdividef(x[p][i], 1.0f + __expf(-x[p][i])));
            x[p][i] = i < count ? rounded(gate * up[i]) : 0;
        }
#else
        load8(x[p], a.x, row + first, count);
#if ADD
        float before[8];
        load8(before, a.residual, row + first, count);
#pragma unroll
        for (int i = 0; i < 8; i++) x[p][i] = rounded(x[p][i] + before[i]);
        store8(x[p], a.residual, row + first, count);
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) total += KIND == 1 ? x[p][i] * x[p][i] : x[p][i];
#endif
    }
#if KIND == 1 || KIND == 2
    float mean = 0;
    total = reduce(total, AddFloat(), reinterpret_cast<float*>(scratch)) / a.inputs;
#if KIND == 2
    mean = total;
    total = 0;
#pragma unroll
    for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float distance = (p * THREADS + static_cast<int>(threadIdx.x)) * 8 + i < a.inputs ? x[p][i] - mean : 0;
            total += distance * distance;
        }
    total = reduce(total, AddFloat(), reinterpret_cast<float*>(scratch)) / a.inputs;
#endif
    float inverse = 1.0f / sqrtf(total + a.epsilon);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        int first = (p * THREADS + threadIdx.x) * 8, count = a.inputs - first;
        float gain[8], shift[8];
        load8(gain, a.gain, first, count);
        if (KIND == 2 && a.shift) load8(shift, a.shift, first, count);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float value = KIND == 1 ? rounded(x[p][i] * inverse) * gain[i] : (x[p][i] - mean) * inverse * gain[i];
            if (KIND == 2 && a.shift) value += shift[i];
            x[p][i] = i < count ? rounded(value) : 0;
        }
    }
#endif
#if GATHER
    float y[OUT_PIECES][8];
    gather(a, x, y);
#else
    float(&y)[PIECES][8] = x;
#endif
    // As bits, so that a NaN is the largest of all and reaches the scale.
    u32 largest = 0;
#pragma unroll
    for (int p = 0; p < OUT_PIECES; p++)
#pragma unroll
        for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(y[p][i]) & 0x7FFFFFFF);
    largest = reduce(largest, MaxBits(), scratch);
    float scale = largest ? __fdiv_rn(__uint_as_float(largest), 127.0f) : 1.0f;
    if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;

    float reciprocal = __fdiv_rn(1.0f, scale);
    int sum = 0;
#pragma unroll
    for (int p = 0; p < OUT_PIECES; p++) {
        int first = (p * THREADS + threadIdx.x) * 8;
        uint2 codes = codes8(y[p], scale, reciprocal);
        sum = __dp4a(static_cast<int>(codes.x), 0x01010101, __dp4a(static_cast<int>(codes.y), 0x01010101, sum));
        if (first >= (a.gathered + 127) / 128 * 128) continue;
#if ROUTED == 1
        for (int c = 0; c < a.choices; c++) {
            int target = a.position[token * a.choices + c];
            if (target >= 0) store_codes(a, target, first, codes);
        }
#else
        store_codes(a, token, first, codes);
#endif
    }
    sum = reduce(sum, AddInt(), reinterpret_cast<int*>(scratch));
#if ROUTED == 1
    for (int c = threadIdx.x; c < a.choices; c += THREADS) {
        int target = a.position[token * a.choices + c];
        if (target < 0) continue;
        a.scale[target] = scale;
        a.sum[target] = sum;
    }
#else
    if (threadIdx.x == 0) {
        a.scale[token] = scale;
        a.sum[token] = sum;
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_tokens(const __grid_constant__ Arguments a) {
    __shared__ u32 scratch[32];
    let_next_kernel_start();
#if GATHER
    load_table(a);
    wait_for_previous_kernel();
    // Blocks stay for many tokens, since each has to load the table.
    for (int token = blockIdx.x; token < a.tokens; token += gridDim.x) quantize_token(a, token, scratch);
#else
    wait_for_previous_kernel();
    quantize_token(a, blockIdx.x, scratch);
#endif
}
