// The attention phase: q of one cluster's two tokens over the whole cache.
#pragma once

#include "layout.h"

// Where in `a` what is kept.
constexpr int Q_STRIDE = 2 * DIM + 64, P_STRIDE = 80,
              PART_STRIDE = 2 * DIM + 16;                        // bytes, so that rows meet in no bank
constexpr int PAIR_AT = 16 * Q_STRIDE, PAIR = 16 * PART_STRIDE;  // a pair of warps' 16 rows: of P, then of its part
constexpr int MIXED_AT = PAIR_AT + 4 * PAIR;                     // bf16 [RANKS][4][DIM], of the cluster's blocks
constexpr int WEIGHTS_AT = MIXED_AT + RANKS * 4 * DIM * 2;       // float2 [RANKS][4], theirs
constexpr int OWN_WEIGHTS_AT = WEIGHTS_AT + RANKS * 4 * 8;       // float2 [8][16], of this block's warps
constexpr int TOPS_AT = OWN_WEIGHTS_AT + 8 * 16 * 8;             // f32 [8][16]
static_assert(TOPS_AT + 8 * 16 * 4 <= A_SLOTS * A_SLOT, "attention fits where the activations were");

// A warp's part of 32 keys: it multiplies q with 16 of them, and all 32 values' half of the dimensions with P.
//
// Fragments come straight from L2, since a block multiplies a key once. Which column of a fragment is which of the 256
// dimensions is free as long as both operands agree, so that a thread reads 16 bytes in a row: its eight values of a key
// are columns of two products, and its eight of a value are eight products' one column.
struct Read {
    uint4 keys[8][2], values[2][2][4];  // values of the first and of the last 16 keys
    bool seen[2][2];
};

struct Attention {
    const bf16 *keys, *values;
    const u8* seen;
    int count, pair, side, r, t;  // of all keys; which warps and lanes these are

    DEVICE uint4 cell(const bf16* cache, int key, int dim) const {
        return load_kept(reinterpret_cast<const uint4*>(cache + (long long)min(key, count - 1) * DIM + dim));
    }
    DEVICE void read_keys(Read& read, int block, int half) const {
        const int key = 32 * block + 16 * side;
#pragma unroll
        for (int j = 4 * half; j < 4 * half + 4; j++)
#pragma unroll
            for (int n = 0; n < 2; n++) read.keys[j][n] = cell(keys, key + 8 * n + r, 32 * j + 8 * t);
        if (half) return;
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 2; i++) read.seen[n][i] = load_constant(seen + min(key + 8 * n + 2 * t + i, count - 1));
    }
    DEVICE void read_values(Read& read, int block, int e) const {
#pragma unroll
        for (int g = 0; g < 2; g++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                read.values[e][g][i] =
                    cell(values, 32 * block + 16 * e + 2 * t + i % 2 + 8 * (i / 2), 128 * side + 64 * g + 8 * r);
    }
};

constexpr float NOTHING = -1e30f;  // a score that nobody may see; finite, so that differences are numbers

// What eight warps found, each with the highest score and the sum that it saw of a row, put together in their block, then
// in the cluster, of which each block adds up four rows: attended rows.
DEVICE void put_together(const Params& p, Shared& s, const Where& at, Progress& done, const Attention& of,
                         const float (&o)[2][8][4], const float (&top)[2], float (&total)[2]) {
    const int r = of.r, t = of.t;
    u8* pair = s.a + PAIR_AT + of.pair * PAIR;
    float2* weights = reinterpret_cast<float2*>(s.a + WEIGHTS_AT);
    float2* own = reinterpret_cast<float2*>(s.a + OWN_WEIGHTS_AT);
    if (at.thread == 0) barrier_expect(&s.mixed, RANKS * 4 * (DIM * sizeof(bf16) + sizeof(float2)));
    for (int half = 0; half < 2; half++) {
        for (int flipped = 1; flipped < 4; flipped *= 2) total[half] += from_lane(total[half], flipped);
        if (t == 0) own[at.warp * 16 + r + 8 * half] = make_float2(top[half], total[half]);
    }
    sync_threads<WORKERS>(1);
    float share[2];
    for (int half = 0; half < 2; half++) {
        const float2 one = own[t * 16 + r + 8 * half], other = own[(t + 4) * 16 + r + 8 * half];
        float highest = fmaxf(one.x, other.x);
        for (int flipped = 1; flipped < 4; flipped *= 2) highest = fmaxf(highest, from_lane(highest, flipped));
        float sum = one.y * __expf(one.x - highest) + other.y * __expf(other.x - highest);
        for (int flipped = 1; flipped < 4; flipped *= 2) sum += from_lane(sum, flipped);
        share[half] = __expf(top[half] - highest);
        const int row = r + 8 * half;
        if (at.warp == 0 && t == 0)
            store_at(weights + at.rank * 4 + row % 4, row / 4, make_float2(highest, sum), &s.mixed);
    }

#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int g = 0; g < 2; g++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                u32 w[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    w[i] = narrow(o[g][2 * i][2 * half + n] * share[half], o[g][2 * i + 1][2 * half + n] * share[half]);
                *reinterpret_cast<uint4*>(pair + (r + 8 * half) * PART_STRIDE +
                                          2 * (128 * of.side + 64 * g + 16 * t + 8 * n)) =
                    make_uint4(w[0], w[1], w[2], w[3]);
            }
    sync_threads<WORKERS>(1);
    const int row = at.thread / 16;
    uint4* sums = reinterpret_cast<uint4*>(s.a + MIXED_AT);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int dim = DIM / 2 * half + at.thread % 16 * 8;
        float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 part = *reinterpret_cast<const uint4*>(s.a + PAIR_AT + i * PAIR + row * PART_STRIDE + 2 * dim);
            const u32 w[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
            for (int k = 0; k < 4; k++) sum[2 * k] += widen(w[k]), sum[2 * k + 1] += widen_high(w[k]);
        }
        const uint4 mine =
            make_uint4(narrow(sum[0], sum[1]), narrow(sum[2], sum[3]), narrow(sum[4], sum[5]), narrow(sum[6], sum[7]));
        store_at(sums + (at.rank * 4 + row % 4) * (DIM / 8) + dim / 8, row / 4, mine, &s.mixed);
    }
    barrier_wait(&s.mixed, done.heads++ & 1);
    const int mine = at.thread / (DIM / 4), column = at.thread % (DIM / 4);
    float highest = NOTHING, sum = 0.f;
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) highest = fmaxf(highest, weights[rank * 4 + mine].x);
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
        const float2 weight = weights[rank * 4 + mine];
        const uint2 part = reinterpret_cast<const uint2*>(sums)[(rank * 4 + mine) * (DIM / 4) + column];
        const float share = __expf(weight.x - highest);
        sum += weight.y * share;
        y.x += widen(part.x) * share, y.y += widen_high(part.x) * share;
        y.z += widen(part.y) * share, y.w += widen_high(part.y) * share;
    }
    const int asked = 16 * at.cluster + 4 * at.rank + mine;
    const float scale = divide(1.f, sum);
    if (asked < p.rows * HEADS)
        *reinterpret_cast<uint2*>(p.mixed + asked * DIM + 4 * column) =
            make_uint2(narrow(y.x * scale, y.y * scale), narrow(y.z * scale, y.w * scale));
}

// 16 rows of q, two tokens' heads, over all keys, 32 at a time a pair of warps, of which a cluster has 16. Eight warps.
DEVICE void attention(const Params& p, Shared& s, Progress& done, int layer) {
    const Where at = where();
    const int query = 16 * at.cluster, r = at.lane / 4, t = at.lane % 4;
    const long long cache = (long long)layer * p.cache_rows * DIM;
    const int count = p.prefix_rows + p.suffix_rows, blocks = (count + 31) / 32;
    const Attention of = {p.keys + cache, p.values + cache, p.seen, count, at.warp / 2, at.warp % 2, r, t};
    int block = of.pair * RANKS + at.rank;
    const bool early = 32 * block + 32 <= p.prefix_rows;  // what was in the cache before this kernel
    Read read;
    if (early) of.read_keys(read, block, 0), of.read_keys(read, block, 1), of.read_values(read, block, 0);
    wait_for_go(s, done);
    for (int i = at.thread; i < 16 * DIM / 8; i += WORKERS) {
        const int row = i / (DIM / 8), column = i % (DIM / 8), asked = min(query + row, p.rows * HEADS - 1);
        *reinterpret_cast<uint4*>(s.a + row * Q_STRIDE + column * 16) =
            load_fresh(reinterpret_cast<const uint4*>(p.q + asked * DIM) + column);
    }
    if (!early && block < blocks)
        of.read_keys(read, block, 0), of.read_keys(read, block, 1), of.read_values(read, block, 0);
    sync_threads<WORKERS>(1);

    u8* pair = s.a + PAIR_AT + of.pair * PAIR;
    float* tops = reinterpret_cast<float*>(s.a + TOPS_AT) + of.pair * 32;
    int limit[2];
    for (int half = 0; half < 2; half++)  // the state token sees no actions
        limit[half] = query / HEADS + half < p.with_state ? p.prefix_rows + 1 : count;
    float top[2] = {NOTHING, NOTHING}, total[2] = {0.f, 0.f};
    float o[2][8][4];
#pragma unroll
    for (int g = 0; g < 2; g++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[g][j][i] = 0.f;
    while (block < blocks) {
        float score[2][4] = {}, more[2][4] = {};  // two sums, since each product waits for the one before
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const uint4 q0 = *reinterpret_cast<const uint4*>(s.a + r * Q_STRIDE + 64 * j + 16 * t);
            const uint4 q1 = *reinterpret_cast<const uint4*>(s.a + (r + 8) * Q_STRIDE + 64 * j + 16 * t);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint4 k = read.keys[j][n];
                multiply(score[n], q0.x, q1.x, q0.y, q1.y, k.x, k.y);
                multiply(more[n], q0.z, q1.z, q0.w, q1.w, k.z, k.w);
            }
        }
        float higher[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] += more[n][i];
                const int key = 32 * block + 16 * of.side + 8 * n + 2 * t + i % 2;
                if (key >= limit[i / 2] || !read.seen[n][i % 2]) score[n][i] = NOTHING;
                higher[i / 2] = fmaxf(higher[i / 2], score[n][i]);
            }
        of.read_values(read, block, 1);
        block += 4 * RANKS;  // its last keys are read again where there are no more
        of.read_keys(read, block, 0);
        for (int half = 0; half < 2; half++) {
            for (int flipped = 1; flipped < 4; flipped *= 2)
                higher[half] = fmaxf(higher[half], from_lane(higher[half], flipped));
            if (t == 0) tops[16 * of.side + r + 8 * half] = higher[half];
        }
        sync_threads<64>(3 + of.pair);
        float fade[2];
        for (int half = 0; half < 2; half++) {
            higher[half] = fmaxf(higher[half], tops[16 * (1 - of.side) + r + 8 * half]);
            fade[half] = __expf(top[half] - higher[half]);
            top[half] = higher[half], total[half] *= fade[half];
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = score[n][i] == NOTHING ? 0.f : __expf(score[n][i] - top[i / 2]);
                total[i / 2] += score[n][i];  // of this thread's keys
            }
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<u32*>(pair + (r + 8 * half) * P_STRIDE + 2 * (16 * of.side + 8 * n + 2 * t)) =
                    narrow(score[n][2 * half], score[n][2 * half + 1]);
        }
        sync_threads<64>(3 + of.pair);
#pragma unroll
        for (int g = 0; g < 2; g++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[g][j][i] *= fade[i / 2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            u32 weights[4];  // rows r and r + 8, keys 2 t and 2 t + 8
            for (int i = 0; i < 4; i++)
                weights[i] =
                    *reinterpret_cast<const u32*>(pair + (r + i % 2 * 8) * P_STRIDE + 2 * (16 * e + 2 * t + i / 2 * 8));
#pragma unroll
            for (int g = 0; g < 2; g++) {
                const uint4* v = read.values[e][g];
                const u32 v0[4] = {v[0].x, v[0].y, v[0].z, v[0].w}, v1[4] = {v[1].x, v[1].y, v[1].z, v[1].w};
                const u32 v8[4] = {v[2].x, v[2].y, v[2].z, v[2].w}, v9[4] = {v[3].x, v[3].y, v[3].z, v[3].w};
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const u32 low = j % 2 ? pick<0x7632>(v0[j / 2], v1[j / 2]) : pick<0x5410>(v0[j / 2], v1[j / 2]);
                    const u32 high = j % 2 ? pick<0x7632>(v8[j / 2], v9[j / 2]) : pick<0x5410>(v8[j / 2], v9[j / 2]);
                    multiply(o[g][j], weights[0], weights[1], weights[2], weights[3], low, high);
                }
            }
            if (e == 0)
                of.read_keys(read, block, 1);
            else
                of.read_values(read, block, 0);
        }
    }
    put_together(p, s, at, done, of, o, top, total);
}
