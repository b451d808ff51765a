// instructions.h for a CPU without a GPU: every thread of the grid is a fiber, run in random order, one at a time.
//
// What hardware does later is done later here: a copy first fills its destination with NaN, and comes when the scheduler
// likes. A kernel that reads before it waited, overwrites what others still read, or forgets a barrier gives NaN,
// wrong numbers, or stands still, which is reported.
#ifndef PI0_HOPPER
#define PI0_HOPPER

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include <sys/mman.h>

#include "types.h"

struct alignas(64) TensorMap {
    u64 base;
    int size[3], box[3];
    long long stride[3];
    u8 rest[72];
};  // innermost first
static_assert(sizeof(TensorMap) == 128);

#define DEVICE inline
#define __global__
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }

struct Meeting {
    int there = 0;
    u64 times = 0;
};
struct Warp {
    int count = 0;
    bool full = false;
    u32 box[32][6];
    Meeting meeting;
};
struct Cluster;
struct Store {
    void* to;
    Barrier* barrier;
    u8 bytes[16];
    size_t size;
};
struct Block {
    Cluster* cluster;
    u32 index, rank;
    u8* memory;
    Warp warps[32];
    Meeting meetings[16];
    std::vector<Store> stores;
    u32 asleep = 0;  // warps that fall behind, for as long as the others find something to do, and longer
};
struct Cluster {
    std::vector<Block*> blocks;
    Meeting meeting;
};
struct Thread {
    ucontext_t context;
    jmp_buf left;
    Block* block;
    u32 index;
    bool begun = false, done = false;
};
struct Copy {
    u8* to;
    Barrier* barrier;
    const TensorMap* map;
    int at[3];
};
struct Index {
    u32 x;
};

inline Thread* current;
inline ucontext_t unused;
inline jmp_buf scheduler;
inline u32 threads_of_a_block, blocks_of_the_grid, blocks_of_a_cluster;
inline std::vector<Copy> copies;
inline bool progress;

#define gridDim (Index{blocks_of_the_grid})

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why), std::fflush(stderr), std::_Exit(3);
}
// A context is entered once with its stack; from then on jumps do, which ask the system for nothing.
inline void yield() {
    if (!_setjmp(current->left)) _longjmp(scheduler, 1);
}
inline void resume() {
    if (_setjmp(scheduler)) return;
    if (current->begun) _longjmp(current->left, 1);
    current->begun = true;
    swapcontext(&unused, &current->context);
}
template <class Condition> void wait_until(Condition condition) {
    while (!condition()) yield();
    progress = true;
}
inline void meet(Meeting& m, int all) {
    const u64 now = m.times;
    if (++m.there == all) m.there = 0, m.times++;
    wait_until([&] { return m.times > now; });
}
inline Warp& warp() { return current->block->warps[current->index / 32]; }

// --- barriers ---------------------------------------------------------------------------------------------------------

struct Fields {
    u16 expected, pending;
    int tx : 31;
    unsigned phase : 1;
};
inline void change(Barrier* b, int arrivals, int bytes) {
    Fields f;
    std::memcpy(&f, b, 8);
    if (arrivals > f.pending) fail("more arrivals at a barrier than it expects");
    f.pending -= arrivals, f.tx += bytes;
    if (f.pending == 0 && f.tx == 0) f.pending = f.expected, f.phase ^= 1;
    std::memcpy(b, &f, 8);
}
inline Barrier* at_rank(Barrier* b, u32 rank) {
    Block* mine = current->block;
    return reinterpret_cast<Barrier*>(mine->cluster->blocks[rank]->memory + (reinterpret_cast<u8*>(b) - mine->memory));
}
inline void barrier_init(Barrier* b, u32 arrivals) {
    const Fields f = {(u16)arrivals, (u16)arrivals, 0, 0};
    std::memcpy(b, &f, 8);
}
inline void barriers_are_ready() {}
inline void barrier_arrive(Barrier* b) { change(b, 1, 0); }
inline void barrier_expect(Barrier* b, u32 bytes) { change(b, 0, bytes), change(b, 1, 0); }
inline void barrier_wait(Barrier* b, u32 parity) {
    wait_until([&] { return reinterpret_cast<Fields*>(b)->phase != parity; });
}
template <int THREADS> void sync_threads(int id) { meet(current->block->meetings[id], THREADS); }
inline void sync_cluster() { meet(current->block->cluster->meeting, threads_of_a_block * blocks_of_a_cluster); }
inline u8* block_memory() { return current->block->memory; }
inline u32 cluster_rank() { return current->block->rank; }
inline u32 thread_index() { return current->index; }
inline u32 block_index() { return current->block->index; }
inline u32 atomicAdd(u32* p, u32 x) { return (*p += x) - x; }
inline void grid_arrive(u32* counter) { ++*counter; }
inline void grid_wait(const u32* counter, u32 arrivals) {
    wait_until([&] { return *counter >= arrivals; });
}
inline void fence_for_copies() {}
inline void fence_for_tiles() {}
template <int> void keep_registers() {}
template <int> void take_registers() {}

// --- copies -----------------------------------------------------------------------------------------------------------

inline u64 swizzled(u64 address) { return address ^ (address >> 7 & 7) << 4; }
template <bool> void copy_tile(void* to, const TensorMap* map, int x, int y, int z, Barrier* b) {
    std::memset(to, 0xFF, map->box[0] * map->box[1] * 2);
    copies.push_back({static_cast<u8*>(to), b, map, {x, y, z}});
}
inline void arrive(const Copy& copy) {
    const TensorMap& m = *copy.map;
    for (int row = 0; row < m.box[1]; row++)
        for (int column = 0; column < m.box[0]; column++) {
            const int at[3] = {copy.at[0] + column, copy.at[1] + row, copy.at[2]};
            bool inside = true;
            long long offset = 0;
            for (int k = 0; k < 3; k++) inside &= at[k] >= 0 && at[k] < m.size[k], offset += at[k] * m.stride[k];
            const u64 to = swizzled((u64)copy.to + row * 128 + column * 2);
            *reinterpret_cast<bf16*>(to) = inside ? reinterpret_cast<const bf16*>(m.base)[offset] : 0;
        }
    change(copy.barrier, 0, -m.box[0] * m.box[1] * 2);
}
inline void prefetch_map(const TensorMap*) {}
template <class T> void store_at(T* p, u32 rank, T v, Barrier* b) {
    Store store = {at_rank(reinterpret_cast<Barrier*>(p), rank), at_rank(b, rank), {}, sizeof v};
    std::memcpy(store.bytes, &v, sizeof v);
    current->block->cluster->blocks[rank]->stores.push_back(store);
}
// Some of what others stored here comes in, in any order.
inline bool stores_arrive(Block& block, std::mt19937& draw) {
    std::vector<Store> later;
    for (const Store& store : block.stores)
        if (draw() % 2) {
            std::memcpy(store.to, store.bytes, store.size);
            change(store.barrier, 0, -(int)store.size);
        } else
            later.push_back(store);
    const bool any = later.size() < block.stores.size();
    block.stores.swap(later);
    return any;
}
template <class T> T load_constant(const T* p) { return *p; }
inline float divide(float x, float y) { return x / y; }
inline uint4 load_fresh(const uint4* p) { return *p; }
inline float load_fresh(const float* p) { return *p; }
inline uint4 load_kept(const uint4* p) { return *p; }

// --- arithmetic -------------------------------------------------------------------------------------------------------

inline float as_float(u32 x) {
    float y;
    return std::memcpy(&y, &x, 4), y;
}
inline float widen(u32 x) { return as_float(x << 16); }
inline float widen_high(u32 x) { return as_float(x & 0xFFFF0000u); }
inline u32 rounded(float x) {
    u32 y;
    std::memcpy(&y, &x, 4);
    return x != x ? 0x7FFF : (y + 0x7FFF + (y >> 16 & 1)) >> 16;
}
inline u32 narrow(float low, float high) { return rounded(low) | rounded(high) << 16; }
template <u32 SELECT> u32 pick(u32 low, u32 high) {
    const u64 both = (u64)high << 32 | low;
    u32 y = 0;
    for (int i = 0; i < 4; i++) y |= (u32)(both >> 8 * (SELECT >> 4 * i & 7) & 255) << 8 * i;
    return y;
}
// All lanes of a warp put something down; each then looks at what the others have.
template <class Look> void together(std::initializer_list<u32> mine, Look look) {
    Warp& w = warp();
    wait_until([&] { return !w.full; });
    std::copy(mine.begin(), mine.end(), w.box[current->index % 32]);
    if (++w.count == 32) w.full = true;
    wait_until([&] { return w.full; });
    look(w.box);
    if (--w.count == 0) w.full = false;
}
inline float from_lane(float x, int flipped) {
    u32 bits;
    float y;
    std::memcpy(&bits, &x, 4);
    together({bits}, [&](auto& box) { y = as_float(box[current->index % 32 ^ flipped][0]); });
    return y;
}
inline float half(u32 both, int i) { return i ? widen_high(both) : widen(both); }
inline void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    together({a0, a1, a2, a3, b0, b1}, [&](auto& box) {
        const int lane = current->index % 32;
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 16; k++) {
                const int n = lane % 4 * 2 + i % 2;
                d[i] += half(box[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + i / 2], k % 2) *
                        half(box[n * 4 + k % 8 / 2][4 + k / 8], k % 2);
            }
    });
}
inline void products_begin() {}
inline void products_commit() {}
template <int N> void products_are_in(float (&)[N]) {}
template <int> void products_wait() { meet(warp().meeting, 32); }
struct Tile {
    u64 start;
    explicit Tile(const void* p) : start((u64)p) {}
    void move(u32 bytes) { start += bytes; }
};
template <int N> void multiply_tiles(float (&d)[N], Tile a, Tile b) {
    const int row = current->index % 128 / 32 * 16 + current->index % 32 / 4, column = current->index % 4 * 2;
    auto at = [](Tile tile, int row, int k) {
        return widen(*reinterpret_cast<const bf16*>(swizzled(tile.start + row * 128 + 2 * k)));
    };
    for (int side = 0; side < 2; side++) {
        float values[16];
        for (int k = 0; k < 16; k++) values[k] = at(a, row + 8 * side, k);
        for (int j = 0; j < N / 4; j++)
            for (int i = 0; i < 2; i++) {
                float sum = d[4 * j + 2 * side + i];
                for (int k = 0; k < 16; k++) sum += values[k] * at(b, 8 * j + column + i, k);
                d[4 * j + 2 * side + i] = sum;
            }
    }
}

// --- the grid ---------------------------------------------------------------------------------------------------------

template <class Params> struct Grid {
    static inline const Params* params;
    static inline void (*kernel)(Params);
    static void enter() {
        kernel(*params);
        current->done = true;
        while (true) yield();
    }
    static void run(void (*function)(Params), const Params& p, u32 blocks, u32 cluster, u32 threads, size_t memory,
                    u32 seed) {
        constexpr size_t STACK = 64 << 10;
        params = &p, kernel = function;
        blocks_of_the_grid = blocks, blocks_of_a_cluster = cluster, threads_of_a_block = threads;
        auto reserve = [](size_t size) {
            void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            return at == MAP_FAILED ? fail("no memory for the grid"), nullptr : static_cast<u8*>(at);
        };
        memory = (memory + 4095) / 4096 * 4096;
        const size_t stacks_size = STACK * blocks * threads;
        u8 *stacks = reserve(stacks_size), *shared = reserve(memory * blocks);
        std::memset(shared, 0xFF, memory * blocks);
        std::vector<Block> all(blocks);
        std::vector<Cluster> clusters(blocks / cluster);
        std::vector<Thread> fibers((size_t)blocks * threads);
        for (u32 i = 0; i < blocks; i++) {
            all[i].cluster = &clusters[i / cluster], all[i].index = i, all[i].rank = i % cluster;
            all[i].memory = shared + memory * i;
            clusters[i / cluster].blocks.push_back(&all[i]);
            for (u32 k = 0; k < threads; k++) {
                Thread& fiber = fibers[(size_t)i * threads + k];
                fiber.block = &all[i], fiber.index = k;
                getcontext(&fiber.context);
                fiber.context.uc_stack = {stacks + STACK * ((size_t)i * threads + k), 0, STACK};
                makecontext(&fiber.context, enter, 0);
            }
        }
        std::mt19937 draw(seed);
        std::vector<u32> order(blocks);
        for (u32 i = 0; i < blocks; i++) order[i] = i;
        for (int idle = 0; idle < 200;) {
            std::shuffle(order.begin(), order.end(), draw);
            bool any = false, running = false;
            for (u32 block : order) {
                std::vector<Copy> now, later;
                for (auto& copy : copies) (draw() % 2 ? now : later).push_back(copy);
                copies = later;
                for (auto& copy : now) arrive(copy), any = true;
                any |= stores_arrive(all[block], draw);
                if (draw() % 4 == 0) all[block].asleep = draw() & draw();
                for (int rounds = 0; rounds < 200; rounds++) {
                    progress = false;
                    for (u32 k = 0; k < threads; k++) {
                        current = &fibers[(size_t)block * threads + k];
                        running |= !current->done;
                        if (!current->done && !(all[block].asleep >> k / 32 & 1)) resume();
                    }
                    any |= progress;
                    if (!progress) break;
                }
            }
            if (!running) break;
            idle = any || !copies.empty() ? 0 : idle + 1;
            if (idle == 200) fail("the grid stands still: some thread waits for what never comes");
        }
        if (!copies.empty()) fail("a copy came after the kernel's end");
        munmap(stacks, stacks_size), munmap(shared, memory * blocks);
    }
};

#endif
