// What layers.cu asks of a GPU of the Hopper kind, a function for each instruction; see NVIDIA's PTX ISA for them.
#ifndef PI0_HOPPER
#define PI0_HOPPER

#include "types.h"

struct alignas(64) TensorMap {
    u64 words[16];
};  // CUtensorMap

#define DEVICE __device__ __forceinline__

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Nothing here waits longer than 40 ms when all is well; a wait of seconds will never end, and would hang the GPU.
struct Patience {
    long long since = clock64();
    DEVICE void check() {
        if (clock64() - since > 8000000000ll) __trap();
    }
};

// --- barriers in shared memory ---------------------------------------------------------------------------------------

DEVICE void barrier_init(Barrier* b, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(arrivals) : "memory");
}

DEVICE void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(Barrier* b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory");
}

// Arrive, and let the phase last until `bytes` more have been copied in.
DEVICE void barrier_expect(Barrier* b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}

DEVICE bool barrier_passed(Barrier* b, u32 parity) {
    u32 passed;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(passed)
        : "r"(address(b)), "r"(parity)
        : "memory");
    return passed;
}

DEVICE void barrier_wait(Barrier* b, u32 parity) {
    if (barrier_passed(b, parity)) return;
    Patience patience;
    while (!barrier_passed(b, parity)) patience.check();
}

// --- barriers of threads ----------------------------------------------------------------------------------------------

template <int THREADS> DEVICE void sync_threads(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

DEVICE void sync_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// This block's shared memory, from a multiple of 1024 on, as swizzled tiles want it.
DEVICE u8* block_memory() {
    extern __shared__ u8 memory[];
    return memory + (1024 - address(memory) % 1024) % 1024;
}

// Volatile, so that nothing derived from it is kept in registers, or in memory for want of them, for longer than it is
// used: shared memory leaves the cache hardly any room.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE u32 thread_index() {
    u32 index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

DEVICE u32 block_index() {
    u32 index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}

DEVICE void grid_arrive(u32* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

DEVICE void grid_wait(const u32* counter, u32 arrivals) {
    Patience patience;
    for (u32 there = 0;;) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(counter) : "memory");
        if (there >= arrivals) return;
        patience.check();
    }
}

// Between this thread's plain use of shared memory and copies into it that are begun after others met it.
DEVICE void fence_for_tiles() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Between others' plain writes, once they are seen, and copies of the same memory by the copy engine.
DEVICE void fence_for_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Registers of a warpgroup's threads, out of what the block has.
template <int COUNT> DEVICE void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// --- copies -----------------------------------------------------------------------------------------------------------

// The map's box from column x, row y, layer z on into shared memory, swizzled; its bytes count at `b`. STREAMED: is read
// once, so it needs no place in L2.
template <bool STREAMED> DEVICE void copy_tile(void* to, const TensorMap* map, int x, int y, int z, Barrier* b) {
    if constexpr (STREAMED)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(address(to)),
            "l"(map), "r"(address(b)), "r"(x), "r"(y), "r"(z),
            "l"(0x12F0000000000000ull)
            : "memory");  // evict first
    else
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(address(to)),
            "l"(map), "r"(address(b)), "r"(x), "r"(y), "r"(z)
            : "memory");
}

DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// To the same place in the shared memory of the cluster's block `rank`; its bytes count at `b` there.
DEVICE void store_at(uint4* p, u32 rank, uint4 v, Barrier* b) {
    asm volatile(
        "{ .reg .b32 there, b; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 b, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [b]; }" ::"r"(
            address(p)),
        "r"(address(b)), "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
}

DEVICE void store_at(float4* p, u32 rank, float4 v, Barrier* b) {
    const uint4 bits =
        make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
    store_at(reinterpret_cast<uint4*>(p), rank, bits, b);
}

DEVICE void store_at(float2* p, u32 rank, float2 v, Barrier* b) {
    asm volatile(
        "{ .reg .b32 there, b; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 b, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [b]; }" ::"r"(address(p)),
        "r"(address(b)), "r"(rank), "f"(v.x), "f"(v.y)
        : "memory");
}

// From L2: another multiprocessor may have written it in this very kernel. Asked for where it stands.
DEVICE uint4 load_fresh(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

DEVICE float load_fresh(const float* p) { return __ldcg(p); }

// The same, of what every step reads again: weights stream past it through L2.
DEVICE uint4 load_kept(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(0x14F0000000000000ull));  // evict last
    return v;
}

// Of what no kernel writes while this one runs.
template <class T> DEVICE T load_constant(const T* p) { return __ldg(p); }

// --- arithmetic -------------------------------------------------------------------------------------------------------

DEVICE float widen(u32 x) { return __uint_as_float(x << 16); }  // the low half
DEVICE float widen_high(u32 x) { return __uint_as_float(x & 0xFFFF0000u); }

DEVICE u32 narrow(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Two of the eight bytes of low and high, see PRMT.
template <u32 SELECT> DEVICE u32 pick(u32 low, u32 high) { return __byte_perm(low, high, SELECT); }

DEVICE float divide(float x, float y) { return __fdividef(x, y); }

DEVICE float from_lane(float x, int flipped) { return __shfl_xor_sync(0xFFFFFFFFu, x, flipped); }

// d += a b for a warp: a bf16 [16, 16], b bf16 [16, 8], d f32 [16, 8].
DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A matrix unit's view of rows of 128 bytes in shared memory, swizzled as copy_tile leaves them, from 16 columns on.
// The same for all threads, which the compiler has to see.
struct Tile {
    u32 start;
    DEVICE explicit Tile(const void* p) : start(__shfl_sync(0xFFFFFFFFu, (address(p) & 0x3FFFF) >> 4 | 1u << 16, 0)) {}
    DEVICE void move(u32 bytes) { start += bytes >> 4; }
    DEVICE u64 view() const { return (u64)0x40000040u << 32 | start; }  // 128 bytes swizzled, 1024 between eight rows
};

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Nothing that the compiler does with them comes before.
template <int N> DEVICE void products_are_in(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define T16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define T20 T16 ", %16, %17, %18, %19"
#define T32 T20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define T40 T32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define T44 T40 ", %40, %41, %42, %43"
#define T48 T44 ", %44, %45, %46, %47"
#define T52 T48 ", %48, %49, %50, %51"

// d += a b^T for four warps: a bf16 [64, 16], b bf16 [COLUMNS, 16], d f32 [64, COLUMNS], 16 rows a warp.
#define MULTIPLY_TILES(REGISTERS, COLUMNS, A, B, ...)                                                \
    DEVICE void multiply_tiles(float (&d)[REGISTERS], Tile a, Tile b) {                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" T##REGISTERS \
                     "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;"                                           \
                     : __VA_ARGS__                                                                   \
                     : "l"(a.view()), "l"(b.view()));                                                \
    }

MULTIPLY_TILES(16, 32, 16, 17, D16(0))
MULTIPLY_TILES(20, 40, 20, 21, D16(0), D4(16))
MULTIPLY_TILES(32, 64, 32, 33, D16(0), D16(16))
MULTIPLY_TILES(40, 80, 40, 41, D16(0), D16(16), D4(32), D4(36))
MULTIPLY_TILES(44, 88, 44, 45, D16(0), D16(16), D4(32), D4(36), D4(40))
MULTIPLY_TILES(48, 96, 48, 49, D16(0), D16(16), D16(32))
MULTIPLY_TILES(52, 104, 52, 53, D16(0), D16(16), D16(32), D4(48))

#endif
