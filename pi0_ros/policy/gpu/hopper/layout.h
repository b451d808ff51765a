// Sizes, the kernel's parameters, a block's shared memory, and where in all that a thread is.
#pragma once

#include "instructions.h"

constexpr int WIDTH = 1024, MLP = 4096, HEADS = 8, DIM = 256;  // gemma_300m, with one head of keys and values
constexpr int QUERIES = HEADS * DIM, QKV = QUERIES + 2 * DIM, RANKS = 4;
constexpr int ROWS = 64, CHUNK = 64;  // of a matrix unit's tiles: rows of activations, inner columns
constexpr int A_CHUNK = ROWS * CHUNK * 2, A_SLOT = 2 * A_CHUNK;  // bytes; activations come two chunks at a time
constexpr int QKV_CHUNKS = WIDTH / RANKS / CHUNK, OUT_CHUNKS = QUERIES / RANKS / CHUNK, GEGLU_CHUNKS = WIDTH / CHUNK,
              DOWN_CHUNKS = MLP / RANKS / CHUNK;
constexpr int WORKERS = 256, GROUP = 128, THREADS = WORKERS + GROUP;
constexpr int MOST_TILES = 32;  // that a row's squares are summed over
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

constexpr int SLOT = 2 * OfQkv::LARGEST * CHUNK * 2;  // of the ring, bytes
constexpr int PARTS = RANKS * OfWidth::LARGEST / 8 * 32 * 16;
constexpr int QKV_PAIRS = (OfQkv::LARGEST + 15) / 16, X_PAIRS = (OfWidth::LARGEST + 15) / 16;  // of a thread, at most
constexpr int A_SLOTS = 4, SLOTS = (MEMORY - A_SLOTS * A_SLOT - PARTS - QKV_PAIRS * GROUP * 8 - 3072) / SLOT;
// Slots being filled at a time. These are enough for the memory's full rate; with more, what blocks tell one another and
// read of one another would stand behind them.
constexpr int ON_THE_WAY = 2;
static_assert(SLOT >= 4 * OfMlp::LARGEST * CHUNK * 2 && SLOT >= 4 * OfWidth::LARGEST * CHUNK * 2, "tiles fit");

struct Params {
    TensorMap x, attended, hidden;    // activations: [1, rows, columns], boxes of [1, 64, 64]
    TensorMap qkv, out, geglu, down;  // weights: [depth, out, in], boxes of [1, its columns, 64]
    bf16 *tokens, *scaled;
    float* squares;                           // [tiles at first and CLUSTERS then, of 32 at least, capacity]
    bf16 *q, *keys, *values, *mixed, *gated;  // keys, values: [depth, cache_rows, DIM]
    const float* rope;                        // [rows, DIM]
    const u8* seen;                           // [cache_rows]
    const int* when;                          // [rows]
    const float *qkv_bias, *geglu_bias;       // [depth, times, columns]
    const bf16* modulation;                   // [times, 2 depth + 1, 3, WIDTH]
    u32* counter;                             // two, zero between launches
    int depth, times, first, rows, prefix_rows, suffix_rows, cache_rows, capacity, tiles, with_state;
};

struct Shared {
    alignas(1024) u8 a[A_SLOTS * A_SLOT];           // a ring of activations; attention's and qkv's exchange as well
    alignas(1024) u8 ring[SLOTS * SLOT];            // of weights
    float4 parts[RANKS][OfWidth::LARGEST / 8][32];  // of this block's rows, from each of the cluster
    float2 rope[QKV_PAIRS][GROUP];                  // cosine and sine for what each thread turns in qkv
    float factor[ROWS];
    Barrier full[SLOTS], empty[SLOTS], arrived[A_SLOTS], drained[A_SLOTS];
    Barrier go, summed, normed, exchanged, mixed;
};
static_assert(sizeof(Shared) + 1024 <= MEMORY, "and the start may have to be moved by up to 1024");

struct Where {
    u32 rank, cluster;
    int warp, lane, thread;
};

DEVICE Where where() {
    const int thread = thread_index();
    return {cluster_rank(), block_index() / RANKS, thread / 32, thread % 32, thread};
}

// How far a thread is with each kind of barrier.
struct Progress {
    u32 slot = 0, turn = 0;  // of the ring of weights: the slot to come, and the parity to wait for
    u32 arrived = 0;         // a bit for each slot of activations: the parity to wait for
    u32 go = 0, normed = 0, exchanged = 0, heads = 0;
};

DEVICE void wait_for_go(Shared& s, Progress& done) { barrier_wait(&s.go, done.go++ & 1); }
