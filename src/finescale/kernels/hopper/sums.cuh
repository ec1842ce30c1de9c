// Sums of tiles that several blocks share. The computing warps add theirs and go on; a warp that has nothing to copy
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
        for (int i = 0; i < TOKENS / 2; i++)
#if FLOAT_SCALE
            asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(mine + i * 128), "f"(total[i]) : "memory");
#else
            asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(mine + i * 128), "r"(total[i]) : "memory");
#endif
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
