// Channels split, merged and permuted within a token: y_j = sum over k of gain_kj * x_(index_kj), each product and each
// sum rounded to the type of the inputs, in the order of k (grid/inputs.py, Gather).
//
// The first term of each channel stands in a table in shared memory. The few channels that are
// merged from several have further terms, in one list sorted by pieces of 8 channels: `more_start` says where each piece
// begins, and `more_index` holds 8 * channel of x + the place in the piece.

#if IN == 2
typedef uint2 Term;  // index, gain

__device__ __forceinline__ float value_of(Element stored) { return stored; }
__device__ __forceinline__ Term term(int index, float gain) { return make_uint2(index, __float_as_uint(gain)); }
__device__ __forceinline__ int index_of(Term term) { return term.x; }
__device__ __forceinline__ float gain_of(Term term) { return __uint_as_float(term.y); }
#else
typedef u32 Term;  // index, and the gain in the type of the inputs above it

__device__ __forceinline__ float value_of(Element stored) { return to_float(stored); }
__device__ __forceinline__ Term term(int index, float gain) {
    return (IN == 0 ? pack_bf16(0, gain) : pack_fp16(0, gain)) & 0xFFFF0000 | index;
}
__device__ __forceinline__ int index_of(Term term) { return term & 0xFFFF; }
__device__ __forceinline__ float gain_of(Term term) { return to_float(static_cast<u16>(term >> 16)); }
#endif

// Behind the stages: what was gathered, and the table.
__device__ __forceinline__ Piece* gathered_pieces(const Arguments& a) {
    return reinterpret_cast<Piece*>(memory + SLOTS * PARTS * row_bytes(a.inputs));
}
__device__ __forceinline__ Term* terms(const Arguments& a) {
    return reinterpret_cast<Term*>(memory + SLOTS * PARTS * row_bytes(a.inputs) + row_bytes(a.gathered));
}

__device__ __forceinline__ void load_table(const Arguments& a) {
    for (int j = threadIdx.x; j < a.gathered; j += THREADS) terms(a)[j] = term(a.index[j], a.index_gain[j]);
}

__device__ __forceinline__ float product(float x, float gain) { return rounded(__fmul_rn(x, gain)); }

// Where the gathered token lies; finds its largest magnitude too.
__device__ __forceinline__ Piece* gather(const Arguments& a, const Element* values, u32& largest) {
    Piece* out = gathered_pieces(a);
    __syncthreads();  // every piece of the token is ready
    for (int piece = threadIdx.x; piece * 8 < a.gathered; piece += THREADS) {
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            y[i] = 0;
            if (piece * 8 + i < a.gathered) {
                Term first = terms(a)[piece * 8 + i];
                y[i] = product(value_of(values[index_of(first)]), gain_of(first));
            }
        }
        for (int t = a.more_start[piece]; t < a.more_start[piece + 1]; t++) {
            int place = a.more_index[t];
            float more = product(value_of(values[place / 8]), rounded(a.more_gain[t]));
#pragma unroll
            for (int i = 0; i < 8; i++) y[i] = rounded(__fadd_rn(y[i], place % 8 == i ? more : 0.0f));
        }
        out[piece] = pack(y);
        largest = larger_magnitude(largest, out[piece]);
    }
    return out;
}
