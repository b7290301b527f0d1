/* What routed experts do to rows between matrix products, each in one pass: add them up, activate them, and go back
   through the activation. rows.py says the same in torch.

   Compiled by ft/kernels/native.py; with -DBFLOAT16 for rows in bfloat16. Arithmetic is in float32. */

#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t value;
static inline float get(value v) {
    uint32_t bits = (uint32_t)v << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline value put(float x) {                       /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;      /* NaN stays NaN */
}
#else
typedef float value;
static inline float get(value v) { return v; }
static inline value put(float x) { return x; }
#endif

enum { LEAST = 1 << 15, COLUMNS = 64 };                  /* values for which threads pay; columns of a cache line or more */

const char *instructions(void) { return "vectors left to the compiler"; }

/* out[target[r]] += weight[r] y[r], in the order of r; a thread has columns of its own. No weights: 1. */
void scatter(
    const value *y, const int64_t *target, const float *weight, float *out, int64_t rows, int64_t width, int threads
) {
    int64_t parts = (width + COLUMNS - 1) / COLUMNS;
    if (threads > parts) threads = parts;
    int64_t share = (parts + threads - 1) / threads * COLUMNS;
#pragma omp parallel for num_threads(threads) if (rows * width >= LEAST)
    for (int thread = 0; thread < threads; thread++) {
        int64_t start = thread * share, stop = start + share < width ? start + share : width;
        for (int64_t r = 0; r < rows; r++) {
            const value *from = y + r * width;
            float *to = out + target[r] * width, w = weight ? weight[r] : 1.0f;
            for (int64_t i = start; i < stop; i++) to[i] += w * get(from[i]);
        }
    }
}

/* e^x within 2 units of the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; ends where float32 does. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;         /* rounded: 1.5 * 2^23 has no bits for a fraction */
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;           /* ln 2 in two pieces */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* f(x) = x sigmoid(k(x)): SiLU with k(x) = x, GELU's tanh form with k(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3). */
static inline float inner(float x, int gelu) { return gelu ? 1.59576912f * x * (1.0f + 0.044715f * x * x) : x; }
static inline float slope(float x, int gelu) { return gelu ? 1.59576912f * (1.0f + 0.134145f * x * x) : 1.0f; }
static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* a = f(gate) * up, of rows [gate; up] */
void forward(const value *h, value *a, int64_t rows, int64_t width, int gelu, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width >= LEAST)
    for (int64_t r = 0; r < rows; r++) {
        const value *gate = h + 2 * r * width, *up = gate + width;
        value *to = a + r * width;
        for (int64_t i = 0; i < width; i++) {
            float x = get(gate[i]);
            to[i] = put(x * sigmoid(inner(x, gelu)) * get(up[i]));
        }
    }
}

/* a as above; dot = <a, u>; and dh = w u times the derivative of a. */
void backward(
    const value *h, const value *u, const float *w, value *a, value *dh, float *dot, int64_t rows, int64_t width,
    int gelu, int threads
) {
#pragma omp parallel for num_threads(threads) if (rows * width >= LEAST)
    for (int64_t r = 0; r < rows; r++) {
        const value *gate = h + 2 * r * width, *up = gate + width, *from = u + r * width;
        value *to = a + r * width, *dgate = dh + 2 * r * width, *dup = dgate + width;
        float weight = w[r], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) {
            float x = get(gate[i]), y = get(up[i]), d = get(from[i]), s = sigmoid(inner(x, gelu)), f = x * s;
            to[i] = put(f * y);
            sum += get(to[i]) * d;
            d *= weight;
            dup[i] = put(d * f);
            dgate[i] = put(d * y * (s + f * (1.0f - s) * slope(x, gelu)));
        }
        dot[r] = sum;
    }
}
