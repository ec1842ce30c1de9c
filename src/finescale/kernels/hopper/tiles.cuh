// Sizes and arguments of the product in gemm.cu, and which block computes what.

constexpr int STEPS = 4 / GROUPS;                      // wgmmas of 32 inputs in a scale group
constexpr int SLAB_BYTES = 4096 + 128 * GROUPS;        // 64 channels by 128 inputs, and their scales
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = WARPGROUPS * SLAB_BYTES;
constexpr int LARGEST_CHUNK = WARPGROUPS == 3 || TOKENS % 32 ? 16 : 32;
constexpr int FINISHERS = CLUSTER < 2 || TOKENS < 16 ? 1 : CLUSTER < 4 || TOKENS < 32 ? 2 : CLUSTER < 8 || TOKENS < 64 ? 4 : 8;
constexpr int SHARE = TOKENS / FINISHERS;              // tokens of a shared tile that one block of the cluster writes
constexpr int CHUNK = SHARE < LARGEST_CHUNK ? SHARE : LARGEST_CHUNK;  // tokens a warpgroup writes at a time
constexpr int PITCH = 144;                             // bytes between tokens in the writing buffers, free of conflicts
constexpr int PART_BYTES = 24;
constexpr int META = (TOKENS + 127) / 128;             // token scales a thread fetches
constexpr int CHUNK_BYTES = CHUNK * PITCH;              // on their way out; there are two of each warpgroup
constexpr int BUFFER_BYTES = WARPGROUPS * (2 * CHUNK_BYTES + TOKENS * 8);

// Registers move from the copying warpgroup to the computing ones, out of what the block was given at its start.
constexpr int THREADS = WARPGROUPS * 128 + 128;
constexpr int START_REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int COPY_REGISTERS = 40;
constexpr int COMPUTE_REGISTERS =
    WARPGROUPS == 1 ? 240 : (START_REGISTERS * (WARPGROUPS + 1) - COPY_REGISTERS) / WARPGROUPS / 8 * 8;

extern __shared__ __align__(1024) u8 memory[];

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
    const int* row_end;     // GROUPED: one past each expert's last row; the next one's first is the next multiple of 8
};

// Where a block stands when: the clocks of its multiprocessor and of the GPU, so far behind in the workspace, by block and
// point (benchmarks/gemm_phases.py).
#if PROFILE
#define MARK(point)                                                                       \
    if (threadIdx.x == 0) {                                                               \
        u64* marks = reinterpret_cast<u64*>(a.workspace + PROFILE) + blockIdx.x * 16;     \
        asm volatile("mov.u64 %0, %%clock64;" : "=l"(marks[point])::"memory");            \
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(marks[8 + point])::"memory");    \
    }
#else
#define MARK(point)
#endif

struct Work {
    int tile, begin, end;   // blocks of the tile
};

// How tiles are shared out: the first `whole` of all `tiles` are not split, the others each into `splits` parts.
struct Shares {
    int whole, tiles, splits;
};

// Where a tile lies: its first slab of 64 channels, its tokens from `token0` up to `token_end`, its expert (0 for one weight).
struct Place {
    int channel_slab, token0, token_end, expert;
};

#if GROUPED
#include "grouped.cuh"
#else
__device__ __forceinline__ Shares shares(const Arguments& a) { return Shares{a.whole_tiles, a.tiles, a.splits}; }

__device__ __forceinline__ Place find_place(const Arguments& a, int tile) {
    if (a.token_tiles == 1) return Place{tile * WARPGROUPS, 0, a.tokens, 0};
    return Place{tile / a.token_tiles * WARPGROUPS, tile % a.token_tiles * TOKENS, a.tokens, 0};
}
#endif

// What one block does. Its part of a split tile comes first, so that nobody waits for the sum at the end; in a cluster,
// which shares one tile, it comes last, so that its sums may stay in registers and the stages' memory is free.
struct Schedule {
    int part, next_tile, whole_tiles, blocks, splits;
    bool has_part;

    __device__ Schedule(const Arguments& a) {
        Shares shared_out = shares(a);
        part = next_tile = blockIdx.x;
        whole_tiles = shared_out.whole;
        blocks = a.blocks;
        splits = shared_out.splits;
        has_part = part < (shared_out.tiles - whole_tiles) * splits;
    }

    __device__ int units() const {
        int sum = next_tile < whole_tiles ? ((whole_tiles - 1 - next_tile) / static_cast<int>(gridDim.x) + 1) * blocks : 0;
        return has_part ? sum + blocks * (part % splits + 1) / splits - blocks * (part % splits) / splits : sum;
    }

    __device__ bool next(Work& work) {
        if (has_part && (CLUSTER == 1 || next_tile >= whole_tiles)) {
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
