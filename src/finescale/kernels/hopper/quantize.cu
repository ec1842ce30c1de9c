// Activations to int8, one scale a token, written as the products read them (kernels/layout.py).
//
// Before the rounding, what stands between two products of a transformer, in the roundings of the plain modules:
//   PLAIN   x
//   RMS     rmsnorm(x) * gain                 ADD: x + residual first, the sum is written back to the residual
//   LAYER   layernorm(x) * gain + shift       (likewise)
//   SILU    silu(x[:, :I]) * x[:, I:]
// GATHER: then channels are split, merged and permuted (gather.cuh).
//
// Blocks stay for many tokens. Bulk copies bring tokens to slots of shared memory; from there each thread takes its
// pieces of 8 values into registers, where they stay until they are codes, so that the slot is filled anew while the
// token is still worked on. Instructions are what bounds this kernel beside the memory (3 bytes a value at 3 TB/s leave a
// multiprocessor 31 of them), so 16-bit numbers are added and multiplied in pairs.
//
// Compile-time settings: KIND (0 plain, 1 rms, 2 layer, 3 silu), ADD, IN (0 bfloat16, 1 float16, 2 float32), THREADS,
// PIECES (of a thread), BLOCKS (that are to fit on a multiprocessor), STAGES (slots; 0 if threads load tokens themselves),
// GATHER, ROUTED (rows sorted by expert, of which `position` says where each choice of a token has its row: 1 reads tokens
// and writes each to all its rows; 2 reads and writes rows, one a choice).

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
    int items, inputs, slabs;  // items: tokens, or choices if ROUTED == 2
    int choices;            // of a token, ROUTED == 1
    float epsilon;
    const int* index;       // GATHER: see gather.cuh
    const float* index_gain;
    const int* more_start;
    const int* more_index;
    const float* more_gain;
    int gathered;           // channels that are rounded; `inputs` unless GATHER
};

extern __shared__ __align__(16) u8 memory[];

constexpr int WARPS = THREADS / 32;
constexpr int SLOTS = STAGES > 0 ? STAGES : 1;
constexpr int PARTS = KIND == 3 || ADD ? 2 : 1;  // rows that a token is made of
constexpr bool NORM = KIND == 1 || KIND == 2;
constexpr int FRONT = GATHER ? 16 : 0;           // zeros before the token, for channels beyond the last
enum { TOTAL, SQUARES, LARGEST, SUM, REDUCTIONS };

__device__ __forceinline__ int row_bytes(int inputs) { return (inputs + 7) / 8 * static_cast<int>(sizeof(Piece)); }
__device__ __forceinline__ int slot_bytes(int inputs) { return FRONT + PARTS * row_bytes(inputs); }

// Over all threads of the block. A scratch is used again two tokens later, with other barriers in between.
__device__ __forceinline__ float total_of_block(float value, u32* scratch) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
    if (WARPS == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = __float_as_uint(value);
    __syncthreads();
    value = threadIdx.x % 32 < WARPS ? __uint_as_float(scratch[threadIdx.x % 32]) : 0;
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        if (offset < WARPS) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
    return __shfl_sync(0xFFFFFFFF, value, 0);
}

__device__ __forceinline__ u32 largest_of_block(u32 value, u32* scratch) {
    value = __reduce_max_sync(0xFFFFFFFF, value);
    if (WARPS == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    return __reduce_max_sync(0xFFFFFFFF, threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : 0);
}

// How a token is rounded: codes are round(value / scale).
//
// For 16-bit values one multiplication gives them. 254 * value - odd * largest is a multiple of the value's last place, so
// that a quotient that is no tie is at least value / (4094 * largest) away from one, and an error of the factor of less
// than 10^-6 does not matter. There is a tie only if value = largest / 2, or if 127 divides the significand of the largest.
// In the first case the factor is made a little too small or too large, as a division rounds that very quotient. In the
// second the scale is exact: if it is a power of two, so is the factor, and else values are divided, as are those of 32
// bits that are near a tie.
struct Rounding {
    float scale, factor;
    bool sure;
};

__device__ __forceinline__ Rounding rounding_of(u32 bits) {
    Rounding r;
#if IN == 2
    float largest = __uint_as_float(bits);
#else
    float largest = to_float(static_cast<u16>(bits));
#endif
    r.scale = largest != 0 ? __fdiv_rn(largest, 127.0f) : 1.0f;
    if (r.scale < 1.17549435e-38f) r.scale = 1.17549435e-38f;
#if IN == 2
    r.factor = __fdiv_rn(1.0f, r.scale);
    r.sure = true;
#else
    bool power = (__float_as_uint(r.scale) & 0x7FFFFF) == 0;
    bool middle_down = __fdiv_rn(0.5f * largest, r.scale) < 63.5f;
    r.factor = power ? __uint_as_float(0x7F000000 - __float_as_uint(r.scale))
                     : about_inverse(r.scale) * (middle_down ? 1.0f - 6e-7f : 1.0f + 6e-7f);
    // Neither NaN nor infinite nor subnormal anywhere.
    r.sure = r.scale > 1e-30f && r.scale < 1e30f && (IN == 0 || power || __fmaf_rn(r.scale, 127.0f, -largest) != 0);
#endif
    return r;
}

// Four bytes of as many words.
__device__ __forceinline__ u32 bytes_of(const u32* words) {
    return __byte_perm(__byte_perm(words[0], words[1], 0x0040), __byte_perm(words[2], words[3], 0x0040), 0x5410);
}

// Codes of 8 values, in order of their bytes. Not in line, since it is long and hardly ever needed.
__device__ __noinline__ uint2 divided(Piece piece, float scale) {
    float x[8];
    u32 codes[8];
    unpack(x, piece);
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i] = max(-127, min(127, __float2int_rn(__fdiv_rn(x[i], scale))));
    return make_uint2(bytes_of(codes), bytes_of(codes + 4));
}

__device__ __forceinline__ uint2 codes_of(const Piece& piece, const Rounding& r) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    float x[8];
    u32 bits[8];
    unpack(x, piece);
    bool sure = r.sure;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float shifted = __fmaf_rn(x[i], r.factor, SHIFT);
        if (IN == 2) sure &= fabsf(__fmaf_rn(x[i], r.factor, SHIFT - shifted)) < 0.4999f;
        bits[i] = __float_as_uint(shifted);
    }
    return sure ? make_uint2(bytes_of(bits), bytes_of(bits + 4)) : divided(piece, r.scale);
}

// The tokens of a block on their way through shared memory.
struct Tokens {
    const Arguments& a;
    u32 full;  // barriers of the stages

    __device__ long long row(int item) const {
#if ROUTED == 2
        return a.position[item];
#else
        return item;
#endif
    }

    __device__ u8* slot(int s) const { return memory + s * slot_bytes(a.inputs); }
    __device__ Piece* part(int s, int p) const { return reinterpret_cast<Piece*>(slot(s) + FRONT + p * row_bytes(a.inputs)); }

    __device__ const Element* source(long long row, int p) const {
        if (KIND == 3) return static_cast<const Element*>(a.x) + (2 * row + p) * a.inputs;
        return static_cast<const Element*>(p ? a.residual : a.x) + row * a.inputs;
    }

    // By one thread.
    __device__ void copy(int item, int s) const {
        u32 barrier = full + 8 * s, bytes = a.inputs * static_cast<u32>(sizeof(Element));
        long long from = row(item);
        if (from < 0) return barrier_arrive(barrier);
        barrier_expect(barrier, PARTS * bytes);
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            copy_bulk(shared_address(part(s, p)), source(from, p), bytes, barrier, policy_evict_first());
    }

    __device__ Piece piece(int s, long long row, int p, int piece) const {
        if (STAGES == 0) return load_piece(source(row, p), piece * 8, a.inputs - piece * 8);
        return piece * 8 < a.inputs ? part(s, p)[piece] : zeros();
    }
};

// silu(x) * y
__device__ __forceinline__ Piece gated(const Piece& x_piece, const Piece& y) {
    float x[8];
    unpack(x, x_piece);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= about_inverse(1.0f + power_of_two(-1.44269504f * x[i]));
    return multiply(pack(x), y);
}

// Of the norm; the mean is that of LAYER.
__device__ __forceinline__ float norm_scale(const Arguments& a, const Piece (&token)[PIECES], float& mean, u32 (*scratch)[32]) {
    float totals[2] = {0, 0}, x[8];
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        unpack(x, token[k]);
#pragma unroll
        for (int i = 0; i < 8; i++) totals[i % 2] += KIND == 1 ? x[i] * x[i] : x[i];
    }
    float total = total_of_block(totals[0] + totals[1], scratch[TOTAL]) / a.inputs;
    if (KIND == 2) {
        mean = total;
        totals[0] = totals[1] = 0;
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            int count = a.inputs - (threadIdx.x + k * THREADS) * 8;
            unpack(x, token[k]);
            if (count < 8) {
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = i < count ? x[i] : mean;
            }
#pragma unroll
            for (int i = 0; i < 8; i++) totals[i % 2] += (x[i] - mean) * (x[i] - mean);
        }
        total = total_of_block(totals[0] + totals[1], scratch[SQUARES]) / a.inputs;
    }
    return 1.0f / sqrtf(total + a.epsilon);
}

__device__ __forceinline__ Piece normed(const Piece& piece, float mean, float inverse, const Piece& gain, const Piece& shift) {
    float x[8], g[8], s[8];
    unpack(x, piece);
    if (KIND == 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= inverse;
        return multiply(pack(x), gain);
    }
    unpack(g, gain);
    unpack(s, shift);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = (x[i] - mean) * inverse * g[i] + s[i];
    return pack(x);
}

#if GATHER
#include "gather.cuh"
#endif

// Where the codes of a thread's first piece of a row go; the next piece of a thread is `THREADS / 16` blocks further.
__device__ __forceinline__ u8* codes_at(const Arguments& a, long long row) {
    int slot = static_cast<int>(row % 8), piece = threadIdx.x % 16;
    long long block = static_cast<long long>(threadIdx.x / 16) * a.slabs + row / 8;
    return a.codes + block * 1024 + slot * 128 + (piece / 2 ^ slot) * 16 + piece % 2 * 8;
}

__device__ __forceinline__ void store_codes(const Arguments& a, long long row, const uint2 (&codes)[PIECES]) {
    u8* target = codes_at(a, row);
    int pieces = (a.gathered + 127) / 128 * 16;
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        if (static_cast<int>(threadIdx.x) + k * THREADS < pieces)
            *reinterpret_cast<uint2*>(target + static_cast<long long>(k * (THREADS / 16)) * a.slabs * 1024) = codes[k];
}

// Scale and sum of codes of a token, by the first warp; where there are several, their sums were written before the last
// barrier.
__device__ __forceinline__ void write_facts(const Arguments& a, long long row, float scale, int sum) {
#if ROUTED == 1
    for (int c = threadIdx.x; c < a.choices; c += 32) {
        int target = a.position[row * a.choices + c];
        if (target < 0) continue;
        a.scale[target] = scale;
        a.sum[target] = sum;
    }
#else
    if (threadIdx.x == 0) {
        a.scale[row] = scale;
        a.sum[row] = sum;
    }
#endif
}

__device__ __forceinline__ void write_facts_of_warps(const Arguments& a, long long row, float scale, const u32* sums) {
    if (threadIdx.x >= 32) return;
    int sum = threadIdx.x < WARPS ? static_cast<int>(sums[threadIdx.x]) : 0;
    write_facts(a, row, scale, __reduce_add_sync(0xFFFFFFFF, sum));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) quantize_tokens(const __grid_constant__ Arguments a) {
    __shared__ u32 scratch[2][REDUCTIONS][32];
    __shared__ u64 barriers[SLOTS];
    let_next_kernel_start();
    Tokens tokens{a, shared_address(barriers)};
    if (STAGES > 0 && threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(tokens.full + 8 * i, 1);
        fence_barrier_init();
    }
    // What is the same for all tokens stays in registers.
    Piece gain[PIECES], shift[PIECES];
#if GATHER
    Piece gather_gain[PIECES];
#endif
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        int piece = threadIdx.x + k * THREADS, count = a.inputs - piece * 8;
        if (NORM) gain[k] = load_piece(a.gain, piece * 8, count);
        if (KIND == 2) shift[k] = a.shift ? load_piece(a.shift, piece * 8, count) : zeros();
#if GATHER
        gather_gain[k] = load_terms(a, piece);
#endif
    }
#if GATHER
    if (threadIdx.x < 4 * SLOTS) *reinterpret_cast<u32*>(tokens.slot(threadIdx.x / 4) + threadIdx.x % 4 * 4) = 0;
#endif
    __syncthreads();
    wait_for_previous_kernel();
    int stride = static_cast<int>(gridDim.x), filling = blockIdx.x;  // the next item to be copied
    if (STAGES > 0 && threadIdx.x == 0)
        for (int i = 0; i < SLOTS && filling < a.items; i++, filling += stride) tokens.copy(filling, i);
    long long row_before = -1;
    float scale_before = 0;
    int parity = 0, slot = 0;
    u32 phase = 0;
    for (int item = blockIdx.x; item < a.items; item += stride) {
        long long row = tokens.row(item);
        if (STAGES > 0) barrier_wait(tokens.full + 8 * slot, phase);
        auto fill_again = [&] {  // after a barrier of those who read the slot
            if (STAGES > 0 && threadIdx.x == 0 && filling < a.items) tokens.copy(filling, slot), filling += stride;
        };
        if (row < 0) {
            __syncthreads();
            fill_again();
        } else {
            Piece token[PIECES];
            u32 largest = 0;
            constexpr bool STRAIGHT = GATHER && KIND == 0 && !ADD && STAGES > 0;  // gathers what was copied
            if (!STRAIGHT) {
                Piece other[PIECES];
#pragma unroll
                for (int k = 0; k < PIECES; k++) {
                    token[k] = tokens.piece(slot, row, 0, threadIdx.x + k * THREADS);
                    if (PARTS == 2) other[k] = tokens.piece(slot, row, 1, threadIdx.x + k * THREADS);
                }
#pragma unroll
                for (int k = 0; k < PIECES; k++) {
                    int piece = threadIdx.x + k * THREADS, count = a.inputs - piece * 8;
                    if (KIND == 3) token[k] = gated(token[k], other[k]);
                    if (ADD) {
                        token[k] = add(token[k], other[k]);
                        if (STAGES == 0) store_piece(token[k], a.residual, row * a.inputs + piece * 8, count);
                        else if (count > 0)
                            reinterpret_cast<Piece*>(static_cast<Element*>(a.residual) + row * a.inputs)[piece] = token[k];
                    }
                }
                if (NORM) {
                    float mean = 0, inverse = norm_scale(a, token, mean, scratch[parity]);
                    if (!GATHER && WARPS > 1) fill_again();
#pragma unroll
                    for (int k = 0; k < PIECES; k++) token[k] = normed(token[k], mean, inverse, gain[k], shift[k]);
                }
            }
#if GATHER
            if (!STRAIGHT) {
#pragma unroll
                for (int k = 0; k < PIECES; k++)
                    if ((static_cast<int>(threadIdx.x) + k * THREADS) * 8 < a.inputs)
                        tokens.part(slot, 0)[threadIdx.x + k * THREADS] = token[k];
                fence_proxy_async();  // what is written here comes before what is copied here
                __syncthreads();
            }
#pragma unroll
            for (int k = 0; k < PIECES; k++) {
                int piece = threadIdx.x + k * THREADS;
                token[k] = piece * 8 < a.gathered ? gather(a, tokens.slot(slot), piece, gather_gain[k]) : zeros();
            }
#endif
#pragma unroll
            for (int k = 0; k < PIECES; k++) largest = larger_magnitude(largest, token[k]);
#if IN != 2
            largest = max(largest & 0xFFFF, largest >> 16);
#endif
            largest = largest_of_block(largest, scratch[parity][LARGEST]);
            if (WARPS == 1) __syncwarp();
            if (GATHER || !NORM || WARPS == 1) fill_again();
            if (WARPS > 1 && row_before >= 0)
                write_facts_of_warps(a, row_before, scale_before, scratch[parity ^ 1][SUM]);
            Rounding rounding = rounding_of(largest);
            uint2 codes[PIECES];
            int sum = 0;
#pragma unroll
            for (int k = 0; k < PIECES; k++) {
                codes[k] = codes_of(token[k], rounding);
                sum = __dp4a(static_cast<int>(codes[k].x), 0x01010101, sum);
                sum = __dp4a(static_cast<int>(codes[k].y), 0x01010101, sum);
#if GATHER
                codes[k] = in_order(codes[k]);
#endif
            }
#if ROUTED == 1
            for (int c = 0; c < a.choices; c++) {
                int target = a.position[row * a.choices + c];
                if (target >= 0) store_codes(a, target, codes);
            }
#else
            store_codes(a, row, codes);
#endif
            sum = __reduce_add_sync(0xFFFFFFFF, sum);
            if (WARPS == 1) write_facts(a, row, rounding.scale, sum);
            else if (threadIdx.x % 32 == 0) scratch[parity][SUM][threadIdx.x / 32] = static_cast<u32>(sum);
            row_before = row, scale_before = rounding.scale, parity ^= 1;
        }
        if (STAGES > 0 && ++slot == SLOTS) slot = 0, phase ^= 1;
    }
    if (WARPS > 1) {
        __syncthreads();
        if (row_before >= 0) write_facts_of_warps(a, row_before, scale_before, scratch[parity ^ 1][SUM]);
    }
}
