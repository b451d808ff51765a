// All layers of the action expert in one kernel: a denoising step without a launch between its products.
//
// A step is a few dozen rows against weights that are read once, so it should take what reading them takes. What it
// takes beyond is waiting: for the kernel before, for the first bytes, for the last. Here the weights come in a stream
// that waits for nothing but room: each block knows beforehand which parts of which matrices it will multiply, and a
// warp of its own keeps a ring of them in shared memory filled, across layers, while the others wait for one another.
//
//     warps 0 to 7    two warpgroups: products, their epilogues, attention
//     warp 8          copies weights into the ring
//     warp 9          waits for the grid, and copies the activations that the next product goes over
//     warps 10, 11    the norms' factors
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
constexpr int A_CHUNK = ROWS * CHUNK * 2, A_SLOT = 2 * A_CHUNK;  // bytes; activations come two chunks at a time
constexpr int QKV_CHUNKS = WIDTH / RANKS / CHUNK, OUT_CHUNKS = QUERIES / RANKS / CHUNK, GEGLU_CHUNKS = WIDTH / CHUNK,
              DOWN_CHUNKS = MLP / RANKS / CHUNK;
constexpr int WORKERS = 256, GROUP = 128, THREADS = WORKERS + GROUP;
constexpr int MOST_TILES = 32;                         // that a row's squares are summed over
constexpr int PHASES = 5;                              // of a layer
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

constexpr int SLOT = 2 * OfQkv::LARGEST * CHUNK * 2;   // of the ring, bytes
constexpr int PARTS = RANKS * OfWidth::LARGEST / 8 * 32 * 16;
constexpr int QKV_PAIRS = (OfQkv::LARGEST + 15) / 16, X_PAIRS = (OfWidth::LARGEST + 15) / 16;  // of a thread, at most
constexpr int A_SLOTS = 4, SLOTS = (MEMORY - A_SLOTS * A_SLOT - PARTS - QKV_PAIRS * GROUP * 8 - 3072) / SLOT;
static_assert(SLOT >= 4 * OfMlp::LARGEST * CHUNK * 2 && SLOT >= 4 * OfWidth::LARGEST * CHUNK * 2, "tiles fit");

struct Params {
    TensorMap x, attended, hidden;                   // activations: [1, rows, columns], boxes of [1, 64, 64]
    TensorMap qkv, out, geglu, down;                 // weights: [depth, out, in], boxes of [1, its columns, 64]
    bf16 *tokens, *scaled;
    float *squares;                                  // [tiles at first and CLUSTERS then, of 32 at least, capacity]
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
    alignas(1024) u8 a[A_SLOTS * A_SLOT];            // a ring of activations; attention's and qkv's exchange as well
    alignas(1024) u8 ring[SLOTS * SLOT];             // of weights
    float4 parts[RANKS][OfWidth::LARGEST / 8][32];   // of this block's rows, from each of the cluster
    float2 rope[QKV_PAIRS][GROUP];                   // cosine and sine for what each thread turns in qkv
    float factor[ROWS];
    Barrier full[SLOTS], empty[SLOTS], arrived[A_SLOTS], drained[A_SLOTS], drained_by_all[A_SLOTS];
    Barrier go, normed, exchanged, weighed, mixed;
};
static_assert(sizeof(Shared) + 1024 <= MEMORY, "and the start may have to be moved by up to 1024");

// Where attention and qkv keep what they exchange, within `a`.
constexpr int QKV_PARTS = QKV_CHUNKS * A_CHUNK;      // float4 [RANKS][OfQkv::LARGEST / 8][32]
constexpr int Q_STRIDE = 2 * DIM + 64, P_STRIDE = 80, PART_STRIDE = 2 * DIM + 16;  // bytes, so that rows meet in no bank
constexpr int PAIR_AT = 16 * Q_STRIDE, PAIR = 16 * PART_STRIDE;  // a pair of warps' 16 rows: of P, then of its part
constexpr int MIXED_AT = PAIR_AT + 4 * PAIR;         // bf16 [RANKS][4][DIM]
constexpr int WEIGHTS_AT = MIXED_AT + RANKS * 4 * DIM * 2;  // float2 [RANKS * 8][16]
constexpr int TOPS_AT = WEIGHTS_AT + RANKS * 8 * 16 * 8;    // f32 [8][16]
static_assert(TOPS_AT + 8 * 16 * 4 <= A_SLOTS * A_SLOT, "attention fits where the activations were");
static_assert(QKV_PARTS + RANKS * OfQkv::LARGEST * 64 <= A_SLOTS * A_SLOT, "so does qkv's exchange");

struct Where {
    u32 rank, cluster;
    int warp, lane, thread;
};

DEVICE Where where() {
    const int thread = thread_index();
    return {cluster_rank(), block_index() / RANKS, thread / 32, thread % 32, thread};
}

// --- copies -----------------------------------------------------------------------------------------------------------

DEVICE void copy_weights(const Params& p, Shared& s, const Where& at) {
    for (const TensorMap* map : {&p.x, &p.attended, &p.hidden, &p.qkv, &p.out, &p.geglu, &p.down}) prefetch_map(map);
    int n = 0;
    // `tiles` of the inner dimension from `column` on, `in_slot` of them at a time; the rows `other` on with them if any
    auto copy = [&](const TensorMap* map, int rows, int in_slot, int tiles, int column, int row, int layer, int other) {
        const int bytes = rows * CHUNK * 2;
        for (int c = 0; c < tiles; c += in_slot, n++) {
            const int i = n % SLOTS;
            if (n >= SLOTS) barrier_wait(&s.empty[i], (n / SLOTS - 1) & 1);
            barrier_expect(&s.full[i], in_slot * bytes * (other ? 2 : 1));
            u8* to = s.ring + i * SLOT;
            for (int k = 0; k < in_slot; k++) {
                copy_tile<true>(to, map, column + (c + k) * CHUNK, row, layer, &s.full[i]), to += bytes;
                if (other) copy_tile<true>(to, map, column + (c + k) * CHUNK, other, layer, &s.full[i]), to += bytes;
            }
        }
    };
    const int of_qkv = OfQkv::begin(at.cluster), of_x = OfWidth::begin(at.cluster);
    const int gate = OfMlp::begin(at.cluster * RANKS + at.rank), inner = at.rank * CHUNK;
    for (int layer = 0; layer < p.depth; layer++) {
        copy(&p.qkv, OfQkv::LARGEST, 2, QKV_CHUNKS, inner * QKV_CHUNKS, of_qkv, layer, 0);
        copy(&p.out, OfWidth::LARGEST, 4, OUT_CHUNKS, inner * OUT_CHUNKS, of_x, layer, 0);
        copy(&p.geglu, OfMlp::LARGEST, 2, GEGLU_CHUNKS, 0, gate, layer, MLP + gate);
        copy(&p.down, OfWidth::LARGEST, 4, DOWN_CHUNKS, inner * DOWN_CHUNKS, of_x, layer, 0);
    }
}

// Keys and values that the steps find in the cache are read a phase later: into L2 with them, each block a part.
DEVICE void prefetch_cache(const Params& p, int layer) {
    const int share = (p.prefix_rows + gridDim.x - 1) / gridDim.x, from = block_index() * share;
    const int rows = min(share, p.prefix_rows - from);
    if (rows <= 0) return;
    const long long start = ((long long)layer * p.cache_rows + from) * DIM;
    prefetch(p.keys + start, rows * DIM * 2);
    prefetch(p.values + start, rows * DIM * 2);
}

DEVICE void copy_activations(const Params& p, Shared& s, const Where& at) {
    u32 met = 0, long_ones = 0, shared_ones = 0;
    auto start = [&](bool wait) {
        if (wait) grid_wait(p.counter, ++met * gridDim.x);
        fence_for_copies();
        barrier_arrive(&s.go);
    };
    // Chunks from `column` on; `together`: all four blocks take the same ones, and each copies its share of them to all.
    auto copy = [&](const TensorMap* map, int chunks, int column, int row, bool together) {
        const int slots = chunks / 2;
        for (int n = 0; n < slots; n++) {
            const int i = n % A_SLOTS;
            if (n >= A_SLOTS) barrier_wait(&s.drained[i], long_ones & 1);
            barrier_expect(&s.arrived[i], A_SLOT);
            if (together && n % RANKS != at.rank) continue;
            if (together && n >= A_SLOTS) barrier_wait(&s.drained_by_all[i], shared_ones & 1);
            for (int k = 0; k < 2; k++) {
                u8* to = s.a + i * A_SLOT + k * A_CHUNK;
                if (together)
                    copy_tile_to((1 << RANKS) - 1, to, map, column + (2 * n + k) * CHUNK, row, 0, &s.arrived[i]);
                else
                    copy_tile<false>(to, map, column + (2 * n + k) * CHUNK, row, 0, &s.arrived[i]);
            }
        }
        long_ones += slots > A_SLOTS;
        shared_ones += together;
    };
    for (int layer = 0; layer < p.depth; layer++) {
        prefetch_cache(p, layer);
        start(layer > 0);
        copy(&p.x, QKV_CHUNKS, at.rank * QKV_CHUNKS * CHUNK, p.first, false);
        start(true);  // attention reads by itself
        start(true);
        copy(&p.attended, OUT_CHUNKS, at.rank * OUT_CHUNKS * CHUNK, 0, false);
        start(true);
        copy(&p.x, GEGLU_CHUNKS, 0, p.first, true);
        start(true);
        copy(&p.hidden, DOWN_CHUNKS, at.rank * DOWN_CHUNKS * CHUNK, 0, false);
    }
}

// --- products ---------------------------------------------------------------------------------------------------------

// How far a thread is with each kind of barrier.
struct Progress {
    u32 slot = 0, turn = 0;  // of the ring of weights: the slot to come, and the parity to wait for
    u32 arrived = 0;     // a bit for each slot of activations: the parity to wait for
    u32 go = 0, normed = 0, exchanged = 0, heads = 0;
};

DEVICE void wait_for_go(Shared& s, Progress& done) { barrier_wait(&s.go, done.go++ & 1); }

DEVICE void next_slot(u32& slot, u32& turn) {
    if (++slot == SLOTS) slot = 0, turn ^= 1;
}

// Go past what a product uses up.
template <int CHUNKS, int IN_SLOT> DEVICE void skip(Progress& done) {
    for (int n = 0; n < CHUNKS / IN_SLOT; n++) next_slot(done.slot, done.turn);
    for (int n = 0; n < CHUNKS / 2; n++) done.arrived ^= 1u << n % A_SLOTS;
}

// d = a w^T for this block's columns and part of the inner dimension, which GROUPS warpgroups share: each has a part of
// the sum. TOGETHER: see copy_activations.
template <int N, int CHUNKS, int IN_SLOT, int GROUPS, bool TOGETHER>
DEVICE void product(float (&d)[N], Shared& s, const Where& at, Progress& done) {
    constexpr int TILE = 2 * N * 2 * CHUNK, EVERY = IN_SLOT / 2;  // bytes: N elements a thread are 2 N columns
    static_assert(GROUPS == 1 || EVERY == 1, "a slot is one group's");
#pragma unroll
    for (int i = 0; i < N; i++) d[i] = 0.f;
    const int group = GROUPS == 1 ? 0 : at.warp / 4;
    u32 slot = done.slot, turn = done.turn, before = 0;
    if (group) next_slot(slot, turn);
    auto release = [&](int n, bool weights) {
        if (at.lane) return;
        if (weights) barrier_arrive(&s.empty[before]);
        if (n + A_SLOTS >= CHUNKS / 2) return;
        barrier_arrive(&s.drained[n]);
        if (TOGETHER) barrier_arrive_at(&s.drained_by_all[n], n % RANKS);
    };
#pragma unroll 1
    for (int n = group; n < CHUNKS / 2; n += GROUPS) {
        const int i = n % A_SLOTS;
        if (n % EVERY == 0) barrier_wait(&s.full[slot], turn);
        barrier_wait(&s.arrived[i], (done.arrived >> i & 1) ^ (n >= A_SLOTS));
        Tile a(s.a + i * A_SLOT), w(s.ring + slot * SLOT + n % EVERY * 2 * TILE);
        products_begin();
#pragma unroll
        for (int k = 0; k < 2 * CHUNK / 16; k++) {
            multiply_tiles(d, a, w);
            a.move(k == CHUNK / 16 - 1 ? A_CHUNK - 32 * k : 32);
            w.move(k == CHUNK / 16 - 1 ? TILE - 32 * k : 32);
        }
        products_commit();
        products_wait<1>();
        if (n >= GROUPS) release(n - GROUPS, n % EVERY == 0);
        if (n % EVERY < EVERY - 1) continue;
        before = slot;
        for (int k = 0; k < GROUPS; k++) next_slot(slot, turn);
    }
    products_wait<0>();
    release(CHUNKS / 2 - GROUPS + group, true);
    skip<CHUNKS, IN_SLOT>(done);
}

// Each warp's 16 rows of d go to the block of that rank. See wait_for_parts.
template <int N> DEVICE void exchange(float4* parts, const float (&d)[N], Shared& s, const Where& at) {
    constexpr int FROM_ONE = N / 4 * 32;
    if (at.thread == 0) barrier_expect(&s.exchanged, (RANKS - 1) * FROM_ONE * sizeof(float4));
    float4* mine = parts + at.rank * FROM_ONE + at.lane;
    if (at.warp == at.rank) {
#pragma unroll
        for (int j = 0; j < N / 4; j++) mine[j * 32] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        barrier_arrive(&s.exchanged);
    } else {
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const float4 part = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
            store_at(mine + j * 32, at.warp, part, &s.exchanged);
        }
    }
}

DEVICE void wait_for_parts(Shared& s, Progress& done) { barrier_wait(&s.exchanged, done.exchanged++ & 1); }

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

// 1 / sqrt(mean(x^2) + eps) of each row, from the sums of squares that whoever wrote the rows left. A thread a row.
DEVICE void norms(const Params& p, Shared& s, const Where& at) {
    const int row = at.thread - (THREADS - ROWS);
    const float* squares = p.squares + p.first + min(row, p.rows - 1);
    for (int phase = 0; phase < p.depth * PHASES; phase++) {
        barrier_wait(&s.go, phase & 1);
        if (phase % PHASES != 0 && phase % PHASES != 3) continue;  // qkv, geglu
        const int tiles = phase == 0 ? p.tiles : CLUSTERS;
        float sum = 0.f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float part[MOST_TILES / 2];
#pragma unroll
            for (int i = 0; i < MOST_TILES / 2; i++)
                part[i] = load_fresh(squares + (half * (MOST_TILES / 2) + i) * p.capacity);
#pragma unroll
            for (int i = 0; i < MOST_TILES / 2; i++) sum += half * (MOST_TILES / 2) + i < tiles ? part[i] : 0.f;
        }
        s.factor[row] = rsqrtf(sum / WIDTH + EPS);
        barrier_arrive(&s.normed);
    }
}

DEVICE void wait_for_norms(Shared& s, Progress& done) { barrier_wait(&s.normed, done.normed++ & 1); }

// The grid may go on: what all threads of this block wrote is there.
DEVICE void finish(const Params& p) {
    fence_for_tiles();
    sync_threads<WORKERS>(1);
    if (thread_index() == 0) grid_arrive(p.counter);
}

// This thread's row in qkv, out and down: of the block's 16, each with eight threads of a group for pairs of columns.
DEVICE int row_of(const Where& at) { return 16 * at.rank + at.thread % GROUP / 8; }
DEVICE int pair_of(const Where& at, int i) { return 2 * (at.thread % 8 + 8 * i); }
DEVICE int time_of(const Params& p, int row) { return ADAPTIVE && row < p.rows ? p.when[row] : 0; }

DEVICE void project(const Params& p, Shared& s, Progress& done, int layer) {
    const Where at = where();
    constexpr int N = OfQkv::LARGEST / 2, PAIRS = (QKV_PAIRS + 1) / 2;  // of a thread: the groups take turns
    float4* parts = reinterpret_cast<float4*>(s.a + QKV_PARTS);
    const int row = row_of(at), begin = OfQkv::begin(at.cluster), size = OfQkv::size(at.cluster), group = at.thread / GROUP;
    float2 bias[PAIRS];
    if (ADAPTIVE) {
        const float* table = p.qkv_bias + ((long long)layer * p.times + time_of(p, row)) * QKV + begin;
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            bias[i] = load_constant(reinterpret_cast<const float2*>(table + min(pair_of(at, 2 * i + group), size - 2)));
    }
    if (group == 0) {
        float d[N];
        product<N, QKV_CHUNKS, 2, 1, false>(d, s, at, done);
        exchange(parts, d, s, at);
    } else
        skip<QKV_CHUNKS, 2>(done);
    wait_for_norms(s, done);
    wait_for_parts(s, done);
    if (row >= p.rows) return;
    const float factor = s.factor[row];
    const long long cached = ((long long)layer * p.cache_rows + p.prefix_rows + p.first + row) * DIM;
    float2 sums[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        sums[i] = summed<N>(parts, at.thread % GROUP / 8, min(pair_of(at, 2 * i + group), size - 2));
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = pair_of(at, 2 * i + group);
        if (pair >= size) break;
        const int column = begin + pair, head = column / DIM, within = column % DIM;
        float2 y = make_float2(sums[i].x * factor, sums[i].y * factor);
        if (ADAPTIVE) y.x += bias[i].x, y.y += bias[i].y;
        if (head <= HEADS) {  // a pair is a complex number
            const float2 turn = s.rope[2 * i + group][at.thread % GROUP];
            y = make_float2(y.x * turn.x - y.y * turn.y, y.x * turn.y + y.y * turn.x);
        }
        bf16* to = head < HEADS ? p.q + row * QUERIES + column : (head == HEADS ? p.keys : p.values) + cached + within;
        *reinterpret_cast<u32*>(to) = narrow(y.x, y.y);
    }
}

// x += gate * (a w^T). A thread keeps its elements of x for good; they are the same in out and down.
template <int CHUNKS>
DEVICE void add_product(const Params& p, Shared& s, Progress& done, float2 (&x)[X_PAIRS], int norm) {
    const Where at = where();
    if (at.warp >= 4) {
        done.exchanged++;
        return skip<CHUNKS, 4>(done);
    }
    constexpr int N = OfWidth::LARGEST / 2;
    const int row = row_of(at), begin = OfWidth::begin(at.cluster), size = OfWidth::size(at.cluster);
    u32 gates[X_PAIRS], scales[X_PAIRS];  // of this branch; of the norm that follows
    if (ADAPTIVE) {
        const bf16* table = p.modulation + ((long long)time_of(p, row) * (2 * p.depth + 1) + norm) * (3 * WIDTH) + begin;
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) {
            const int within = min(pair_of(at, i), size - 2);
            gates[i] = load_constant(reinterpret_cast<const u32*>(table + 2 * WIDTH + within));
            scales[i] = load_constant(reinterpret_cast<const u32*>(table + 3 * WIDTH + within));
        }
    }
    float d[N];
    product<N, CHUNKS, 4, 1, false>(d, s, at, done);
    exchange(&s.parts[0][0][0], d, s, at);
    wait_for_parts(s, done);
    float squares = 0.f;
    float2 sums[X_PAIRS];
#pragma unroll
    for (int i = 0; i < X_PAIRS; i++)
        sums[i] = summed<N>(&s.parts[0][0][0], at.thread / 8, min(pair_of(at, i), size - 2));
#pragma unroll
    for (int i = 0; i < X_PAIRS; i++) {
        if (pair_of(at, i) >= size || row >= p.rows) break;
        const int cell = (p.first + row) * WIDTH + begin + pair_of(at, i);
        float2 y = sums[i];
        if (ADAPTIVE) y.x *= widen(gates[i]), y.y *= widen_high(gates[i]);
        const u32 both = narrow(x[i].x + y.x, x[i].y + y.y);
        x[i] = make_float2(widen(both), widen_high(both));
        squares += x[i].x * x[i].x + x[i].y * x[i].y;
        *reinterpret_cast<u32*>(p.tokens + cell) = both;
        if (ADAPTIVE)
            *reinterpret_cast<u32*>(p.scaled + cell) = narrow(x[i].x * widen(scales[i]), x[i].y * widen_high(scales[i]));
    }
    for (int flipped = 1; flipped < 8; flipped *= 2) squares += from_lane(squares, flipped);
    if (at.thread % 8 == 0 && row < p.rows) p.squares[at.cluster * p.capacity + p.first + row] = squares;
}

DEVICE float gelu(float x) {  // the tanh form: 0.5 (1 + tanh(y)) is sigmoid(2 y)
    return divide(x, 1.f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

DEVICE void geglu(const Params& p, Shared& s, Progress& done, int layer) {
    const Where at = where();
    constexpr int N = OfMlp::LARGEST;  // gates, and as many that they gate
    const int group = at.thread / GROUP, thread = at.thread % GROUP, row = 16 * (at.warp % 4) + at.lane / 4 + 8 * group;
    const int share = at.cluster * RANKS + at.rank, first = OfMlp::begin(share) + 2 * (at.lane % 4);
    float2 bias[2][N / 8];
    if (ADAPTIVE) {
        const float* table = p.geglu_bias + ((long long)layer * p.times + time_of(p, row)) * (2 * MLP) + first;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int up = 0; up < 2; up++) {
                const float* from = table + up * MLP + min(8 * j, OfMlp::size(share) - 8);
                bias[up][j] = load_constant(reinterpret_cast<const float2*>(from));
            }
    }
    float d[N];
    product<N, GEGLU_CHUNKS, 2, 2, true>(d, s, at, done);
    sync_threads<WORKERS>(1);
    // rows r of each eight pairs are for the first group, rows r + 8 for the second: they swap what they have of them
    float2* swapped = reinterpret_cast<float2*>(s.a) + thread;
#pragma unroll
    for (int j = 0; j < N / 4; j++)
        swapped[(group * (N / 4) + j) * GROUP] =
            group ? make_float2(d[4 * j], d[4 * j + 1]) : make_float2(d[4 * j + 2], d[4 * j + 3]);
    wait_for_norms(s, done);
    sync_threads<WORKERS>(1);
    if (row >= p.rows) return;
    const float factor = s.factor[row];
    float2 y[N / 4];
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const float2 other = swapped[((1 - group) * (N / 4) + j) * GROUP];
        y[j] = make_float2(((group ? d[4 * j + 2] : d[4 * j]) + other.x) * factor,
                           ((group ? d[4 * j + 3] : d[4 * j + 1]) + other.y) * factor);
        if (ADAPTIVE) {
            const float2 shift = bias[j / (N / 8)][j % (N / 8)];
            y[j].x += shift.x, y[j].y += shift.y;
        }
    }
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float2 gate = y[j], up = y[N / 8 + j];
        if (8 * j < OfMlp::size(share))
            *reinterpret_cast<u32*>(p.gated + row * MLP + first + 8 * j) = narrow(gelu(gate.x) * up.x, gelu(gate.y) * up.y);
    }
}

// --- attention --------------------------------------------------------------------------------------------------------

// A warp's part of 32 keys: it multiplies q with 16 of them, and all 32 values' half of the dimensions with P.
//
// Fragments come straight from L2, since a block multiplies a key once. Which column of a fragment is which of the 256
// dimensions is free as long as both operands agree, so that a thread reads 16 bytes in a row: its eight values of a key
// are columns of two products, and its eight of a value are eight products' one column.
struct Read {
    uint4 keys[8][2], values[2][2][4];  // values of the first and of the last 16 keys
    u16 seen[2];
};

struct Attention {
    const bf16 *keys, *values;
    const u8* seen;
    int count, pair, side, r, t;  // of all keys; which warps and lanes these are

    DEVICE uint4 cell(const bf16* cache, int key, int dim) const {
        return load_fresh(reinterpret_cast<const uint4*>(cache + (long long)min(key, count - 1) * DIM + dim));
    }
    DEVICE void read_keys(Read& read, int block, int half) const {
        const int key = 32 * block + 16 * side;
#pragma unroll
        for (int j = 4 * half; j < 4 * half + 4; j++)
#pragma unroll
            for (int n = 0; n < 2; n++) read.keys[j][n] = cell(keys, key + 8 * n + r, 32 * j + 8 * t);
        for (int n = 0; n < 2; n++)
            read.seen[n] = load_constant(reinterpret_cast<const u16*>(seen + min(key + 8 * n + 2 * t, (count - 1) & ~1)));
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
    for (int i = at.thread; i < 16 * DIM / 8; i += WORKERS)
        *reinterpret_cast<uint4*>(s.a + i / (DIM / 8) * Q_STRIDE + i % (DIM / 8) * 16) =
            load_fresh(reinterpret_cast<const uint4*>(p.q + query * DIM) + i);
    if (!early && block < blocks) of.read_keys(read, block, 0), of.read_keys(read, block, 1), of.read_values(read, block, 0);
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
        float score[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}}, more[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
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
                if (key >= limit[i / 2] || !(read.seen[n] >> 8 * (i % 2) & 255)) score[n][i] = NOTHING;
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
                weights[i] = *reinterpret_cast<const u32*>(pair + (r + i % 2 * 8) * P_STRIDE + 2 * (16 * e + 2 * t + i / 2 * 8));
#pragma unroll
            for (int g = 0; g < 2; g++) {
                const uint4 *v = read.values[e][g];
                const u32 v0[4] = {v[0].x, v[0].y, v[0].z, v[0].w}, v1[4] = {v[1].x, v[1].y, v[1].z, v[1].w};
                const u32 v8[4] = {v[2].x, v[2].y, v[2].z, v[2].w}, v9[4] = {v[3].x, v[3].y, v[3].z, v[3].w};
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const u32 low = j % 2 ? pick<0x7632>(v0[j / 2], v1[j / 2]) : pick<0x5410>(v0[j / 2], v1[j / 2]);
                    const u32 high = j % 2 ? pick<0x7632>(v8[j / 2], v9[j / 2]) : pick<0x5410>(v8[j / 2], v9[j / 2]);
                    multiply(o[g][j], weights[0], weights[1], weights[2], weights[3], low, high);
                }
            }
            if (e == 0) of.read_keys(read, block, 1);
            else of.read_values(read, block, 0);
        }
    }

    // how much each of the cluster's 32 warps counts in a row
    float2* weights = reinterpret_cast<float2*>(s.a + WEIGHTS_AT);
    if (at.thread == 0) {
        barrier_expect(&s.weighed, 8 * RANKS * 16 * sizeof(float2));
        barrier_expect(&s.mixed, RANKS * 4 * DIM * sizeof(bf16));
    }
    for (int half = 0; half < 2; half++) {
        for (int flipped = 1; flipped < 4; flipped *= 2) total[half] += from_lane(total[half], flipped);
        const float2 mine = make_float2(top[half], total[half]);
        store_at(weights + (at.rank * 8 + at.warp) * 16 + r + 8 * half, t, mine, &s.weighed);
    }
    barrier_wait(&s.weighed, done.heads & 1);
    float share[2];
    for (int half = 0; half < 2; half++) {
        float2 weight[2 * RANKS];
        float highest = NOTHING, sum = 0.f;
#pragma unroll
        for (int i = 0; i < 2 * RANKS; i++) {
            weight[i] = weights[(4 * i + t) * 16 + r + 8 * half];
            highest = fmaxf(highest, weight[i].x);
        }
        for (int flipped = 1; flipped < 4; flipped *= 2) highest = fmaxf(highest, from_lane(highest, flipped));
#pragma unroll
        for (int i = 0; i < 2 * RANKS; i++) sum += weight[i].y * __expf(weight[i].x - highest);
        for (int flipped = 1; flipped < 4; flipped *= 2) sum += from_lane(sum, flipped);
        share[half] = divide(__expf(top[half] - highest), sum);
    }

    // the block's four pairs together, then the cluster's four blocks
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
                                          2 * (128 * of.side + 64 * g + 16 * t + 8 * n)) = make_uint4(w[0], w[1], w[2], w[3]);
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
        const uint4 mine = make_uint4(narrow(sum[0], sum[1]), narrow(sum[2], sum[3]), narrow(sum[4], sum[5]), narrow(sum[6], sum[7]));
        store_at(sums + (at.rank * 4 + row % 4) * (DIM / 8) + dim / 8, row / 4, mine, &s.mixed);
    }
    barrier_wait(&s.mixed, done.heads++ & 1);
    const int mine = at.thread / (DIM / 4), column = at.thread % (DIM / 4);
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
        const uint2 part = reinterpret_cast<const uint2*>(sums)[(rank * 4 + mine) * (DIM / 4) + column];
        y.x += widen(part.x), y.y += widen_high(part.x), y.z += widen(part.y), y.w += widen_high(part.y);
    }
    const int asked = query + 4 * at.rank + mine;
    if (asked < p.rows * HEADS)
        *reinterpret_cast<uint2*>(p.mixed + asked * DIM + 4 * column) = make_uint2(narrow(y.x, y.y), narrow(y.z, y.w));
}

// --- the kernel -------------------------------------------------------------------------------------------------------

DEVICE void work(const Params& p, Shared& s) {
    const Where at = where();
    Progress done;
    float2 x[X_PAIRS];
    const int row = row_of(at);
    if (at.warp < 4 && row < p.rows) {
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) {
            if (pair_of(at, i) >= OfWidth::size(at.cluster)) break;
            const bf16* from = p.tokens + (p.first + row) * WIDTH + OfWidth::begin(at.cluster) + pair_of(at, i);
            x[i] = make_float2(widen(from[0]), widen(from[1]));
        }
        const float2* rope = reinterpret_cast<const float2*>(p.rope + (p.first + row) * DIM);
        for (int i = 0; i < QKV_PAIRS; i++) s.rope[i][at.thread] = rope[(OfQkv::begin(at.cluster) + pair_of(at, i)) % DIM / 2];
    }
    sync_threads<WORKERS>(1);
    for (int layer = 0; layer < p.depth; layer++) {
        wait_for_go(s, done);
        project(p, s, done, layer);
        finish(p);
        if (16 * (int)where().cluster < p.rows * HEADS)
            attention(p, s, done, layer);
        else
            wait_for_go(s, done);
        finish(p);
        wait_for_go(s, done);
        add_product<OUT_CHUNKS>(p, s, done, x, 2 * layer);
        finish(p);
        wait_for_go(s, done);
        geglu(p, s, done, layer);
        finish(p);
        wait_for_go(s, done);
        add_product<DOWN_CHUNKS>(p, s, done, x, 2 * layer + 1);
        if (layer + 1 < p.depth) finish(p);
    }
}

extern "C" __global__ void __cluster_dims__(RANKS, 1, 1) __launch_bounds__(THREADS, 1)
layers(const __grid_constant__ Params p) {
    Shared& s = *reinterpret_cast<Shared*>(block_memory());
    const Where at = where();
    if (at.thread == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], GROUP / 32);
        for (int i = 0; i < A_SLOTS; i++) {
            barrier_init(&s.arrived[i], 1);
            barrier_init(&s.drained[i], GROUP / 32);
            barrier_init(&s.drained_by_all[i], RANKS * GROUP / 32);
        }
        for (Barrier* b : {&s.go, &s.weighed, &s.mixed}) barrier_init(b, 1);
        barrier_init(&s.normed, ROWS);
        barrier_init(&s.exchanged, 1 + 32);
        barriers_are_ready();
    }
    sync_cluster();
    if (at.warp < WORKERS / 32) {
        take_registers<232>();
        work(p, s);
    } else {
        keep_registers<40>();
        if (at.warp == WORKERS / 32 && at.lane == 0) copy_weights(p, s, at);
        if (at.warp == WORKERS / 32 + 1 && at.lane == 0) copy_activations(p, s, at);
        if (at.warp >= WORKERS / 32 + 2) norms(p, s, at);
    }
    sync_cluster();  // nobody's shared memory goes while others write to it
    if (at.thread == 0 && atomicAdd(p.counter + 1, 1u) == gridDim.x - 1) p.counter[0] = p.counter[1] = 0;
}
