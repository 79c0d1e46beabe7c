// What stands between the products of a layer when each of R rows of a batch gets one more token; see cpu_decoder.py.
//
// On the command line of the compiler stand T, the dtype of weights, cache and activations (float or bfloat16), and
// the shape of attention: DIM numbers in a head, KV heads of keys and values, GROUP heads of queries for each of them,
// LANES numbers in a vector, of which half a head is a multiple. Loops of known length keep a head in registers.

#include "products.h"

const int N = DIM / LANES, WORDS = N / PAIR;  // vectors in a head: of numbers, and of words
const int FEW = 4;  // keys at once

static inline void read(const T *from, floats *head) {
    for (int i = 0; i < N; i++) head[i] = load(from + i * LANES);
}

// A head over its root mean square, times gain, turned by its position's angles (DIM / 2 cosines and sines).
static inline void norm_and_rotate(floats *head, const float *gain, const float *cos, const float *sin, float eps,
                                   T *to) {
    floats squares = {};
    for (int i = 0; i < N; i++) squares += head[i] * head[i];
    float scale = 1 / std::sqrt(sum(squares) / DIM + eps);
    for (int i = 0; i < N / 2; i++) {
        floats a = head[i] * scale * load(gain + i * LANES), c = load(cos + i * LANES);
        floats b = head[i + N / 2] * scale * load(gain + (i + N / 2) * LANES), s = load(sin + i * LANES);
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

extern "C" {

// x (R, n) float += by (R, n), if there is one; out (R, n) = x over the root mean square of its row. n, as all that
// follow, is a multiple of LANES.
void add_and_norm(float *x, const T *by, T *out, int64_t R, int64_t n, float eps) {
#pragma omp parallel for if (R > 1)
    for (int64_t begin = 0; begin < R * n; begin += n) {
        floats squares = {};
        for (int64_t i = begin; i < begin + n; i += LANES) {
            floats at = load(x + i);
            if (by) store(x + i, at += load(by + i));
            squares += at * at;
        }
        const float scale = 1 / std::sqrt(sum(squares) / n + eps);
        for (int64_t i = begin; i < begin + n; i += LANES) store(out + i, load(x + i) * scale);
    }
}

// out (R, n) = silu(gate) * up, each (R, n), which stand side by side in gate_up (R, 2 n)
void swiglu(const T *gate_up, T *out, int64_t R, int64_t n) {
#pragma omp parallel for if (R > 1)
    for (int64_t r = 0; r < R; r++) {
        const T *gate = gate_up + 2 * r * n;
        for (int64_t i = 0; i < n; i += LANES) {
            floats x = load(gate + i);
            store(out + r * n + i, x * sigmoid(x) * load(gate + n + i));
        }
    }
}

// Attention of the new tokens to all that their rows hold, and themselves.
//   qkv (R, KV * GROUP + KV + KV heads of DIM): their queries, keys and values
//   q_gain, k_gain (DIM,), cos, sin (capacity, DIM / 2): for norm_and_rotate
//   places (R,): where the tokens stand in their rows, which is how many each row holds
//   keys, values (rows, KV, capacity, DIM): take up the new ones
//   where (R,): which of these rows are meant, if they are not the first R
//   out (R, KV * GROUP * DIM)
void attend(const T *qkv, const float *q_gain, const float *k_gain, const float *cos, const float *sin,
            const int64_t *places, const int64_t *where, T *keys, T *values, T *out, int64_t R, int64_t capacity,
            float eps) {
    const int64_t step = std::max(LANES, FEW), most = round_up(capacity, step);
    const float scale = LOG2_E / std::sqrt(float(DIM));  // of products, for powers of 2
#pragma omp parallel
    {
        std::vector<float> scores(GROUP * most);  // a row for each query of a group
        std::vector<T> weights(GROUP * most);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < R * KV; task++) {
            const int64_t r = task / KV, head = task % KV, place = places[r], held = place + 1;
            const int64_t end = round_up(held, step);
            const float *cosines = cos + place * (DIM / 2), *sines = sin + place * (DIM / 2);
            const int64_t begin = ((where ? where[r] : r) * KV + head) * capacity * DIM;
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
