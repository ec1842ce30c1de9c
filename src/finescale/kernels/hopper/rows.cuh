// Eight neighbouring values of a row of bfloat16 (IN 0), float16 (1) or float32 (2) numbers.

typedef unsigned short u16;

__device__ __forceinline__ float to_float(u16 value) {
#if IN == 0
    return __uint_as_float(static_cast<u32>(value) << 16);
#else
    return wide_fp16(value);
#endif
}

// The value as the type of the inputs holds it.
__device__ __forceinline__ float rounded(float value) {
#if IN == 0
    return __uint_as_float((pack_bf16(value, 0) & 0xFFFF) << 16);
#elif IN == 1
    return to_float(static_cast<u16>(pack_fp16(value, 0) & 0xFFFF));
#else
    return value;
#endif
}

// Eight neighbouring values as they lie in memory.
#if IN == 2
struct Piece {
    float4 low, high;
};
typedef float Element;
#else
typedef uint4 Piece;
typedef u16 Element;
#endif

__device__ __forceinline__ void unpack(float (&values)[8], const Piece& piece) {
#if IN == 2
    values[0] = piece.low.x, values[1] = piece.low.y, values[2] = piece.low.z, values[3] = piece.low.w;
    values[4] = piece.high.x, values[5] = piece.high.y, values[6] = piece.high.z, values[7] = piece.high.w;
#else
    u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
#if IN == 0
        values[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000 : words[i / 2] << 16);
#else
        values[i] = to_float(static_cast<u16>(words[i / 2] >> (16 * (i % 2))));
#endif
#endif
}

// Rounds.
__device__ __forceinline__ Piece pack(const float (&values)[8]) {
#if IN == 2
    return Piece{make_float4(values[0], values[1], values[2], values[3]),
                 make_float4(values[4], values[5], values[6], values[7])};
#else
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        words[i] = IN == 0 ? pack_bf16(values[2 * i], values[2 * i + 1]) : pack_fp16(values[2 * i], values[2 * i + 1]);
    return make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// Sums and products of all eight, each rounded.
#if IN == 2
__device__ __forceinline__ Piece add(const Piece& a, const Piece& b) {
    float x[8], y[8];
    unpack(x, a);
    unpack(y, b);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __fadd_rn(x[i], y[i]);
    return pack(x);
}
__device__ __forceinline__ Piece multiply(const Piece& a, const Piece& b) {
    float x[8], y[8];
    unpack(x, a);
    unpack(y, b);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __fmul_rn(x[i], y[i]);
    return pack(x);
}
#else
__device__ __forceinline__ u32 add_pair(u32 a, u32 b) { return IN == 0 ? add_bf16s(a, b) : add_fp16s(a, b); }
__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) { return IN == 0 ? multiply_bf16s(a, b) : multiply_fp16s(a, b); }
__device__ __forceinline__ Piece add(const Piece& a, const Piece& b) {
    return make_uint4(add_pair(a.x, b.x), add_pair(a.y, b.y), add_pair(a.z, b.z), add_pair(a.w, b.w));
}
__device__ __forceinline__ Piece multiply(const Piece& a, const Piece& b) {
    return make_uint4(multiply_pair(a.x, b.x), multiply_pair(a.y, b.y), multiply_pair(a.z, b.z), multiply_pair(a.w, b.w));
}
#endif

// The largest magnitude so far, as bits (of two halves where numbers have 16); a NaN is the largest of all. Integers are
// compared: of max.NaN.xorsign.abs.bf16x2 of a product and zero, ptxas 13.0 makes the maximum without the magnitude.
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

__device__ __forceinline__ Piece zeros() {
    const float none[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    return pack(none);
}

// The `count` values from place `first` of a row on, if they are fewer than eight, and zeros.
__device__ __forceinline__ Piece load_piece(const void* base, long long first, int count) {
    const Element* source = static_cast<const Element*>(base) + first;
    if (count >= 8 && (reinterpret_cast<u64>(source) & 15) == 0) return *reinterpret_cast<const Piece*>(source);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
#if IN == 2
        values[i] = i < count ? source[i] : 0;
#else
        values[i] = i < count ? to_float(source[i]) : 0;
#endif
    return pack(values);
}

__device__ __forceinline__ void store_piece(const Piece& piece, void* base, long long first, int count) {
    Element* target = static_cast<Element*>(base) + first;
    if (count >= 8 && (reinterpret_cast<u64>(target) & 15) == 0) {
        *reinterpret_cast<Piece*>(target) = piece;
        return;
    }
#if IN == 2
    float values[8];
    unpack(values, piece);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) target[i] = values[i];
#else
    u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) target[i] = static_cast<u16>(words[i / 2] >> (16 * (i % 2)));
#endif
}

__device__ __forceinline__ void load8(float (&values)[8], const void* base, long long first, int count) {
    unpack(values, load_piece(base, first, count));
}

__device__ __forceinline__ void store8(const float (&values)[8], void* base, long long first, int count) {
    store_piece(pack(values), base, first, count);
}
