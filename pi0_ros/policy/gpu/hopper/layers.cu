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
// has columns of its own over the whole inner dimension.
// What step_kernels.py says of norms, modulation and RoPE holds here, and all buffers are the same.

#include "attention.h"

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
            const int last = n - ON_THE_WAY;
            if (last >= 0) barrier_wait(&s.full[last % SLOTS], last / SLOTS & 1);
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

DEVICE void copy_activations(const Params& p, Shared& s, const Where& at) {
    u32 met = 0, long_ones = 0;
    auto start = [&](bool wait, bool normed) {
        if (wait) grid_wait(p.counter, ++met * gridDim.x);
        fence_for_copies();
        barrier_arrive(&s.go);
        if (normed) barrier_arrive(&s.summed);
    };
    // two chunks from `column` on into each slot
    auto copy = [&](const TensorMap* map, int chunks, int column, int row) {
        for (int n = 0; n < chunks / 2; n++) {
            const int i = n % A_SLOTS;
            if (n >= A_SLOTS) barrier_wait(&s.drained[i], long_ones & 1);
            barrier_expect(&s.arrived[i], A_SLOT);
            for (int k = 0; k < 2; k++)
                copy_tile<false>(s.a + i * A_SLOT + k * A_CHUNK, map, column + (2 * n + k) * CHUNK, row, 0,
                                 &s.arrived[i]);
        }
        long_ones += chunks / 2 > A_SLOTS;
    };
    const int inner = at.rank * CHUNK;
    for (int layer = 0; layer < p.depth; layer++) {
        start(layer > 0, true);
        copy(&p.x, QKV_CHUNKS, inner * QKV_CHUNKS, p.first);
        start(true, false);  // attention reads by itself
        start(true, false);
        copy(&p.attended, OUT_CHUNKS, inner * OUT_CHUNKS, 0);
        start(true, true);
        copy(&p.x, GEGLU_CHUNKS, 0, p.first);
        start(true, false);
        copy(&p.hidden, DOWN_CHUNKS, inner * DOWN_CHUNKS, 0);
    }
}

// --- products ---------------------------------------------------------------------------------------------------------

DEVICE void next_slot(u32& slot, u32& turn) {
    if (++slot == SLOTS) slot = 0, turn ^= 1;
}

// Go past what a product uses up.
template <int CHUNKS, int IN_SLOT> DEVICE void skip(Progress& done) {
    for (int n = 0; n < CHUNKS / IN_SLOT; n++) next_slot(done.slot, done.turn);
    for (int n = 0; n < CHUNKS / 2; n++) done.arrived ^= 1u << n % A_SLOTS;
}

// d = a w^T for this block's columns and part of the inner dimension, CHUNKS of it, IN_SLOT in a slot of the ring. GROUPS
// warpgroups take turns, and each has a part of the sum.
template <int N, int CHUNKS, int IN_SLOT, int GROUPS>
DEVICE void product(float (&d)[N], Shared& s, const Where& at, Progress& done) {
    constexpr int TILE = 2 * N * 2 * CHUNK, EVERY = IN_SLOT / 2;  // bytes: N elements a thread are 2 N columns
    static_assert(GROUPS == 1 || (EVERY == 1 && SLOTS > A_SLOTS), "a slot is one group's");
#pragma unroll
    for (int i = 0; i < N; i++) d[i] = 0.f;
    const int group = GROUPS == 1 ? 0 : at.warp / 4;
    u32 slot = done.slot, turn = done.turn, before = 0;
    if (group) next_slot(slot, turn);
    auto release = [&](int n, bool weights) {
        if (at.lane) return;
        if (weights) barrier_arrive(&s.empty[before]);
        if (n + A_SLOTS < CHUNKS / 2) barrier_arrive(&s.drained[n]);
    };
#pragma unroll 1
    for (int n = group; n < CHUNKS / 2; n += GROUPS) {
        const int i = n % A_SLOTS;
        // activations first: they say that the other group, too, is past n - A_SLOTS, and so past what `full` was for before
        barrier_wait(&s.arrived[i], (done.arrived >> i & 1) ^ (n >= A_SLOTS));
        if (n % EVERY == 0) barrier_wait(&s.full[slot], turn);
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
    products_are_in(d);
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
    for (int n = 0; n < 2 * p.depth; n++) {  // before qkv and before geglu
        barrier_wait(&s.summed, n & 1);
        const int tiles = n == 0 ? p.tiles : CLUSTERS;
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

constexpr int QKV_PARTS = QKV_CHUNKS * A_CHUNK;  // where in `a`: float4 [RANKS][OfQkv::LARGEST / 8][32]
static_assert(QKV_PARTS + RANKS * OfQkv::LARGEST * 64 <= A_SLOTS * A_SLOT,
              "qkv's exchange fits behind its activations");

DEVICE void project(const Params& p, Shared& s, Progress& done, int layer) {
    const Where at = where();
    constexpr int N = OfQkv::LARGEST / 2, PAIRS = (QKV_PAIRS + 1) / 2;  // of a thread: the groups take turns
    float4* parts = reinterpret_cast<float4*>(s.a + QKV_PARTS);
    const int row = row_of(at), begin = OfQkv::begin(at.cluster), size = OfQkv::size(at.cluster),
              group = at.thread / GROUP;
    float2 bias[PAIRS];
    if (ADAPTIVE) {
        const float* table = p.qkv_bias + ((long long)layer * p.times + time_of(p, row)) * QKV + begin;
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            bias[i] = load_constant(reinterpret_cast<const float2*>(table + min(pair_of(at, 2 * i + group), size - 2)));
    }
    if (group == 0) {
        float d[N];
        product<N, QKV_CHUNKS, 2, 1>(d, s, at, done);
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
        const bf16* table =
            p.modulation + ((long long)time_of(p, row) * (2 * p.depth + 1) + norm) * (3 * WIDTH) + begin;
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) {
            const int within = min(pair_of(at, i), size - 2);
            gates[i] = load_constant(reinterpret_cast<const u32*>(table + 2 * WIDTH + within));
            scales[i] = load_constant(reinterpret_cast<const u32*>(table + 3 * WIDTH + within));
        }
    }
    float d[N];
    product<N, CHUNKS, 4, 1>(d, s, at, done);
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
            *reinterpret_cast<u32*>(p.scaled + cell) =
                narrow(x[i].x * widen(scales[i]), x[i].y * widen_high(scales[i]));
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
    product<N, GEGLU_CHUNKS, 2, 2>(d, s, at, done);
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
            *reinterpret_cast<u32*>(p.gated + row * MLP + first + 8 * j) =
                narrow(gelu(gate.x) * up.x, gelu(gate.y) * up.y);
    }
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
        for (int i = 0; i < QKV_PAIRS; i++)
            s.rope[i][at.thread] = rope[(OfQkv::begin(at.cluster) + pair_of(at, i)) % DIM / 2];
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
        }
        for (Barrier* b : {&s.go, &s.summed, &s.mixed}) barrier_init(b, 1);
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
