// Rotary embedding of new tokens in place, and their way into a paged cache.
//
// A block has one token. Threads with the same place in a head take every so many heads, so that cosines and sines are
// loaded once. Those of a pair of pieces hold 8 channels of a head's first half and the same of its second, which are
// rotated against each other; of values they only copy them.
//
// The kernel after this one may not start early: attention of others would not wait for what is written here.
//
// Compile-time settings: IN (0 bfloat16, 1 float16), WIDTH (channels of a head, a power of two from 16 on), THREADS (a
// multiple of WIDTH / 16).

#include "ptx.cuh"
#include "rows.cuh"

struct Arguments {
    const long long* position;
    const float* table;      // a row for each position: cosines, then sines, of half a head each
    u16* query;              // read and written
    u16* key;                // read and written
    const u16* value;
    u16* keys;
    u16* values;
    const long long* slot;   // page * slots + slot; negative for none
    long long page_stride;   // strides count values
    int slot_stride, head_stride, query_stride, key_stride, value_stride;
    int heads, kv_heads, slots;
};

constexpr int PAIRS = WIDTH / 16;

extern "C" __global__ void __launch_bounds__(THREADS) rotate_into_pages(const __grid_constant__ Arguments a) {
    wait_for_previous_kernel();
    long long token = blockIdx.x, slot = a.slot[token];
    int place = static_cast<int>(threadIdx.x) % PAIRS * 8;
    float cosine[8], sine[8];
    const float* row = a.table + a.position[token] * WIDTH + place;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4 c = *reinterpret_cast<const float4*>(row + i), s = *reinterpret_cast<const float4*>(row + WIDTH / 2 + i);
        cosine[i] = c.x, cosine[i + 1] = c.y, cosine[i + 2] = c.z, cosine[i + 3] = c.w;
        sine[i] = s.x, sine[i + 1] = s.y, sine[i + 2] = s.z, sine[i + 3] = s.w;
    }
    long long page = slot < 0 ? 0 : slot / a.slots * a.page_stride + slot % a.slots * a.slot_stride;
#pragma unroll 2
    for (int head = threadIdx.x / PAIRS; head < a.heads + 2 * a.kv_heads; head += THREADS / PAIRS) {
        int own = head < a.heads ? head : head < a.heads + a.kv_heads ? head - a.heads : head - a.heads - a.kv_heads;
        bool is_query = head < a.heads, is_value = head >= a.heads + a.kv_heads;
        u16* source = is_query ? a.query + token * a.query_stride
                               : is_value ? const_cast<u16*>(a.value) + token * a.value_stride : a.key + token * a.key_stride;
        source += own * WIDTH + place;
        Piece first = *reinterpret_cast<const Piece*>(source), second = *reinterpret_cast<const Piece*>(source + WIDTH / 2);
        if (!is_value) {
            float x[8], y[8], rotated[8], turned[8];
            unpack(x, first);
            unpack(y, second);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                rotated[i] = x[i] * cosine[i] - y[i] * sine[i];
                turned[i] = y[i] * cosine[i] + x[i] * sine[i];
            }
            first = pack(rotated), second = pack(turned);
            *reinterpret_cast<Piece*>(source) = first;
            *reinterpret_cast<Piece*>(source + WIDTH / 2) = second;
        }
        if (!is_query && slot >= 0) {
            u16* target = (is_value ? a.values : a.keys) + page + static_cast<long long>(own) * a.head_stride + place;
            *reinterpret_cast<Piece*>(target) = first;
            *reinterpret_cast<Piece*>(target + WIDTH / 2) = second;
        }
    }
}
