// Means and variances of a token whose values its block holds in registers.

// Over groups of so many neighbouring lanes.
template <int LANES>
__device__ __forceinline__ float total_of(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
    return value;
}

constexpr int WARP_LANES = WARPS > 16 ? 32 : WARPS > 8 ? 16 : WARPS > 4 ? 8 : WARPS > 2 ? 4 : 2;  // lanes that see all warps

// Over all threads of the block. A scratch is used again two tokens later, with other barriers in between.
__device__ __forceinline__ float total_of_block(float value, u32* scratch) {
    value = total_of<32>(value);
    if (WARPS == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = __float_as_uint(value);
    __syncthreads();
    int warp = threadIdx.x % WARP_LANES;  // every so many lanes do the same
    return total_of<WARP_LANES>(warp < WARPS ? __uint_as_float(scratch[warp]) : 0);
}

// The sum of some values, and of the squares of their distances from their mean.
struct Moments {
    float count, sum, squares;
};

// Those of `LANES` neighbouring lanes together, which have `count` values (Chan, Golub and LeVeque, Updating formulae and
// a pairwise algorithm for computing sample variances).
template <int LANES>
__device__ __forceinline__ Moments together(const Moments& own, float count) {
    float sum = total_of<LANES>(own.sum);
    float distance = own.count > 0 ? own.sum * about_inverse(own.count) - sum * about_inverse(count) : 0;
    return {count, sum, total_of<LANES>(own.squares + own.count * distance * distance)};
}

// Values of `threads` threads from `first` on.
__device__ __forceinline__ float count_of(int first, int threads, int inputs) {
    int count = 0;
#pragma unroll
    for (int k = 0; k < PIECES; k++) count += max(0, min(threads * 8, inputs - (first + k * THREADS) * 8));
    return static_cast<float>(count);
}

// A thread's first value stands in for its mean. It is one of them, so that sums of squares are at most so many times
// too large as the thread has values, and lose no more to the subtraction.
__device__ __forceinline__ Moments moments_of_thread(const Arguments& a, const Piece (&token)[PIECES]) {
    float x[8], totals[2] = {0, 0}, squares[2] = {0, 0}, about = 0;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        if (!inside(k, a.inputs)) continue;
        unpack(x, token[k]);
        if (k == 0) about = x[0];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float distance = x[i] - about;
            if (!ALIGNED && piece_of(k) * 8 + i >= a.inputs) distance = 0;
            totals[i % 2] += distance;
            squares[i % 2] += distance * distance;
        }
    }
    float count = count_of(threadIdx.x, 1, a.inputs), total = totals[0] + totals[1];
    float excess = count > 0 ? total * total * about_inverse(count) : 0;
    return {count, about * count + total, max(squares[0] + squares[1] - excess, 0.0f)};
}

__device__ __forceinline__ Moments moments_of_block(const Arguments& a, const Piece (&token)[PIECES], u32 (*scratch)[32]) {
    int first = static_cast<int>(threadIdx.x) & ~31;
    Moments moments = together<32>(moments_of_thread(a, token), count_of(first, 32, a.inputs));
    if (WARPS == 1) return moments;
    if (threadIdx.x == first) {
        scratch[TOTAL][first / 32] = __float_as_uint(moments.sum);
        scratch[SQUARES][first / 32] = __float_as_uint(moments.squares);
    }
    __syncthreads();
    int warp = threadIdx.x % WARP_LANES;
    if (warp < WARPS)
        moments = {count_of(warp * 32, 32, a.inputs), __uint_as_float(scratch[TOTAL][warp]),
                   __uint_as_float(scratch[SQUARES][warp])};
    else moments = {0, 0, 0};
    return together<WARP_LANES>(moments, static_cast<float>(a.inputs));
}

// sum / count, as good as divided, but for a count that stays the same much faster.
__device__ __forceinline__ float average(float sum, float count) {
    float inverse = about_inverse(count), about = sum * inverse;
    return __fmaf_rn(__fmaf_rn(about, -count, sum), inverse, about);
}

// What a norm multiplies by, for LAYER after the mean was subtracted.
__device__ __forceinline__ float norm_scale(const Arguments& a, const Piece (&token)[PIECES], float& mean, u32 (*scratch)[32]) {
    float squares, inputs = static_cast<float>(a.inputs);
    if (KIND == 2) {
        Moments moments = moments_of_block(a, token, scratch);
        mean = average(moments.sum, inputs), squares = moments.squares;
    } else {
        float totals[2] = {0, 0}, x[8];
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            unpack(x, token[k]);
#pragma unroll
            for (int i = 0; i < 8; i++) totals[i % 2] += x[i] * x[i];
        }
        squares = total_of_block(totals[0] + totals[1], scratch[TOTAL]);
    }
    return inverse_root(average(squares, inputs) + a.epsilon);
}
