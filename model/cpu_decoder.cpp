// What stands between the products of a layer when each of R rows of a batch gets one more token; see cpu_decoder.py.
//
// On the command line of the compiler stand T, the dtype of weights, cache and activations (float or bfloat16), and
// the shape of attention: DIM numbers in a head, KV heads of keys and values, GROUP heads of queries for each of them,
// LANES numbers in a vector, of which half a head is a multiple. Loops of known length keep a head in registers.

#include "vectors.h"

const int N = DIM / LANES;  // vectors in a head

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
    const int64_t most = (capacity + LANES - 1) / LANES * LANES;
#pragma omp parallel
    {
        std::vector<float> weights(GROUP * most);  // a row for each query of a group
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < R * KV; task++) {
            const int64_t r = task / KV, head = task % KV, place = places[r], held = place + 1;
            const float *cosines = cos + place * (DIM / 2), *sines = sin + place * (DIM / 2);
            const int64_t begin = ((where ? where[r] : r) * KV + head) * capacity * DIM;
            T *key = keys + begin, *value = values + begin;
            const T *token = qkv + r * (GROUP + 2) * KV * DIM;
            // 1. The queries, and the new key and value, which the cache takes up
            floats q[GROUP][N], x[N];
            for (int g = 0; g < GROUP; g++) {
                T rounded[DIM];
                read(token + (head * GROUP + g) * DIM, x);
                norm_and_rotate(x, q_gain, cosines, sines, eps, rounded);
                for (int i = 0; i < N; i++) q[g][i] = load(rounded + i * LANES) * (LOG2_E / std::sqrt(float(DIM)));
            }
            read(token + (KV * GROUP + head) * DIM, x);
            norm_and_rotate(x, k_gain, cosines, sines, eps, key + place * DIM);
            memcpy(value + place * DIM, token + (KV * GROUP + KV + head) * DIM, DIM * sizeof(T));

            // 2. Scores, for powers of 2. The values are fetched meanwhile.
            for (int64_t s = 0; s < held; s++) {
                floats k[N];
                read(key + s * DIM, k);
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
