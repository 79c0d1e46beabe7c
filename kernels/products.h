// Products of matrices, in float or bfloat16, summed in float.
//
// T is the dtype of the factors, which consist of words of 32 bits. In float that is a number; in bfloat16 it is a pair
// of numbers whose products are summed, as the matrix unit of a CPU (AMX) takes them.

#include <algorithm>

#include "vectors.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef uint32_t word;
const int PAIR = 4 / sizeof(T);  // numbers in a word

#ifdef __AMX_BF16__

// Linux lets a process use tiles once it has asked for them.
static const bool TILES = PAIR == 2 && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;

// What stands in memory is written before tiles are loaded from it: the headers of GCC do not tell the compiler that
// the instructions behind this line read memory (GCC bug 114098).
static inline void written() { asm volatile("" ::: "memory"); }

struct Tiles {  // 8 tiles of 16 rows of 64 bytes, as long as this exists
    Tiles() {
        struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {};
        shape.palette = 1;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
        written();
        if (TILES) _tile_loadconfig(&shape);
    }
    ~Tiles() {
        if (TILES) _tile_release();
    }
};

// c (32, 32) += or = a (32, K) @ b (K, 32)
template <bool ADD>
static inline void tile_product(const word *a, int64_t a_row, const word *b, int64_t b_row, float *c, int64_t c_row,
                                int64_t K) {
    written();
    if (ADD) {
        _tile_loadd(0, c, c_row * 4);
        _tile_loadd(1, c + 16, c_row * 4);
        _tile_loadd(2, c + 16 * c_row, c_row * 4);
        _tile_loadd(3, c + 16 * c_row + 16, c_row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += 16) {
        _tile_loadd(4, a + k, a_row * 4);
        _tile_loadd(6, b + k * b_row, b_row * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + k * b_row + 16, b_row * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * a_row + k, a_row * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row * 4);
    _tile_stored(1, c + 16, c_row * 4);
    _tile_stored(2, c + 16 * c_row, c_row * 4);
    _tile_stored(3, c + 16 * c_row + 16, c_row * 4);
}

#else
static const bool TILES = false;
struct Tiles {};
#endif

struct alignas(64) Line { char bytes[64]; };

template <class S>
struct Piece {  // of memory, for numbers of type S
    std::vector<Line> lines;
    void resize(int64_t n) { lines.resize(std::max<size_t>(lines.size(), (n * sizeof(S) + 63) / 64)); }  // at least
    operator S *() { return (S *)lines.data(); }
};

static inline ints load_words(const word *from) {
    ints x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store_words(word *to, ints x) { memcpy(to, &x, sizeof x); }

static inline ints pair(halves a, halves b) {
    return __builtin_convertvector(a, ints) | __builtin_convertvector(b, ints) << 16;
}

// Words of two vectors of numbers that stand one below the other. In float they are the first one.
static inline ints pair(const float *a, const float *) { return (ints)load(a); }

static inline ints pair(const bfloat16 *a, const bfloat16 *b) {
    halves upper, lower;
    memcpy(&upper, a, sizeof upper);
    memcpy(&lower, b, sizeof lower);
    return pair(upper, lower);
}

static inline ints pick(ints a, ints b, ints places) {  // among the numbers of both, one behind the other
#ifdef __clang__
    ints out;
    for (int l = 0; l < LANES; l++) out[l] = places[l] < LANES ? a[places[l]] : b[places[l] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, places);
#endif
}

template <int STEP>
static inline void exchange(ints *rows) {  // blocks of STEP by STEP words that lie across the diagonal from each other
    ints upper, lower;
    for (int l = 0; l < LANES; l++) {
        upper[l] = l & STEP ? LANES + l - STEP : l;
        lower[l] = l & STEP ? LANES + l : l + STEP;
    }
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) {
            const ints a = rows[i], b = rows[i + STEP];
            rows[i] = pick(a, b, upper);
            rows[i + STEP] = pick(a, b, lower);
        }
}

static inline void transpose(ints *rows) {  // LANES of them
    if constexpr (LANES > 1) exchange<1>(rows);
    if constexpr (LANES > 2) exchange<2>(rows);
    if constexpr (LANES > 4) exchange<4>(rows);
    if constexpr (LANES > 8) exchange<8>(rows);
}

// from (rows, columns) -> to (columns, rows), of words or floats, both multiples of LANES
static void transpose(const void *matrix, int64_t rows, int64_t columns, void *result) {
    const word *from = (const word *)matrix;
    word *to = (word *)result;
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            ints block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = load_words(from + (r + i) * columns + c);
            transpose(block);
            for (int i = 0; i < LANES; i++) store_words(to + (c + i) * rows + r, block[i]);
        }
}

// sums + the products of words
static inline floats add_products(floats sums, ints a, ints b) {
    if (PAIR == 1) return sums + (floats)a * (floats)b;
#if defined(__AVX512BF16__) && LANES == 16
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (floats)(a << 16) * (floats)(b << 16);
    return sums + (floats)(a & -65536) * (floats)(b & -65536);
#endif
}

#ifdef __AVX512F__  // rows whose sums stay in registers
const int ROWS = 8;
#else
const int ROWS = 4;
#endif

// c (COUNT, 2 vectors) += or = a (COUNT, K) @ b (K, 2 vectors). Meanwhile K lines of memory at `next`, if any, are fetched.
template <bool ADD, int COUNT = ROWS>
static inline void vector_product(const word *a, int64_t a_row, const word *b, int64_t b_row, float *c, int64_t c_row,
                                  int64_t K, const char *next) {
    floats sums[COUNT][2];
    for (int r = 0; r < COUNT; r++)
        for (int v = 0; v < 2; v++) sums[r][v] = ADD ? load(c + r * c_row + v * LANES) : floats{};
    for (int64_t k = 0; k < K; k++) {
        if (next) __builtin_prefetch(next + k * 64, 0, 2);
        const ints right[2] = {load_words(b + k * b_row), load_words(b + k * b_row + LANES)};
        for (int r = 0; r < COUNT; r++) {
            ints left = ints{} + (int32_t)a[r * a_row + k];
            for (int v = 0; v < 2; v++) sums[r][v] = add_products(sums[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < COUNT; r++)
        for (int v = 0; v < 2; v++) store(c + r * c_row + v * LANES, sums[r][v]);
}

// c (R, C) float += or = a (R, K) @ b (K, C); all of them multiples of 32 but for K in float, and R of ROWS without
// tiles; *_row: from row to row. next: what is wanted in the next turn, 32 columns of K words, if it is far away.
template <bool ADD>
static void product(const void *left, int64_t a_row, const word *b, int64_t b_row, float *c, int64_t c_row, int64_t R,
                    int64_t C, int64_t K, const char *next = nullptr) {
    const word *a = (const word *)left;
#ifdef __AMX_BF16__
    if (TILES) {
        for (int64_t j = 0; j < C; j += 32)
            for (int64_t i = 0; i < R; i += 32)
                tile_product<ADD>(a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, K);
        return;
    }
#endif
    for (int64_t j = 0; j < C; j += 2 * LANES)
        for (int64_t i = 0; i < R; i += ROWS)
            vector_product<ADD>(a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, K,
                                next && i < 2 * ROWS ? next + i / ROWS * K * 64 : nullptr);
}

