// Sorts the choices of tokens by expert: where in the sorted rows each choice goes, and where each expert's rows end.
//
// Rows of one expert stand in the order of the choices, and begin at a multiple of 8. One block: counts by warp and
// expert, sums over warps, then over experts, then each warp gives its choices their places. No atomics, so the same
// choices always get the same places. Choices that are no expert's (negative, or too large) get none, -1.
//
// The next kernel may not start before this one ends: products read `row_end` before they wait (grouped.cuh).
//
// Compile-time settings: WARPS, WIDE (choices are 64-bit numbers, else 32-bit).

#include "ptx.cuh"

struct Arguments {
    const void* choice;
    int* position;
    int* row_end;
    int choices, experts;
};

__device__ __forceinline__ int expert_of(const Arguments& a, int index, int end) {
    if (index >= end) return -1;
#if WIDE
    long long expert = static_cast<const long long*>(a.choice)[index];
#else
    int expert = static_cast<const int*>(a.choice)[index];
#endif
    return expert >= 0 && expert < a.experts ? static_cast<int>(expert) : -1;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) route_tokens(const __grid_constant__ Arguments a) {
    extern __shared__ int memory[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int* count = memory + warp * a.experts;     // of this warp's choices by expert, later those of the warps before it
    int* row = memory + WARPS * a.experts;      // rows of an expert, later its first one
    int share = (a.choices + WARPS * 32 - 1) / (WARPS * 32) * 32;
    int begin = warp * share, end = min(a.choices, begin + share);
    u32 before = (1u << lane) - 1;

    for (int e = lane; e < a.experts; e += 32) count[e] = 0;
    wait_for_previous_kernel();
    __syncwarp();
    for (int i = begin; i < end; i += 32) {
        int expert = expert_of(a, i + lane, end);
        u32 same = __match_any_sync(0xFFFFFFFF, expert);
        if (expert >= 0 && (same & before) == 0) count[expert] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    for (int e = threadIdx.x; e < a.experts; e += WARPS * 32) {
        int sum = 0;
        for (int w = 0; w < WARPS; w++) {
            int own = memory[w * a.experts + e];
            memory[w * a.experts + e] = sum;
            sum += own;
        }
        row[e] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        int slabs_before = 0;
        for (int e = lane; e - lane < a.experts; e += 32) {
            int rows = e < a.experts ? row[e] : 0, slabs = (rows + 7) / 8, sum = slabs;
            for (int offset = 1; offset < 32; offset *= 2) {
                int lower = __shfl_up_sync(0xFFFFFFFF, sum, offset);
                if (lane >= offset) sum += lower;
            }
            int first = (slabs_before + sum - slabs) * 8;
            if (e < a.experts) {
                row[e] = first;
                a.row_end[e] = first + rows;
            }
            slabs_before += __shfl_sync(0xFFFFFFFF, sum, 31);
        }
    }
    __syncthreads();
    for (int i = begin; i < end; i += 32) {
        int expert = expert_of(a, i + lane, end);
        u32 same = __match_any_sync(0xFFFFFFFF, expert);
        int place = expert < 0 ? -1 : row[expert] + count[expert] + __popc(same & before);
        if (i + lane < end) a.position[i + lane] = place;
        __syncwarp();
        if (expert >= 0 && (same & before) == 0) count[expert] += __popc(same);
        __syncwarp();
    }
    __threadfence();
}
