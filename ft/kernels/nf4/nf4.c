/* NF4 to dense in one pass, bit for bit what reference.py gives: code * scale in float32, rounded to the weight's type.

   Of the values of one block only 16 differ, a value for each code. They are multiplied and rounded once a block, and
   every 4-bit code then looks up its own: a vector instruction looks up 8 to 32 at a time, by the low bits of each
   lane. Blocks are multiples of 32 values, so of 16 bytes; what the last, partial block has beyond that goes one by one.

   Compiled by ft/kernels/native.py. Products and sums must not be fused: -ffp-contract=off. */

#include <stdint.h>
#include <string.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };            /* types of the output */
enum { NESTED = 256, LEAST = 1 << 16 };         /* blocks that share an absmax2; values for which threads pay */
enum { LARGE = 8 << 20, FRESH = 32 << 20 };     /* bytes that a core's cache does not hold; that are newly mapped */

typedef struct {
    const uint8_t *packed;                      /* byte j holds code 2j in its high half and 2j + 1 in its low half */
    const void *absmax;                         /* a block's: float32, or uint8 where absmax2 is given */
    const float *absmax2, *offset, *map, *code; /* of 256 blocks; one number; 256 and 16 values */
    int64_t n, block;
} weight;

static float scale_of(const weight *w, int64_t b) {
    if (!w->absmax2) return ((const float *)w->absmax)[b];
    float nested = w->map[((const uint8_t *)w->absmax)[b]] * w->absmax2[b / NESTED];
    return nested + *w->offset;
}

/* ---- the 16 values of a block ------------------------------------------------------------------------------------ */

/* The nearest bfloat16, ties to even: the upper half of the float, after adding just under half of its last bit. */
static uint16_t bfloat16(uint32_t x) {
    uint32_t rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
    return (x & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;       /* NaN stays NaN */
}

/* The nearest float16, ties to even. Normal ones as above, with the exponent's bias changed from 127 to 15. Beside 0.5
   a float's last bit is that of float16's denormals, so that adding 0.5 rounds to one. */
static uint16_t float16(uint32_t x) {
    uint32_t size = x & 0x7fffffff, normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13, tiny;
    float value;
    memcpy(&value, &size, 4);
    value += 0.5f;
    memcpy(&tiny, &value, 4);
    uint32_t big = size > 0x7f800000 ? 0x7e00 : 0x7c00;            /* NaN, or beyond the largest */
    uint32_t found = size < 0x38800000 ? tiny - 0x3f000000 : size >= 0x47800000 ? big : normal;
    return found | (x >> 16 & 0x8000);
}

/* ---- looking up: 16 bytes at a time, 32 values ------------------------------------------------------------------- */

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define INSTRUCTIONS "AVX-512"
#define FENCE() _mm_sfence()                    /* other threads see what went past the caches */

/* A large output goes past the caches, which would read each line from memory before it is written. */
static inline void put(void *to, __m512i x, int large) {
    if (large) _mm512_stream_si512(to, x);
    else _mm512_storeu_si512(to, x);
}

/* A lane of 64 bits a byte: its halves are the byte's codes, and a lookup reads but 4 bits of each. */
static inline void look_up_32(const uint32_t *values, const uint8_t *bytes, int64_t count, uint32_t *out, int large) {
    __m512i table = _mm512_loadu_si512(values);
    for (int64_t i = 0; i < count; i += 8) {
        __m512i x = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(bytes + i)));
        x = _mm512_or_si512(_mm512_srli_epi64(x, 4), _mm512_slli_epi64(x, 32));
        put(out + 2 * i, _mm512_permutexvar_epi32(x, table), large);
    }
}

/* The same with lanes of 32 bits. A lookup reads 5 bits, so the table stands there twice. */
static inline void look_up_16(const uint16_t *values, const uint8_t *bytes, int64_t count, uint16_t *out, int large) {
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
    for (int64_t i = 0; i < count; i += 16) {
        __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(bytes + i)));
        x = _mm512_or_si512(_mm512_srli_epi32(x, 4), _mm512_slli_epi32(x, 16));
        put(out + 2 * i, _mm512_permutexvar_epi16(x, table), large);
    }
}

#elif defined(__AVX2__)
#define INSTRUCTIONS "AVX2"
#define FENCE()

/* Lanes as above; a lookup reads 3 bits, so there are two, and bit 3, moved to the sign, chooses between them. */
static void look_up_32(const uint32_t *values, const uint8_t *bytes, int64_t count, uint32_t *out, int large) {
    __m256i low = _mm256_loadu_si256((const __m256i *)values), high = _mm256_loadu_si256((const __m256i *)values + 1);
    for (int64_t i = 0; i < count; i += 4) {
        uint32_t four;
        memcpy(&four, bytes + i, 4);
        __m256i x = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        x = _mm256_or_si256(_mm256_srli_epi64(x, 4), _mm256_slli_epi64(x, 32));
        __m256 below = (__m256)_mm256_permutevar8x32_epi32(low, x), above = (__m256)_mm256_permutevar8x32_epi32(high, x);
        _mm256_storeu_ps((float *)out + 2 * i, _mm256_blendv_ps(below, above, (__m256)_mm256_slli_epi32(x, 28)));
    }
}

/* A lookup of bytes: one for the lower and one for the upper bytes of the values, then these are brought together. */
static void look_up_16(const uint16_t *values, const uint8_t *bytes, int64_t count, uint16_t *out, int large) {
    __m128i first = _mm_loadu_si128((const __m128i *)values), second = _mm_loadu_si128((const __m128i *)values + 1);
    __m128i byte = _mm_set1_epi16(255), half = _mm_set1_epi8(15);
    __m128i lower = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    __m128i upper = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    for (int64_t i = 0; i < count; i += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(bytes + i));
        __m128i even = _mm_and_si128(_mm_srli_epi16(x, 4), half), odd = _mm_and_si128(x, half);
        __m128i codes[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int j = 0; j < 2; j++) {
            __m128i l = _mm_shuffle_epi8(lower, codes[j]), u = _mm_shuffle_epi8(upper, codes[j]);
            _mm_storeu_si128((__m128i *)(out + 2 * i + 16 * j), _mm_unpacklo_epi8(l, u));
            _mm_storeu_si128((__m128i *)(out + 2 * i + 16 * j + 8), _mm_unpackhi_epi8(l, u));
        }
    }
}

#else
#define INSTRUCTIONS "no vector instructions"
#define FENCE()

/* Any processor: a value after the other. */
#define LOOK_UP(name, type)                                                                           \
    static void name(const type *values, const uint8_t *bytes, int64_t count, type *out, int large) { \
        for (int64_t i = 0; i < count; i++) {                                                         \
            out[2 * i] = values[bytes[i] >> 4];                                                       \
            out[2 * i + 1] = values[bytes[i] & 15];                                                   \
        }                                                                                             \
    }
LOOK_UP(look_up_32, uint32_t)
LOOK_UP(look_up_16, uint16_t)
#endif

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* Blocks first .. last - 1. Called with a constant `kind`: the compiler makes a loop of each. */
static inline void blocks(const weight *w, int kind, int large, void *out, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        float scale = scale_of(w, b), product[16];
        uint32_t bits[16];
        uint16_t half[16];
        for (int i = 0; i < 16; i++) product[i] = w->code[i] * scale;
        memcpy(bits, product, sizeof bits);
        for (int i = 0; i < 16 && kind == BFLOAT16; i++) half[i] = bfloat16(bits[i]);
        for (int i = 0; i < 16 && kind == FLOAT16; i++) half[i] = float16(bits[i]);
        int64_t start = b * w->block, size = w->n - start < w->block ? w->n - start : w->block, whole = size & -32;
        const uint8_t *bytes = w->packed + start / 2;
        uint32_t *to32 = (uint32_t *)out + start;
        uint16_t *to16 = (uint16_t *)out + start;
        if (kind == FLOAT32) look_up_32(bits, bytes, whole / 2, to32, large);
        else look_up_16(half, bytes, whole / 2, to16, large);
        for (int64_t i = whole; i < size; i++) {
            int code = i % 2 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4;
            if (kind == FLOAT32) to32[i] = bits[code];
            else to16[i] = half[code];
        }
    }
}

static void part(const weight *w, int kind, void *out, int64_t first, int64_t last) {
    int64_t bytes = w->n * (kind == FLOAT32 ? 4 : 2);
    /* The system has just put newly mapped memory into the caches, by zeroing it. */
    int large = bytes >= LARGE && bytes < FRESH && (uintptr_t)out % 64 == 0;
    if (kind == FLOAT32) blocks(w, FLOAT32, large, out, first, last);
    else if (kind == BFLOAT16) blocks(w, BFLOAT16, large, out, first, last);
    else blocks(w, FLOAT16, large, out, first, last);
    FENCE();
}

/* Ask for pages of 2 MB where the output is fresh memory: one fault then serves as much as 512 of small pages, which
   would take longer than all else. Advice only: the system may not follow it. */
static void large_pages(void *out, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20, first = ((uintptr_t)out + page - 1) & -page, last = ((uintptr_t)out + bytes) & -page;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
}

const char *instructions(void) { return INSTRUCTIONS; }

void dequantise(const uint8_t *packed, const void *absmax, const float *absmax2, const float *offset, const float *map,
                const float *code, int64_t n, int64_t block, int kind, int threads, void *out) {
    weight w = {packed, absmax, absmax2, offset, map, code, n, block};
    int64_t count = (n + block - 1) / block;
    large_pages(out, n * (kind == FLOAT32 ? 4 : 2));
    if (threads <= 1 || n < LEAST) {
        part(&w, kind, out, 0, count);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) part(&w, kind, out, count * t / threads, count * (t + 1) / threads);
}
