// Runs a kernel of kernels/hopper on a CPU, thread by thread, to see what it computes where there is no GPU.
//
// Every thread is a coroutine that is left only where it has to wait. Which one goes on is drawn at random, and copies
// between memories arrive some random time after they were asked for, so that a missing wait shows itself. Takes the place
// of ptx.cuh; blocks of a cluster, or all of a grid, run side by side.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

template <class T> struct alignas(2 * sizeof(T)) Two { T x, y; };
template <class T> struct alignas(4 * sizeof(T)) Four { T x, y, z, w; };
typedef Two<float> float2;
typedef Two<int> int2;
typedef Two<u32> uint2;
typedef Four<float> float4;
typedef Four<int> int4;
typedef Four<u32> uint4;
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class A, class B> inline auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> inline auto max(A a, B b) { return a > b ? a : b; }

// ---------------------------------------------------------------- threads

struct Meeting {
    int present = 0, times = 0;
};
struct Barrier {
    int expected = 0, pending = 0, phase = 0;
    long bytes = 0;
};
struct Block {
    std::vector<u8> storage;
    u8* memory = nullptr;
    int index = 0, first_of_cluster = 0, alive = 0;
    size_t used = 0;
    std::map<std::string, u8*> named;
    std::map<u32, Barrier> barriers;
    std::map<int, Meeting> meetings;  // named barriers by number; 1000 + warp for warps; 2000 for all threads
    u32 lanes[64][32];                // what a warp exchanges
    u32 operands[64][32][4];
    int cluster_arrived = 0, cluster_times = 0;  // of the first block of a cluster
};
struct Thread {
    ucontext_t context;
    std::vector<u8> stack;
    Block* block;
    int x;
    bool done = false;
    std::function<bool()> ready;
};

static std::vector<Block> all_blocks;
static std::vector<Thread> all_threads;
static Thread* self;
static ucontext_t scheduler;
static std::vector<std::pair<int, std::function<void()>>> copies;  // ticks to go, what happens then
static u64 random_state = 1;
static int cluster_size = 1, threads_of_block = 0;

inline u32 draw(u32 below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<u32>(random_state >> 33) % below;
}
inline void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    self->ready = std::move(ready);
    swapcontext(&self->context, &scheduler);
}
inline void later(std::function<void()> copy) { copies.push_back({static_cast<int>(draw(40)), std::move(copy)}); }
inline void meet(int key, int count) {
    Meeting& meeting = self->block->meetings[key];
    int time = meeting.times;
    if (++meeting.present == count) {
        meeting.present = 0, meeting.times++;
        return;
    }
    wait_until([&meeting, time] { return meeting.times != time; });
}

struct Index {
    int x;
};
#define threadIdx (Index{::self->x})
#define blockIdx (Index{::self->block->index})
#define gridDim (Index{static_cast<int>(::all_blocks.size())})

inline int lane() { return self->x % 32; }
inline int warp() { return self->x / 32; }
inline void __syncthreads() { meet(2000, threads_of_block); }
inline void __syncwarp() { meet(1000 + warp(), 32); }
inline void __threadfence() {}
template <class T> inline T exchange(T value, int from) {
    static_assert(sizeof(T) == 4, "four bytes");
    std::memcpy(&self->block->lanes[warp()][lane()], &value, 4);
    __syncwarp();
    T got;
    std::memcpy(&got, &self->block->lanes[warp()][from], 4);
    __syncwarp();
    return got;
}
template <class T> inline T __shfl_xor_sync(u32, T value, int mask) { return exchange(value, lane() ^ mask); }
template <class T> inline T __shfl_sync(u32, T value, int from) { return exchange(value, from); }
inline int __reduce_add_sync(u32, int value) {
    for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(0, value, mask);
    return value;
}
inline u32 __reduce_max_sync(u32, u32 value) {
    for (int mask = 16; mask; mask /= 2) value = max(value, __shfl_xor_sync(0, value, mask));
    return value;
}

// ---------------------------------------------------------------- numbers

template <class To, class From> inline To bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
inline float __uint_as_float(u32 value) { return bits<float>(value); }
inline u32 __float_as_uint(float value) { return bits<u32>(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(x)); }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 both = static_cast<u64>(b) << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= static_cast<u32>(both >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return out;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i));
    return sum;
}
template <class T> inline T __ldcg(const T* pointer) { return *pointer; }
inline int atomicAdd(int* sum, int value) { int before = *sum; *sum += value; return before; }
template <class T> inline T atomicExch(T* place, T value) { T before = *place; *place = value; return before; }
inline void add_there(int* sum, int value) { *sum += value; }
inline void add_there(float* sum, float value) { *sum += value; }
inline float about_inverse(float x) { return 1 / x; }
inline float inverse_root(float x) { return 1 / std::sqrt(x); }
inline float power_of_two(float x) { return std::exp2(x); }
inline u32 bf16(float value) {
    u32 word = bits<u32>(value);
    if (std::isnan(value)) return 0x7FFF;
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16(low) | bf16(high) << 16; }
inline u32 pack_fp16(float low, float high) {
    return bits<unsigned short>(static_cast<_Float16>(low)) | static_cast<u32>(bits<unsigned short>(static_cast<_Float16>(high))) << 16;
}
inline float wide_fp16(unsigned short value) { return static_cast<float>(bits<_Float16>(value)); }

inline float wide_bf16(unsigned short value) { return bits<float>(static_cast<u32>(value) << 16); }
template <class F> inline u32 pairs(u32 a, u32 b, bool half, F function) {
    auto wide = [half](u32 v) { return half ? wide_fp16(static_cast<unsigned short>(v)) : wide_bf16(static_cast<unsigned short>(v)); };
    float low = function(wide(a), wide(b)), high = function(wide(a >> 16), wide(b >> 16));
    return half ? pack_fp16(low, high) : pack_bf16(low, high);
}
inline float sum_of(float a, float b) { return a + b; }
inline float product_of(float a, float b) { return a * b; }
inline u32 add_bf16s(u32 a, u32 b) { return pairs(a, b, false, sum_of); }
inline u32 add_fp16s(u32 a, u32 b) { return pairs(a, b, true, sum_of); }
inline u32 multiply_bf16s(u32 a, u32 b) { return pairs(a, b, false, product_of); }
inline u32 multiply_fp16s(u32 a, u32 b) { return pairs(a, b, true, product_of); }
inline u32 max_pairs(u32 a, u32 b) { return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16; }

// ---------------------------------------------------------------- shared memory: an address is block of the cluster, offset

inline u8* shared_pointer(u32 address) {
    Block& block = all_blocks[self->block->first_of_cluster + (address >> 24)];
    u32 offset = address & 0xFFFFFF;
    if (offset >= block.storage.size()) std::fprintf(stderr, "shared memory has no byte %u\n", offset), std::abort();
    return block.memory + offset;
}
inline u32 shared_address(const void* pointer) {
    Block& block = *self->block;
    return static_cast<u32>(static_cast<const u8*>(pointer) - block.memory) |
           static_cast<u32>(block.index - block.first_of_cluster) << 24;
}
inline u8* static_shared(const char* name, size_t bytes) {
    u8*& place = self->block->named[name];
    if (!place) place = self->block->memory + self->block->used, self->block->used += (bytes + 127) / 128 * 128;
    return place;
}
inline uint4 load_shared16(u32 address) { uint4 v; std::memcpy(&v, shared_pointer(address), 16); return v; }
inline u32 load_shared4(u32 address) { u32 v; std::memcpy(&v, shared_pointer(address), 4); return v; }
inline void store_shared4(u32 address, u32 value) { std::memcpy(shared_pointer(address), &value, 4); }
inline void store_shared16(u32 address, uint4 value) { std::memcpy(shared_pointer(address), &value, 16); }
inline u32 cluster_address(u32 address, int rank) { return (address & 0xFFFFFF) | static_cast<u32>(rank) << 24; }
inline void store_cluster16(u32 address, u32 a, u32 b, u32 c, u32 d) { store_shared16(address, uint4{a, b, c, d}); }
inline void store_transposed(u32 address, const u32* tiles, int count) {
    u32 addresses[32], values[4][32];
    for (int i = 0; i < 32; i++) addresses[i] = 0;
    for (int from = 0; from < 32; from++) addresses[from] = exchange(address, from);
    for (int t = 0; t < count; t++)
        for (int from = 0; from < 32; from++) values[t][from] = exchange(tiles[t], from);
    if (lane() == 0)
        for (int t = 0; t < count; t++)
            for (int from = 0; from < 32; from++)
                for (int half = 0; half < 2; half++) {
                    unsigned short value = static_cast<unsigned short>(values[t][from] >> (16 * half));
                    std::memcpy(shared_pointer(addresses[t * 8 + from % 4 * 2 + half]) + from / 4 * 2, &value, 2);
                }
    __syncwarp();
}
inline void store_transposed4(u32 address, u32 a, u32 b, u32 c, u32 d) { u32 t[4] = {a, b, c, d}; store_transposed(address, t, 4); }
inline void store_transposed2(u32 address, u32 a, u32 b) { u32 t[2] = {a, b}; store_transposed(address, t, 2); }

// ---------------------------------------------------------------- barriers and copies

inline Barrier& barrier_at(u32 address) { return all_blocks[self->block->first_of_cluster + (address >> 24)].barriers[address & 0xFFFFFF]; }
inline void settle(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.expected;
}
inline void barrier_init(u32 barrier, u32 arrivals) { barrier_at(barrier) = Barrier{static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0}; }
inline void arrive(Barrier& barrier) {
    if (barrier.pending < 1) std::fprintf(stderr, "more arrivals at a barrier than it expects\n"), std::abort();
    barrier.pending--;
    settle(barrier);
}
inline void barrier_arrive(u32 barrier) { arrive(barrier_at(barrier)); }
inline void barrier_expect(u32 barrier, u32 bytes) { barrier_at(barrier).bytes += bytes; arrive(barrier_at(barrier)); }
inline void barrier_wait(u32 barrier, u32 parity) {
    Barrier& found = barrier_at(barrier);
    wait_until([&found, parity] { return static_cast<u32>(found.phase) != parity; });
}
inline void fence_barrier_init() {}
inline void fence_proxy_async() {}
inline u64 policy_evict_first() { return 0; }
inline u64 policy_evict_last() { return 0; }
inline void copy_to(u32 destination, const void* source, u32 bytes, u32 barrier) {
    if (bytes % 16 || reinterpret_cast<u64>(source) % 16 || destination % 16)
        std::fprintf(stderr, "a bulk copy of %u bytes is not aligned\n", bytes), std::abort();
    u8* target = shared_pointer(destination);
    Barrier* found = &barrier_at(barrier);
    later([=] {
        std::memcpy(target, source, bytes);
        found->bytes -= bytes;
        settle(*found);
    });
}
inline void copy_bulk(u32 destination, const void* source, u32 bytes, u32 barrier, u64) { copy_to(destination, source, bytes, barrier); }
inline void copy_bulk(u32 destination, const void* source, u32 bytes, u32 barrier) { copy_to(destination, source, bytes, barrier); }
inline void prefetch_bulk(const void*, u32) {}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}
inline void named_barrier(int id, int threads) { meet(id, threads); }
template <int COUNT> inline void claim_registers() {}
template <int COUNT> inline void release_registers() {}
inline void cluster_meet() {
    Block* first = &all_blocks[self->block->first_of_cluster];
    int time = first->cluster_times;
    first->cluster_arrived++;
    wait_until([first, time] { return first->cluster_times != time; });
}

// ---------------------------------------------------------------- tensor cores

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int COUNT> inline void wgmma_wait() {}
inline u64 tile_descriptor(u32 address) {
    if (address % 1024) std::fprintf(stderr, "a tile does not begin at a kilobyte\n"), std::abort();
    return address >> 4;
}
// 32 inputs of 64 outputs by TOKENS tokens; at once, where a GPU would only begin.
template <bool SIGNED, int TOKENS_> inline void wgmma(int* d, const u32* a, u64 tile, int accumulate) {
    Block& block = *self->block;
    std::memcpy(block.operands[warp()][lane()], a, 16);
    __syncwarp();
    u32 base = static_cast<u32>(tile) << 4;
    for (int half = 0; half < 2; half++) {
        int row[32];
        for (int k = 0; k < 32; k++) {
            u32 word = block.operands[warp()][lane() / 4 * 4 + k % 16 / 4][half + k / 16 * 2];
            u8 byte = static_cast<u8>(word >> (8 * (k % 4)));
            row[k] = SIGNED ? static_cast<signed char>(byte) : byte;
        }
        for (int j = 0; j < TOKENS_ / 8; j++)
            for (int odd = 0; odd < 2; odd++) {
                int token = j * 8 + lane() % 4 * 2 + odd, sum = 0;
                for (int k = 0; k < 32; k++) {
                    u32 linear = base + token * 128 + k, physical = linear ^ ((linear >> 7 & 7) << 4);
                    sum += row[k] * static_cast<signed char>(*shared_pointer(physical));
                }
                int& place = d[j * 4 + half * 2 + odd];
                place = accumulate ? static_cast<int>(static_cast<u32>(place) + static_cast<u32>(sum)) : sum;
            }
    }
    __syncwarp();
}

// ---------------------------------------------------------------- a launch

static std::function<void()> body;
static void enter() {
    body();
    self->done = true;
    self->block->alive--;
    swapcontext(&self->context, &scheduler);
}
static int run_grid(int grid, int threads, int shared_bytes, int cluster, u64 seed) {
    random_state = seed;
    cluster_size = cluster, threads_of_block = threads;
    copies.clear();
    all_blocks = std::vector<Block>(grid);
    all_threads = std::vector<Thread>(static_cast<size_t>(grid) * threads);
    for (int b = 0; b < grid; b++) {
        Block& block = all_blocks[b];
        block.storage.assign(shared_bytes + 8192, 0xCD);
        block.memory = block.storage.data();
        block.memory += (1024 - reinterpret_cast<u64>(block.memory) % 1024) % 1024;
        block.used = (shared_bytes + 127) / 128 * 128;
        block.index = b, block.first_of_cluster = b / cluster * cluster, block.alive = threads;
        for (int t = 0; t < threads; t++) {
            Thread& thread = all_threads[static_cast<size_t>(b) * threads + t];
            thread.block = &block, thread.x = t;
            thread.stack.resize(64 * 1024);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, enter, 0);
        }
    }
    size_t left = all_threads.size(), idle = 0, count = all_threads.size();
    while (left > 0) {
        size_t start = draw(static_cast<u32>(count));
        bool moved = false;
        for (size_t i = 0; i < count; i++) {
            Thread& thread = all_threads[(start + i) % count];
            if (thread.done || (thread.ready && !thread.ready())) continue;
            if (draw(8) == 0) continue;
            thread.ready = nullptr;
            self = &thread;
            swapcontext(&scheduler, &thread.context);
            moved = true;
            if (thread.done) left--;
        }
        for (int b = 0; b < grid; b += cluster) {
            Block& first = all_blocks[b];
            int living = 0;
            for (int i = 0; i < cluster; i++) living += all_blocks[b + i].alive;
            if (first.cluster_arrived > 0 && first.cluster_arrived >= living) first.cluster_arrived = 0, first.cluster_times++, moved = true;
        }
        for (size_t i = 0; i < copies.size();) {
            if (copies[i].first-- > 0) { i++; continue; }
            auto copy = std::move(copies[i].second);
            copies[i] = std::move(copies.back());
            copies.pop_back();
            copy();
        }
        idle = moved || !copies.empty() ? 0 : idle + 1;
        if (idle > 1000) {
            std::fprintf(stderr, "all threads wait for one another\n");
            return 1;
        }
    }
    return 0;
}
