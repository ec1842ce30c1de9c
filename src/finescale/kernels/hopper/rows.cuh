// Eight neighbouring values of a row of bfloat16 (IN 0), float16 (1) or float32 (2) numbers.

typedef unsigned short u16;

__device__ __forceinline__ float to_float(u16 value) {
#if IN == 0
    return __uint_as_float(static_cast<u32>(value) << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
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

__device__ __forceinline__ void load8(float (&values)[8], const void* base, long long first, int count) {
#if IN == 2
    const float* source = static_cast<const float*>(base) + first;
    if (count >= 8 && (reinterpret_cast<u64>(source) & 15) == 0) {
        float4 a = *reinterpret_cast<const float4*>(source), b = *reinterpret_cast<const float4*>(source + 4);
        values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
        values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = i < count ? source[i] : 0;
#else
    const u16* source = static_cast<const u16*>(base) + first;
    if (count >= 8 && (reinterpret_cast<u64>(source) & 15) == 0) {
        uint4 packed = *reinterpret_cast<const uint4*>(source);
        u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = to_float(static_cast<u16>(words[i / 2] >> (16 * (i % 2))));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = i < count ? to_float(source[i]) : 0;
#endif
}

__device__ __forceinline__ void store8(const float (&values)[8], void* base, long long first, int count) {
#if IN == 2
    float* target = static_cast<float*>(base) + first;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) target[i] = values[i];
#else
    u16* target = static_cast<u16*>(base) + first;
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        words[i] = IN == 0 ? pack_bf16(values[2 * i], values[2 * i + 1]) : pack_fp16(values[2 * i], values[2 * i + 1]);
    if (count >= 8 && (reinterpret_cast<u64>(target) & 15) == 0) {
        *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) target[i] = static_cast<u16>(words[i / 2] >> (16 * (i % 2)));
#endif
}
