// Vectors of LANES numbers that the compilers of GNU and LLVM translate for any CPU; bfloat16 in memory, float in them.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#define MOST_LANES 16
#else
#define MOST_LANES 8  // longer ones are made in ways that take ten times as long
#endif
#if !defined(LANES)
#define LANES MOST_LANES
#elif LANES > MOST_LANES  // a multiple of it
#undef LANES
#define LANES MOST_LANES
#endif

#if defined(__AVX512BF16__) && LANES == 16
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 { uint16_t bits; };

// A pointer that may be null, in a prototype that native.py reads.
#define OPTIONAL

const float LOG2_E = 1.44269504f;

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static inline floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline floats load(const bfloat16 *from) {
    halves x;
    memcpy(&x, from, sizeof x);
    return (floats)(__builtin_convertvector(x, ints) << 16);
}

// To the nearest bfloat16; of two, the even one.
static inline halves rounded(floats x) {
#if defined(__AVX512BF16__) && LANES == 16
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    ints bits = (ints)x;
    return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, halves);
#endif
}

static inline void store(float *to, floats x) { memcpy(to, &x, sizeof x); }

static inline void store(bfloat16 *to, floats x) {
    halves numbers = rounded(x);
    memcpy(to, &numbers, sizeof numbers);
}

// The same for the first n numbers only, zeros behind them.
template <class S>
static inline floats load(const S *from, int64_t n) {
    if (n >= LANES) return load(from);
    S part[LANES] = {};
    memcpy(part, from, n * sizeof(S));
    return load(part);
}

template <class S>
static inline void store(S *to, floats x, int64_t n) {
    if (n >= LANES) return store(to, x);
    S part[LANES];
    store(part, x);
    memcpy(to, part, n * sizeof(S));
}

// Two vectors, past the caches where the CPU can: what many rows of a product are will not be found there again.
static inline void stream(bfloat16 *to, floats a, floats b) {
#if defined(__AVX512BF16__) && LANES == 16
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    if ((uintptr_t)to % 64 == 0) return _mm512_stream_si512((__m512i *)to, both);
#endif
    store(to, a);
    store(to + LANES, b);
}

static inline void stream(float *to, floats x, int64_t n) {  // the first n numbers
#if defined(__AVX512BF16__) && LANES == 16
    if (n >= LANES && (uintptr_t)to % 64 == 0) return _mm512_stream_ps(to, (__m512)x);
#endif
    store(to, x, n);
}

static inline void streamed() {  // before other threads read it
#if defined(__AVX512BF16__) && LANES == 16
    _mm_sfence();
#endif
}

template <int LENGTH>
static inline float sum(const void *vector) {  // its halves, added, and so on
    typedef float half __attribute__((vector_size(2 * LENGTH)));
    half a, b;
    memcpy(&a, vector, sizeof a);
    memcpy(&b, (char *)vector + sizeof a, sizeof b);
    a += b;
    return sum<LENGTH / 2>(&a);
}

template <>
inline float sum<1>(const void *vector) {
    float x;
    memcpy(&x, vector, sizeof x);
    return x;
}

static inline float sum(floats x) { return sum<LANES>(&x); }

static inline float largest(floats x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// 2^x for x <= 0, to 1e-7 of it: the series of Taylor around the nearest whole number. 0 below the least normal number.
static inline floats exp2(floats x) {
    const float FACTORS[] = {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f,
                             2.40226507e-1f, 6.93147181e-1f, 1.f};  // ln(2)^n / n!, for n from 6 to 0
    floats least = floats{} - 126.f, inside = x < least ? least : x;
    ints whole = __builtin_convertvector(inside - 0.5f, ints);
    floats f = inside - __builtin_convertvector(whole, floats), series = floats{} + 1.52527338e-5f;
    for (float factor : FACTORS) series = series * f + factor;
    return x < least ? floats{} : series * (floats)((whole + 127) << 23);
}

static inline floats sigmoid(floats x) {
    floats e = exp2((x < 0.f ? x : -x) * LOG2_E);  // of -|x|: no overflow
    return (x < 0.f ? e : floats{} + 1.f) / (1.f + e);
}
