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
    r.sure = false;
#else
    float largest = to_float(static_cast<u16>(bits));
    // A quotient by a constant that is corrected once is that of a division; neither NaN nor infinite nor subnormal anywhere.
    float about = largest * (1.0f / 127.0f);
    r.scale = __fmaf_rn(__fmaf_rn(about, -127.0f, largest), 1.0f / 127.0f, about);
    bool power = (__float_as_uint(r.scale) & 0x7FFFFF) == 0;
    r.sure = largest > 1e-30f && largest < 1e30f && (IN == 0 || power || __fmaf_rn(r.scale, 127.0f, -largest) != 0);
    // Whether the quotient of half of the largest is rounded to less than 63.5.
    bool down = __fmaf_rn(r.scale, -63.5f, 0.5f * largest) < r.scale * -1.9073486328125e-6f;
    r.factor = power ? __uint_as_float(0x7F000000 - __float_as_uint(r.scale))
                     : about_inverse(r.scale) * (down ? 1.0f - 6e-7f : 1.0f + 6e-7f);
#endif
    if (!r.sure) {
        r.scale = largest != 0 ? __fdiv_rn(largest, 127.0f) : 1.0f;
        if (r.scale < 1.17549435e-38f) r.scale = 1.17549435e-38f;
        r.factor = __fdiv_rn(1.0f, r.scale);
    }
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

constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits

__device__ __forceinline__ uint2 multiplied(const Piece& piece, const Rounding& r) {
    float x[8];
    u32 bits[8];
    unpack(x, piece);
#pragma unroll
    for (int i = 0; i < 8; i++) bits[i] = __float_as_uint(__fmaf_rn(x[i], r.factor, SHIFT));
    return make_uint2(bytes_of(bits), bytes_of(bits + 4));
}

// Whether all quotients of a piece are so far from ties that a factor serves; not if one is no number.
__device__ __forceinline__ bool far_from_ties(const Piece& piece, const Rounding& r) {
    float x[8];
    bool far = true;
    unpack(x, piece);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float rounded_away = __fsub_rn(__fadd_rn(x[i] * r.factor, SHIFT), SHIFT);
        far &= fabsf(__fmaf_rn(x[i], r.factor, -rounded_away)) < 0.4999f;
    }
    return far;
}
