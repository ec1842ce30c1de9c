// Tiles of a product with many weights, one an expert: which expert a tile belongs to is known on the device alone.
//
// Rows are sorted by expert, and each expert's begin at a multiple of 8. Every block makes the same table of how many
// tiles of tokens each expert has, and finds a tile's expert in it. The copying warp notes where the tiles lie, beside
// the data of their first units, so that the computing warps need not search.
//
// Compile-time settings: EXPERTS, of which there are at most 1024.

struct Table {
    Shares shares;
    int tile_end[EXPERTS];  // tiles of tokens up to and with each expert
    int row_end[EXPERTS];
};

constexpr int NOTES_OFFSET = (STAGES * (X_BYTES + W_BYTES + 16) + BUFFER_BYTES + WARPGROUPS * PART_BYTES + 15) / 16 * 16;
constexpr int TABLE_OFFSET = NOTES_OFFSET + STAGES * 16;

__device__ __forceinline__ Table& table() { return *reinterpret_cast<Table*>(memory + TABLE_OFFSET); }

__device__ __forceinline__ Shares shares(const Arguments& a) { return table().shares; }

__device__ __forceinline__ int channel_tiles(const Arguments& a) { return (a.channels + 64 * WARPGROUPS - 1) / (64 * WARPGROUPS); }

// By the first warp of each block.
__device__ __forceinline__ void make_table(const Arguments& a) {
    constexpr int ROUNDS = (EXPERTS + 31) / 32;
    int lane = threadIdx.x, first[ROUNDS], end[ROUNDS], sum = 0;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        int expert = i * 32 + lane;
        first[i] = expert > 0 && expert < EXPERTS ? (__ldcg(a.row_end + expert - 1) + 7) / 8 * 8 : 0;
        end[i] = expert < EXPERTS ? __ldcg(a.row_end + expert) : 0;
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        int tiles = (max(end[i] - first[i], 0) + TOKENS - 1) / TOKENS;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            int before = __shfl_up_sync(0xFFFFFFFF, tiles, offset);
            if (lane >= offset) tiles += before;
        }
        if (i * 32 + lane < EXPERTS) {
            table().tile_end[i * 32 + lane] = sum + tiles;
            table().row_end[i * 32 + lane] = end[i];
        }
        sum += __shfl_sync(0xFFFFFFFF, tiles, 31);
    }
    if (lane == 0) {
        int tiles = sum * channel_tiles(a), blocks = static_cast<int>(gridDim.x), left = tiles % blocks;
        int splits = left ? min(a.splits ? a.blocks : 1, blocks / left) : 1;
        table().shares = Shares{splits == 1 ? tiles : tiles - left, tiles, splits};
    }
}

// Tiles of an expert stand together, and those of one weight among them, so that it is fetched from memory once.
__device__ __forceinline__ Place find_place(const Arguments& a, int tile) {
    const Table& t = table();
    int channels = channel_tiles(a), token_tile = tile / channels, expert = 0;
#pragma unroll
    for (int step = 512; step; step /= 2)
        if (expert + step <= EXPERTS && t.tile_end[expert + step - 1] <= token_tile) expert += step;
    int first_tile = expert ? t.tile_end[expert - 1] : 0, own = t.tile_end[expert] - first_tile;
    int first_row = expert ? (t.row_end[expert - 1] + 7) / 8 * 8 : 0;
    int inner = tile - first_tile * channels;
    return Place{inner / own * WARPGROUPS, first_row + inner % own * TOKENS, t.row_end[expert], expert};
}

__device__ __forceinline__ int4& note(int stage) { return reinterpret_cast<int4*>(memory + NOTES_OFFSET)[stage]; }

// The barrier that says that the stage is full also says that the note is there.
__device__ __forceinline__ void note_place(int stage, const Place& place) {
    note(stage) = make_int4(place.channel_slab, place.token0, place.token_end, place.expert);
}

__device__ __forceinline__ Place noted_place(int stage) {
    int4 found = note(stage);
    return Place{found.x, found.y, found.z, found.w};
}
