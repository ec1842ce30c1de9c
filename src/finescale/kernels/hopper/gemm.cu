// Y[M, N] = X[M, K] W[K, N]: int8 activations, int4 weights, integer group scales, one conversion at the end.
//
//   y_TO = x_scale_T / amplifier * sum_G S_OG * (sum over the inputs k of group G of x_Tk * code_Ok)     (all int32)
//
// Weights are the 64-row side of wgmma and go from shared memory through registers; tokens are its wide side. A block has
// one copying warp and WARPGROUPS computing warpgroups, each of 64 channels. A unit of work is 128 inputs of a tile of
// 64 * WARPGROUPS channels by TOKENS tokens. Blocks stay for the whole call. The tiles that would not fill a last wave
// are split along the inputs, so that every block has something to do: their int32 partial sums are added up exactly in a
// workspace, and whoever comes last writes the result.
//
// Compile-time settings: TOKENS (8 to 256; 8 to 128 unless FOLDED), WARPGROUPS (1 to 3), GROUPS (scale groups in 128
// inputs: 1, 2 or 4), FOLDED (scales up to 15, multiplied into the weights), FLOAT_SCALE (bfloat16 scales and float32
// sums, as others do it, to compare with), STAGES, OUT (0 bfloat16, 1 float16, 2 float32, 3 the int32 sums).
// Layouts: kernels/layout.py.

#include "ptx.cuh"
#include "wgmma.cuh"

constexpr int STEPS = 4 / GROUPS;                      // wgmmas of 32 inputs in a scale group
constexpr int SLAB_BYTES = 4096 + 128 * GROUPS;        // 64 channels by 128 inputs, and their scales
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = WARPGROUPS * SLAB_BYTES;
constexpr int CHUNK = TOKENS < 32 ? TOKENS : 32;       // tokens a warp writes at a time
constexpr int PITCH = 48;                              // bytes between tokens in the writing buffer, free of conflicts
constexpr int PART_BYTES = 24;
constexpr int META = (TOKENS + 127) / 128;             // token scales a thread fetches
constexpr int BUFFER_BYTES = WARPGROUPS * (4 * CHUNK * PITCH + TOKENS * 8);

// Registers move from the copying warpgroup to the computing ones, out of what the block was given at its start.
constexpr int THREADS = WARPGROUPS * 128 + 128;
constexpr int START_REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int COPY_REGISTERS = 40;
constexpr int COMPUTE_REGISTERS =
    WARPGROUPS == 1 ? 240 : (START_REGISTERS * (WARPGROUPS + 1) - COPY_REGISTERS) / WARPGROUPS / 8 * 8;

#if FLOAT_SCALE
typedef float Sum;
#else
typedef int Sum;
#endif

struct Arguments {
    const u8* weight;
    const u8* x;
    const float* x_scale;
    const int* x_sum;       // sums of the activations of each token, for FOLDED
    const float* bias;      // or null
    const float* channel_scale;   // or null
    void* out;
    int* workspace;         // zeros, left as zeros
    int* counters;          // zeros, left as zeros
    int tokens, channels, blocks, slabs;   // blocks of 128 inputs; slabs of 8 tokens
    int token_tiles;
    int whole_tiles, tiles; // of the tiles, the first `whole_tiles` are not split,
    int splits;             // the others each into `splits` parts, a block a part
    float factor;           // 1 / amplifier
};

struct Work {
    int tile, begin, end;   // blocks of the tile
};

// What one block does: its part of a split tile first, so that nobody waits for the sum at the end.
struct Schedule {
    int part, next_tile, whole_tiles, blocks, splits;
    bool has_part;

    __device__ Schedule(const Arguments& a) {
        part = next_tile = blockIdx.x;
        whole_tiles = a.whole_tiles;
        blocks = a.blocks;
        splits = a.splits;
        has_part = part < (a.tiles - whole_tiles) * splits;
    }

    __device__ int units() const {
        int sum = next_tile < whole_tiles ? ((whole_tiles - 1 - next_tile) / static_cast<int>(gridDim.x) + 1) * blocks : 0;
        return has_part ? sum + blocks * (part % splits + 1) / splits - blocks * (part % splits) / splits : sum;
    }

    __device__ bool next(Work& work) {
        if (has_part) {
            has_part = false;
            work.tile = whole_tiles + part / splits;
            work.begin = blocks * (part % splits) / splits;
            work.end = blocks * (part % splits + 1) / splits;
            return true;
        }
        if (next_tile >= whole_tiles) return false;
        work = Work{next_tile, 0, blocks};
        next_tile += gridDim.x;
        return true;
    }
};

__device__ __forceinline__ int token_tile(const Arguments& a, int tile) { return a.token_tiles == 1 ? 0 : tile % a.token_tiles; }

// First slab of 64 channels of a tile.
__device__ __forceinline__ int channel_slab(const Arguments& a, int tile) {
    return (a.token_tiles == 1 ? tile : tile / a.token_tiles) * WARPGROUPS;
}

// Walks the units of a schedule in order and copies them.
struct Copier {
    const Arguments& a;
    Schedule schedule;
    Work work;
    u32 x_bytes;
    int left, groups;
    const u8 *slab, *x;

    __device__ Copier(const Arguments& arguments) : a(arguments), schedule(arguments), left(0) {}

    __device__ void advance() {
        if (left > 0) {
            left--;
            slab += SLAB_BYTES;
            x += a.slabs * 1024;
        }
        if (left == 0 && schedule.next(work)) {
            left = work.end - work.begin;
            int first_slab = channel_slab(a, work.tile);
            int token_slab = token_tile(a, work.tile) * (TOKENS / 8);
            groups = max(0, min(WARPGROUPS, (a.channels + 63) / 64 - first_slab));
            slab = a.weight + (static_cast<long long>(first_slab) * a.blocks + work.begin) * SLAB_BYTES;
            x = a.x + (static_cast<long long>(work.begin) * a.slabs + token_slab) * 1024;
            x_bytes = min(TOKENS / 8, a.slabs - token_slab) * 1024;
        }
    }

    __device__ void copy_weight(u32 target, u32 barrier, u64 policy) {
        barrier_expect(barrier, x_bytes + groups * SLAB_BYTES);
#pragma unroll 1
        for (int g = 0; g < groups; g++)
            copy_bulk(target + g * SLAB_BYTES, slab + static_cast<long long>(g * a.blocks) * SLAB_BYTES, SLAB_BYTES,
                      barrier, policy);
    }

    __device__ void copy_x(u32 target, u32 barrier, u64 policy) { copy_bulk(target, x, x_bytes, barrier, policy); }
};

__device__ __forceinline__ void copy_units(const Arguments& a, u32 x_base, u32 w_base, u32 full, u32 empty) {
    u64 keep = policy_evict_last();
    u64 weight_policy = a.token_tiles == 1 ? policy_evict_first() : keep;
    Copier copier(a);
    int total = copier.schedule.units(), filled = min(total, STAGES);
    copier.advance();
    Copier tokens = copier;
#pragma unroll 1
    for (int i = 0; i < filled; i++) {
        copier.copy_weight(w_base + i * W_BYTES, full + 8 * i, weight_policy);
        copier.advance();
    }
    wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < filled; i++) {
        tokens.copy_x(x_base + i * X_BYTES, full + 8 * i, keep);
        tokens.advance();
    }
    int stage = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int i = filled; i < total; i++) {
        u32 barrier = full + 8 * stage;
        barrier_wait(empty + 8 * stage, phase);
        copier.copy_weight(w_base + stage * W_BYTES, barrier, weight_policy);
        copier.copy_x(x_base + stage * X_BYTES, barrier, keep);
        copier.advance();
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
}

struct Words {
    u32 weight[8];      // this thread's weights of a unit, two wgmma registers a word
    u32 scale[GROUPS];  // of its two channels
};

__device__ __forceinline__ void load_words(Words& words, u32 slab, int thread) {
    uint4 low = load_shared16(slab + thread * 16), high = load_shared16(slab + 2048 + thread * 16);
    words.weight[0] = low.x, words.weight[1] = low.y, words.weight[2] = low.z, words.weight[3] = low.w;
    words.weight[4] = high.x, words.weight[5] = high.y, words.weight[6] = high.z, words.weight[7] = high.w;
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        words.scale[g] = load_shared4(slab + 4096 + g * 128 + thread / 32 * 32 + thread % 32 / 4 * 4);
}

#if FLOAT_SCALE
__device__ __forceinline__ float first_scale(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_scale(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }
#else
__device__ __forceinline__ int first_scale(u32 pair) { return static_cast<short>(pair & 0xFFFF); }
__device__ __forceinline__ int second_scale(u32 pair) { return static_cast<int>(pair) >> 16; }
#endif

// Eight nibbles u = code + 8 of a word become eight bytes: signed codes, or code * scale + 128 when FOLDED.
__device__ __forceinline__ void unpack(u32 (&operand)[16], const Words& words) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int step = i / 2, row = i % 2;
        u32 word = words.weight[i];
        u32 low = word & 0x0F0F0F0F, high = (word >> 4) & 0x0F0F0F0F;
#if FOLDED
        u32 pair = words.scale[step / STEPS];
        u32 scale = row ? second_scale(pair) : first_scale(pair);
        u32 offset = 0x80808080u - scale * 0x08080808u;
        operand[step * 4 + row] = low * scale + offset;
        operand[step * 4 + row + 2] = high * scale + offset;
#else
        operand[step * 4 + row] = (low + 0x78787878u) ^ 0x80808080u;
        operand[step * 4 + row + 2] = (high + 0x78787878u) ^ 0x80808080u;
#endif
    }
}

// Sums of tiles that several blocks share. The computing warps add theirs and go on; a warp that has nothing to copy
// counts the parts once they have arrived, and whoever counted last takes the whole sum when its other work is done.
struct Part {
    const Arguments& a;
    u32 added;               // a barrier; behind it another one, and a flag
    int group;

    __device__ Part(const Arguments& arguments, u32 base, int warpgroup)
        : a(arguments), added(base + PART_BYTES * warpgroup), group(warpgroup) {}

    __device__ u32 counted() const { return added + 8; }
    __device__ u32 flag() const { return added + 16; }
    __device__ int slot() const { return static_cast<int>(blockIdx.x) / a.splits * WARPGROUPS + group; }
    __device__ Sum* sums() const { return reinterpret_cast<Sum*>(a.workspace) + static_cast<long long>(slot()) * (TOKENS * 64); }

    __device__ void init() const {
        barrier_init(added, 4);
        barrier_init(counted(), 1);
    }

    __device__ __forceinline__ void add(const Sum (&total)[TOKENS / 2], int thread) const {
        Sum* mine = sums() + thread;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++)
#if FLOAT_SCALE
            asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(mine + i * 128), "f"(total[i]) : "memory");
#else
            asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(mine + i * 128), "r"(total[i]) : "memory");
#endif
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(added);
    }

    // By one thread that computes nothing.
    __device__ void count() const {
        int* counter = a.counters + slot();
        barrier_wait(added, 0);
        __threadfence();
        bool all = atomicAdd(counter, 1) + 1 == a.splits;
        if (all) *counter = 0;
        __threadfence();
        store_shared4(flag(), all);
        barrier_arrive(counted());
    }

    __device__ __forceinline__ bool take(Sum (&total)[TOKENS / 2], int thread) const {
        barrier_wait(counted(), 0);
        if (!load_shared4(flag())) return false;
        Sum* mine = sums() + thread;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) total[i] = atomicExch(mine + i * 128, static_cast<Sum>(0));
        return true;
    }
};

// Scales and sums of the tokens of a tile, fetched when the tile begins and used when it ends.
struct TokenFacts {
    float scale[META];
    int sum[META];

    __device__ void fetch(const Arguments& a, int tile, int thread) {
        int token0 = token_tile(a, tile) * TOKENS;
#pragma unroll
        for (int i = 0; i < META; i++) {
            int token = token0 + i * 128 + thread;
            bool inside = i * 128 + thread < TOKENS && token < a.tokens;
            scale[i] = inside ? __ldcg(a.x_scale + token) * a.factor : 0;
            sum[i] = FOLDED && inside ? 128 * __ldcg(a.x_sum + token) : 0;
        }
    }
};

__device__ __forceinline__ u32 pack_out(float low, float high) {
    return OUT == 0 ? pack_bf16(low, high) : pack_fp16(low, high);
}

__device__ __forceinline__ void write_tile(
    const Arguments& a, const Sum (&total)[TOKENS / 2], const TokenFacts& facts, int tile, int channel0, int group,
    int thread, u8* buffer) {
    int token0 = token_tile(a, tile) * TOKENS;
    int warp = thread / 32, lane = thread % 32;
    float* scales = reinterpret_cast<float*>(buffer + WARPGROUPS * 4 * CHUNK * PITCH) + group * TOKENS * 2;
    int* sums = reinterpret_cast<int*>(scales + TOKENS);
    named_barrier(1 + group, 128);
#pragma unroll
    for (int i = 0; i < META; i++)
        if (i * 128 + thread < TOKENS) {
            scales[i * 128 + thread] = facts.scale[i];
            sums[i * 128 + thread] = facts.sum[i];
        }
    named_barrier(1 + group, 128);
    channel0 += warp * 16;
    int channel = channel0 + lane / 4;
    float bias0 = 0, bias1 = 0, own0 = 1, own1 = 1;
    if (channel < a.channels) {
        if (a.bias) bias0 = a.bias[channel];
        if (a.channel_scale) own0 = a.channel_scale[channel];
    }
    if (channel + 8 < a.channels) {
        if (a.bias) bias1 = a.bias[channel + 8];
        if (a.channel_scale) own1 = a.channel_scale[channel + 8];
    }
    u32 mine = shared_address(buffer) + (group * 4 + warp) * (CHUNK * PITCH);
#pragma unroll
    for (int chunk = 0; chunk < TOKENS / CHUNK; chunk++) {
        if (token0 + chunk * CHUNK >= a.tokens) break;
        u32 packed[CHUNK / 4];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            int inner = chunk * CHUNK + j * 8 + lane % 4 * 2;
            const Sum* sum = total + (chunk * CHUNK / 8 + j) * 4;
            float2 scale = *reinterpret_cast<const float2*>(scales + inner);
            int2 excess = FOLDED ? *reinterpret_cast<const int2*>(sums + inner) : make_int2(0, 0);
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Sum accumulator = sum[i] - static_cast<Sum>(i % 2 ? excess.y : excess.x);
                value[i] = static_cast<float>(accumulator) * (i % 2 ? scale.y : scale.x);
                if (a.channel_scale) value[i] *= i < 2 ? own0 : own1;
                if (a.bias) value[i] = __fadd_rn(value[i], i < 2 ? bias0 : bias1);
#if OUT >= 2
                int token = token0 + inner + i % 2, c = channel + i / 2 * 8;
                if (token < a.tokens && c < a.channels) {
                    long long place = static_cast<long long>(token) * a.channels + c;
                    if (OUT == 2) static_cast<float*>(a.out)[place] = value[i];
                    else static_cast<int*>(a.out)[place] = accumulator;
                }
#endif
            }
            packed[2 * j] = pack_out(value[0], value[1]);
            packed[2 * j + 1] = pack_out(value[2], value[3]);
        }
#if OUT < 2
        u32 row = mine + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
        if (CHUNK == 8) {
            store_transposed2(row, packed[0], packed[1]);
        } else {
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j += 2)
                store_transposed4(row + j * 8 * PITCH, packed[2 * j], packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]);
        }
        __syncwarp();
        unsigned short* out = static_cast<unsigned short*>(a.out);
#pragma unroll
        for (int i = 0; i < (CHUNK + 15) / 16; i++) {
            int inner = i * 16 + lane / 2, token = token0 + chunk * CHUNK + inner, c = channel0 + lane % 2 * 8;
            if (inner < CHUNK && token < a.tokens && c < a.channels) {
                uint4 value = load_shared16(mine + inner * PITCH + lane % 2 * 16);
                unsigned short* target = out + static_cast<long long>(token) * a.channels + c;
                if (a.channels % 8 == 0) {
                    *reinterpret_cast<uint4*>(target) = value;
                } else {
                    u32 words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        if (c + e < a.channels) target[e] = static_cast<unsigned short>(words[e / 2] >> (16 * (e % 2)));
                }
            }
        }
        __syncwarp();
#endif
    }
}

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
        if (thread % 32 == 0) barrier_arrive(empty + 8 * ring.stage);
        ring.advance();
        remaining--;
    }

    __device__ __forceinline__ void write(const Sum (&total)[TOKENS / 2]) {
        write_tile(a, total, facts, work.tile, (channel_slab(a, work.tile) + part.group) * 64, part.group, thread, buffer);
    }

    __device__ __forceinline__ bool inside() { return (channel_slab(a, work.tile) + part.group) * 64 < a.channels; }

    __device__ __forceinline__ void finish_tile(const Sum (&total)[TOKENS / 2]) {
        if (!inside()) return;
        if (work.tile >= schedule.whole_tiles) part.add(total, thread);
        else write(total);
    }

    // Writes the split tile, if this block's part came last.
    __device__ __forceinline__ void finish_part(Sum (&total)[TOKENS / 2]) {
        Schedule again(a);
        if (!again.has_part) return;
        again.next(work);
        if (inside() && part.take(total, thread)) {
            facts.fetch(a, work.tile, thread);
            write(total);
        }
    }

    __device__ __forceinline__ void next_tile() {
        if (schedule.next(work)) {
            left = work.end - work.begin;
            facts.fetch(a, work.tile, thread);
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
            next_tile();
            issue(total, next, ahead.stage, true);
        }
    }

    __device__ __forceinline__ void run() {
        Sum total[TOKENS / 2];
        u32 operand[2][16], scale[GROUPS];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) total[i] = 0;
        next_tile();
        fetch(operand[0], scale);
        issue(total, operand[0], 0, true);
        while (true) {
            step(total, operand[1]);
            if (remaining == 0) break;
            step(total, operand[0]);
            if (remaining == 0) break;
        }
        wgmma_wait<0>();
        finish_part(total);
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
        next_tile();
        fetch(operand[0], scale[0]);
        while (true) {
            step(total, operand[0], scale[0], operand[1], scale[1]);
            if (remaining == 0) break;
            step(total, operand[1], scale[1], operand[0], scale[0]);
            if (remaining == 0) break;
        }
        finish_part(total);
    }
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) w4a8_gemm(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 x_base = shared_address(memory);
    u32 w_base = x_base + STAGES * X_BYTES;
    u8* buffer = memory + STAGES * (X_BYTES + W_BYTES);
    u32 full = shared_address(buffer) + BUFFER_BYTES, empty = full + 8 * STAGES, parts = empty + 8 * STAGES;

    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, WARPGROUPS * 4);
        }
        for (int g = 0; g < WARPGROUPS; g++) Part(a, parts, g).init();
        fence_barrier_init();
    }
    __syncthreads();

    int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    if (group == WARPGROUPS) {
        release_registers<COPY_REGISTERS>();
        // Warp 0 copies; warps 1 to 3 each count the part of one warpgroup.
        if (thread == 0) copy_units(a, x_base, w_base, full, empty);
        int served = thread / 32 - 1;
        Schedule schedule(a);
        Work work;
        if (thread % 32 == 0 && served >= 0 && served < WARPGROUPS && schedule.has_part && schedule.next(work) &&
            (channel_slab(a, work.tile) + served) * 64 < a.channels) {
            wait_for_previous_kernel();
            Part(a, parts, served).count();
        }
    } else {
        claim_registers<COMPUTE_REGISTERS>();
        wait_for_previous_kernel();
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
