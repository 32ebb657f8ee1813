// A BF16 weight laid out as nested_block.cu wants it, in one pass over memory: `split` of formats/nested.py. `join` is
// its inverse.
//
// How. A warp takes a block of 16 rows and 64 columns, and each of its threads those 32 weights whose bytes it writes: 16
// neighbours of row g and 16 of row g + 8. What a row's offset is, and so its scale, is known before.
//
// Why the bits are those of formats/nested.py. There the fixed point is rounded in float64, half to even. A weight's
// significand has 8 bits, and float64 only moves its point: the one rounding is that of a shift to the right, which
// integers round alike. All else is integers there too. A weight is an escape where the shift has dropped a bit.
//
// Escapes of a block stand in its table row by row. How many a block has behind its third is known only in the end: the
// host adds them up, and `split_others` goes through those blocks again, few as they are.

constexpr u32 SMALLEST_NORMAL = 1 << 7;  // relative magnitudes below it are the fixed point

struct Source {
    const u16* weight;   // [N][K]
    const int* offsets;  // [N]
    int n, k;
};

// A magnitude counted from its row's offset; `escapes` where that is not all of it.
__device__ __forceinline__ u32 relative(u32 magnitude, u32 offset, bool& escapes) {
    const int above = (int)magnitude - (int)(offset << 7);
    // Under offset 0 the fixed point is BF16's own.
    escapes = false;
    if (above >= (int)SMALLEST_NORMAL || offset == 0) return above;
    // A weight is significand * 2^(exponent - 134), the fixed point's step 2^(offset - 133).
    const u32 exponent = max(magnitude >> 7, 1u);
    const u32 significand = magnitude < SMALLEST_NORMAL ? magnitude : SMALLEST_NORMAL | (magnitude & 127);
    const u32 shift = min(offset + 1 - exponent, 9u);  // from 9 on nothing is left of 8 bits
    const u32 fixed = (significand + (1 << (shift - 1)) - 1 + (significand >> shift & 1)) >> shift;
    escapes = fixed << shift != significand;
    return fixed;
}

// What a thread writes of a block, and which of its weights are escapes: a bit each, those of row g + 8 in the upper half.
struct Taken {
    u32 codes[2][4], nibbles[4], escapes;
};

__device__ __forceinline__ Taken take_block(const Source& s, int tile, int chunk) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Taken taken = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int n = tile * ROWS + half * 8 + g;
        const u32 offset = s.offsets[n];
        const uint4* from = (const uint4*)(s.weight + (size_t)n * s.k + chunk * COLUMNS + t * 16);
        const uint4 first = from[0], second = from[1];
        const u32 pairs[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
        for (int c = 0; c < 16; c++) {
            const u32 bits = pairs[c / 2] >> c % 2 * 16 & 0xFFFF;
            bool escapes;
            const u32 rounded = relative(bits & 0x7FFF, offset, escapes) + 8;
            taken.codes[half][c / 4] |= (rounded >> 4 | (bits >> 8 & 0x80)) << c % 4 * 8;
            taken.nibbles[c % 8 / 2] |= (rounded & 15) << (c / 8 * 16 + c % 2 * 8 + half * 4);
            taken.escapes |= (u32)escapes << (half * 16 + c);
        }
    }
    return taken;
}

// Where a thread's escapes stand among its block's, in rows g and g + 8, and how many the block has.
struct Places {
    u32 first[2], count;
};

// Lanes follow each other row by row, but all upper rows come before all lower ones.
__device__ __forceinline__ Places find_places(u32 escapes) {
    const u32 lane = threadIdx.x % 32, own = __popc(escapes & 0xFFFF) | __popc(escapes >> 16) << 16;
    u32 sums = own;  // of both halves at once: none exceeds 512
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 before = __shfl_up_sync(0xFFFFFFFF, sums, step);
        if (lane >= step) sums += before;
    }
    const u32 all = __shfl_sync(0xFFFFFFFF, sums, 31);
    sums -= own;
    return {{sums & 0xFFFF, (all & 0xFFFF) + (sums >> 16)}, (all & 0xFFFF) + (all >> 16)};
}

// Call use(place, escape, exact) for each of a thread's escapes. exact: whether `join` will make the weight of it.
template <class Use>
__device__ __forceinline__ void each_escape(
    const Source& s, int tile, int chunk, u32 escapes, const Places& places, const Use& use) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {
        const int row = half * 8 + g, n = tile * ROWS + row;
        const float scale = __uint_as_float((u32)(s.offsets[n] + 14) << 23);  // 2^(offset - 113): takes the lift back
        u32 place = places.first[half];
        for (u32 left = escapes >> half * 16 & 0xFFFF; left; left &= left - 1, place++) {
            const int column = t * 16 + __ffs(left) - 1;
            const float weight = __uint_as_float((u32)s.weight[(size_t)n * s.k + chunk * COLUMNS + column] << 16);
            const u32 lifted = bf16(weight / scale);
            use(place, (u32)column << 20 | row << 16 | lifted, __uint_as_float(lifted << 16) * scale == weight);
        }
    }
}

// plane and nibbles: as in Weight. escapes: [K / 64][N / 16][4] zeros; set are a block's count and its first three.
// inexact: set where an escape is so small that BF16 does not hold it lifted.
__global__ void __launch_bounds__(256) split(Source s, u8* plane, uint4* nibbles, u32* escapes, int* inexact) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, tile = blockIdx.x;
    for (int chunk = blockIdx.y * 8 + threadIdx.x / 32; chunk < s.k / COLUMNS; chunk += gridDim.y * 8) {
        const size_t block = (size_t)chunk * (s.n / ROWS) + tile;
        const Taken taken = take_block(s, tile, chunk);
        u8* const codes = plane + (size_t)(tile * ROWS + g) * s.k + chunk * COLUMNS + t * 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32* const c = taken.codes[half];
            *(uint4*)(codes + (size_t)half * 8 * s.k) = {c[0], c[1], c[2], c[3]};
        }
        const u32* const b = taken.nibbles;
        nibbles[block * 32 + unit(g, t)] = {b[0], b[1], b[2], b[3]};
        if (!__any_sync(0xFFFFFFFF, taken.escapes)) continue;  // most blocks
        const Places places = find_places(taken.escapes);
        u32* const entry = escapes + block * 4;
        if (lane == 0) entry[0] = places.count;
        each_escape(s, tile, chunk, taken.escapes, places, [&](u32 place, u32 escape, bool exact) {
            if (place < 3) entry[1 + place] = escape;
            if (!exact) *inexact = 1;
        });
    }
}

// The escapes behind the third of their block. escapes: counts, and above them where in `more` a block's others begin.
__global__ void __launch_bounds__(256) split_others(Source s, const u32* escapes, u32* more) {
    const int tile = blockIdx.x;
    for (int chunk = blockIdx.y * 8 + threadIdx.x / 32; chunk < s.k / COLUMNS; chunk += gridDim.y * 8) {
        const u32 entry = escapes[((size_t)chunk * (s.n / ROWS) + tile) * 4];
        if ((entry & 0x7FF) <= 3) continue;
        const Taken taken = take_block(s, tile, chunk);
        const Places places = find_places(taken.escapes);
        each_escape(s, tile, chunk, taken.escapes, places, [&](u32 place, u32 escape, bool) {
            if (place >= 3) more[(entry >> 11) + place - 3] = escape;
        });
    }
}
