// The outputs of a token's experts, times their routing weights, summed in float32 in the order of the choices.
//
// Compile-time settings: IN (type of rows and outputs: 0 bfloat16, 1 float16, 2 float32), THREADS.

#include "ptx.cuh"
#include "rows.cuh"

struct Arguments {
    const void* y;          // rows sorted by expert
    const int* position;    // the row of each choice, negative for none
    const float* weight;    // of each choice
    void* out;
    int outputs, choices;   // choices of a token
};

extern "C" __global__ void __launch_bounds__(THREADS) combine_experts(const __grid_constant__ Arguments a) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    long long token = blockIdx.x;
    for (int first = threadIdx.x * 8; first < a.outputs; first += THREADS * 8) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
        for (int c = 0; c < a.choices; c++) {
            int row = a.position[token * a.choices + c];
            if (row < 0) continue;
            float weight = a.weight[token * a.choices + c], value[8];
            load8(value, a.y, static_cast<long long>(row) * a.outputs + first, a.outputs - first);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] = __fadd_rn(sum[i], __fmul_rn(value[i], weight));
        }
        store8(sum, a.out, token * a.outputs + first, a.outputs - first);
    }
}
