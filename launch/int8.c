/* Matrices of fp32 as bytes with scales, and products of such bytes as fp32 again: launch/int8.py, which says why.

   Rows lie one after another. A largest magnitude is sought among the bits without their sign, whose order is that of
   magnitudes, with infinities above numbers and NaN above both: so a scale is NaN where one of its numbers is, and what
   is multiplied by it, too. Threads are OpenMP's, in torch's own pool: nothing is linked. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { STRIPE = 64 }; /* columns that a thread goes down together: four vectors */

static inline float scale_of(uint32_t bits, float *factor) {
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    *factor = largest > 0 ? 127 / largest : 0;
    return largest / 127;
}

static inline uint32_t magnitude(const float *number) {
    uint32_t bits;
    memcpy(&bits, number, sizeof bits);
    return bits & 0x7fffffff;
}

/* bytes[i, j] = round(values[i, j] / scales[i]), scales[i] = the largest magnitude of row i / 127. */
void quantise_rows(const float *restrict values, int8_t *restrict bytes, float *restrict scales, int64_t rows,
                   int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *from = values + i * columns;
        int8_t *to = bytes + i * columns;
        uint32_t largest = 0;
        for (int64_t j = 0; j < columns; j++) {
            uint32_t here = magnitude(from + j);
            largest = here > largest ? here : largest;
        }
        float factor;
        scales[i] = scale_of(largest, &factor);
        for (int64_t j = 0; j < columns; j++) to[j] = (int8_t)(int32_t)rintf(from[j] * factor);
    }
}

static inline void quantise_stripe(const float *restrict values, int8_t *restrict bytes, float *restrict scales,
                                   int64_t rows, int64_t columns, int64_t width) {
    uint32_t largest[STRIPE] = {0};
    float factors[STRIPE];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) {
            uint32_t here = magnitude(values + i * columns + j);
            largest[j] = here > largest[j] ? here : largest[j];
        }
    for (int64_t j = 0; j < width; j++) scales[j] = scale_of(largest[j], factors + j);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++)
            bytes[i * columns + j] = (int8_t)(int32_t)rintf(values[i * columns + j] * factors[j]);
}

/* The same by columns: bytes[i, j] = round(values[i, j] / scales[j]). */
void quantise_columns(const float *restrict values, int8_t *restrict bytes, float *restrict scales, int64_t rows,
                      int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < columns; j += STRIPE) {
        if (columns - j >= STRIPE) /* a width known beforehand: whole vectors, kept in registers */
            quantise_stripe(values + j, bytes + j, scales + j, rows, columns, STRIPE);
        else
            quantise_stripe(values + j, bytes + j, scales + j, rows, columns, columns - j);
    }
}

/* What a product of bytes stands for, in its place: sums[i, j] * of_rows[i] * of_columns[j], + bias[j] where it is. */
void scale_sums(void *sums, const float *restrict of_rows, const float *restrict of_columns,
                const float *restrict bias, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        char *here = (char *)sums + i * columns * 4;
        float scale = of_rows[i];
        for (int64_t j = 0; j < columns; j++) {
            int32_t sum;
            memcpy(&sum, here + 4 * j, 4);
            float value = (float)sum * scale * of_columns[j];
            if (bias) value += bias[j];
            memcpy(here + 4 * j, &value, 4);
        }
    }
}
