// What stands between the products of a layer when each of R rows of a batch gets one more token; see few_rows.py.
//
// Activations are (n, columns), a column for each row. columns is 1 or a multiple of LANES, more than R where R is not.
// On the command line of the compiler stand T, the dtype of weights, cache and activations (float or bfloat16), and
// the shape of attention: DIM numbers in a head, KV heads of keys and values, GROUP heads of queries for each of them,
// LANES numbers in a vector, of which half a head is a multiple. Loops of known length keep a head in registers.

#include "vectors.h"

const int N = DIM / LANES;  // vectors in a head

static inline void read_column(const T *from, int64_t columns, floats *head) {
    T numbers[DIM];
    for (int d = 0; d < DIM; d++) numbers[d] = from[d * columns];
    for (int i = 0; i < N; i++) head[i] = load(numbers + i * LANES);
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

extern "C" {

// x (n, columns) float += by (n, columns), if there is one; out (n, columns) = x over root mean squares, by column.
void add_and_norm(float *x, const T *by, T *out, int64_t n, int64_t columns, float eps) {
    if (columns == 1) {  // n is a multiple of LANES
        floats squares = {};
        for (int64_t i = 0; i < n; i += LANES) {
            floats at = load(x + i);
            if (by) store(x + i, at += load(by + i));
            squares += at * at;
        }
        float scale = 1 / std::sqrt(sum(squares) / n + eps);
        for (int64_t i = 0; i < n; i += LANES) store(out + i, load(x + i) * scale);
        return;
    }
#pragma omp parallel for
    for (int64_t begin = 0; begin < columns; begin += LANES) {
        floats scale = {};
        for (int64_t i = begin; i < n * columns; i += columns) {
            floats at = load(x + i);
            if (by) store(x + i, at += load(by + i));
            scale += at * at;
        }
        for (int r = 0; r < LANES; r++) scale[r] = 1 / std::sqrt(scale[r] / n + eps);
        for (int64_t i = begin; i < n * columns; i += columns) store(out + i, load(x + i) * scale);
    }
}

// out (n,) = silu(gate (n,)) * up (n,)
void swiglu(const T *gate, const T *up, T *out, int64_t n) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += LANES) {
        floats x = load(gate + i);
        store(out + i, x * sigmoid(x) * load(up + i));
    }
}

// Attention of the new tokens to all that their rows hold, and themselves.
//   qkv (KV * GROUP + KV + KV heads of DIM, columns): their queries, keys and values
//   q_gain, k_gain (DIM,), cos, sin (capacity, DIM / 2): for norm_and_rotate
//   places (R,): where the tokens stand in their rows, which is how many each row holds
//   keys, values (R, KV, capacity, DIM): take up the new ones
//   out (R, KV * GROUP * DIM)
void attend(const T *qkv, const float *q_gain, const float *k_gain, const float *cos, const float *sin,
            const int64_t *places, T *keys, T *values, T *out, int64_t R, int64_t columns, int64_t capacity,
            float eps) {
    const int64_t most = (capacity + LANES - 1) / LANES * LANES, width = DIM * columns;
#pragma omp parallel
    {
        std::vector<float> weights(GROUP * most);  // a row for each query of a group
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < R * KV; task++) {
            const int64_t r = task / KV, head = task % KV, place = places[r], held = place + 1;
            const float *cosines = cos + place * (DIM / 2), *sines = sin + place * (DIM / 2);
            T *key = keys + task * capacity * DIM, *value = values + task * capacity * DIM;
            const T *column = qkv + r;
            // 1. The queries, and the new key and value, which the cache takes up
            floats q[GROUP][N], x[N];
            for (int g = 0; g < GROUP; g++) {
                T rounded[DIM];
                read_column(column + (head * GROUP + g) * width, columns, x);
                norm_and_rotate(x, q_gain, cosines, sines, eps, rounded);
                for (int i = 0; i < N; i++) q[g][i] = load(rounded + i * LANES) * (LOG2_E / std::sqrt(float(DIM)));
            }
            read_column(column + (KV * GROUP + head) * width, columns, x);
            norm_and_rotate(x, k_gain, cosines, sines, eps, key + place * DIM);
            read_column(column + (KV * GROUP + KV + head) * width, columns, x);
            for (int i = 0; i < N; i++) store(value + place * DIM + i * LANES, x[i]);

            // 2. Scores, for powers of 2. The values are fetched meanwhile.
            for (int64_t s = 0; s < held; s++) {
                floats k[N];
                for (int i = 0; i < N; i++) k[i] = load(key + s * DIM + i * LANES);
                for (size_t c = 0; c < DIM * sizeof(T); c += 64) __builtin_prefetch((char *)(value + s * DIM) + c);
                for (int g = 0; g < GROUP; g++) {
                    floats products = q[g][0] * k[0];
                    for (int i = 1; i < N; i++) products += q[g][i] * k[i];
                    weights[g * most + s] = sum(products);
                }
            }
            // 3. The numerators of the softmax, and their sum
            float total[GROUP];
            for (int g = 0; g < GROUP; g++) {
                float *w = &weights[g * most];
                for (int64_t s = held; s % LANES; s++) w[s] = -INFINITY;
                floats all = {}, tops = load(w);
                for (int64_t s = LANES; s < held; s += LANES) {
                    floats x = load(w + s);
                    tops = x > tops ? x : tops;
                }
                const float top = largest(tops);
                for (int64_t s = 0; s < held; s += LANES) {
                    floats e = exp2(load(w + s) - top);
                    store(w + s, e);
                    all += e;
                }
                total[g] = sum(all);
            }
            // 4. The mean of the values
            floats result[GROUP][N] = {};
            for (int64_t s = 0; s < held; s++)
                for (int i = 0; i < N; i++) {
                    floats v = load(value + s * DIM + i * LANES);
                    for (int g = 0; g < GROUP; g++) result[g][i] += weights[g * most + s] * v;
                }
            for (int g = 0; g < GROUP; g++)
                for (int i = 0; i < N; i++) store(out + (task * GROUP + g) * DIM + i * LANES, result[g][i] / total[g]);
        }
    }
}

}
