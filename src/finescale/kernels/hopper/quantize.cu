// Activations to int8, one scale a token, written as the products read them (kernels/layout.py).
//
// Before the rounding, what stands between two products of a transformer, in the roundings of the plain modules:
//   PLAIN   x
//   RMS     rmsnorm(x) * gain                 ADD: x + residual first, the sum is written back to the residual
//   LAYER   layernorm(x) * gain + shift       (likewise)
//   SILU    silu(x[:, :I]) * x[:, I:]
// GATHER: then channels are split, merged and permuted (gather.cuh).
//
// Blocks stay for many tokens. A token lies in shared memory, in pieces of 8 values, each of which is one thread's from
// the first step to the last. With STAGES, bulk copies bring the next tokens meanwhile.
//
// Compile-time settings: KIND (0 plain, 1 rms, 2 layer, 3 silu), ADD, IN (0 bfloat16, 1 float16, 2 float32), THREADS,
// STAGES (tokens in shared memory; 0 if threads load them, one at a time), GATHER, ROUTED (rows sorted by expert, of
// which `position` says where each choice of a token has its row: 1 reads tokens and writes each to all its rows; 2 reads
// and writes rows, one a choice).

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
enum { TOTAL, SQUARES, LARGEST, SUM };           // what is combined over the block

__device__ __forceinline__ int row_bytes(int inputs) { return (inputs + 7) / 8 * static_cast<int>(sizeof(Piece)); }

struct AddFloat {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct MaxBits {
    __device__ u32 operator()(u32 a, u32 b) const { return a > b ? a : b; }
};

// Over all threads of the block. A scratch is used again two tokens later, with other barriers in between.
template <class Value, class Operator>
__device__ __forceinline__ Value reduce(Value value, Operator combine, u32* place) {
    Value* scratch = reinterpret_cast<Value*>(place);
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFF, value, offset));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : static_cast<Value>(0);
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFF, value, offset));
    return value;
}

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

    __device__ Piece* part(int slot, int p) const {
        return reinterpret_cast<Piece*>(memory + (slot * PARTS + p) * row_bytes(a.inputs));
    }

    __device__ const Element* source(long long row, int p) const {
        if (KIND == 3) return static_cast<const Element*>(a.x) + (2 * row + p) * a.inputs;
        return static_cast<const Element*>(p ? a.residual : a.x) + row * a.inputs;
    }

    // By one thread.
    __device__ void copy(int item, int slot) const {
        u32 barrier = full + 8 * slot, bytes = a.inputs * static_cast<u32>(sizeof(Element));
        long long from = row(item);
        if (from < 0) return barrier_arrive(barrier);
        barrier_expect(barrier, PARTS * bytes);
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            copy_bulk(shared_address(part(slot, p)), source(from, p), bytes, barrier, policy_evict_first());
    }

    // Each thread its own pieces.
    __device__ void load(long long row) const {
        for (int piece = threadIdx.x; piece * 8 < a.inputs; piece += THREADS)
#pragma unroll
            for (int p = 0; p < PARTS; p++) part(0, p)[piece] = load_piece(source(row, p), piece * 8, a.inputs - piece * 8);
    }
};

// The sum with the residual, which is written back, or silu(x) * y, in place of x.
__device__ __forceinline__ void join(const Arguments& a, Piece* token, const Piece* other, int piece, long long row) {
    float x[8], y[8];
    unpack(x, token[piece]);
    unpack(y, other[piece]);
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = KIND == 3 ? rounded(__fdividef(x[i], 1.0f + __expf(-x[i]))) * y[i] : x[i] + y[i];
    token[piece] = pack(x);
    if (ADD) store_piece(token[piece], a.residual, row * a.inputs + piece * 8, a.inputs - piece * 8);
}

__device__ __forceinline__ float norm_scale(const Arguments& a, const Piece* token, float& mean, u32 (*scratch)[32]) {
    float total = 0;
    for (int piece = threadIdx.x; piece * 8 < a.inputs; piece += THREADS) {
        float x[8];
        unpack(x, token[piece]);
#pragma unroll
        for (int i = 0; i < 8; i++) total += KIND == 1 ? x[i] * x[i] : x[i];
    }
    total = reduce(total, AddFloat(), scratch[TOTAL]) / a.inputs;
    if (KIND == 2) {
        mean = total;
        total = 0;
        for (int piece = threadIdx.x; piece * 8 < a.inputs; piece += THREADS) {
            float x[8];
            unpack(x, token[piece]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float distance = piece * 8 + i < a.inputs ? x[i] - mean : 0;
                total += distance * distance;
            }
        }
        total = reduce(total, AddFloat(), scratch[SQUARES]) / a.inputs;
    }
    return 1.0f / sqrtf(total + a.epsilon);
}

__device__ __forceinline__ void norm(const Arguments& a, Piece* token, int piece, float mean, float inverse) {
    float x[8], gain[8], shift[8];
    int count = a.inputs - piece * 8;
    unpack(x, token[piece]);
    load8(gain, a.gain, piece * 8, count);
    if (KIND == 2 && a.shift) load8(shift, a.shift, piece * 8, count);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float value = KIND == 1 ? rounded(x[i] * inverse) * gain[i] : (x[i] - mean) * inverse * gain[i];
        if (KIND == 2 && a.shift) value += shift[i];
        x[i] = i < count ? value : 0;
    }
    token[piece] = pack(x);
}

// The larger magnitude, as bits: a NaN is the largest of all and reaches the scale.
__device__ __forceinline__ u32 larger_magnitude(u32 largest, const Piece& piece) {
#if IN == 2
    float x[8];
    unpack(x, piece);
#pragma unroll
    for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(x[i]) & 0x7FFFFFFF);
    return largest;
#else
    u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; i++) largest = max_pairs(largest, words[i] & 0x7FFF7FFF);
    return largest;
#endif
}

#if GATHER
#include "gather.cuh"
#endif

__device__ __forceinline__ float block_largest(u32 largest, u32* scratch) {
#if IN == 2
    return __uint_as_float(reduce(largest, MaxBits(), scratch));
#else
    return to_float(static_cast<u16>(reduce(max(largest & 0xFFFF, largest >> 16), MaxBits(), scratch)));
#endif
}

// Scale and sum of codes of a token; the warps' sums were written before the last barrier.
__device__ __forceinline__ void write_facts(const Arguments& a, long long row, float scale, const u32* sums) {
    if (threadIdx.x >= 32) return;
    int sum = __reduce_add_sync(0xFFFFFFFF, threadIdx.x < WARPS ? static_cast<int>(sums[threadIdx.x]) : 0);
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

extern "C" __global__ void __launch_bounds__(THREADS) quantize_tokens(const __grid_constant__ Arguments a) {
    __shared__ u32 scratch[2][4][32];
    __shared__ u64 barriers[SLOTS];
    let_next_kernel_start();
    Tokens tokens{a, shared_address(barriers)};
    if (STAGES > 0 && threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(tokens.full + 8 * i, 1);
        fence_barrier_init();
    }
#if GATHER
    load_table(a);
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
        else if (row >= 0) tokens.load(row);
        if (row >= 0) {
            Piece* token = tokens.part(slot, 0);
            u32 largest = 0;
            if (PARTS == 2)
                for (int piece = threadIdx.x; piece * 8 < a.inputs; piece += THREADS)
                    join(a, token, tokens.part(slot, 1), piece, row);
            float mean = 0, inverse = KIND == 1 || KIND == 2 ? norm_scale(a, token, mean, scratch[parity]) : 0;
            for (int piece = threadIdx.x; piece * 8 < a.inputs; piece += THREADS) {
                if (KIND == 1 || KIND == 2) norm(a, token, piece, mean, inverse);
                if (!GATHER) largest = larger_magnitude(largest, token[piece]);
            }
#if GATHER
            token = gather(a, reinterpret_cast<const Element*>(token), largest);
#endif
            float scale = block_largest(largest, scratch[parity][LARGEST]);
            if (row_before >= 0) write_facts(a, row_before, scale_before, scratch[parity ^ 1][SUM]);
            scale = scale != 0 ? __fdiv_rn(scale, 127.0f) : 1.0f;
            if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
            float reciprocal = __fdiv_rn(1.0f, scale);
            int sum = 0;
            for (int piece = threadIdx.x; piece < (a.gathered + 127) / 128 * 16; piece += THREADS) {
                float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
                if (piece * 8 < a.gathered) unpack(x, token[piece]);
                uint2 codes = codes8(x, scale, reciprocal);
                sum = __dp4a(static_cast<int>(codes.x), 0x01010101, __dp4a(static_cast<int>(codes.y), 0x01010101, sum));
#if ROUTED == 1
                for (int c = 0; c < a.choices; c++) {
                    int target = a.position[row * a.choices + c];
                    if (target >= 0) store_codes(a, target, piece * 8, codes);
                }
#else
                store_codes(a, row, piece * 8, codes);
#endif
            }
            sum = __reduce_add_sync(0xFFFFFFFF, sum);
            if (threadIdx.x % 32 == 0) scratch[parity][SUM][threadIdx.x / 32] = static_cast<u32>(sum);
            row_before = row, scale_before = scale, parity ^= 1;
        }
        if (STAGES > 0) {
            fence_proxy_async();  // what was written in place comes before what is copied there
            __syncthreads();
            if (threadIdx.x == 0 && filling < a.items) tokens.copy(filling, slot), filling += stride;
            if (++slot == SLOTS) slot = 0, phase ^= 1;
        }
    }
    __syncthreads();
    if (row_before >= 0) write_facts(a, row_before, scale_before, scratch[parity ^ 1][SUM]);
}
