// Sums of tiles that several blocks share, through device memory. The computing warps add theirs and go on; a warp that has nothing to copy
// counts the parts once they have arrived, and whoever counted last takes the whole sum when its other work is done.
struct Part {
    const Arguments& a;
    u32 added;               // a barrier; behind it another one, and a flag
    int group;

    __device__ Part(const Arguments& arguments, u32 base, int warpgroup)
        : a(arguments), added(base + PART_BYTES * warpgroup), group(warpgroup) {}

    __device__ u32 counted() const { return added + 8; }
    __device__ u32 flag() const { return added + 16; }
    __device__ int slot() const { return static_cast<int>(blockIdx.x) / shares(a).splits * WARPGROUPS + group; }
    __device__ Sum* sums() const { return reinterpret_cast<Sum*>(a.workspace) + static_cast<long long>(slot()) * (TOKENS * 64); }

    __device__ void init() const {
        barrier_init(added, 4);
        barrier_init(counted(), 1);
    }

    __device__ __forceinline__ void add(const Sum (&total)[TOKENS / 2], int thread) const {
        Sum* mine = sums() + thread;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) add_there(mine + i * 128, total[i]);
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(added);
    }

    // By one thread that computes nothing.
    __device__ void count() const {
        int* counter = a.counters + slot();
        barrier_wait(added, 0);
        __threadfence();
        bool all = atomicAdd(counter, 1) + 1 == shares(a).splits;
        if (all) *counter = 0;
        __threadfence();
        store_shared4(flag(), all);
        barrier_arrive(counted());
    }

    __device__ __forceinline__ bool take(Sum (&total)[TOKENS / 2], int thread) const {
        barrier_wait(counted(), 0);
        if (!load_shared4(flag())) return false;
        Sum* mine = sums() + thread;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) total[i] = atomicExch(mine + i * 128, static_cast<Sum>(0));
        return true;
    }
};

#if CLUSTER > 1
// Sums of a tile that the blocks of a cluster share, through their shared memory: each of the first FINISHERS blocks gets
// the others' sums of its own SHARE tokens. Four sums of a thread stand together, by sending block, warpgroup, four, thread.
constexpr int FOURS = SHARE / 8;
constexpr int SENDER_BYTES = WARPGROUPS * FOURS * 2048;
static_assert((CLUSTER - 1) * SENDER_BYTES <= STAGES * (X_BYTES + W_BYTES), "the sums need more than the stages' memory");

#if FLOAT_SCALE
__device__ __forceinline__ u32 sum_bits(float sum) { return __float_as_uint(sum); }
__device__ __forceinline__ float sum_of(u32 bits) { return __uint_as_float(bits); }
#else
__device__ __forceinline__ u32 sum_bits(int sum) { return static_cast<u32>(sum); }
__device__ __forceinline__ int sum_of(u32 bits) { return static_cast<int>(bits); }
#endif

// `area` is where the stages were; `tokens` are those from the tile's first to the last of all. Every computing thread of
// the cluster comes here once, and those that copied to the stages meet them; the others have ended or will.
__device__ __forceinline__ void add_cluster(
    Sum (&total)[TOKENS / 2], u32 area, int tokens, int group, int thread) {
    int rank = static_cast<int>(blockIdx.x) % CLUSTER;
    area += group * (FOURS * 2048) + thread * 16;
    cluster_meet();  // all are done with the stages
#pragma unroll
    for (int r = 0; r < FINISHERS; r++) {
        if (r == rank || r * SHARE >= tokens) continue;
        u32 target = cluster_address(area + (rank - (rank > r)) * SENDER_BYTES, r);
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const Sum* four = total + (r * FOURS + i) * 4;
            store_cluster16(target + i * 2048, sum_bits(four[0]), sum_bits(four[1]), sum_bits(four[2]), sum_bits(four[3]));
        }
    }
    cluster_meet();  // all sums have come
#pragma unroll
    for (int r = 0; r < FINISHERS; r++) {
        if (r != rank) continue;
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            Sum* four = total + (r * FOURS + i) * 4;
#pragma unroll
            for (int sender = 0; sender < CLUSTER - 1; sender++) {
                uint4 bits = load_shared16(area + sender * SENDER_BYTES + i * 2048);
                four[0] += sum_of(bits.x), four[1] += sum_of(bits.y), four[2] += sum_of(bits.z), four[3] += sum_of(bits.w);
            }
        }
    }
}
#endif
