// Fused RMSNorm with residual, RoPE, SwiGLU, cross-entropy and router logits, each in one pass over memory.
//
// On the command line of the compiler stands T, the dtype of products: float or bfloat16. Behind each pointer of an
// exported function stands how many numbers it points to; native.py reads that and checks every call.

#include <algorithm>
#include <omp.h>
#include <type_traits>

#include "vectors.h"

// Within a team of threads, total (n,) += what each of them has: one after the other, so that it is always the same sum.
static void add_in_thread_order(const std::vector<float> &part, float *total, int64_t n) {
#pragma omp for ordered schedule(static, 1)
    for (int thread = 0; thread < omp_get_num_threads(); thread++)
#pragma omp ordered
        for (int64_t i = 0; i < n; i++) total[i] += part[i];
}

// residual (rows, n) = x (rows, n) + branch, else it is x; out (rows, n) = residual over its root mean square, times gain;
// scales (rows,): 1 / that root
template <class X>
static void norm(const X *x, const T *branch, X *residual, const float *gain, T *out, float *scales, int64_t rows,
                 int64_t n, float eps) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        X *const at = residual + row * n;
        floats squares = {};
        for (int64_t i = 0; i < n; i += LANES) {
            if (branch) store(at + i, load(x + row * n + i, n - i) + load(branch + row * n + i, n - i), n - i);
            floats value = load(at + i, n - i);
            squares += value * value;
        }
        const float scale = scales[row] = 1 / std::sqrt(sum(squares) / n + eps);
        for (int64_t i = 0; i < n; i += LANES)
            store(out + row * n + i, load(at + i, n - i) * scale * load(gain + i, n - i), n - i);
    }
}

// grad_x and, rounded, grad_branch (rows, n), if it is wanted, and grad_gain (n,), from the gradients of out and, if it has one,
// of residual
template <class X>
static void norm_backward(const X *residual, const float *gain, const float *scales, const T *grad, const X *grad_residual,
                          X *grad_x, T *grad_branch, float *grad_gain, int64_t rows, int64_t n) {
    memset(grad_gain, 0, n * sizeof(float));
#pragma omp parallel
    {
        std::vector<float> part(round_up(n, LANES));  // of grad_gain
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float scale = scales[row];
            floats along = {};  // what only changes the length of a row has no effect
            for (int64_t i = 0; i < n; i += LANES) {
                floats product = load(residual + row * n + i, n - i) * scale * load(grad + row * n + i, n - i);
                store(&part[i], load(&part[i]) + product);
                along += product * load(gain + i, n - i);
            }
            const float mean = sum(along) / n;
            for (int64_t i = 0; i < n; i += LANES) {
                const int64_t at = row * n + i;
                floats upstream = load(grad + at, n - i) * load(gain + i, n - i);
                floats change = (upstream - load(residual + at, n - i) * scale * mean) * scale;
                if (grad_residual) change += load(grad_residual + at, n - i);
                store(grad_x + at, change, n - i);
                if (grad_branch) store(grad_branch + at, change, n - i);
            }
        }
        add_in_thread_order(part, grad_gain, n);
    }
}

// The first n numbers, -infinity behind them: nothing to a softmax.
static inline floats load_or_neg_inf(const T *from, int64_t n) {
    floats x = load(from, n);
    for (int64_t i = n; i < LANES; i++) x[i] = -INFINITY;
    return x;
}

const int FEW = 4;  // rows whose factors stay in registers

extern "C" {

// The residual stream in float
void add_norm_float(const float *x /* rows * n */, const T *OPTIONAL branch /* rows * n */,
                    float *residual /* rows * n */, const float *gain /* n */, T *out /* rows * n */,
                    float *scales /* rows */, int64_t rows, int64_t n, float eps) {
    norm(x, branch, residual, gain, out, scales, rows, n, eps);
}

void add_norm_float_backward(const float *residual /* rows * n */, const float *gain /* n */,
                             const float *scales /* rows */, const T *grad /* rows * n */,
                             const float *OPTIONAL grad_residual /* rows * n */, float *grad_x /* rows * n */,
                             T *OPTIONAL grad_branch /* rows * n */, float *grad_gain /* n */, int64_t rows, int64_t n) {
    norm_backward(residual, gain, scales, grad, grad_residual, grad_x, grad_branch, grad_gain, rows, n);
}

// The residual stream in the dtype of products
void add_norm(const T *x /* rows * n */, const T *OPTIONAL branch /* rows * n */, T *residual /* rows * n */,
              const float *gain /* n */, T *out /* rows * n */, float *scales /* rows */, int64_t rows, int64_t n,
              float eps) {
    norm(x, branch, residual, gain, out, scales, rows, n, eps);
}

void add_norm_backward(const T *residual /* rows * n */, const float *gain /* n */, const float *scales /* rows */,
                       const T *grad /* rows * n */, const T *OPTIONAL grad_residual /* rows * n */,
                       T *grad_x /* rows * n */, T *OPTIONAL grad_branch /* rows * n */, float *grad_gain /* n */,
                       int64_t rows, int64_t n) {
    norm_backward(residual, gain, scales, grad, grad_residual, grad_x, grad_branch, grad_gain, rows, n);
}

// out (rows, m) = x (rows, n) @ weight.T, of the few rows of a weight (m, n)
void router_logits(const T *x /* rows * n */, const float *weight /* m * n */, float *out /* rows * m */, int64_t rows,
                   int64_t n, int64_t m) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t first = 0; first < m; first += FEW) {  // of the last ones, where there are fewer, one several times
            floats products[FEW] = {};
            for (int64_t i = 0; i < n; i += LANES)
                for (int64_t j = 0; j < FEW; j++)
                    products[j] += load(x + row * n + i, n - i) * load(weight + std::min(first + j, m - 1) * n + i, n - i);
            for (int64_t j = first; j < std::min(first + FEW, m); j++) out[row * m + j] = sum(products[j - first]);
        }
}

// grad_x like x, grad_weight like weight, from grad (rows, m)
void router_logits_backward(const T *x /* rows * n */, const float *weight /* m * n */, const float *grad /* rows * m */,
                            T *grad_x /* rows * n */, float *grad_weight /* m * n */, int64_t rows, int64_t n,
                            int64_t m) {
    memset(grad_weight, 0, m * n * sizeof(float));
#pragma omp parallel
    {
        std::vector<float> part(m * n);  // of grad_weight
        auto work = [&](auto count, int64_t row) {  // on so many rows
            for (int64_t i = 0; i < n; i += LANES) {
                floats at[count], sums[count] = {};
                for (int r = 0; r < count; r++) at[r] = load(x + (row + r) * n + i, n - i);
                for (int64_t j = 0; j < m; j++) {
                    const floats factor = load(weight + j * n + i, n - i);
                    floats total = load(&part[j * n + i], n - i);
                    for (int r = 0; r < count; r++) {
                        sums[r] += grad[(row + r) * m + j] * factor;
                        total += grad[(row + r) * m + j] * at[r];
                    }
                    store(&part[j * n + i], total, n - i);
                }
                for (int r = 0; r < count; r++) store(grad_x + (row + r) * n + i, sums[r], n - i);
            }
        };
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += FEW) {
            if (row + FEW <= rows)
                work(std::integral_constant<int, FEW>(), row);
            else
                for (int64_t last = row; last < rows; last++) work(std::integral_constant<int, 1>(), last);
        }
        add_in_thread_order(part, grad_weight, m * n);
    }
}

// out = x (tokens, heads, 2 * half), its pairs turned by angles: cos, sin (tokens, half)
void rotate(const T *x /* tokens * heads * 2 * half */, const float *cos /* tokens * half */,
            const float *sin /* tokens * half */, T *out /* tokens * heads * 2 * half */, int64_t tokens, int64_t heads,
            int64_t half) {
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
void swiglu(const T *gate /* n */, const T *up /* n */, T *out /* n */, int64_t n) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += LANES) {
        floats x = load(gate + i, n - i);
        store(out + i, x * sigmoid(x) * load(up + i, n - i), n - i);
    }
}

void swiglu_backward(const T *gate /* n */, const T *up /* n */, const T *grad /* n */, T *grad_gate /* n */,
                     T *grad_up /* n */, int64_t n) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += LANES) {
        floats x = load(gate + i, n - i), g = load(grad + i, n - i), share = sigmoid(x);
        store(grad_gate + i, g * load(up + i, n - i) * share * (1.f + x * (1.f - share)), n - i);
        store(grad_up + i, g * x * share, n - i);
    }
}

// losses (rows,) = -log softmax(logits (rows, n))[targets (rows,)]; logits become its gradient
void cross_entropy(T *logits /* rows * n */, const int64_t *targets /* rows */, float *losses /* rows */, int64_t rows,
                   int64_t n) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        T *at = logits + row * n;
        floats tops = floats{} - INFINITY, sums = {};
        for (int64_t i = 0; i < n; i += LANES) {
            floats x = load_or_neg_inf(at + i, n - i);
            tops = x > tops ? x : tops;
        }
        const float top = largest(tops);
        for (int64_t i = 0; i < n; i += LANES) sums += exp2((load_or_neg_inf(at + i, n - i) - top) * LOG2_E);
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

}
