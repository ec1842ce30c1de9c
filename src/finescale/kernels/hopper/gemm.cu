// Y[M, N] = X[M, K] W[K, N]: int8 activations, int4 weights, integer group scales, one conversion at the end.
//
//   y_TO = x_scale_T / amplifier * sum_G S_OG * (sum over the inputs k of group G of x_Tk * code_Ok)     (all int32)
//
// Weights are the 64-row side of wgmma and go from shared memory through registers; tokens are its wide side. A block has
// one copying warp and WARPGROUPS computing warpgroups, each of 64 channels. A unit of work is 128 inputs of a tile of
// 64 * WARPGROUPS channels by TOKENS tokens. Blocks stay for the whole call. The tiles that would not fill a last wave
// are split along the inputs, so that every block has something to do: their int32 partial sums are added up exactly,
// through the shared memory of a cluster of blocks, or in a workspace, where whoever comes last writes the result.
//
// Compile-time settings: TOKENS (8 to 256; 8 to 128 unless FOLDED), WARPGROUPS (1 to 3), GROUPS (scale groups in 128
// inputs: 1, 2 or 4), FOLDED (scales up to 15, multiplied into the weights), FLOAT_SCALE (bfloat16 scales and float32
// sums, as others do it, to compare with), STAGES, OUT (0 bfloat16, 1 float16, 2 float32, 3 the int32 sums), CLUSTER
// (blocks that share split tiles), ARRIVING (lanes of a warp that hand back a stage, 1 or 32), PROFILE (0, or where blocks
// note the time), GROUPED (many weights, one an expert, and rows sorted by expert; grouped.cuh).
// Layouts: kernels/layout.py.

#include "ptx.cuh"
#include "wgmma.cuh"
#include "tiles.cuh"
#include "copying.cuh"
#include "weights.cuh"
#include "sums.cuh"
#include "writing.cuh"

struct Ring {
    int stage;
    u32 phase;

    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// One computing warpgroup. The next unit's weights are unpacked while the tensor cores work on this one's.
struct Computer {
    const Arguments& a;
    u32 x_base, slab_base, full, empty;
    int thread;
    u8* buffer;
    Part part;

    Schedule schedule;
    Work work;
#if GROUPED
    Place noted;
#endif
    int left, remaining;
    Ring ring, ahead;
    TokenFacts facts;

    __device__ Computer(const Arguments& arguments, const Part& own_part)
        : a(arguments), part(own_part), schedule(arguments), remaining(schedule.units()), ring{0, 0}, ahead{0, 0} {}

    // Unpacks the next unit's weights; after the last one, the last one's again.
    __device__ __forceinline__ void fetch(u32 (&operand)[16], u32 (&scale)[GROUPS]) {
        barrier_wait(full + 8 * ahead.stage, ahead.phase);
        Words words;
        load_words(words, slab_base + ahead.stage * W_BYTES, thread);
        unpack(operand, words);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) scale[g] = words.scale[g];
    }

    __device__ __forceinline__ void look_ahead() {
        if (remaining > 1) ahead.advance();
    }

    __device__ __forceinline__ void release() {
        __syncwarp();  // what its lanes have read comes before what is copied there
        if (thread % 32 < ARRIVING) barrier_arrive(empty + 8 * ring.stage);
        ring.advance();
        remaining--;
    }

    __device__ __forceinline__ void write(const Sum (&total)[TOKENS / 2], int first = 0, int last = TOKENS) {
        write_tile(a, total, facts, place(), part.group, thread, buffer, first, last);
    }

    // Where the tile lies: noted if it takes a search, otherwise found again, which keeps registers free.
    __device__ __forceinline__ Place place() {
#if GROUPED
        return noted;
#else
        return find_place(a, work.tile);
#endif
    }

    __device__ __forceinline__ bool inside() { return (place().channel_slab + part.group) * 64 < a.channels; }

    __device__ __forceinline__ void finish_tile(Sum (&total)[TOKENS / 2]) {
        MARK(4)
        int first = 0, last = TOKENS;
#if CLUSTER > 1
        if (work.tile >= schedule.whole_tiles) {
            add_cluster(total, x_base, place().token_end - place().token0, part.group, thread);
            first = static_cast<int>(blockIdx.x) % CLUSTER * SHARE, last = first + SHARE;
        }
#else
        if (work.tile >= schedule.whole_tiles) {
            if (inside()) part.add(total, thread);
            return;
        }
#endif
        if (inside()) write(total, first, last);
    }

    // Writes the split tile, if this block's part came last.
    __device__ __forceinline__ void finish_part(Sum (&total)[TOKENS / 2]) {
        if (CLUSTER > 1) return;
        Schedule again(a);
        if (!again.has_part) return;
        again.next(work);
#if GROUPED
        noted = find_place(a, work.tile);
#endif
        if (!inside()) return;
        facts.fetch(a, place(), part.group, thread);  // on its way while the other parts come
        if (part.take(total, thread)) write(total);
    }

    // Its first unit must have arrived.
    __device__ __forceinline__ void next_tile() {
        if (schedule.next(work)) {
            left = work.end - work.begin;
#if GROUPED
            noted = noted_place(ahead.stage);
#endif
            facts.fetch(a, place(), part.group, thread);
        }
    }

#if FOLDED
    __device__ __forceinline__ void issue(Sum (&total)[TOKENS / 2], const u32 (&operand)[16], int stage, bool first) {
        u64 tile = tile_descriptor(x_base + stage * X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma_u8(total, operand + step * 4, tile + step * 2, !first || step > 0);
        wgmma_commit();
    }

    // This unit's products are running; prepares and queues those of the next.
    __device__ __forceinline__ void step(Sum (&total)[TOKENS / 2], u32 (&next)[16]) {
        u32 scale[GROUPS];
        look_ahead();
        fetch(next, scale);
        if (--left > 0) {
            issue(total, next, ahead.stage, false);
            wgmma_wait<1>();
            release();
        } else {
            wgmma_wait<0>();
            release();
            finish_tile(total);
            if (remaining == 0) return;
            next_tile();
            issue(total, next, ahead.stage, true);
        }
    }

    __device__ __forceinline__ void run() {
        Sum total[TOKENS / 2];
        u32 operand[2][16], scale[GROUPS];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) total[i] = 0;
        fetch(operand[0], scale);
        MARK(3)
        next_tile();
        issue(total, operand[0], 0, true);
        while (true) {
            step(total, operand[1]);
            if (remaining == 0) break;
            step(total, operand[0]);
            if (remaining == 0) break;
        }
        wgmma_wait<0>();
        MARK(5)
        finish_part(total);
        MARK(6)
    }
#else
    __device__ __forceinline__ void issue(int (&partial)[TOKENS / 2], const u32 (&operand)[16], int g) {
        u64 tile = tile_descriptor(x_base + ring.stage * X_BYTES) + g * STEPS * 2;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            wgmma_s8(partial, operand + (g * STEPS + step) * 4, tile + step * 2, step > 0);
        wgmma_commit();
    }

    __device__ __forceinline__ void step(
        Sum (&total)[TOKENS / 2], const u32 (&operand)[16], const u32 (&scale)[GROUPS], u32 (&next)[16],
        u32 (&next_scale)[GROUPS]) {
        int partial[TOKENS / 2];
        issue(partial, operand, 0);
        look_ahead();
        fetch(next, next_scale);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            wgmma_wait<0>();
            Sum first = first_scale(scale[g]), second = second_scale(scale[g]);
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) total[i] += static_cast<Sum>(partial[i]) * (i % 4 < 2 ? first : second);
            if (g + 1 < GROUPS) issue(partial, operand, g + 1);
        }
        release();
        if (--left == 0) {
            finish_tile(total);
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) total[i] = 0;
            next_tile();
        }
    }

    __device__ __forceinline__ void run() {
        Sum total[TOKENS / 2];
        u32 operand[2][16], scale[2][GROUPS];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) total[i] = 0;
        fetch(operand[0], scale[0]);
        MARK(3)
        next_tile();
        while (true) {
            step(total, operand[0], scale[0], operand[1], scale[1]);
            if (remaining == 0) break;
            step(total, operand[1], scale[1], operand[0], scale[0]);
            if (remaining == 0) break;
        }
        MARK(5)
        finish_part(total);
        MARK(6)
    }
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) w4a8_gemm(const __grid_constant__ Arguments a) {
    u32 x_base = shared_address(memory);
    u32 w_base = x_base + STAGES * X_BYTES;
    u8* buffer = memory + STAGES * (X_BYTES + W_BYTES);
    u32 full = shared_address(buffer) + BUFFER_BYTES, empty = full + 8 * STAGES, parts = empty + 8 * STAGES;

    MARK(0)
    let_next_kernel_start();
#if GROUPED
    if (threadIdx.x < 32) make_table(a);
#endif
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, WARPGROUPS * 4 * ARRIVING);
        }
        for (int g = 0; g < WARPGROUPS; g++) Part(a, parts, g).init();
        fence_barrier_init();
    }
    __syncthreads();

    // The same in all lanes, which the compiler shall know.
    int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (group == WARPGROUPS) {
        release_registers<COPY_REGISTERS>();
        // Warp 0 copies; warps 1 to 3 each count the part of one warpgroup.
        if (thread == 0) copy_units(a, x_base, w_base, full, empty);
        int served = thread / 32 - 1;
        Schedule schedule(a);
        Work work;
        if (CLUSTER == 1 && thread % 32 == 0 && served >= 0 && served < WARPGROUPS && schedule.has_part &&
            schedule.next(work) && (find_place(a, work.tile).channel_slab + served) * 64 < a.channels) {
            wait_for_previous_kernel();
            Part(a, parts, served).count();
        }
    } else {
        claim_registers<COMPUTE_REGISTERS>();
        MARK(1)
        wait_for_previous_kernel();
        MARK(2)
        Computer computer(a, Part(a, parts, group));
        computer.x_base = x_base;
        computer.slab_base = w_base + group * SLAB_BYTES;
        computer.full = full;
        computer.empty = empty;
        computer.thread = thread;
        computer.buffer = buffer;
        if (computer.remaining > 0) computer.run();
    }
}
