// What expressions are made of. T is computed in, I is as long; S is what is stored.

// A NaN comes through, as in torch: the comparison with one is false.
static inline T larger(T a, T b) {
    T c = a > b ? a : b;  // in two steps, or gcc sees control flow and no vector
    return a != a ? a : c;
}

static inline T smaller(T a, T b) {
    T c = a < b ? a : b;
    return a != a ? a : c;
}

// Within two units in the last place, branch-free, where the C library's is no vector:
// the arc tangent of a quotient up to 1 by a polynomial, and the octants from that.
#ifdef __FP_FAST_FMAF
#define HORNER(a, x, b) __builtin_fmaf(a, x, b)
#else
#define HORNER(a, x, b) (a) * (x) + (b)
#endif

static inline float arc_tangent(float y, float x) {
    float a = fabsf(x), b = fabsf(y), long_ = a > b ? a : b, short_ = a > b ? b : a;
    int32_t sign;  // of -0, too
    memcpy(&sign, &x, sizeof sign);
    long_ = long_ < 0x1p-149f ? 0x1p-149f : long_;  // 0 / 0 is 0, and inf / inf is 1
    float q = short_ == long_ ? 1 : short_ / long_, z = q * q;
    float r = HORNER(-0x1.d62e0cp-10f, z, 0x1.65a54ep-7f);
    r = HORNER(r, z, -0x1.fed062p-6f);
    r = HORNER(r, z, 0x1.dac964p-5f);
    r = HORNER(r, z, -0x1.58346cp-4f);
    r = HORNER(r, z, 0x1.c099f2p-4f);
    r = HORNER(r, z, -0x1.2421b4p-3f);
    r = HORNER(r, z, 0x1.9991fep-3f);
    r = HORNER(r, z, -0x1.55553ep-2f);
    r = HORNER(q, z * r, q);
    r = b > a ? 0x1.921fb6p0f - (r + 0x1.777a5cp-25f) : r;
    r = sign < 0 ? 0x1.921fb6p1f - (r + 0x1.777a5cp-24f) : r;
    return copysignf(r, y);  // a NaN has come through the quotient
}

// The product is contracted into the sum, as by torch.
static inline T addcmul(T a, T b, T c) {
#ifdef CONTRACTED
    return FMA(b, c, a);
#else
    return a + b * c;
#endif
}

// From the nearer end.
static inline T lerp(T a, T b, T w) {
    int near = FABS(w) < (T)0.5;
    return addcmul(near ? a : b, near ? w : w - 1, b - a);
}

static inline T bits(T x) {
    I out;
    memcpy(&out, &x, sizeof out);
    return (T)out;
}

static inline T of_bits(T number) {
    I in = (I)number;
    T out;
    memcpy(&out, &in, sizeof out);
    return out;
}

static inline T from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}
