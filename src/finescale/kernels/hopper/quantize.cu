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
// Compile-time settings: KIND (0 plain, 1 rms, 2 layer, 3 silu), ADD, IN (0 bfloat16, 1 float16, 2 float32), ALIGNED (all
// rows are whole pieces and begin at multiples of 16 bytes), THREADS, PIECES (of a thread), WHOLE (of these, how many every
// thread has), BLOCKS (that are to fit on a multiprocessor), STAGES (slots; 0 if threads load tokens themselves), KEPT
// (gains and shifts stay in 0 nothing, 1 shared memory, 2 registers), FIRST (tokens leave the cache before all else, so that
// codes stay there), AHEAD (gathers fetch the next token to the cache), GATHER, ROUTED (rows sorted by expert, of which
// `position` says where each choice of a token has its row: 1 reads tokens and writes each to all its rows; 2 reads and
// writes rows, one a choice).

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

// Where a thread's piece number `k` lies, and whether any of it is inside of so many values.
__device__ __forceinline__ int piece_of(int k) { return static_cast<int>(threadIdx.x) + k * THREADS; }
__device__ __forceinline__ bool inside(int k, int values) { return k < WHOLE || piece_of(k) * 8 < values; }

__device__ __forceinline__ int row_bytes(int inputs) { return (inputs + 7) / 8 * static_cast<int>(sizeof(Piece)); }
__device__ __forceinline__ int slot_bytes(int inputs) { return FRONT + PARTS * row_bytes(inputs); }

__device__ __forceinline__ u32 largest_of_block(u32 value, u32* scratch) {
    value = __reduce_max_sync(0xFFFFFFFF, value);
    if (WARPS == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    return __reduce_max_sync(0xFFFFFFFF, threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : 0);
}

#include "rounding.cuh"

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
    __device__ void copy(int item, int s, int p) const {
        u32 barrier = full + 8 * s, bytes = a.inputs * static_cast<u32>(sizeof(Element));
        long long from = row(item);
        if (from < 0) return barrier_arrive(barrier);
        barrier_expect(barrier, bytes);
        if (FIRST) copy_bulk(shared_address(part(s, p)), source(from, p), bytes, barrier, policy_evict_first());
        else copy_bulk(shared_address(part(s, p)), source(from, p), bytes, barrier);
    }

    // Brings it nearer, while its slot is still in use.
    __device__ void prefetch(int item, int p) const {
        long long from = row(item);
        if (from >= 0) prefetch_bulk(source(from, p), a.inputs * static_cast<u32>(sizeof(Element)));
    }

    // Piece number `k` of this thread.
    __device__ Piece piece(int s, long long row, int p, int k) const {
        int piece = piece_of(k);
        if (!ALIGNED) return load_piece(source(row, p), piece * 8, a.inputs - piece * 8);
        if (!inside(k, a.inputs)) return zeros();
        return STAGES > 0 ? part(s, p)[piece] : reinterpret_cast<const Piece*>(source(row, p))[piece];
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

// Gains and shifts of the norm, which are the same for all tokens.
struct Parameters {
    const Arguments& a;
    Piece gain[KEPT == 2 ? PIECES : 1], shift[KEPT == 2 && KIND == 2 ? PIECES : 1];

    __device__ Piece* shared(int row) const {  // behind the slots
        return reinterpret_cast<Piece*>(memory + SLOTS * slot_bytes(a.inputs) + row * row_bytes(a.inputs));
    }
    __device__ Piece loaded(const void* base, int k) const {
        if (!base || !inside(k, a.inputs)) return zeros();
        if (ALIGNED) return static_cast<const Piece*>(base)[piece_of(k)];
        return load_piece(base, piece_of(k) * 8, a.inputs - piece_of(k) * 8);
    }

    // Each thread reads later what it has written itself.
    __device__ void load() {
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            if (KEPT == 2) gain[k] = loaded(a.gain, k);
            if (KEPT == 2 && KIND == 2) shift[k] = loaded(a.shift, k);
            if (KEPT == 1 && inside(k, a.inputs)) {
                shared(0)[piece_of(k)] = loaded(a.gain, k);
                if (KIND == 2) shared(1)[piece_of(k)] = loaded(a.shift, k);
            }
        }
    }

    __device__ Piece gain_of(int k) const { return get(k, 0, a.gain, gain[KEPT == 2 ? k : 0]); }
    __device__ Piece shift_of(int k) const { return get(k, 1, a.shift, shift[KEPT == 2 && KIND == 2 ? k : 0]); }

    __device__ Piece get(int k, int row, const void* base, const Piece& kept) const {
        if (KEPT == 2) return kept;
        if (KEPT == 0) return loaded(base, k);
        return inside(k, a.inputs) ? shared(row)[piece_of(k)] : zeros();
    }
};

#include "moments.cuh"

__device__ __forceinline__ Piece normed(const Piece& piece, float mean, float inverse, const Parameters& parameters, int k) {
    float x[8], g[8], s[8];
    unpack(x, piece);
    if (KIND == 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= inverse;
        return multiply(pack(x), parameters.gain_of(k));
    }
    unpack(g, parameters.gain_of(k));
    unpack(s, parameters.shift_of(k));
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = (x[i] - mean) * inverse * g[i] + s[i];
    return pack(x);
}

#if GATHER
#include "gather.cuh"
#endif

// The codes of a thread's next piece go `THREADS / 16` blocks of inputs further.
__device__ __forceinline__ void store_codes(const Arguments& a, long long row, const uint2 (&codes)[PIECES]) {
    int slot = static_cast<int>(row) & 7, piece = threadIdx.x % 16;
    u8* target = a.codes + (static_cast<u64>(threadIdx.x / 16) * a.slabs + (row >> 3)) * 1024 + slot * 128 +
                 (piece / 2 ^ slot) * 16 + piece % 2 * 8;
    u64 step = static_cast<u64>(a.slabs) * (THREADS / 16 * 1024);
    int padded = (a.gathered + 127) & ~127;
#pragma unroll
    for (int k = 0; k < PIECES; k++, target += step)
        if (inside(k, padded)) *reinterpret_cast<uint2*>(target) = codes[k];
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
        for (int i = 0; i < SLOTS; i++) barrier_init(tokens.full + 8 * i, PARTS);
        fence_barrier_init();
    }
    Parameters parameters{a};
    if (NORM) parameters.load();
#if GATHER
    Piece gather_gain[PIECES];
#pragma unroll
    for (int k = 0; k < PIECES; k++) gather_gain[k] = load_terms(a, piece_of(k));
#endif
#if GATHER
    if (threadIdx.x < 4 * SLOTS) *reinterpret_cast<u32*>(tokens.slot(threadIdx.x / 4) + threadIdx.x % 4 * 4) = 0;
#endif
    __syncthreads();
    wait_for_previous_kernel();
    int stride = static_cast<int>(gridDim.x), filling = blockIdx.x;  // the next item to be copied
    if (STAGES > 0 && threadIdx.x == 0)
        for (int i = 0; i < SLOTS && filling < a.items; i++, filling += stride)
            for (int p = 0; p < PARTS; p++) tokens.copy(filling, i, p);
    long long row_before = -1;
    float scale_before = 0;
    int parity = 0, slot = 0;
    u32 phase = 0;
    for (int item = blockIdx.x; item < a.items; item += stride) {
        long long row = tokens.row(item);
        if (STAGES > 0) barrier_wait(tokens.full + 8 * slot, phase);
        // After a barrier of those who read them: the last parts of the slot, and then the first.
        auto fill_again = [&](int first, int last) {
            if (STAGES == 0 || threadIdx.x > 0 || filling >= a.items) return;
            for (int p = first; p < last; p++) tokens.copy(filling, slot, p);
            if (first == 0) filling += stride;
        };
        // The same where gathers need the first part a while longer.
        auto fill_but_first = [&] {
            fill_again(1, PARTS);
            if (AHEAD && STAGES == 1 && threadIdx.x == 0 && filling < a.items) tokens.prefetch(filling, 0);
        };
        if (row < 0) {
            __syncthreads();
            fill_again(0, PARTS);
        } else {
            Piece token[PIECES];
            u32 largest = 0;
            constexpr bool STRAIGHT = GATHER && KIND == 0 && !ADD && STAGES > 0;  // gathers what was copied
            if (!STRAIGHT) {
                Piece other[PIECES];
#pragma unroll
                for (int k = 0; k < PIECES; k++) {
                    token[k] = tokens.piece(slot, row, 0, k);
                    if (PARTS == 2) other[k] = tokens.piece(slot, row, 1, k);
                }
#pragma unroll
                for (int k = 0; k < PIECES; k++) {
                    if (KIND == 3) token[k] = gated(token[k], other[k]);
                    if (ADD) {
                        int piece = piece_of(k);
                        token[k] = add(token[k], other[k]);
                        if (!ALIGNED) store_piece(token[k], a.residual, row * a.inputs + piece * 8, a.inputs - piece * 8);
                        else if (inside(k, a.inputs))
                            reinterpret_cast<Piece*>(static_cast<Element*>(a.residual) + row * a.inputs)[piece] = token[k];
                    }
                }
                if (NORM) {
                    float mean = 0, inverse = norm_scale(a, token, mean, scratch[parity]);
                    if (WARPS > 1 && GATHER) fill_but_first();
                    if (WARPS > 1 && !GATHER) fill_again(0, PARTS);
#pragma unroll
                    for (int k = 0; k < PIECES; k++) token[k] = normed(token[k], mean, inverse, parameters, k);
                }
            }
#if GATHER
            if (!STRAIGHT) {
#pragma unroll
                for (int k = 0; k < PIECES; k++)
                    if (inside(k, a.inputs)) tokens.part(slot, 0)[piece_of(k)] = token[k];
                fence_proxy_async();  // what is written here comes before what is copied here
                __syncthreads();
            }
            if (!NORM || WARPS == 1) fill_but_first();
#pragma unroll
            for (int k = 0; k < PIECES; k++)
                token[k] = inside(k, a.gathered) ? gather(a, tokens.slot(slot), piece_of(k), gather_gain[k]) : zeros();
#endif
#pragma unroll
            for (int k = 0; k < PIECES; k++) largest = larger_magnitude(largest, token[k]);
#if IN != 2
            largest = max(largest & 0xFFFF, largest >> 16);
#endif
            largest = largest_of_block(largest, scratch[parity][LARGEST]);
            if (WARPS == 1) __syncwarp();
            if (GATHER || !NORM || WARPS == 1) fill_again(0, GATHER ? 1 : PARTS);
            if (WARPS > 1 && row_before >= 0)
                write_facts_of_warps(a, row_before, scale_before, scratch[parity ^ 1][SUM]);
            Rounding rounding = rounding_of(largest);
            uint2 codes[PIECES];
            int sum = 0;
            if (rounding.sure) {
#pragma unroll
                for (int k = 0; k < PIECES; k++) codes[k] = multiplied(token[k], rounding);
            } else {
#pragma unroll
                for (int k = 0; k < PIECES; k++)
                    if (IN == 2 && far_from_ties(token[k], rounding)) codes[k] = multiplied(token[k], rounding);
                    else codes[k] = divided(token[k], rounding.scale);
            }
#pragma unroll
            for (int k = 0; k < PIECES; k++) {
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
