// The copying warp of the product in gemm.cu.

// Walks the units of a schedule in order and copies them.
struct Copier {
    const Arguments& a;
    Schedule schedule;
    Work work;
    u32 x_bytes;
    Place place;
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
            place = find_place(a, work.tile);
            int channel_slabs = (a.channels + 63) / 64, token_slab = place.token0 / 8;
            long long first_slab = static_cast<long long>(place.expert) * channel_slabs + place.channel_slab;
            groups = max(0, min(WARPGROUPS, channel_slabs - place.channel_slab));
            slab = a.weight + (first_slab * a.blocks + work.begin) * SLAB_BYTES;
            x = a.x + (static_cast<long long>(work.begin) * a.slabs + token_slab) * 1024;
            x_bytes = min(TOKENS / 8, (place.token_end + 7) / 8 - token_slab) * 1024;
        }
    }

    __device__ void copy_weight(int stage, u32 w_base, u32 full, u64 policy) {
        u32 target = w_base + stage * W_BYTES, barrier = full + 8 * stage;
#if GROUPED
        note_place(stage, place);
#endif
        barrier_expect(barrier, x_bytes + groups * SLAB_BYTES);
#pragma unroll 1
        for (int g = 0; g < groups; g++)
            copy_bulk(target + g * SLAB_BYTES, slab + static_cast<long long>(g * a.blocks) * SLAB_BYTES, SLAB_BYTES,
                      barrier, policy);
    }

    __device__ void copy_x(u32 target, u32 barrier, u64 policy) {
        copy_bulk(target, x, x_bytes, barrier, policy);
    }
};

__device__ __forceinline__ void copy_units(const Arguments& a, u32 x_base, u32 w_base, u32 full, u32 empty) {
    u64 keep = policy_evict_last();
    u64 weight_policy = a.token_tiles == 1 ? policy_evict_first() : keep;
    Copier copier(a);
    int total = copier.schedule.units(), filled = min(total, STAGES);
    [[maybe_unused]] bool shares_tile = CLUSTER > 1 && copier.schedule.has_part;
    copier.advance();
    Copier tokens = copier;
#pragma unroll 1
    for (int i = 0; i < filled; i++) {
        copier.copy_weight(i, w_base, full, weight_policy);
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
        barrier_wait(empty + 8 * stage, phase);
        copier.copy_weight(stage, w_base, full, weight_policy);
        copier.copy_x(x_base + stage * X_BYTES, full + 8 * stage, keep);
        copier.advance();
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
#if CLUSTER > 1
    // What was copied has come before other blocks store their sums there (add_cluster).
    if (!shares_tile) return;
#pragma unroll 1
    for (int i = total - filled; i < total; i++) barrier_wait(full + 8 * (i % STAGES), i / STAGES & 1);
    cluster_meet();
    cluster_meet();
#endif
}
