// Causal attention inside each document of a packed row, and its gradients; see attention.py.
//
// On the command line of the compiler stands T, the dtype of queries, keys and values: float or bfloat16. Sums are made
// in float. A factor of a product consists of words of 32 bits. In float that is a number; in bfloat16 it is a pair of
// numbers whose products are summed, as the matrix unit of a CPU (AMX) takes them.

#include "vectors.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef uint32_t word;
const int PAIR = 4 / sizeof(T);  // numbers in a word
const int BLOCK = 32;            // queries whose scores exist at once. Keys and heads are filled up to a multiple of it

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

#ifdef __AMX_BF16__

// Linux lets a process use tiles once it has asked for them.
static const bool TILES = PAIR == 2 && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;

struct Tiles {  // 8 tiles of 16 rows of 64 bytes, as long as this exists
    Tiles() {
        struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {};
        shape.palette = 1;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
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
struct Tiles {};
#endif

static inline ints load_words(const word *from) {
    ints x;
    memcpy(&x, from, sizeof x);
    return x;
}

// c (8, 2 vectors) += or = a (8, K) @ b (K, 2 vectors)
template <bool ADD>
static inline void vector_product(const word *a, int64_t a_row, const word *b, int64_t b_row, float *c, int64_t c_row,
                                  int64_t K) {
    floats sums[8][2];
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++) sums[r][v] = ADD ? load(c + r * c_row + v * LANES) : floats{};
    for (int64_t k = 0; k < K; k++) {
        const ints right[2] = {load_words(b + k * b_row), load_words(b + k * b_row + LANES)};
        for (int r = 0; r < 8; r++) {
            ints left = ints{} + (int32_t)a[r * a_row + k];
            for (int v = 0; v < 2; v++) {
                if (PAIR == 1) {
                    sums[r][v] += (floats)left * (floats)right[v];
                } else {
                    sums[r][v] += (floats)(left << 16) * (floats)(right[v] << 16);
                    sums[r][v] += (floats)(left & -65536) * (floats)(right[v] & -65536);
                }
            }
        }
    }
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++) store(c + r * c_row + v * LANES, sums[r][v]);
}

// c (R, C) float += or = a (R, K) @ b (K, C); all of them multiples of 32 but for K in float; *_row: from row to row.
template <bool ADD>
static void product(const void *left, int64_t a_row, const word *b, int64_t b_row, float *c, int64_t c_row, int64_t R,
                    int64_t C, int64_t K) {
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
        for (int64_t i = 0; i < R; i += 8)
            vector_product<ADD>(a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, K);
}

// n rows of D numbers -> (rows, width) with zeros behind
static void read(const T *from, int64_t stride, int64_t n, int64_t D, T *to, int64_t rows, int64_t width) {
    memset((void *)to, 0, rows * width * sizeof(T));
    for (int64_t s = 0; s < n; s++) memcpy((void *)(to + s * width), from + s * stride, D * sizeof(T));
}

// rows (n, width) of numbers -> (n / PAIR, width) words, of numbers one below the other
static void pair(const T *rows, int64_t n, int64_t width, word *to) {
    for (int64_t s = 0; s < n; s += PAIR)
        for (int64_t i = 0; i < width; i += LANES) {
            ints a = (ints)load(rows + s * width + i), b = (ints)load(rows + (s + PAIR - 1) * width + i);
            if (PAIR == 2) a = (ints)((a >> 16 & 0xffff) | b);
            memcpy(to + s / PAIR * width + i, &a, sizeof a);
        }
}

static void transpose(const void *from, int64_t rows, int64_t columns, word *to) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[c * rows + r] = ((const word *)from)[r * columns + c];
}

// PAIR vectors of numbers, one below the other -> a vector of words
static inline void store_pair(word *to, const floats *x) {
    ints words = PAIR == 1 ? (ints)x[0] : ((rounded(x[0]) >> 16 & 0xffff) | (rounded(x[PAIR - 1]) & -65536));
    memcpy(to, &words, sizeof words);
}

// columns (D, most), times scale -> n rows of D numbers
static void write_columns(const float *columns, int64_t most, float scale, T *to, int64_t stride, int64_t n,
                          int64_t D) {
    for (int64_t s = 0; s < n; s++)
        for (int64_t i = 0; i < D; i += LANES) {
            floats x = {};
            for (int64_t d = 0; d < LANES && i + d < D; d++) x[d] = columns[(i + d) * most + s];
            store(to + s * stride + i, x * scale, D - i);
        }
}

struct alignas(64) Line { char bytes[64]; };

template <class S>
struct Piece {  // of memory, for numbers of type S
    std::vector<Line> lines;
    void resize(int64_t n) { lines.resize((n * sizeof(S) + 63) / 64); }
    operator S *() { return (S *)lines.data(); }
};

extern "C" {

// Queries and results are (N, KV * group, D), keys and values (N, KV, D).
//   begins (docs + 1,): where each document begins, and where the last one ends
//   out: the mean of the values that a query sees
//   logs (N, KV * group): log2 of the sum of exp(score), for the backward pass
void attention(const T *q, const T *k, const T *v, const int64_t *begins, T *out, float *logs, int64_t docs, int64_t KV,
               int64_t group, int64_t D) {
    const int64_t heads = KV * group, width = round_up(D, BLOCK), words = width / PAIR;
    const float scale = LOG2_E / std::sqrt(float(D));
#pragma omp parallel
    {
        Tiles tiles;
        Piece<T> rows, queries, weights;
        Piece<word> keys, values;
        Piece<float> scores, result;
        queries.resize(BLOCK * width), result.resize(BLOCK * width);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < docs * KV; task++) {
            const int64_t begin = begins[task / KV], n = begins[task / KV + 1] - begin, most = round_up(n, BLOCK);
            const int64_t head = task % KV, place = (begin * KV + head) * D;
            rows.resize(most * width), keys.resize(most * words), values.resize(most * words);
            scores.resize(BLOCK * most), weights.resize(BLOCK * most);
            read(k + place, KV * D, n, D, rows, most, width);
            transpose(rows, most, words, keys);
            read(v + place, KV * D, n, D, rows, most, width);
            pair(rows, most, width, values);
            for (int64_t h = head * group; h < (head + 1) * group; h++)
                for (int64_t at = 0; at < n; at += BLOCK) {
                    const int64_t first = begin + at, count = n - at < BLOCK ? n - at : BLOCK, end = at + BLOCK;
                    const int64_t at_query = (first * heads + h) * D;
                    read(q + at_query, heads * D, count, D, queries, BLOCK, width);
                    product<false>(queries, words, keys, most, scores, most, BLOCK, end, words);
                    float sums[BLOCK];
                    for (int64_t r = 0; r < BLOCK; r++) {
                        float *row = scores + r * most;
                        for (int64_t s = at + r + 1; s < end; s++) row[s] = -INFINITY;
                        floats tops = load(row), all = {};
                        for (int64_t s = LANES; s < end; s += LANES) {
                            floats x = load(row + s);
                            tops = x > tops ? x : tops;
                        }
                        const float top = largest(tops) * scale;
                        for (int64_t s = 0; s < end; s += LANES) {
                            floats e = exp2(load(row + s) * scale - top);
                            store(weights + r * most + s, e);
                            all += e;
                        }
                        sums[r] = sum(all);
                        if (r < count) logs[(first + r) * heads + h] = top + std::log2(sums[r]);
                    }
                    product<false>(weights, most / PAIR, values, width, result, width, BLOCK, width, end / PAIR);
                    for (int64_t r = 0; r < count; r++)
                        for (int64_t i = 0; i < D; i += LANES)
                            store(out + at_query + r * heads * D + i, load(result + r * width + i) / sums[r], D - i);
                }
        }
    }
}

// grad and by_q like q, by_k and by_v like k. Source: Dao, FlashAttention-2 (2023), algorithm 2, a block of queries
// and all the keys that they see at a time.
void attention_backward(const T *q, const T *k, const T *v, const int64_t *begins, const T *out, const float *logs,
                        const T *grad, T *by_q, T *by_k, T *by_v, int64_t docs, int64_t KV, int64_t group, int64_t D) {
    const int64_t heads = KV * group, width = round_up(D, BLOCK), words = width / PAIR, pairs = BLOCK / PAIR;
    const float scale = 1 / std::sqrt(float(D));
#pragma omp parallel
    {
        Tiles tiles;
        Piece<T> rows, queries, upstream, by_scores;
        Piece<word> keys, key_columns, value_columns, paired, query_columns, upstream_columns, weight_pairs;
        Piece<word> score_pairs;
        Piece<float> scores, by_weights, result, key_totals, value_totals;
        queries.resize(BLOCK * width), upstream.resize(BLOCK * width), result.resize(BLOCK * width);
        paired.resize(BLOCK * width), query_columns.resize(BLOCK * width), upstream_columns.resize(BLOCK * width);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < docs * KV; task++) {
            const int64_t begin = begins[task / KV], n = begins[task / KV + 1] - begin, most = round_up(n, BLOCK);
            const int64_t head = task % KV, place = (begin * KV + head) * D;
            for (Piece<word> *piece : {&keys, &key_columns, &value_columns}) piece->resize(most * words);
            for (Piece<float> *piece : {&scores, &by_weights}) piece->resize(BLOCK * most);
            for (Piece<word> *piece : {&weight_pairs, &score_pairs}) piece->resize(pairs * most);
            rows.resize(most * width), by_scores.resize(BLOCK * most);
            read(v + place, KV * D, n, D, rows, most, width);
            transpose(rows, most, words, value_columns);
            read(k + place, KV * D, n, D, rows, most, width);
            transpose(rows, most, words, key_columns);
            pair(rows, most, width, keys);
            for (Piece<float> *piece : {&key_totals, &value_totals}) {  // (width, most): gradients of columns
                piece->resize(width * most);
                memset(*piece, 0, width * most * sizeof(float));
            }
            for (int64_t h = head * group; h < (head + 1) * group; h++)
                for (int64_t at = 0; at < n; at += BLOCK) {
                    const int64_t first = begin + at, count = n - at < BLOCK ? n - at : BLOCK, end = at + BLOCK;
                    const int64_t at_query = (first * heads + h) * D;
                    read(q + at_query, heads * D, count, D, queries, BLOCK, width);
                    pair(queries, BLOCK, width, paired);
                    transpose(paired, pairs, width, query_columns);
                    read(grad + at_query, heads * D, count, D, upstream, BLOCK, width);
                    pair(upstream, BLOCK, width, paired);
                    transpose(paired, pairs, width, upstream_columns);
                    product<false>(queries, words, key_columns, most, scores, most, BLOCK, end, words);
                    product<false>(upstream, words, value_columns, most, by_weights, most, BLOCK, end, words);
                    for (int64_t r = 0; r < BLOCK; r += PAIR) {
                        float log[PAIR], mean[PAIR];  // of by_weights, by the weights
                        for (int i = 0; i < PAIR; i++) {
                            const bool is = r + i < count;  // else it only fills up the block
                            log[i] = is ? logs[(first + r + i) * heads + h] : INFINITY;
                            floats all = {};
                            for (int64_t d = 0; d < D && is; d += LANES)
                                all += load(upstream + (r + i) * width + d) *
                                       load(out + at_query + (r + i) * heads * D + d, D - d);
                            mean[i] = sum(all);
                            for (int64_t s = at + r + i + 1; s < end; s++) scores[(r + i) * most + s] = -INFINITY;
                        }
                        for (int64_t s = 0; s < end; s += LANES) {
                            floats weight[PAIR], by_score[PAIR];
                            for (int i = 0; i < PAIR; i++) {
                                weight[i] = exp2(load(scores + (r + i) * most + s) * (scale * LOG2_E) - log[i]);
                                by_score[i] = weight[i] * (load(by_weights + (r + i) * most + s) - mean[i]);
                                store(by_scores + (r + i) * most + s, by_score[i]);
                            }
                            store_pair(weight_pairs + r / PAIR * most + s, weight);
                            store_pair(score_pairs + r / PAIR * most + s, by_score);
                        }
                    }
                    product<false>(by_scores, most / PAIR, keys, width, result, width, BLOCK, width, end / PAIR);
                    for (int64_t r = 0; r < count; r++)
                        for (int64_t i = 0; i < D; i += LANES)
                            store(by_q + at_query + r * heads * D + i, load(result + r * width + i) * scale, D - i);
                    product<true>(query_columns, pairs, score_pairs, most, key_totals, most, width, end, pairs);
                    product<true>(upstream_columns, pairs, weight_pairs, most, value_totals, most, width, end, pairs);
                }
            write_columns(key_totals, most, scale, by_k + place, KV * D, n, D);
            write_columns(value_totals, most, 1, by_v + place, KV * D, n, D);
        }
    }
}

}
