// Channels split, merged and permuted within a token: y_j = sum over k of gain_kj * x_(index_kj), each product and each
// sum rounded to the type of the inputs, in the order of k (grid/inputs.py, Gather).
//
// The first term of each channel: where its input lies stands in a table in shared memory, its gain in registers, both
// for all tokens of the block. The few channels that are merged from several have further terms, in one list sorted by
// pieces of 8 channels: `more_start` says where each piece begins, and `more_index` holds 8 * channel of x + the place in
// the piece. A piece seldom has more than one, which stands in the table too: nothing waits for device memory then.
//
// Eight neighbouring channels are one thread's, so that lanes l, l + 8, l + 16 and l + 24 would read the same banks where
// channels hardly move. They begin with different ones instead: step i of a thread is channel (i + turn) % 8 of its piece.

#if IN == 2
typedef u32 Offset;
#else
typedef u16 Offset;
#endif
struct __align__(8) Terms {
    Offset offset[8];  // of first terms
    Offset more;       // of the first further term, 0 if there is none
    Offset more_gain;  // its gain, as bits of the type of the inputs
    int rest;          // 8 * further terms beyond that one + its place in the piece
};

__device__ __forceinline__ int turn() { return threadIdx.x % 32 / 8 * 2; }

// Behind the slots, and gains and shifts where they are there.
__device__ __forceinline__ Terms* table(const Arguments& a) {
    int rows = KEPT == 1 ? KIND : 0;  // a gain, and a shift if LAYER
    return reinterpret_cast<Terms*>(memory + SLOTS * slot_bytes(a.inputs) + rows * row_bytes(a.inputs));
}

// Where a channel of the inputs lies in its slot, which begins with zeros.
__device__ __forceinline__ Offset offset_of(int channel) {
    return static_cast<Offset>(16 + channel * static_cast<int>(sizeof(Element)));
}

// A gain in the type of the inputs.
__device__ __forceinline__ Offset bits_of(float gain) {
#if IN == 2
    return __float_as_uint(gain);
#else
    return static_cast<Offset>(IN == 0 ? pack_bf16(gain, 0) : pack_fp16(gain, 0));
#endif
}

// Notes where the terms of a piece lie; gives the gains of the first ones.
__device__ __forceinline__ Piece load_terms(const Arguments& a, int piece) {
    float gain[8];
    Terms terms;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int channel = piece * 8 + (i + turn()) % 8;
        bool some = channel < a.gathered;
        gain[i] = some ? a.index_gain[channel] : 1.0f;
        terms.offset[i] = some ? offset_of(a.index[channel]) : 0;
    }
    if (piece * 8 < a.gathered) {
        int begin = a.more_start[piece], count = a.more_start[piece + 1] - begin;
        terms.more = terms.more_gain = 0, terms.rest = 0;
        if (count > 0) {
            int place = a.more_index[begin];
            terms.more = offset_of(place / 8);
            terms.more_gain = bits_of(a.more_gain[begin]);
            terms.rest = 8 * (count - 1) + place % 8;
        }
        table(a)[piece] = terms;
    }
    return pack(gain);
}

// Adds a term, where it belongs, to the sums of a piece.
__device__ __forceinline__ void add_term(Piece& sums, const u8* slot, Offset offset, Offset gain, int place) {
    int step = (place - turn()) & 7;
#if IN == 2
    float y[8], more = __fmul_rn(*reinterpret_cast<const float*>(slot + offset), __uint_as_float(gain));
    unpack(y, sums);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (step == i) y[i] = __fadd_rn(y[i], more);
    sums = pack(y);
#else
    u32 more = multiply_pair(*reinterpret_cast<const u16*>(slot + offset), gain) & 0xFFFF;
    more = step % 2 ? more << 16 | 0x8000 : more | 0x80000000;  // -0 changes nothing
    if (step / 2 == 0) sums.x = add_pair(sums.x, more);
    if (step / 2 == 1) sums.y = add_pair(sums.y, more);
    if (step / 2 == 2) sums.z = add_pair(sums.z, more);
    if (step / 2 == 3) sums.w = add_pair(sums.w, more);
#endif
}

__device__ __forceinline__ Piece gather(const Arguments& a, const u8* slot, int piece, const Piece& gain) {
    Terms terms = table(a)[piece];
#if IN == 2
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = *reinterpret_cast<const float*>(slot + terms.offset[i]);
    Piece out = multiply(pack(y), gain);
#else
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        words[i] = static_cast<u32>(*reinterpret_cast<const u16*>(slot + terms.offset[2 * i])) |
                   static_cast<u32>(*reinterpret_cast<const u16*>(slot + terms.offset[2 * i + 1])) << 16;
    Piece out = multiply(make_uint4(words[0], words[1], words[2], words[3]), gain);
#endif
    if (terms.more == 0) return out;
    add_term(out, slot, terms.more, terms.more_gain, terms.rest % 8);
    int begin = terms.rest < 8 ? 0 : a.more_start[piece] + 1;
#pragma unroll 1
    for (int t = begin; t < begin + terms.rest / 8; t++)
        add_term(out, slot, offset_of(a.more_index[t] / 8), bits_of(a.more_gain[t]), a.more_index[t] % 8);
    return out;
}

// Codes of steps in the order of channels.
__device__ __forceinline__ uint2 in_order(uint2 codes) {
    u32 low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        low |= static_cast<u32>((i - turn()) & 7) << (4 * i);
        high |= static_cast<u32>((i + 4 - turn()) & 7) << (4 * i);
    }
    return make_uint2(__byte_perm(codes.x, codes.y, low), __byte_perm(codes.x, codes.y, high));
}
