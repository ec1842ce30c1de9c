// Four-bit weights on their way from shared memory to the registers of the tensor cores.

struct Words {
    u32 weight[8];      // this thread's weights of a unit, two wgmma registers a word
    u32 scale[GROUPS];  // of its two channels
};

__device__ __forceinline__ void load_words(Words& words, u32 slab, int thread) {
    uint4 low = load_shared16(slab + thread * 16), high = load_shared16(slab + 2048 + thread * 16);
    words.weight[0] = low.x, words.weight[1] = low.y, words.weight[2] = low.z, words.weight[3] = low.w;
    words.weight[4] = high.x, words.weight[5] = high.y, words.weight[6] = high.z, words.weight[7] = high.w;
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        words.scale[g] = load_shared4(slab + 4096 + g * 128 + thread / 32 * 32 + thread % 32 / 4 * 4);
}

#if FLOAT_SCALE
__device__ __forceinline__ float first_scale(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_scale(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }
#else
__device__ __forceinline__ int first_scale(u32 pair) { return static_cast<short>(pair & 0xFFFF); }
__device__ __forceinline__ int second_scale(u32 pair) { return static_cast<int>(pair) >> 16; }
#endif

// Eight nibbles u = code + 8 of a word become eight bytes: signed codes, or code * scale + 128 when FOLDED.
__device__ __forceinline__ void unpack(u32 (&operand)[16], const Words& words) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int step = i / 2, row = i % 2;
        u32 word = words.weight[i];
        u32 low = word & 0x0F0F0F0F, high = (word >> 4) & 0x0F0F0F0F;
#if FOLDED
        u32 pair = words.scale[step / STEPS];
        u32 scale = row ? second_scale(pair) : first_scale(pair);
        u32 offset = 0x80808080u - scale * 0x08080808u;
        operand[step * 4 + row] = low * scale + offset;
        operand[step * 4 + row + 2] = high * scale + offset;
#else
        operand[step * 4 + row] = (low + 0x78787878u) ^ 0x80808080u;
        operand[step * 4 + row + 2] = (high + 0x78787878u) ^ 0x80808080u;
#endif
    }
}
