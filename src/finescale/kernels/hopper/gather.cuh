// Channels split, merged and permuted within a token: y_j = sum over k of gain_kj * x_(index_kj), each product and each
// sum rounded to the type of the inputs, in the order of k (grid/inputs.py, Gather).
//
// The first term of each channel: where its input lies stands in a table in shared memory, its gain in registers, both
// for all tokens of the block. The few channels that are merged from several have further terms, in one list sorted by
// pieces of 8 channels: `more_start` says where each piece begins, and `more_index` holds 8 * channel of x + the place in
// the piece.
//
// Eight neighbouring channels are one thread's, so that lanes l, l + 8, l + 16 and l + 24 would read the same banks where
// channels hardly move. They begin with different ones instead: step i of a thread is channel (i + turn) % 8 of its piece.

#if IN == 2
typedef u32 Offset;
#else
typedef u16 Offset;
#endif
struct __align__(8) Terms {
    Offset offset[8];        // of first terms
    int more_begin, more_end;
};

__device__ __forceinline__ int turn() { return threadIdx.x % 32 / 8 * 2; }

// Behind the slots, and gains and shifts where they are there.
__device__ __forceinline__ Terms* table(const Arguments& a) {
    int rows = KEPT == 1 ? KIND : 0;  // a gain, and a shift if LAYER
    return reinterpret_cast<Terms*>(memory + SLOTS * slot_bytes(a.inputs) + rows * row_bytes(a.inputs));
}

// Notes where the first terms of a piece lie in their slot, which begins with zeros, and further terms in their list; gives
// the gains of the first ones.
__device__ __forceinline__ Piece load_terms(const Arguments& a, int piece) {
    float gain[8];
    Terms terms;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int channel = piece * 8 + (i + turn()) % 8;
        bool some = channel < a.gathered;
        gain[i] = some ? a.index_gain[channel] : 1.0f;
        terms.offset[i] = static_cast<Offset>(some ? 16 + a.index[channel] * static_cast<int>(sizeof(Element)) : 0);
    }
    if (piece * 8 < a.gathered) {
        terms.more_begin = a.more_start[piece], terms.more_end = a.more_start[piece + 1];
        table(a)[piece] = terms;
    }
    return pack(gain);
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
#pragma unroll 1
    for (int t = terms.more_begin; t < terms.more_end; t++) {
        int place = a.more_index[t], step = (place - turn()) & 7;
        const u8* from = slot + 16 + place / 8 * static_cast<int>(sizeof(Element));
#if IN == 2
        float more = __fmul_rn(*reinterpret_cast<const float*>(from), a.more_gain[t]);
        unpack(y, out);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (step == i) y[i] = __fadd_rn(y[i], more);
        out = pack(y);
#else
        u32 other = static_cast<u32>(*reinterpret_cast<const u16*>(from));
        u32 more = multiply_pair(other, IN == 0 ? pack_bf16(a.more_gain[t], 0) : pack_fp16(a.more_gain[t], 0)) & 0xFFFF;
        more = step % 2 ? more << 16 | 0x8000 : more | 0x80000000;  // -0 changes nothing
        if (step / 2 == 0) out.x = add_pair(out.x, more);
        if (step / 2 == 1) out.y = add_pair(out.y, more);
        if (step / 2 == 2) out.z = add_pair(out.z, more);
        if (step / 2 == 3) out.w = add_pair(out.w, more);
#endif
    }
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
