// Causal attention inside each document of a packed row, and its gradients; see attention.py, and ops.cpp for prototypes.
//
// On the command line of the compiler stands T, the dtype of queries, keys and values: float or bfloat16. Sums are made
// in float.

#include "products.h"

const int BLOCK = 32;  // queries whose scores exist at once. Keys and heads are filled up to a multiple of it

// n rows of D numbers -> (rows, width) with zeros behind
static void read(const T *from, int64_t stride, int64_t n, int64_t D, T *to, int64_t rows, int64_t width) {
    memset((void *)to, 0, rows * width * sizeof(T));
    for (int64_t s = 0; s < n; s++) memcpy((void *)(to + s * width), from + s * stride, D * sizeof(T));
}

// rows (n, width) of numbers -> (n / PAIR, width) words
static void pair(const T *rows, int64_t n, int64_t width, word *to) {
    for (int64_t s = 0; s < n; s += PAIR)
        for (int64_t i = 0; i < width; i += LANES)
            store_words(to + s / PAIR * width + i, pair(rows + s * width + i, rows + (s + PAIR - 1) * width + i));
}

// PAIR vectors of numbers, one below the other -> a vector of words
static inline void store_pair(word *to, const floats *x) {
    store_words(to, PAIR == 1 ? (ints)x[0] : pair(rounded(x[0]), rounded(x[PAIR - 1])));
}

// Scores from s on, -infinity behind the last one that a query sees.
static inline floats causal_scores(const float *row, int64_t s, int64_t last) {
    ints places;
    for (int l = 0; l < LANES; l++) places[l] = l;
    return places + (int32_t)(s - last) > 0 ? floats{} - INFINITY : load(row + s);
}

// rows (n, width), times scale -> n rows of D numbers
static void write(const float *rows, int64_t width, float scale, T *to, int64_t stride, int64_t n, int64_t D) {
    for (int64_t s = 0; s < n; s++)
        for (int64_t i = 0; i < D; i += LANES) store(to + s * stride + i, load(rows + s * width + i) * scale, D - i);
}

extern "C" {

// Queries and results are (N, KV * group, D), keys and values (N, KV, D).
//   cu_seqlens (docs + 1,): where each document begins, and where the last one ends
//   out: the mean of the values that a query sees
//   lse (N, KV * group): log2 of the sum of exp(score), for the backward pass
void attention(const T *q /* N * KV * group * D */, const T *k /* N * KV * D */, const T *v /* N * KV * D */,
               const int32_t *cu_seqlens /* docs + 1 */, T *out /* N * KV * group * D */,
               float *lse /* N * KV * group */, int64_t N, int64_t docs, int64_t KV, int64_t group, int64_t D) {
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
            const int64_t begin = cu_seqlens[task / KV], n = cu_seqlens[task / KV + 1] - begin, most = round_up(n, BLOCK);
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
                        const float *row = scores + r * most;
                        floats tops = floats{} - INFINITY, all = {};
                        for (int64_t s = 0; s < end; s += LANES) {
                            const floats x = causal_scores(row, s, at + r);
                            tops = x > tops ? x : tops;
                        }
                        const float top = largest(tops) * scale;
                        for (int64_t s = 0; s < end; s += LANES) {
                            const floats e = exp2(causal_scores(row, s, at + r) * scale - top);
                            store(weights + r * most + s, e);
                            all += e;
                        }
                        sums[r] = sum(all);
                        if (r < count) lse[(first + r) * heads + h] = top + std::log2(sums[r]);
                    }
                    product<false>(weights, most / PAIR, values, width, result, width, BLOCK, width, end / PAIR);
                    for (int64_t r = 0; r < count; r++)
                        for (int64_t i = 0; i < D; i += LANES)
                            store(out + at_query + r * heads * D + i, load(result + r * width + i) / sums[r], D - i);
                }
        }
    }
}

// grad and grad_q like q, grad_k and grad_v like k. Source: Dao, FlashAttention-2 (2023), algorithm 2, a block of queries
// and all the keys that they see at a time.
void attention_backward(const T *q /* N * KV * group * D */, const T *k /* N * KV * D */, const T *v /* N * KV * D */,
                        const int32_t *cu_seqlens /* docs + 1 */, const T *out /* N * KV * group * D */,
                        const float *lse /* N * KV * group */, const T *grad /* N * KV * group * D */,
                        T *grad_q /* N * KV * group * D */, T *grad_k /* N * KV * D */, T *grad_v /* N * KV * D */,
                        int64_t N, int64_t docs, int64_t KV, int64_t group, int64_t D) {
    const int64_t heads = KV * group, width = round_up(D, BLOCK), words = width / PAIR, pairs = BLOCK / PAIR;
    const float scale = 1 / std::sqrt(float(D));
#pragma omp parallel
    {
        Tiles tiles;
        Piece<T> rows, queries, upstream, grad_scores;
        Piece<word> keys, key_columns, value_columns, paired, query_columns, upstream_columns;
        Piece<word> weight_pairs, score_pairs;
        Piece<float> scores, grad_probs, result, key_totals, value_totals, totals;
        queries.resize(BLOCK * width), upstream.resize(BLOCK * width), result.resize(BLOCK * width);
        paired.resize(BLOCK * width), query_columns.resize(BLOCK * width), upstream_columns.resize(BLOCK * width);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < docs * KV; task++) {
            const int64_t begin = cu_seqlens[task / KV], n = cu_seqlens[task / KV + 1] - begin, most = round_up(n, BLOCK);
            const int64_t head = task % KV, place = (begin * KV + head) * D;
            for (Piece<word> *piece : {&keys, &key_columns, &value_columns}) piece->resize(most * words);
            for (Piece<float> *piece : {&scores, &grad_probs}) piece->resize(BLOCK * most);
            for (Piece<word> *piece : {&weight_pairs, &score_pairs}) piece->resize(pairs * most);
            rows.resize(most * width), grad_scores.resize(BLOCK * most), totals.resize(most * width);
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
                    for (int64_t r = 0; r < count; r++)  // wanted in a while, and far away
                        for (int64_t d = 0; d < D; d += 64 / sizeof(T))
                            __builtin_prefetch(out + at_query + r * heads * D + d);
                    read(q + at_query, heads * D, count, D, queries, BLOCK, width);
                    pair(queries, BLOCK, width, paired);
                    transpose(paired, pairs, width, query_columns);
                    read(grad + at_query, heads * D, count, D, upstream, BLOCK, width);
                    pair(upstream, BLOCK, width, paired);
                    transpose(paired, pairs, width, upstream_columns);
                    product<false>(queries, words, key_columns, most, scores, most, BLOCK, end, words);
                    product<false>(upstream, words, value_columns, most, grad_probs, most, BLOCK, end, words);
                    for (int64_t r = 0; r < BLOCK; r += PAIR) {
                        float log[PAIR], mean[PAIR];  // of grad_probs, by the weights
                        for (int i = 0; i < PAIR; i++) {
                            const bool is = r + i < count;  // else it only fills up the block
                            log[i] = is ? lse[(first + r + i) * heads + h] : INFINITY;
                            floats all = {};
                            for (int64_t d = 0; d < D && is; d += LANES)
                                all += load(upstream + (r + i) * width + d) *
                                       load(out + at_query + (r + i) * heads * D + d, D - d);
                            mean[i] = sum(all);
                        }
                        for (int64_t s = 0; s < end; s += LANES) {
                            floats weight[PAIR], grad_score[PAIR];
                            for (int i = 0; i < PAIR; i++) {
                                const floats score = causal_scores(scores + (r + i) * most, s, at + r + i);
                                weight[i] = exp2(score * (scale * LOG2_E) - log[i]);
                                grad_score[i] = weight[i] * (load(grad_probs + (r + i) * most + s) - mean[i]);
                                store(grad_scores + (r + i) * most + s, grad_score[i]);
                            }
                            store_pair(weight_pairs + r / PAIR * most + s, weight);
                            store_pair(score_pairs + r / PAIR * most + s, grad_score);
                        }
                    }
                    product<false>(grad_scores, most / PAIR, keys, width, result, width, BLOCK, width, end / PAIR);
                    write(result, width, scale, grad_q + at_query, heads * D, count, D);
                    product<true>(query_columns, pairs, score_pairs, most, key_totals, most, width, end, pairs);
                    product<true>(upstream_columns, pairs, weight_pairs, most, value_totals, most, width, end, pairs);
                }
            transpose(key_totals, width, most, totals);
            write(totals, width, scale, grad_k + place, KV * D, n, D);
            transpose(value_totals, width, most, totals);
            write(totals, width, 1, grad_v + place, KV * D, n, D);
        }
    }
}

}
