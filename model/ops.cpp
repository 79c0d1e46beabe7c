// What stands between the products of a training step, each in one pass over memory; see ops.py.
//
// On the command line of the compiler stands T, the dtype of products: float or bfloat16.

#include <omp.h>

#include <algorithm>

#include "products.h"

// out (rows, n) = x (rows, n) over its root mean square, times gain; scales (rows,): 1 / that
template <class X>
static void norm(const X *x, const float *gain, T *out, float *scales, int64_t rows, int64_t n, float eps) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const X *from = x + row * n;
        floats squares = {};
        for (int64_t i = 0; i < n; i += LANES) {
            floats at = load(from + i, n - i);
            squares += at * at;
        }
        const float scale = scales[row] = 1 / std::sqrt(sum(squares) / n + eps);
        for (int64_t i = 0; i < n; i += LANES)
            store(out + row * n + i, load(from + i, n - i) * scale * load(gain + i, n - i), n - i);
    }
}

// by_x like x, by_gain (n,), from grad (rows, n), the gradient of out
template <class X>
static void norm_backward(const X *x, const float *gain, const float *scales, const T *grad, X *by_x, float *by_gain,
                          int64_t rows, int64_t n) {
    memset(by_gain, 0, n * sizeof(float));
#pragma omp parallel
    {
        std::vector<float> part(round_up(n, LANES));  // of by_gain
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float scale = scales[row];
            floats along = {};  // what only changes the length of x has no effect
            for (int64_t i = 0; i < n; i += LANES) {
                floats product = load(x + row * n + i, n - i) * scale * load(grad + row * n + i, n - i);
                store(&part[i], load(&part[i]) + product);
                along += product * load(gain + i, n - i);
            }
            const float mean = sum(along) / n;
            for (int64_t i = 0; i < n; i += LANES) {
                floats unit = load(x + row * n + i, n - i) * scale;
                floats upstream = load(grad + row * n + i, n - i) * load(gain + i, n - i);
                store(by_x + row * n + i, (upstream - unit * mean) * scale, n - i);
            }
        }
#pragma omp for ordered schedule(static, 1)
        for (int thread = 0; thread < omp_get_num_threads(); thread++)  // one after the other: always the same sum
#pragma omp ordered
            for (int64_t i = 0; i < n; i++) by_gain[i] += part[i];
    }
}

// The first n numbers, -infinity behind them: nothing to a softmax.
static inline floats some(const T *from, int64_t n) {
    floats x = load(from, n);
    for (int64_t i = n; i < LANES; i++) x[i] = -INFINITY;
    return x;
}

extern "C" {

void norm_of_floats(const float *x, const float *gain, T *out, float *scales, int64_t rows, int64_t n, float eps) {
    norm(x, gain, out, scales, rows, n, eps);
}

void norm_of_same(const T *x, const float *gain, T *out, float *scales, int64_t rows, int64_t n, float eps) {
    norm(x, gain, out, scales, rows, n, eps);
}

void norm_of_floats_backward(const float *x, const float *gain, const float *scales, const T *grad, float *by_x,
                             float *by_gain, int64_t rows, int64_t n) {
    norm_backward(x, gain, scales, grad, by_x, by_gain, rows, n);
}

void norm_of_same_backward(const T *x, const float *gain, const float *scales, const T *grad, T *by_x, float *by_gain,
                           int64_t rows, int64_t n) {
    norm_backward(x, gain, scales, grad, by_x, by_gain, rows, n);
}

// out = x (tokens, heads, 2 * half), its pairs turned by angles: cos, sin (tokens, half)
void rotate(const T *x, const float *cos, const float *sin, T *out, int64_t tokens, int64_t heads, int64_t half) {
#pragma omp parallel for
    for (int64_t head = 0; head < tokens * heads; head++) {
        const T *from = x + head * 2 * half;
        T *to = out + head * 2 * half;
        for (int64_t i = 0; i < half; i += LANES) {
            floats a = load(from + i, half - i), c = load(cos + head / heads * half + i, half - i);
            floats b = load(from + half + i, half - i), s = load(sin + head / heads * half + i, half - i);
            store(to + i, a * c - b * s, half - i);
            store(to + half + i, b * c + a * s, half - i);
        }
    }
}

// out (n,) = silu(gate (n,)) * up (n,)
void swiglu(const T *gate, const T *up, T *out, int64_t n) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += LANES) {
        floats x = load(gate + i, n - i);
        store(out + i, x * sigmoid(x) * load(up + i, n - i), n - i);
    }
}

void swiglu_backward(const T *gate, const T *up, const T *grad, T *by_gate, T *by_up, int64_t n) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += LANES) {
        floats x = load(gate + i, n - i), g = load(grad + i, n - i), share = sigmoid(x);
        store(by_gate + i, g * load(up + i, n - i) * share * (1.f + x * (1.f - share)), n - i);
        store(by_up + i, g * x * share, n - i);
    }
}

// losses (rows,) = -log softmax(logits (rows, n))[targets (rows,)]; logits become its gradient
void cross_entropy(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t n) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        T *at = logits + row * n;
        floats tops = floats{} - INFINITY, sums = {};
        for (int64_t i = 0; i < n; i += LANES) {
            floats x = some(at + i, n - i);
            tops = x > tops ? x : tops;
        }
        const float top = largest(tops);
        for (int64_t i = 0; i < n; i += LANES) sums += exp2((some(at + i, n - i) - top) * LOG2_E);
        const float total = sum(sums);
        losses[row] = std::log(total) + top - load(at + targets[row], 1)[0];
        for (int64_t i = 0; i < n; i += LANES) {
            floats probability = exp2((load(at + i, n - i) - top) * LOG2_E) / total;
            const int64_t target = targets[row] - i;
            if (target >= 0 && target < LANES) probability[target] -= 1;
            store(at + i, probability, n - i);
        }
    }
}

int has_tiles() { return TILES; }

// total (M, N) float = or += a.T @ b; a (K, M), b (K, N). Only with tiles.
void sum_of_products(const T *a, const T *b, float *total, int64_t K, int64_t M, int64_t N, int64_t add) {
#ifdef __AMX_BF16__
    constexpr int64_t MOST = 128;
    const int64_t most = round_up(N, 32);  // words of a column at a time: they stay in the cache of a core
    if (!K && !add) memset(total, 0, M * N * sizeof(float));
    static thread_local Piece<word> memory;
    memory.resize(most * MOST);
    word *const right = memory;  // all columns of b, 32 of them after 32
#pragma omp parallel
    {
        Tiles tiles;
        alignas(64) word left[32 * MOST];  // 32 columns of a
        for (int64_t k = 0; k < K; k += MOST * PAIR) {
            const int64_t rows = std::min(MOST * PAIR, K - k), words = round_up(rows, 16 * PAIR) / PAIR;
            auto word_at = [rows](const T *from, int64_t row, int64_t width, int64_t column) {
                const int64_t n = width - column;
                const T *first = from + row * width + column;
                if (row + 1 < rows && n >= LANES) return pair(first, first + width);
                const floats a = row < rows ? load(first, n) : floats{};
                const floats b = row + 1 < rows ? load(first + width, n) : floats{};
                return (ints)((ints)b | ((ints)a >> 16 & 0xffff));
            };
#pragma omp for
            for (int64_t w = 0; w < words; w++)
                for (int64_t j = 0; j < N; j += LANES)
                    store_words(right + (j / 32 * words + w) * 32 + j % 32, word_at(b + k * N, PAIR * w, N, j));
#pragma omp for
            for (int64_t i = 0; i < M; i += 32) {
                for (int64_t h = 0; h < 32 && i + h < M; h += LANES)
                    for (int64_t w = 0; w < words; w += LANES) {
                        ints block[LANES];
                        for (int64_t r = 0; r < LANES; r++) block[r] = word_at(a + k * M, PAIR * (w + r), M, i + h);
                        transpose(block);
                        for (int64_t r = 0; r < LANES; r++) store_words(left + (h + r) * words + w, block[r]);
                    }
                for (int64_t j = 0; j < N; j += 32) {
                    const word *columns = right + j * words;
                    if (i + 32 <= M && j + 32 <= N) {
                        float *at = total + i * N + j;
                        if (k || add)
                            tile_product<true>(left, words, columns, 32, at, N, words);
                        else
                            tile_product<false>(left, words, columns, 32, at, N, words);
                        continue;
                    }
                    float block[32 * 32];  // at an edge
                    tile_product<false>(left, words, columns, 32, block, 32, words);
                    for (int64_t r = i; r < std::min(i + 32, M); r++)
                        for (int64_t c = j; c < std::min(j + 32, N); c++) {
                            const float sum = block[(r - i) * 32 + c - j];
                            total[r * N + c] = k || add ? total[r * N + c] + sum : sum;
                        }
                }
            }
        }
    }
#endif
}

}
