// Linear layers in bfloat16 on a CPU that has products of it, in AVX-512 or on a matrix unit (AMX): x @ weight.T and its
// gradients; see linear.py, and ops.cpp for prototypes.
//
// Weights are float, as the optimizer keeps them, and rounded on the way: no pass over memory makes a copy. A thread
// computes a rectangle of a result, and puts in order itself what it reads for that: there is nothing to wait for.

#include <omp.h>

#include "products.h"

#ifdef __AVX512BF16__

struct Rectangle { int64_t top, bottom, from, to; };  // rows and columns, multiples of 32 but for the last ones

// This thread's part of a result (M, N): of the ways to cut it for the team, the one where a part has the least edges. A
// column, whose factors have to be read, counts as many rows as `cost`.
static Rectangle part(int64_t M, int64_t N, int64_t cost) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    auto edges = [&](int64_t down) { return M / down + cost * N / (threads / down); };  // parts below each other
    int64_t down = 1;
    for (int64_t d = 2; d <= threads; d++)
        if (threads % d == 0 && edges(d) < edges(down)) down = d;
    auto border = [](int64_t n, int64_t parts, int64_t i) { return std::min(n, (n + 31) / 32 * i / parts * 32); };
    const int64_t across = threads / down, row = me / across, column = me % across;
    return {border(M, down, row), border(M, down, row + 1), border(N, across, column), border(N, across, column + 1)};
}

// 32 numbers of a row of a matrix (rows, width), zeros beyond its edges
static inline ints numbers(const T *matrix, int64_t rows, int64_t width, int64_t row, int64_t column) {
    ints x = {};
    const T *at = matrix + row * width + column;
    if (row < rows && width - column >= 32)
        memcpy(&x, at, sizeof x);
    else if (row < rows)
        memcpy(&x, at, (width - column) * sizeof(T));
    return x;
}

// Columns `from` to `to` of a weight (K, N), or ROWS of a weight (N, K): 32 after 32, as words (K / 2, 32).
template <bool ROWS>
static void pack(const float *weight, int64_t from, int64_t to, int64_t N, int64_t K, word *result) {
    auto place = [&](int64_t n, int64_t k) {
        return result + ((n - from) / 32 * (K / 2) + k / 2) * 32 + (n - from) % 32;
    };
    if (ROWS) {
        for (int64_t n = from; n < to; n += LANES)
            for (int64_t k = 0; k < K; k += 2 * LANES) {
                ints block[LANES];
                for (int r = 0; r < LANES; r++) {
                    const float *at = weight + (n + r) * K + k;
                    const halves both[] = {rounded(load(at)), rounded(load(at + LANES))};
                    memcpy(&block[r], both, sizeof both);
                }
                transpose(block);
                for (int r = 0; r < LANES; r++) store_words(place(n, k) + r * 32, block[r]);
            }
    } else {
        for (int64_t k = 0; k < K; k += 2)
            for (int64_t n = from; n < to; n += LANES) {
                const float *at = weight + k * N + n;
                store_words(place(n, k), pair(rounded(load(at)), rounded(load(at + N))));
            }
    }
}

// out (M, N) = x (M, K) @ weight.T, ROWS, or x @ weight; the same of a second pair with K2 instead of K, and bias (N,), are
// added, if there are these.
template <bool ROWS>
static void multiply(const T *x, const float *weight, const T *x2, const float *weight2, const float *bias, T *out,
                     int64_t M, int64_t N, int64_t K, int64_t K2) {
    const T *const factors[] = {x, x2};
    const int64_t pairs = x2 ? 2 : 1, words[] = {K / 2, x2 ? K2 / 2 : 0}, all = words[0] + words[1];
    const int64_t whole = M / 32 * 32;
    auto most = [&](int64_t numbers) { return std::max<int64_t>(32, numbers / (2 * all) / 32 * 32); };
    const int64_t rows = most(1 << 18), columns = most(3 << 18);  // that stay in a core's cache: 0.5 and 1.5 MiB
#pragma omp parallel
    {
        const Rectangle my = part(M, N, 2);  // a column's factors are float, and packed
        static thread_local Piece<word> memory, padded;
        padded.resize(32 * all);
        memset(padded, 0, 32 * all * sizeof(word));
        for (int64_t p = 0; p < pairs; p++)  // beyond the last row there is no memory of ours
            memcpy(padded + p * 32 * words[0], factors[p] + whole * 2 * words[p], (M - whole) * words[p] * sizeof(word));
        alignas(64) float sums[2][32 * 32];  // in turns: one is read while the other is made
        int turn = 0;
        Tiles tiles;
        for (int64_t from = my.from; from < my.to; from += columns) {
            const int64_t to = std::min(from + columns, my.to), size = (to - from) * words[0];
            memory.resize((to - from) * all);
            pack<ROWS>(weight, from, to, N, K, memory);
            if (x2) pack<ROWS>(weight2, from, to, N, K2, memory + size);
            for (int64_t begin = my.top; begin < my.bottom; begin += rows)
                for (int64_t n = from; n < to; n += 32)
                    for (int64_t m = begin; m < std::min(begin + rows, my.bottom); m += 32, turn ^= 1) {
                        float *const sum = sums[turn];
                        for (int64_t p = 0; p < pairs; p++) {
                            const int64_t count = words[p];
                            const word *left = m < whole ? (word *)factors[p] + m * count : padded + p * 32 * words[0];
                            const word *right = memory + p * size + (n - from) * count;
                            if (p)
                                product<true>(left, count, right, 32, sum, 32, 32, 32, count);
                            else
                                product<false>(left, count, right, 32, sum, 32, 32, 32, count);
                        }
                        const floats left = bias ? load(bias + n) : floats{};
                        const floats right = bias ? load(bias + n + LANES) : floats{};
                        for (int64_t r = 0; r < std::min<int64_t>(32, M - m); r++)
                            stream(out + (m + r) * N + n, load(sum + r * 32) + left,
                                   load(sum + r * 32 + LANES) + right);
                    }
        }
        streamed();
    }
}

// What stays in a core's cache: rows and columns of a gradient that are summed at once, and words of either factor.
const int64_t MOST = 1024, WORDS = 128;

// A rectangle of total (M, N) float = or += grad.T @ x; grad (K, M), x (K, N)
static void sum_products(const T *grad, const T *x, float *total, int64_t K, int64_t M, int64_t N, bool add,
                         Rectangle my) {
    const int64_t wide = round_up(my.to - my.from, 32);
    static thread_local Piece<word> memory;
    static thread_local Piece<float> sums;
    memory.resize((32 + wide) * WORDS);
    sums.resize(round_up(my.bottom - my.top, 32) * wide);
    word *const left = memory, *const right = left + 32 * WORDS;
    auto block = [&](int64_t i, int64_t j) { return sums + ((i - my.top) * wide + (j - my.from) * 32); };  // (32, 32)
    const int64_t share = 2 * WORDS / ((my.bottom - my.top + 31) / 32) + 1;
    for (int64_t k = 0; k < K; k += 2 * WORDS) {
        const int64_t rows = std::min(K, k + 2 * WORDS), words = round_up(rows - k, 32) / 2;
        for (int64_t w = 0; w < words; w++)
            for (int64_t j = my.from; j < my.to; j += 32) {
                const ints a = numbers(x, rows, N, k + 2 * w, j), b = numbers(x, rows, N, k + 2 * w + 1, j);
                for (int h = 0; h < 32; h += LANES)
                    store_words(right + ((j - my.from) / 32 * words + w) * 32 + h, pair((T *)&a + h, (T *)&b + h));
            }
        for (int64_t i = my.top; i < my.bottom; i += 32) {
            for (int64_t w = 0; w < words; w += LANES) {
                ints even[LANES], odd[LANES];  // columns
                for (int64_t r = 0; r < LANES; r++) {
                    const int64_t row = k + 2 * (w + r);
                    const ints a = numbers(grad, rows, M, row, i), b = numbers(grad, rows, M, row + 1, i);
                    even[r] = (a & 0xffff) | b << 16;
                    odd[r] = (a >> 16 & 0xffff) | (b & -65536);
                    for (int next = 0; next < 2; next++)  // wanted in the next turn
                        __builtin_prefetch(grad + (row + next) * M + i + 32, 0, 2);
                }
                transpose(even);
                transpose(odd);
                for (int64_t r = 0; r < LANES; r++) {
                    store_words(left + 2 * r * words + w, even[r]);
                    store_words(left + (2 * r + 1) * words + w, odd[r]);
                }
            }
            for (int64_t j = my.from; j < my.to; j += 32) {
                const word *columns = right + (j - my.from) * words;
                if (k)
                    product<true>(left, words, columns, 32, block(i, j), 32, 32, 32, words);
                else
                    product<false>(left, words, columns, 32, block(i, j), 32, 32, 32, words);
                // Meanwhile a part of the numbers that are wanted next comes nearer.
                const int64_t next = k + 2 * WORDS + (i - my.top) / 32 * share, end = std::min(K, next + share);
                for (int64_t row = next; row < end; row++) __builtin_prefetch(x + row * N + j, 0, 2);
            }
        }
    }
    for (int64_t i = my.top; i < my.bottom; i++)
        for (int64_t j = my.from; j < my.to; j += LANES) {
            const floats sum = K ? load(block(i / 32 * 32, j / 32 * 32) + i % 32 * 32 + j % 32) : floats{};
            float *at = total + i * N + j;
            if (add)
                store(at, load(at, N - j) + sum, N - j);
            else
                stream(at, sum, N - j);
        }
}

#endif

extern "C" {

// Whether there is more
#ifdef __AVX512BF16__
int64_t has_products() { return 1; }

// out (M, N) = x (M, K) @ weight.T + x2 (M, K2) @ weight2.T + bias, if there are these; weights (N, K) float. K, K2 and N
// are multiples of 32.
void linear(const T *x /* M * K */, const float *weight /* N * K */, const T *OPTIONAL x2 /* M * K2 */,
            const float *OPTIONAL weight2 /* N * K2 */, const float *OPTIONAL bias /* N */, T *out /* M * N */, int64_t M,
            int64_t N, int64_t K, int64_t K2) {
    multiply<true>(x, weight, x2, weight2, bias, out, M, N, K, K2);
}

// out (M, K) = grad (M, N) @ weight + grad2 (M, N2) @ weight2, if there are these
void linear_grad_x(const T *grad /* M * N */, const float *weight /* N * K */, const T *OPTIONAL grad2 /* M * N2 */,
                   const float *OPTIONAL weight2 /* N2 * K */, T *out /* M * K */, int64_t M, int64_t K, int64_t N,
                   int64_t N2) {
    multiply<false>(grad, weight, grad2, weight2, nullptr, out, M, K, N, N2);
}

// total (M, N) float = or += grad.T @ x; grad (K, M), x (K, N)
void linear_grad_weight(const T *grad /* K * M */, const T *x /* K * N */, float *total /* M * N */, int64_t K, int64_t M,
                        int64_t N, int64_t add) {
#pragma omp parallel
    {
        const Rectangle my = part(M, N, 1);
        Tiles tiles;
        for (int64_t top = my.top; top < my.bottom; top += MOST)
            for (int64_t from = my.from; from < my.to; from += MOST)
                sum_products(grad, x, total, K, M, N, add,
                             {top, std::min(top + MOST, my.bottom), from, std::min(from + MOST, my.to)});
        streamed();
    }
}

#else
int64_t has_products() { return 0; }
#endif

}
