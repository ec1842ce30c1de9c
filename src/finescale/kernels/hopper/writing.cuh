// A finished tile: from int32 sums in registers to rows of outputs.

typedef unsigned short u16;

// Scales and sums of the tokens of a tile, fetched when the tile begins and used when it ends; nothing is computed with
// them before, so that nobody waits for them.
struct TokenFacts {
    float scale[META];
    int sum[META];
    float own[2];  // factors of the thread's two channels

    __device__ __forceinline__ void fetch(const Arguments& a, const Place& place, int group, int thread) {
#pragma unroll
        for (int i = 0; i < META; i++) {
            int token = place.token0 + i * 128 + thread;
            bool inside = i * 128 + thread < TOKENS && token < place.token_end;
            scale[i] = inside ? __ldcg(a.x_scale + token) : 0;
            sum[i] = FOLDED && inside ? __ldcg(a.x_sum + token) : 0;
        }
        int channel = (place.channel_slab + group) * 64 + thread / 32 * 16 + thread % 32 / 4;
        const float* factor = a.channel_scale + channel;
#if GROUPED
        factor += static_cast<long long>(place.expert) * a.channels;
#endif
        bool given = GROUPED || a.channel_scale;
        own[0] = given && channel < a.channels ? __ldcg(factor) : 1;
        own[1] = given && channel + 8 < a.channels ? __ldcg(factor + 8) : 1;
    }
};

__device__ __forceinline__ u32 pack_out(float low, float high) {
    return OUT == 0 ? pack_bf16(low, high) : pack_fp16(low, high);
}

// Writes the tokens of a tile from `first` to `last`, multiples of CHUNK.
__device__ __forceinline__ void write_tile(
    const Arguments& a, const Sum (&total)[TOKENS / 2], const TokenFacts& facts, const Place& place, int group,
    int thread, u8* buffer, int first = 0, int last = TOKENS) {
    int token0 = place.token0, channel0 = (place.channel_slab + group) * 64;
    int warp = thread / 32, lane = thread % 32;
    float* scales = reinterpret_cast<float*>(buffer + WARPGROUPS * 2 * CHUNK_BYTES) + group * TOKENS * 2;
    int* sums = reinterpret_cast<int*>(scales + TOKENS);
    named_barrier(1 + group, 128);
#pragma unroll
    for (int i = 0; i < META; i++)
        if (i * 128 + thread < TOKENS) {
            scales[i * 128 + thread] = facts.scale[i] * a.factor;
            sums[i * 128 + thread] = 128 * facts.sum[i];
        }
    named_barrier(1 + group, 128);
    [[maybe_unused]] int channel = channel0 + warp * 16 + lane / 4;
    // Read before the loop: ptxas serializes the products of the main loop otherwise.
    float bias0 = 0, bias1 = 0, own0 = facts.own[0], own1 = facts.own[1];
    if (!GROUPED && a.bias) {
        if (channel < a.channels) bias0 = a.bias[channel];
        if (channel + 8 < a.channels) bias1 = a.bias[channel + 8];
    }
    u32 chunks = shared_address(buffer) + group * 2 * CHUNK_BYTES;
#pragma unroll
    for (int chunk = 0; chunk < TOKENS / CHUNK; chunk++) {
        if (token0 + chunk * CHUNK >= place.token_end) break;
        if (CLUSTER > 1 && (chunk * CHUNK < first || chunk * CHUNK >= last)) continue;
        u32 packed[CHUNK / 4];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            int inner = chunk * CHUNK + j * 8 + lane % 4 * 2;
            const Sum* sum = total + (chunk * CHUNK / 8 + j) * 4;
            float2 scale = *reinterpret_cast<const float2*>(scales + inner);
            int2 excess = FOLDED ? *reinterpret_cast<const int2*>(sums + inner) : make_int2(0, 0);
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Sum accumulator = sum[i] - static_cast<Sum>(i % 2 ? excess.y : excess.x);
                value[i] = static_cast<float>(accumulator) * (i % 2 ? scale.y : scale.x);
                if (GROUPED || a.channel_scale) value[i] *= i < 2 ? own0 : own1;
                if (!GROUPED && a.bias) value[i] = __fadd_rn(value[i], i < 2 ? bias0 : bias1);
#if OUT >= 2
                int token = token0 + inner + i % 2, c = channel + i / 2 * 8;
                if (token < place.token_end && c < a.channels) {
                    long long place = static_cast<long long>(token) * a.channels + c;
                    if (OUT == 2) static_cast<float*>(a.out)[place] = value[i];
                    else static_cast<int*>(a.out)[place] = accumulator;
                }
#endif
            }
            packed[2 * j] = pack_out(value[0], value[1]);
            packed[2 * j + 1] = pack_out(value[2], value[3]);
        }
#if OUT < 2
        // Rows of 64 channels, 128 bytes of each token together.
        // There are two buffers: when one is written again, all have passed the barrier of the other, and so have read
        // this one.
        u32 rows = chunks + chunk % 2 * CHUNK_BYTES;
        u32 row = rows + (lane / 16 * 8 + lane % 8) * PITCH + warp * 32 + lane / 8 % 2 * 16;
        if (CHUNK == 8) {
            store_transposed2(row, packed[0], packed[1]);
        } else {
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j += 2)
                store_transposed4(row + j * 8 * PITCH, packed[2 * j], packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]);
        }
        int chunk0 = token0 + chunk * CHUNK;
        named_barrier(1 + group, 128);
#pragma unroll
        for (int i = 0; i < (CHUNK + 15) / 16; i++) {
            int inner = i * 16 + thread / 8, token = chunk0 + inner, c = channel0 + thread % 8 * 8;
            if (inner < CHUNK && token < place.token_end && c < a.channels) {
                uint4 value = load_shared16(rows + inner * PITCH + thread % 8 * 16);
                u16* target = static_cast<u16*>(a.out) + static_cast<long long>(token) * a.channels + c;
                if (a.channels % 8 == 0) {
                    *reinterpret_cast<uint4*>(target) = value;
                } else {
                    u32 words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        if (c + e < a.channels) target[e] = static_cast<u16>(words[e / 2] >> (16 * (e % 2)));
                }
            }
        }
#endif
    }
}
