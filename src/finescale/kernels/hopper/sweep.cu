// One sweep of QuantEase over a batch of at most 128 columns: columns follow one another, rows are independent.
//
// Four threads share a row. A step of 16 columns lies in their registers, four columns each: whose turn it is rounds its
// target, hands the change to the others, and all correct what they hold of the step. The later columns of the batch,
// which lie in shared memory with the matrix, follow once a step. So a column costs the latency of one rounding and one
// exchange within the warp.
//
// Compile-time settings: WARPS, GROUPED (scales differ between columns), ZERO (has zero points), FREE (some entries are
// not rounded), RELAXED (no entry is), PARTS (3: changes as float16 [3 * columns, rows], the high parts, what they leave
// over, and the high parts again; 2: as float16 [2 * columns, rows], twice the same, and values follow these rounded
// changes; 0: as float32 [columns, rows]).

#include "ptx.cuh"

typedef unsigned short u16;

#define WIDTH 128
#define STEP 16
#define THREADS (WARPS * 32)

struct Arguments {
    const float* beta;      // [columns, rows] targets, without what changes in this batch
    float* current;         // [columns, rows] replaced by the new values
    void* change;           // old less new values
    const float* inner;     // [columns, 128] H_kj / H_jj, row k, zeros beyond the columns
    const float* scale;     // [groups, rows]
    const float* zero;      // [groups, rows]
    const int* group;       // [columns]
    const u8* free;         // [columns, rows]
    int columns, rows;
    float low, high;
};

struct Step {
    float old[4], scale[4], zero[4];
    bool free[4];
};

__device__ __forceinline__ void load_step(Step& step, const Arguments& a, int first, int row) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool live = first + i < a.columns && row < a.rows;
        const long long at = static_cast<long long>(first + i) * a.rows + row;
        step.old[i] = live ? a.current[at] : 0.0f;
#if GROUPED
        const long long from = live ? static_cast<long long>(a.group[first + i]) * a.rows + row : 0;
        step.scale[i] = live ? a.scale[from] : 1.0f;
        step.zero[i] = live && ZERO ? a.zero[from] : 0.0f;
#endif
        step.free[i] = FREE && live && a.free[at] != 0;
    }
}

// The nearest point of the grid. The quotient is the correctly rounded one (where it does not overflow, as it may for the
// smallest scales); adding and taking off 1.5 * 2^23 rounds to the nearest integer, ties to even.
__device__ __forceinline__ float nearest(float value, float scale, float inverse, float zero, float low, float high) {
    const float rough = __fmul_rn(value, inverse);
    float code = __fmaf_rn(__fmaf_rn(-rough, scale, value), inverse, rough);
    code = fabsf(rough) < 1e30f ? code : rough;
    code = fminf(fmaxf(__fadd_rn(code, zero), low), high);
    code = __fadd_rn(__fadd_rn(code, 12582912.0f), -12582912.0f);
    return __fmul_rn(__fadd_rn(code, -zero), scale);
}

__device__ __forceinline__ float float_of_fp16(u16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}

__device__ __forceinline__ u16 fp16_of_float(float value) { return static_cast<u16>(pack_fp16(value, 0.0f) & 0xFFFF); }

__device__ __forceinline__ void store_change(const Arguments& a, int column, int row, float change) {
#if PARTS
    u16* parts = static_cast<u16*>(a.change);
    const u16 high = fp16_of_float(change);
    parts[static_cast<long long>(column) * a.rows + row] = high;
#if PARTS == 3
    const u16 low = fp16_of_float(__fadd_rn(change, -float_of_fp16(high)));
    parts[static_cast<long long>(a.columns + column) * a.rows + row] = low;
#endif
    parts[static_cast<long long>((PARTS - 1) * a.columns + column) * a.rows + row] = high;
#else
    static_cast<float*>(a.change)[static_cast<long long>(column) * a.rows + row] = change;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) sweep(const __grid_constant__ Arguments a) {
    extern __shared__ float4 shared[];
    float4* inner = shared;                           // [128, 32]
    float4* beta = shared + WIDTH * WIDTH / 4;        // [8, THREADS], each thread its own
    const int thread = threadIdx.x, lane = thread & 3, row = blockIdx.x * (THREADS / 4) + thread / 4;
    const int steps = (a.columns + STEP - 1) / STEP;
    for (int i = thread; i < WIDTH * WIDTH / 4; i += THREADS)
        inner[i] = i < a.columns * WIDTH / 4 ? reinterpret_cast<const float4*>(a.inner)[i] : make_float4(0, 0, 0, 0);
    wait_for_previous_kernel();
#pragma unroll 4
    for (int s = 0; s < steps; s++) {
        float own[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = s * STEP + lane * 4 + i;
            const bool live = column < a.columns && row < a.rows;
            own[i] = live ? a.beta[static_cast<long long>(column) * a.rows + row] : 0.0f;
        }
        beta[s * THREADS + thread] = make_float4(own[0], own[1], own[2], own[3]);
    }
    Step step;
#if !GROUPED
    const float row_scale = row < a.rows ? a.scale[row] : 1.0f;
    const float row_zero = ZERO && row < a.rows ? a.zero[row] : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) step.scale[i] = row_scale, step.zero[i] = row_zero;
#endif
    load_step(step, a, lane * 4, row);
    __syncthreads();
#pragma unroll 1
    for (int s = 0; s < steps; s++) {
        const float4 packed = beta[s * THREADS + thread];
        float own[4] = {packed.x, packed.y, packed.z, packed.w};
        float value[4], mine[4], inverse[4], moved[STEP];
#pragma unroll
        for (int i = 0; i < 4; i++) inverse[i] = __frcp_rn(step.scale[i]), value[i] = 0.0f, mine[i] = 0.0f;
        const float4* matrix = inner + s * STEP * (WIDTH / 4) + s * (STEP / 4) + lane;
#pragma unroll
        for (int k = 0; k < STEP; k++) {
            const int i = k % 4;
            float chosen = own[i];
#if !RELAXED
            chosen = nearest(own[i], step.scale[i], inverse[i], step.zero[i], a.low, a.high);
            if (FREE && step.free[i]) chosen = own[i];
#endif
            float change = __fadd_rn(step.old[i], -chosen);
#if PARTS == 2
            change = float_of_fp16(fp16_of_float(change));
            chosen = __fadd_rn(step.old[i], -change);
#endif
            if (lane == k / 4) value[i] = chosen, mine[i] = change;
            moved[k] = __shfl_sync(0xFFFFFFFFu, change, k / 4, 4);
            const float4 factor = matrix[k * (WIDTH / 4)];
            own[0] = __fmaf_rn(moved[k], factor.x, own[0]);
            own[1] = __fmaf_rn(moved[k], factor.y, own[1]);
            own[2] = __fmaf_rn(moved[k], factor.z, own[2]);
            own[3] = __fmaf_rn(moved[k], factor.w, own[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = s * STEP + lane * 4 + i;
            if (column < a.columns && row < a.rows) {
                a.current[static_cast<long long>(column) * a.rows + row] = value[i];
                store_change(a, column, row, mine[i]);
            }
        }
        if (s + 1 < steps) load_step(step, a, (s + 1) * STEP + lane * 4, row);
#pragma unroll 1
        for (int t = s + 1; t < steps; t++) {
            float4 later = beta[t * THREADS + thread];
            const float4* part = inner + s * STEP * (WIDTH / 4) + t * (STEP / 4) + lane;
#pragma unroll
            for (int k = 0; k < STEP; k++) {
                const float4 factor = part[k * (WIDTH / 4)];
                later.x = __fmaf_rn(moved[k], factor.x, later.x);
                later.y = __fmaf_rn(moved[k], factor.y, later.y);
                later.z = __fmaf_rn(moved[k], factor.z, later.z);
                later.w = __fmaf_rn(moved[k], factor.w, later.w);
            }
            beta[t * THREADS + thread] = later;
        }
    }
}
