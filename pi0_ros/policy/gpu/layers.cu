// All layers of the action expert in one kernel: a denoising step without a launch between its products.
//
// A step is a few dozen rows against weights that are read once, so it should take what reading them takes. What it
// takes beyond is waiting: for the kernel before, for the first bytes, for the last. Here the weights come in a stream
// that waits for nothing but room: each block knows beforehand which parts of which matrices it will multiply, and a
// warp of its own keeps a ring of them in shared memory filled, across layers, while the others wait for one another.
//
//     warps 0 to 3   products (a warpgroup), their epilogues, attention
//     warps 4 to 7   the norms' factors, attention
//     warp 8         copies weights into the ring
//     warp 9         waits for the grid, and copies the activations that the next product goes over
//
// A layer is five phases with the whole grid meeting after each: qkv, attention, out, geglu, down. Four blocks are a
// cluster. In qkv, out and down each of them multiplies a quarter of the inner dimension for the same columns; then
// each adds up a quarter of the rows, in the order of the blocks: the same inputs give the same bits. In geglu a block
// has columns of its own over the whole inner dimension, and the cluster shares the activations that it reads.
// What step_kernels.py says of norms, modulation and RoPE holds here, and all buffers are the same.

#include "hopper.h"

constexpr int WIDTH = 1024, MLP = 4096, HEADS = 8, DIM = 256;  // gemma_300m, with one head of keys and values
constexpr int QUERIES = HEADS * DIM, QKV = QUERIES + 2 * DIM, RANKS = 4;
constexpr int ROWS = 64, CHUNK = 64;                   // of a matrix unit's tiles: rows of activations, inner columns
constexpr int A_CHUNK = ROWS * CHUNK * 2;              // bytes
constexpr int QKV_CHUNKS = WIDTH / RANKS / CHUNK, OUT_CHUNKS = QUERIES / RANKS / CHUNK, GEGLU_CHUNKS = WIDTH / CHUNK,
              DOWN_CHUNKS = MLP / RANKS / CHUNK;
constexpr int WORKERS = 256, GROUP = 128, THREADS = WORKERS + GROUP;
constexpr float EPS = RMS_EPS;

// Columns come in eights and are shared out as evenly as that allows, CLUSTERS being what the GPU has room for. Each share
// is read and multiplied as if it were of the largest size; what it has too much is its neighbour's, and is left.
template <int COLUMNS, int SHARES> struct Shares {
    static constexpr int EIGHTS = COLUMNS / 8, LARGEST = (EIGHTS + SHARES - 1) / SHARES * 8;
    DEVICE static int begin(int i) { return i * EIGHTS / SHARES * 8; }
    DEVICE static int size(int i) { return begin(i + 1) - begin(i); }
};
using OfQkv = Shares<QKV, CLUSTERS>;
using OfWidth = Shares<WIDTH, CLUSTERS>;
using OfMlp = Shares<MLP, CLUSTERS * RANKS>;

constexpr int SLOT = OfQkv::LARGEST * CHUNK * 2;       // of the ring, bytes
constexpr int PARTS = RANKS * OfWidth::LARGEST / 8 * 32 * 16;
constexpr int SLOTS = (MEMORY - 16 * A_CHUNK - PARTS - 3072) / SLOT;
static_assert(SLOT >= 2 * OfMlp::LARGEST * CHUNK * 2 && SLOT >= 2 * OfWidth::LARGEST * CHUNK * 2, "tiles fit");

struct Params {
    TensorMap x, attended, hidden;                   // activations: [1, rows, columns], boxes of [1, 64, 64]
    TensorMap qkv, out, geglu, down;                 // weights: [depth, out, in], boxes of [1, its columns, 64]
    bf16 *tokens, *scaled;
    float *squares;                                  // [tiles at first and CLUSTERS then, capacity]
    bf16 *q, *keys, *values, *mixed, *gated;         // keys, values: [depth, cache_rows, DIM]
    const float *rope;                               // [rows, DIM]
    const u8 *seen;                                  // [cache_rows]
    const int *when;                                 // [rows]
    const float *qkv_bias, *geglu_bias;              // [depth, times, columns]
    const bf16 *modulation;                          // [times, 2 depth + 1, 3, WIDTH]
    u32 *counter;                                    // two, zero between launches
    int depth, times, first, rows, prefix_rows, suffix_rows, cache_rows, capacity, tiles, with_state;
};

struct Shared {
    alignas(1024) u8 a[16 * A_CHUNK];                // activations by chunks; attention's and qkv's exchange as well
    alignas(1024) u8 ring[SLOTS * SLOT];
    float4 parts[RANKS][OfWidth::LARGEST / 8][32];        // of this block's rows, from each of the cluster
    float factor[2][ROWS];
    Barrier full[SLOTS], empty[SLOTS], arrived[16], go, exchanged, weighed, mixed;
};

static_assert(sizeof(Shared) + 1024 <= MEMORY, "and the start may have to be moved by up to 1024");

// Where attention and qkv keep what they exchange, within `a`.
constexpr int QKV_PARTS = QKV_CHUNKS * A_CHUNK;      // float4 [RANKS][OfQkv::LARGEST / 8][32]
constexpr int Q_STRIDE = 2 * DIM + 64, PART_STRIDE = 2 * DIM + 16;  // bytes, so that rows meet in no bank
constexpr int PARTS_AT = 16 * Q_STRIDE;              // bf16 [8 warps][16][PART_STRIDE]
constexpr int MIXED_AT = PARTS_AT + 8 * 16 * PART_STRIDE;  // f32 [RANKS][4][DIM]
constexpr int WEIGHTS_AT = MIXED_AT + RANKS * 4 * DIM * 4;  // float2 [RANKS * 8][16]
static_assert(WEIGHTS_AT + RANKS * 8 * 16 * 8 <= 16 * A_CHUNK, "attention fits where the activations were");

struct Where {
    u32 rank, cluster;
    int warp, lane, thread;
};

// --- copies -----------------------------------------------------------------------------------------------------------

DEVICE void copy_weights(const Params& p, Shared& s, const Where& at) {
    for (const TensorMap* map : {&p.x, &p.attended, &p.hidden, &p.qkv, &p.out, &p.geglu, &p.down}) prefetch_map(map);
    int n = 0;
    auto slot = [&](u32 bytes) {
        const int i = n % SLOTS;
        if (n >= SLOTS) barrier_wait(&s.empty[i], (n / SLOTS - 1) & 1);
        n++;
        barrier_expect(&s.full[i], bytes);
        return i;
    };
    const int column = OfWidth::begin(at.cluster), gate = OfMlp::begin(at.cluster * RANKS + at.rank);
    auto pairs = [&](const TensorMap* map, int chunks, int layer) {
        constexpr int TILE = OfWidth::LARGEST * CHUNK * 2;
        for (int c = 0; c < chunks; c += 2) {
            const int i = slot(2 * TILE);
            for (int k = 0; k < 2; k++)
                copy_tile<true>(s.ring + i * SLOT + k * TILE, map, (at.rank * chunks + c + k) * CHUNK, column, layer,
                                &s.full[i]);
        }
    };
    for (int layer = 0; layer < p.depth; layer++) {
        for (int c = 0; c < QKV_CHUNKS; c++) {
            const int i = slot(SLOT);
            copy_tile<true>(s.ring + i * SLOT, &p.qkv, (at.rank * QKV_CHUNKS + c) * CHUNK, OfQkv::begin(at.cluster), layer,
                            &s.full[i]);
        }
        pairs(&p.out, OUT_CHUNKS, layer);
        for (int c = 0; c < GEGLU_CHUNKS; c++) {
            constexpr int TILE = OfMlp::LARGEST * CHUNK * 2;
            const int i = slot(2 * TILE);
            copy_tile<true>(s.ring + i * SLOT, &p.geglu, c * CHUNK, gate, layer, &s.full[i]);
            copy_tile<true>(s.ring + i * SLOT + TILE, &p.geglu, c * CHUNK, MLP + gate, layer, &s.full[i]);
        }
        pairs(&p.down, DOWN_CHUNKS, layer);
    }
}

// Keys and values that the steps find in the cache are read a phase later: into L2 with them, each block a part.
DEVICE void prefetch_cache(const Params& p, int layer) {
    const int share = (p.prefix_rows + gridDim.x - 1) / gridDim.x, from = blockIdx.x * share;
    const int rows = min(share, p.prefix_rows - from);
    if (rows <= 0) return;
    const long long start = ((long long)layer * p.cache_rows + from) * DIM;
    prefetch(p.keys + start, rows * DIM * 2);
    prefetch(p.values + start, rows * DIM * 2);
}

DEVICE void copy_activations(const Params& p, Shared& s, const Where& at) {
    u32 met = 0;
    auto start = [&](bool wait) {
        if (wait) grid_wait(p.counter, ++met * gridDim.x);
        fence_for_copies();
        barrier_arrive(&s.go);
    };
    auto mine = [&](const TensorMap* map, int chunks, int row) {
        for (int c = 0; c < chunks; c++) {
            barrier_expect(&s.arrived[c], A_CHUNK);
            copy_tile<false>(s.a + c * A_CHUNK, map, (at.rank * chunks + c) * CHUNK, row, 0, &s.arrived[c]);
        }
    };
    for (int layer = 0; layer < p.depth; layer++) {
        prefetch_cache(p, layer);
        start(layer > 0);
        mine(&p.x, QKV_CHUNKS, p.first);
        start(true);  // attention reads by itself
        start(true);
        mine(&p.attended, OUT_CHUNKS, 0);
        start(true);
        for (int c = 0; c < GEGLU_CHUNKS; c++) {
            barrier_expect(&s.arrived[c], A_CHUNK);
            if (c % RANKS == at.rank)
                copy_tile_to((1 << RANKS) - 1, s.a + c * A_CHUNK, &p.x, c * CHUNK, p.first, 0, &s.arrived[c]);
        }
        start(true);
        mine(&p.hidden, DOWN_CHUNKS, 0);
    }
}

// --- products ---------------------------------------------------------------------------------------------------------

// How far a thread is with each kind of barrier.
struct Progress {
    int slot = 0;        // weights' slots used up
    u32 arrived = 0;     // a bit for each chunk of activations: the parity to wait for
    u32 go = 0, exchanged = 0, heads = 0;
};

DEVICE void wait_for_go(Shared& s, Progress& done) { barrier_wait(&s.go, done.go++ & 1); }

// d = a w^T for this block's columns and part of the inner dimension. Four warps.
template <int N, int CHUNKS, int IN_SLOT> DEVICE void product(float (&d)[N], Shared& s, const Where& at, Progress& done) {
    constexpr int TILE = 2 * N * 2 * CHUNK;  // bytes; 64 rows in 128 threads are N / 2 elements a thread of 2 N columns
    auto release = [&](int slot) {
        if (at.lane == 0) barrier_arrive(&s.empty[slot % SLOTS]);
    };
    for (int c = 0; c < CHUNKS; c++) {
        const int slot = done.slot + c / IN_SLOT;
        if (c % IN_SLOT == 0) barrier_wait(&s.full[slot % SLOTS], slot / SLOTS & 1);
        barrier_wait(&s.arrived[c], done.arrived >> c & 1);
        const u8 *a = s.a + c * A_CHUNK, *w = s.ring + slot % SLOTS * SLOT + c % IN_SLOT * TILE;
        products_begin();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) multiply_tiles(d, a + 32 * k, w + 32 * k, c > 0 || k > 0);
        products_commit();
        products_wait<1>();
        if (c > 0 && c % IN_SLOT == 0) release(slot - 1);
    }
    products_wait<0>();
    done.slot += CHUNKS / IN_SLOT;
    release(done.slot - 1);
    done.arrived ^= (1u << CHUNKS) - 1;
}

// Each warp's 16 rows of d go to the block of that rank, which waits for those of all four.
template <int N> DEVICE void exchange(float4* parts, const float (&d)[N], Shared& s, const Where& at, Progress& done) {
    float4* mine = parts + at.rank * (N / 4 * 32) + at.lane;
#pragma unroll
    for (int j = 0; j < N / 4; j++)
        store_at(mine + j * 32, at.warp, make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]));
    sync_warp();
    if (at.lane == 0) barrier_arrive_at(&s.exchanged, at.warp);
    barrier_wait(&s.exchanged, done.exchanged++ & 1);
}

// Two neighbouring columns of one of the 16 rows, added up.
template <int N> DEVICE float2 summed(const float4* parts, int row, int column) {
    float2 sum = make_float2(0.f, 0.f);
    const float4* at = parts + column / 8 * 32 + row % 8 * 4 + column % 8 / 2;
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
        const float2 part = reinterpret_cast<const float2*>(at + rank * (N / 4 * 32))[row / 8];
        sum.x += part.x, sum.y += part.y;
    }
    return sum;
}

// 1 / sqrt(mean(x^2) + eps) of each row, from the sums of squares that whoever wrote the rows left. Four warps.
DEVICE void factors(const Params& p, Shared& s, int thread, int tiles) {
    const int row = thread % ROWS, half = thread / ROWS;
    float sum = 0.f;
    if (row < p.rows)
#pragma unroll 8
        for (int i = half; i < tiles; i += 2) sum += load_fresh(p.squares + i * p.capacity + p.first + row);
    s.factor[half][row] = sum;
    sync_threads<2, GROUP>();
    if (half == 0) s.factor[0][row] = rsqrtf((sum + s.factor[1][row]) / WIDTH + EPS);
}

// The grid may go on: what all threads of this block wrote is there.
DEVICE void finish(const Params& p, const Where& at) {
    fence_for_copies();
    sync_threads<1, WORKERS>();
    if (at.thread == 0) grid_arrive(p.counter);
}

DEVICE int time_of(const Params& p, int row) { return ADAPTIVE && row < p.rows ? p.when[row] : 0; }

DEVICE void project(const Params& p, Shared& s, const Where& at, Progress& done, int layer) {
    float4* parts = reinterpret_cast<float4*>(s.a + QKV_PARTS);
    float d[OfQkv::LARGEST / 2];
    if (at.warp < 4)
        product<OfQkv::LARGEST / 2, QKV_CHUNKS, 1>(d, s, at, done);
    else
        factors(p, s, at.thread - GROUP, layer ? CLUSTERS : p.tiles);
    sync_threads<1, WORKERS>();
    if (at.warp >= 4) return;
    exchange(parts, d, s, at, done);
    const int part = at.thread / 8, row = 16 * at.rank + part;
    if (row >= p.rows) return;
    const float factor = s.factor[0][row];
    const float* rope = p.rope + (p.first + row) * DIM;
    const long long cached = ((long long)layer * p.cache_rows + p.prefix_rows + p.first + row) * DIM;
    const int begin = OfQkv::begin(at.cluster), size = OfQkv::size(at.cluster);
#pragma unroll
    for (int i = 0; i < (OfQkv::LARGEST + 15) / 16; i++) {
        const int within_tile = 2 * (at.thread % 8 + 8 * i), column = begin + within_tile;
        if (within_tile >= size) break;
        const int head = column / DIM, within = column % DIM;
        float2 y = summed<OfQkv::LARGEST / 2>(parts, part, within_tile);
        y.x *= factor, y.y *= factor;
        if (ADAPTIVE) {
            const float* bias = p.qkv_bias + ((long long)layer * p.times + time_of(p, row)) * QKV + column;
            y.x += bias[0], y.y += bias[1];
        }
        if (head <= HEADS) {  // a pair is a complex number
            const float cosine = rope[within], sine = rope[within + 1];
            y = make_float2(y.x * cosine - y.y * sine, y.x * sine + y.y * cosine);
        }
        bf16* to = head < HEADS ? p.q + row * QUERIES + column : (head == HEADS ? p.keys : p.values) + cached + within;
        *reinterpret_cast<u32*>(to) = narrow(y.x, y.y);
    }
}

// This block's part of x: 16 rows of its cluster's columns, eight threads a row, pairs of neighbouring columns.
constexpr int PAIRS = (OfWidth::LARGEST + 15) / 16;  // a thread has at most

// x += gate * (a w^T). A thread keeps its elements of x for good; they are the same in out and down.
template <int CHUNKS>
DEVICE void add_product(const Params& p, Shared& s, const Where& at, Progress& done, float2 (&x)[PAIRS], int norm) {
    if (at.warp >= 4) return;
    constexpr int N = OfWidth::LARGEST / 2;
    float d[N];
    product<N, CHUNKS, 2>(d, s, at, done);
    exchange(&s.parts[0][0][0], d, s, at, done);
    const int part = at.thread / 8, row = 16 * at.rank + part, begin = OfWidth::begin(at.cluster);
    const bf16* table = p.modulation + ((long long)time_of(p, row) * (2 * p.depth + 1) + norm) * (3 * WIDTH) + begin;
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int within = 2 * (at.thread % 8 + 8 * i), cell = (p.first + row) * WIDTH + begin + within;
        if (within >= OfWidth::size(at.cluster) || row >= p.rows) break;
        float2 y = summed<N>(&s.parts[0][0][0], part, within);
        if (ADAPTIVE) y.x *= widen(table[2 * WIDTH + within]), y.y *= widen(table[2 * WIDTH + within + 1]);
        const u32 both = narrow(x[i].x + y.x, x[i].y + y.y);
        x[i] = make_float2(widen(both), widen_high(both));
        squares += x[i].x * x[i].x + x[i].y * x[i].y;
        *reinterpret_cast<u32*>(p.tokens + cell) = both;
        if (ADAPTIVE) {
            const bf16* scale = table + 3 * WIDTH + within;
            *reinterpret_cast<u32*>(p.scaled + cell) = narrow(x[i].x * widen(scale[0]), x[i].y * widen(scale[1]));
        }
    }
    for (int flipped = 1; flipped < 8; flipped *= 2) squares += from_lane(squares, flipped);
    if (at.thread % 8 == 0 && row < p.rows) p.squares[at.cluster * p.capacity + p.first + row] = squares;
}

DEVICE float gelu(float x) {  // the tanh form: 0.5 (1 + tanh(y)) is sigmoid(2 y)
    return x / (1.f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

DEVICE void geglu(const Params& p, Shared& s, const Where& at, Progress& done, int layer) {
    constexpr int N = OfMlp::LARGEST;  // gates, and as many that they gate
    float d[N];
    if (at.warp < 4)
        product<N, GEGLU_CHUNKS, 1>(d, s, at, done);
    else
        factors(p, s, at.thread - GROUP, CLUSTERS);
    sync_threads<1, WORKERS>();
    if (at.warp >= 4) return;
    const int share = at.cluster * RANKS + at.rank, first = OfMlp::begin(share) + 2 * (at.lane % 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = 16 * at.warp + at.lane / 4 + 8 * half;
        if (row >= p.rows) break;
        const float factor = s.factor[0][row];
        const float* bias = p.geglu_bias + ((long long)layer * p.times + time_of(p, row)) * (2 * MLP) + first;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            if (8 * j >= OfMlp::size(share)) break;
            float h[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float gate = d[4 * j + 2 * half + i] * factor, up = d[N / 2 + 4 * j + 2 * half + i] * factor;
                if (ADAPTIVE) gate += bias[8 * j + i], up += bias[MLP + 8 * j + i];
                h[i] = gelu(gate) * up;
            }
            *reinterpret_cast<u32*>(p.gated + row * MLP + first + 8 * j) = narrow(h[0], h[1]);
        }
    }
}

// --- attention --------------------------------------------------------------------------------------------------------

constexpr float NOTHING = -1e30f;  // a score that nobody may see; finite, so that differences are numbers

// 16 rows of q, two tokens' heads, over all keys: 16 keys at a time a warp, 32 warps a cluster. Eight warps.
//
// Fragments come straight from L2, since a key is multiplied once here. Which column of a fragment is which of the 256
// dimensions is free as long as both operands agree, so that a thread reads 16 bytes in a row: a thread's eight values
// of a key are columns of two products, and its eight of a value are eight products' one column.
DEVICE void attention(const Params& p, Shared& s, const Where& at, Progress& done, int layer) {
    const int query = 16 * at.cluster, r = at.lane / 4, t = at.lane % 4;
    const int count = p.prefix_rows + p.suffix_rows, blocks = (count + 15) / 16;
    const bf16* keys = p.keys + (long long)layer * p.cache_rows * DIM;
    const bf16* values = p.values + (long long)layer * p.cache_rows * DIM;
    for (int i = at.thread; i < 16 * DIM / 8; i += WORKERS)
        *reinterpret_cast<uint4*>(s.a + i / (DIM / 8) * Q_STRIDE + i % (DIM / 8) * 16) =
            load_fresh(reinterpret_cast<const uint4*>(p.q + query * DIM) + i);
    sync_threads<1, WORKERS>();

    const int first_token = query / HEADS;
    int limit[2];
    for (int half = 0; half < 2; half++)  // the state token sees no actions
        limit[half] = first_token + half < p.with_state ? p.prefix_rows + 1 : count;
    float top[2] = {NOTHING, NOTHING}, total[2] = {0.f, 0.f};
    float o[4][8][4];
    for (int g = 0; g < 4; g++)
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 4; i++) o[g][j][i] = 0.f;
    auto cell = [&](const bf16* cache, int key, int dim) {
        return load_fresh(reinterpret_cast<const uint4*>(cache + (long long)min(key, count - 1) * DIM + dim));
    };
    for (int block = at.warp * RANKS + at.rank; block < blocks; block += 8 * RANKS) {
        const int key = 16 * block;
        float score[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
        uint4 k[8][2], v[4][4];  // all at once, or each would be waited for
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int n = 0; n < 2; n++) k[j][n] = cell(keys, key + 8 * n + r, 32 * j + 8 * t);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const uint4 q0 = *reinterpret_cast<const uint4*>(s.a + r * Q_STRIDE + 64 * j + 16 * t);
            const uint4 q1 = *reinterpret_cast<const uint4*>(s.a + (r + 8) * Q_STRIDE + 64 * j + 16 * t);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                multiply(score[n], q0.x, q1.x, q0.y, q1.y, k[j][n].x, k[j][n].y);
                multiply(score[n], q0.z, q1.z, q0.w, q1.w, k[j][n].z, k[j][n].w);
            }
        }
#pragma unroll
        for (int g = 0; g < 4; g++)
#pragma unroll
            for (int i = 0; i < 4; i++) v[g][i] = cell(values, key + 2 * t + i % 2 + 8 * (i / 2), 64 * g + 8 * r);
        float higher[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int seen = key + 8 * n + 2 * t + i % 2;
                if (seen >= limit[i / 2] || !p.seen[seen]) score[n][i] = NOTHING;
                higher[i / 2] = fmaxf(higher[i / 2], score[n][i]);
            }
        float fade[2];
        for (int half = 0; half < 2; half++) {
            for (int flipped = 1; flipped < 4; flipped *= 2)
                higher[half] = fmaxf(higher[half], from_lane(higher[half], flipped));
            fade[half] = __expf(top[half] - higher[half]);
            top[half] = higher[half], total[half] *= fade[half];
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = score[n][i] == NOTHING ? 0.f : __expf(score[n][i] - top[i / 2]);
                total[i / 2] += score[n][i];  // of this thread's keys
            }
        const u32 p0 = narrow(score[0][0], score[0][1]), p1 = narrow(score[0][2], score[0][3]);
        const u32 p2 = narrow(score[1][0], score[1][1]), p3 = narrow(score[1][2], score[1][3]);
#pragma unroll
        for (int g = 0; g < 4; g++) {
            const uint4 a = v[g][0], b = v[g][1], c = v[g][2], d = v[g][3];
            const u32 va[4] = {a.x, a.y, a.z, a.w}, vb[4] = {b.x, b.y, b.z, b.w};
            const u32 vc[4] = {c.x, c.y, c.z, c.w}, vd[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                for (int i = 0; i < 4; i++) o[g][j][i] *= fade[i / 2];
                const u32 low = j % 2 ? pick<0x7632>(va[j / 2], vb[j / 2]) : pick<0x5410>(va[j / 2], vb[j / 2]);
                const u32 high = j % 2 ? pick<0x7632>(vc[j / 2], vd[j / 2]) : pick<0x5410>(vc[j / 2], vd[j / 2]);
                multiply(o[g][j], p0, p1, p2, p3, low, high);
            }
        }
    }

    // how much each of the cluster's 32 warps counts in a row
    float2* weights = reinterpret_cast<float2*>(s.a + WEIGHTS_AT);
    float share[2];
    for (int half = 0; half < 2; half++) {
        for (int flipped = 1; flipped < 4; flipped *= 2) total[half] += from_lane(total[half], flipped);
        store_at(weights + (at.rank * 8 + at.warp) * 16 + r + 8 * half, t, make_float2(top[half], total[half]));
    }
    sync_warp();
    if (at.lane < RANKS) barrier_arrive_at(&s.weighed, at.lane);
    barrier_wait(&s.weighed, done.heads & 1);
    for (int half = 0; half < 2; half++) {
        float highest = NOTHING, sum = 0.f;
        for (int i = t; i < 8 * RANKS; i += 4) highest = fmaxf(highest, weights[i * 16 + r + 8 * half].x);
        for (int flipped = 1; flipped < 4; flipped *= 2) highest = fmaxf(highest, from_lane(highest, flipped));
        for (int i = t; i < 8 * RANKS; i += 4) {
            const float2 weight = weights[i * 16 + r + 8 * half];
            sum += weight.y * __expf(weight.x - highest);
        }
        for (int flipped = 1; flipped < 4; flipped *= 2) sum += from_lane(sum, flipped);
        share[half] = __expf(top[half] - highest) / sum;
    }

    // the block's eight warps together, then the cluster's four blocks
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int g = 0; g < 4; g++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                u32 w[4];
                for (int i = 0; i < 4; i++)
                    w[i] = narrow(o[g][2 * i][2 * half + n] * share[half], o[g][2 * i + 1][2 * half + n] * share[half]);
                *reinterpret_cast<uint4*>(s.a + PARTS_AT + (at.warp * 16 + r + 8 * half) * PART_STRIDE +
                                          2 * (64 * g + 16 * t + 8 * n)) = make_uint4(w[0], w[1], w[2], w[3]);
            }
    sync_threads<1, WORKERS>();
    const int row = at.thread / 16;
    float4* sums = reinterpret_cast<float4*>(s.a + MIXED_AT);
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int dim = DIM / 2 * side + at.thread % 16 * 8;
        float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int warp = 0; warp < 8; warp++) {
            const uint4 part = *reinterpret_cast<const uint4*>(s.a + PARTS_AT + (warp * 16 + row) * PART_STRIDE + 2 * dim);
            const u32 w[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
            for (int i = 0; i < 4; i++) sum[2 * i] += widen(w[i]), sum[2 * i + 1] += widen_high(w[i]);
        }
        float4* to = sums + (at.rank * 4 + row % 4) * (DIM / 4) + dim / 4;
        store_at(to, row / 4, make_float4(sum[0], sum[1], sum[2], sum[3]));
        store_at(to + 1, row / 4, make_float4(sum[4], sum[5], sum[6], sum[7]));
    }
    sync_warp();
    if (at.lane == 0) barrier_arrive_at(&s.mixed, row / 4);
    barrier_wait(&s.mixed, done.heads++ & 1);
    const int mine = at.thread / (DIM / 4), column = at.thread % (DIM / 4);
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int rank = 0; rank < RANKS; rank++) {
        const float4 part = sums[(rank * 4 + mine) * (DIM / 4) + column];
        y.x += part.x, y.y += part.y, y.z += part.z, y.w += part.w;
    }
    const int asked = query + 4 * at.rank + mine;
    if (asked < p.rows * HEADS)
        *reinterpret_cast<uint2*>(p.mixed + asked * DIM + 4 * column) = make_uint2(narrow(y.x, y.y), narrow(y.z, y.w));
}

// --- the kernel -------------------------------------------------------------------------------------------------------

DEVICE void work(const Params& p, Shared& s, const Where& at) {
    Progress done;
    float2 x[PAIRS];
    const int row = 16 * at.rank + at.thread / 8;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int within = 2 * (at.thread % 8 + 8 * i);
        if (at.warp >= 4 || row >= p.rows || within >= OfWidth::size(at.cluster)) break;
        const bf16* from = p.tokens + (p.first + row) * WIDTH + OfWidth::begin(at.cluster) + within;
        x[i] = make_float2(widen(from[0]), widen(from[1]));
    }
    for (int layer = 0; layer < p.depth; layer++) {
        wait_for_go(s, done);
        project(p, s, at, done, layer);
        finish(p, at);
        wait_for_go(s, done);
        if (16 * (int)at.cluster < p.rows * HEADS) attention(p, s, at, done, layer);
        finish(p, at);
        wait_for_go(s, done);
        add_product<OUT_CHUNKS>(p, s, at, done, x, 2 * layer);
        finish(p, at);
        wait_for_go(s, done);
        geglu(p, s, at, done, layer);
        finish(p, at);
        wait_for_go(s, done);
        add_product<DOWN_CHUNKS>(p, s, at, done, x, 2 * layer + 1);
        if (layer + 1 < p.depth) finish(p, at);
    }
}

extern "C" __global__ void __cluster_dims__(RANKS, 1, 1) __launch_bounds__(THREADS, 1)
layers(const __grid_constant__ Params p) {
    Shared& s = *reinterpret_cast<Shared*>(block_memory());
    const int thread = threadIdx.x;
    const Where at = {cluster_rank(), blockIdx.x / RANKS, thread / 32, thread % 32, thread};
    if (thread == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], GROUP / 32);
        for (int i = 0; i < 16; i++) barrier_init(&s.arrived[i], 1);
        barrier_init(&s.go, 1);
        barrier_init(&s.exchanged, RANKS);     // a warp of each block
        barrier_init(&s.weighed, 8 * RANKS);   // all warps
        barrier_init(&s.mixed, 2 * RANKS);     // two of each block, for their four rows
        barriers_are_ready();
    }
    sync_cluster();
    if (at.warp < WORKERS / 32) {
        take_registers<232>();
        work(p, s, at);
    } else {
        keep_registers<40>();
        if (at.warp == WORKERS / 32 && at.lane == 0) copy_weights(p, s, at);
        if (at.warp == WORKERS / 32 + 1 && at.lane == 0) copy_activations(p, s, at);
    }
    sync_cluster();  // nobody's shared memory goes while others write to it
    if (thread == 0 && atomicAdd(p.counter + 1, 1u) == gridDim.x - 1) p.counter[0] = p.counter[1] = 0;
}
