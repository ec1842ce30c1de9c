// The copying warp of the product in gemm.cu.

// Walks the units of a schedule in order and copies them.
struct Copier {
    const Arguments& a;
    Schedule schedule;
    Work work;
    u32 x_bytes;
    int left, groups;
    const u8 *slab, *x;

    __device__ Copier(const Arguments& arguments) : a(arguments), schedule(arguments), left(0) {}

    __device__ void advance() {
        if (left > 0) {
            left--;
            slab += SLAB_BYTES;
            x += a.slabs * 1024;
        }
        if (left == 0 && schedule.next(work)) {
            left = work.end - work.begin;
            int first_slab = channel_slab(a, work.tile);
            int token_slab = token_tile(a, work.tile) * (TOKENS / 8);
            groups = max(0, min(WARPGROUPS, (a.channels + 63) / 64 - first_slab));
            slab = a.weight + (static_cast<long long>(first_slab) * a.blocks + work.begin) * SLAB_BYTES;
            x = a.x + (static_cast<long long>(work.begin) * a.slabs + token_slab) * 1024;
            x_bytes = min(TOKENS / 8, a.slabs - token_slab) * 1024;
        }
    }

    __device__ void copy_weight(u32 target, u32 barrier, u64 policy) {
        barrier_expect(barrier, x_bytes + groups * SLAB_BYTES);
#pragma unroll 1
        for (int g = 0; g < groups; g++)
            copy_bulk(target + g * SLAB_BYTES, slab + static_cast<long long>(g * a.blocks) * SLAB_BYTES, SLAB_BYTES,
                      barrier, policy);
    }

    __device__ void copy_x(u32 target, u32 barrier, u64 policy) { copy_bulk(target, x, x_bytes, barrier, policy); }
};

__device__ __forceinline__ void copy_units(const Arguments& a, u32 x_base, u32 w_base, u32 full, u32 empty) {
    u64 keep = policy_evict_last();
    u64 weight_policy = a.token_tiles == 1 ? policy_evict_first() : keep;
    Copier copier(a);
    int total = copier.schedule.units(), filled = min(total, STAGES);
    copier.advance();
    Copier tokens = copier;
#pragma unroll 1
    for (int i = 0; i < filled; i++) {
        copier.copy_weight(w_base + i * W_BYTES, full + 8 * i, weight_policy);
        copier.advance();
    }
    wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < filled; i++) {
        tokens.copy_x(x_base + i * X_BYTES, full + 8 * i, keep);
        tokens.advance();
    }
    int stage = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int i = filled; i < total; i++) {
        u32 barrier = full + 8 * stage;
        barrier_wait(empty + 8 * stage, phase);
        copier.copy_weight(w_base + stage * W_BYTES, barrier, weight_policy);
        copier.copy_x(x_base + stage * X_BYTES, barrier, keep);
        copier.advance();
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
}
