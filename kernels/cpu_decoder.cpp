// Generation on a CPU: the products of a layer with what stands between them, and the attention of a step; see
// cpu_decoder.py, and ops.cpp for prototypes.
//
// On the command line of the compiler stand T, the dtype of weights, cache and activations (float or bfloat16), and
// the shape of attention: DIM numbers in a head, KV heads of keys and values, GROUP heads of queries for each of them,
// LANES numbers in a vector, of which half a head is a multiple. Loops of known length keep a head in registers.

#include "products.h"

const int N = DIM / LANES, WORDS = N / PAIR;  // vectors in a head: of numbers, and of words
const int FEW = 4;  // keys at once
const int BLOCK = 32;  // rows, and columns, that are multiplied at once
const int64_t MANY = 64;  // rows that stay in a core's cache from one block of columns to the next

static inline void read(const T *from, floats *head) {
    for (int i = 0; i < N; i++) head[i] = load(from + i * LANES);
}

// A head, over its root mean square and times gain if there is one, turned by its position's angles (DIM / 2 cosines and
// sines).
static inline void norm_and_rotate(floats *head, const float *gain, const float *cos, const float *sin, float eps,
                                   T *to) {
    if (gain) {
        floats squares = {};
        for (int i = 0; i < N; i++) squares += head[i] * head[i];
        float scale = 1 / std::sqrt(sum(squares) / DIM + eps);
        for (int i = 0; i < N; i++) head[i] = head[i] * scale * load(gain + i * LANES);
    }
    for (int i = 0; i < N / 2; i++) {
        floats a = head[i], c = load(cos + i * LANES), b = head[i + N / 2], s = load(sin + i * LANES);
        store(to + i * LANES, a * c - b * s);
        store(to + (i + N / 2) * LANES, b * c + a * s);
    }
}

// The sum of each of FEW vectors -> to (FEW,)
static inline void sums(const floats *x, float *to) {
    if constexpr (LANES < FEW) {
        for (int i = 0; i < FEW; i++) to[i] = sum(x[i]);
    } else {  // two vectors become one whose numbers belong to them in turns, twice; then its parts are added
        ints even, odd, front, back;
        for (int l = 0; l < LANES; l++) {
            const int part = l / 4 * 4, place = l % 4;
            even[l] = part + place / 2 + place % 2 * LANES, odd[l] = even[l] + 2;
            front[l] = part + place % 2 + place / 2 * LANES, back[l] = front[l] + 2;
        }
        auto add = [](floats a, floats b, ints one, ints other) {
            return (floats)pick((ints)a, (ints)b, one) + (floats)pick((ints)a, (ints)b, other);
        };
        const floats all = add(add(x[0], x[1], even, odd), add(x[2], x[3], even, odd), front, back);
        typedef float part __attribute__((vector_size(4 * FEW)));
        part parts[LANES / FEW];
        memcpy(parts, &all, sizeof all);
        for (int i = 1; i < LANES / FEW; i++) parts[0] += parts[i];
        memcpy(to, parts, sizeof parts[0]);
    }
}

// out (R, n) = x (R, n) over the root mean square of its row. Within a team of threads, as the next one.
static void norm(const float *x, T *out, int64_t R, int64_t n, float eps) {
#pragma omp for
    for (int64_t begin = 0; begin < R * n; begin += n) {
        floats squares = {};
        for (int64_t i = begin; i < begin + n; i += LANES) squares += load(x + i) * load(x + i);
        const float scale = 1 / std::sqrt(sum(squares) / n + eps);
        for (int64_t i = begin; i < begin + n; i += LANES) store(out + i, load(x + i) * scale);
    }
}

// x (R, n) @ weight.T (n, m), BLOCK numbers of a row at a time: finish(row, column, numbers). The weight is laid out as
// words (m / BLOCK, n / PAIR, BLOCK). There are rows up to a multiple of BLOCK, and n is one.
template <class F>
static void multiply(const T *x, const word *weight, int64_t R, int64_t m, int64_t n, F finish) {
    const int64_t words = n / PAIR, least = TILES ? BLOCK : ROWS;
    Tiles tiles;
#pragma omp for collapse(2)
    for (int64_t top = 0; top < R; top += MANY)
        for (int64_t column = 0; column < m; column += BLOCK)
            for (int64_t row = top; row < std::min(R, top + MANY); row += BLOCK) {
                alignas(64) float sums[BLOCK * BLOCK];
                const int64_t count = std::min<int64_t>(BLOCK, R - row);
                const char *next = R > ROWS && row == top ? (const char *)(weight + (column + BLOCK) * words) : nullptr;
                if (R == 1 && !TILES)  // one reply: nothing is computed for rows that are not there
                    for (int64_t j = 0; j < BLOCK; j += 2 * LANES)
                        vector_product<false, 1>((const word *)x, words, weight + column * words + j, BLOCK, sums + j,
                                                 BLOCK, words, nullptr);
                else
                    product<false>(x + row * n, words, weight + column * words, BLOCK, sums, BLOCK,
                                   round_up(count, least), BLOCK, words, next);
                for (int64_t r = 0; r < count; r++) finish(row + r, column, sums + r * BLOCK);
            }
}

template <class S>
static void norm_and_multiply(const float *x, const word *weight, const float *bias, S *out, int64_t R, int64_t n,
                              int64_t m, float eps) {
    static thread_local Piece<T> normed;
    normed.resize(round_up(R, BLOCK) * n);
    T *const factors = normed;  // of this thread, for all of its team
#pragma omp parallel
    {
        norm(x, factors, R, n, eps);
        multiply(factors, weight, R, m, n, [=](int64_t row, int64_t column, const float *sums) {
            for (int64_t i = 0; i < BLOCK && column + i < m; i += LANES) {
                const int64_t at = column + i;
                const floats sum = bias ? load(sums + i) + load(bias + at, m - at) : load(sums + i);
                store(out + row * m + at, sum, m - at);
            }
        });
    }
}

extern "C" {

// out (R, m) = the norm of x (R, n) @ weight.T, whose rows are multiplied by the gains of the norm already, + bias
void project(const float *x /* R * n */, const word *weight /* round_up(m, 32) * n */,
             const float *OPTIONAL bias /* m */, T *out /* R * m */, int64_t R, int64_t n, int64_t m, float eps) {
    norm_and_multiply(x, weight, bias, out, R, n, m, eps);
}

void project_to_floats(const float *x /* R * n */, const word *weight /* round_up(m, 32) * n */,
                       float *out /* R * m */, int64_t R, int64_t n, int64_t m, float eps) {
    norm_and_multiply(x, weight, nullptr, out, R, n, m, eps);
}

// What is behind attention in a layer: x (R, n) += attended (R, heads) @ out.T, and then += its MLP with h inner numbers.
// In gate_up columns of both matrices stand side by side, half a block of each.
void mlp(float *x /* R * n */, const T *attended /* round_up(R, 32) * heads */, const word *out /* n * heads */,
         const word *gate_up /* 2 * h * n */, const word *down /* n * h */, int64_t R, int64_t heads, int64_t n,
         int64_t h, float eps) {
    static thread_local Piece<T> memory;
    memory.resize(round_up(R, BLOCK) * (n + h));
    T *const normed = memory, *const inner = normed + round_up(R, BLOCK) * n;
    auto add = [=](int64_t row, int64_t column, const float *sums) {
        float *at = x + row * n + column;
        for (int i = 0; i < BLOCK; i += LANES) store(at + i, load(at + i) + load(sums + i));
    };
    auto gated = [=](int64_t row, int64_t column, const float *sums) {
        for (int i = 0; i < BLOCK / 2; i += LANES) {
            const floats gate = load(sums + i), up = load(sums + BLOCK / 2 + i);
            store(inner + row * h + column / 2 + i, gate * sigmoid(gate) * up);
        }
    };
#pragma omp parallel
    {
        multiply(attended, out, R, n, heads, add);
        norm(x, normed, R, n, eps);
        multiply(normed, gate_up, R, 2 * h, n, gated);
        multiply(inner, down, R, n, h, add);
    }
}

// Attention of the new tokens to all that their rows hold, and themselves.
//   qkv (R, KV * GROUP + KV + KV heads of DIM): their queries, keys and values
//   q_gain, k_gain (DIM,) if queries and keys are normed, cos, sin (capacity, DIM / 2): for norm_and_rotate
//   positions (R,): where the tokens stand in their rows, which is how many each row holds
//   keys, values (rows, KV, capacity, DIM): take up the new ones
//   row_ids (R,): which of these rows are meant, if they are not the first R
//   out (R, KV * GROUP * DIM)
void attend(const T *qkv /* R * (GROUP + 2) * KV * DIM */, const float *OPTIONAL q_gain /* DIM */,
            const float *OPTIONAL k_gain /* DIM */,
            const float *cos /* capacity * DIM / 2 */, const float *sin /* capacity * DIM / 2 */,
            const int64_t *positions /* R */, const int64_t *OPTIONAL row_ids /* R */,
            T *keys /* rows * KV * capacity * DIM */, T *values /* rows * KV * capacity * DIM */,
            T *out /* round_up(R, 32) * KV * GROUP * DIM */, int64_t R, int64_t rows, int64_t capacity, float eps) {
    const int64_t step = std::max(LANES, FEW), most = round_up(capacity, step);
    const float scale = LOG2_E / std::sqrt(float(DIM));  // of products, for powers of 2
#pragma omp parallel
    {
        std::vector<float> scores(GROUP * most);  // a row for each query of a group
        std::vector<T> weights(GROUP * most);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < R * KV; task++) {
            const int64_t r = task / KV, head = task % KV, place = positions[r], held = place + 1;
            const int64_t end = round_up(held, step);
            const float *cosines = cos + place * (DIM / 2), *sines = sin + place * (DIM / 2);
            const int64_t begin = ((row_ids ? row_ids[r] : r) * KV + head) * capacity * DIM;
            T *key = keys + begin, *value = values + begin;
            const T *token = qkv + r * (GROUP + 2) * KV * DIM;
            // 1. The queries, and the new key and value, which the cache takes up
            T rounded[DIM];
            ints q[GROUP][WORDS];
            floats x[N];
            for (int g = 0; g < GROUP; g++) {
                read(token + (head * GROUP + g) * DIM, x);
                norm_and_rotate(x, q_gain, cosines, sines, eps, rounded);
                memcpy(q[g], rounded, sizeof rounded);
            }
            read(token + (KV * GROUP + head) * DIM, x);
            norm_and_rotate(x, k_gain, cosines, sines, eps, key + place * DIM);
            memcpy(value + place * DIM, token + (KV * GROUP + KV + head) * DIM, DIM * sizeof(T));

            // 2. The products with the keys, the last one several times. The values are fetched meanwhile.
            for (int64_t s = 0; s < held; s += FEW) {
                ints k[FEW][WORDS];
                for (int i = 0; i < FEW; i++) {
                    const int64_t at = std::min(s + i, place) * DIM;
                    memcpy(k[i], key + at, sizeof k[i]);
                    for (size_t c = 0; c < sizeof k[i]; c += 64) __builtin_prefetch((char *)(value + at) + c);
                }
                for (int g = 0; g < GROUP; g++) {
                    floats products[FEW] = {};
                    for (int w = 0; w < WORDS; w++)
                        for (int i = 0; i < FEW; i++) products[i] = add_products(products[i], q[g][w], k[i][w]);
                    sums(products, &scores[g * most + s]);
                }
            }
            // 3. The numerators of the softmax, and their sum
            float total[GROUP];
            for (int g = 0; g < GROUP; g++) {
                float *at = &scores[g * most];
                for (int64_t s = held; s < end; s++) at[s] = -INFINITY;
                floats all = {}, tops = load(at);
                for (int64_t s = LANES; s < end; s += LANES) {
                    floats x = load(at + s);
                    tops = x > tops ? x : tops;
                }
                const float top = largest(tops);
                for (int64_t s = 0; s < end; s += LANES) {
                    floats e = exp2((load(at + s) - top) * scale);
                    store(&weights[g * most + s], e);
                    all += e;
                }
                total[g] = sum(all);
            }
            // 4. The mean of the values
            floats result[GROUP][N] = {};
            for (int64_t s = 0; s < held; s += PAIR) {
                const T *upper = value + s * DIM, *lower = value + std::min(s + PAIR - 1, place) * DIM;
                for (int g = 0; g < GROUP; g++) {
                    int32_t weight;
                    memcpy(&weight, &weights[g * most + s], sizeof weight);
                    for (int i = 0; i < N; i++)
                        result[g][i] = add_products(result[g][i], ints{} + weight,
                                                    pair(upper + i * LANES, lower + i * LANES));
                }
            }
            for (int g = 0; g < GROUP; g++)
                for (int i = 0; i < N; i++) store(out + (task * GROUP + g) * DIM + i * LANES, result[g][i] / total[g]);
        }
    }
}

}
