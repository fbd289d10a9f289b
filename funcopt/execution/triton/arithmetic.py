"""What the printed Triton kernels call: exact arithmetic, scalars by their address.

Kernels are compiled without contraction: a product is fused into a sum only where it is
written ``tl.fma``. Everything here gives the same bits on a GPU and in the interpreter,
but for `tl.exp` and `tl.log`.
"""

# Annotations name what Triton knows when it compiles, not types.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def pointer(address, KIND: tl.constexpr):
    """The address as a pointer that may have any alignment."""
    return address.to(tl.pointer_type(KIND))


@triton.jit
def aligned(address, KIND: tl.constexpr):
    """The address as a pointer from which 16 bytes are read at once."""
    return tl.multiple_of(address.to(tl.pointer_type(KIND)), 16)


@triton.jit
def scalar(table, entry, task):
    """A scalar by its entry of three words; see `tables.words`."""
    place = tl.load(entry) + tl.load(entry + 2) * task
    place = tl.where(tl.load(entry + 1) == 1, table.to(tl.int64) + place, place)
    return tl.load(pointer(place, tl.float64))


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest; the plain operator is an approximation in float32."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """√x, rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def larger(a, b):
    """The maximum; a NaN comes through, as in torch."""
    return tl.where(a != a, a, tl.where(a > b, a, b))


@triton.jit
def smaller(a, b):
    """The minimum; a NaN comes through, as in torch."""
    return tl.where(a != a, a, tl.where(a < b, a, b))


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def bits(x):
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True).to(tl.float64)
    else:
        return x.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def of_bits(number):
    if number.dtype == tl.float64:
        return number.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return number.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def interpolate(a, b, w):
    """torch's lerp: from the nearer end, with one rounding for product and sum."""
    near = tl.abs(w) < 0.5
    return tl.fma(tl.where(near, w, w - 1), b - a, tl.where(near, a, b))


@triton.jit
def exponential(x):
    return tl.exp(x.to(tl.float64)).to(x.dtype)


@triton.jit
def logarithm(x):
    return tl.log(x.to(tl.float64)).to(x.dtype)


@triton.jit
def sigmoid(x):
    return (1 / (1 + tl.exp(-x.to(tl.float64)))).to(x.dtype)


@triton.jit
def hyperbolic_tangent(x):
    y = 2 * tl.abs(x.to(tl.float64))
    small = y < 0.3
    less = tl.where(small, y, 0.0)
    less = less + less * less * _exp_series(less)  # exp(y) - 1 without cancellation
    value = tl.where(small, less / (less + 2), 1 - 2 / (tl.exp(y) + 1))
    return tl.where(x < 0, -value, value).to(x.dtype)


@triton.jit
def angle(y, x):
    """atan2, where a zero has no sign: artan of at most √2 - 1, turned to its octant."""
    up, right = tl.abs(y.to(tl.float64)), tl.abs(x.to(tl.float64))
    steep = up > right
    ratio = tl.where(steep, right, up) / tl.where(steep, up, right)
    ratio = tl.where(up == right, tl.where(up == 0, 0.0, 1.0), ratio)  # 0 / 0, inf / inf
    half = ratio > 0.41421356237309503
    t = tl.where(half, (ratio - 1) / (ratio + 1), ratio)
    z = t * t
    p = tl.full(z.shape, 1 / 45, tl.float64)
    for k in tl.static_range(21):
        p = _times_plus(p, -z, 1 / (43 - 2 * k))
    value = t - t * z * p
    quarter = tl.full((), 0.7853981633974483, tl.float64)
    value = tl.where(half, quarter + value, value)
    value = tl.where(steep, 2 * quarter - value, value)
    value = tl.where(x < 0, 4 * quarter - value, value)
    return tl.where(y < 0, -value, value).to(y.dtype)


@triton.jit
def power(a, b):
    """a**b by float64, within 0.6 ulp while |b·log a| < 50: 1 - β**t as in the reference.

    exp(b·log a), with the logarithm and its product by b as unevaluated sums of two.
    """
    base, exponent = tl.broadcast(a.to(tl.float64), b.to(tl.float64))
    high, low = _log(tl.abs(base))
    high = tl.where(tl.abs(base) == float("inf"), float("inf"), high)
    product = exponent * high
    rest = tl.fma(exponent, high, -product) + exponent * low
    # Where the result is 0 or infinite, inf - inf must not make a NaN of it.
    far = tl.abs(product) > 800.0
    limit = tl.where(product > 0, 800.0, -800.0).to(tl.float64)
    value = _exp(tl.where(far, limit, product), tl.where(far, 0.0, rest))
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(exponent * 0.5) * 2 != exponent)
    value = tl.where((base < 0) & odd, -value, value)
    finite = tl.abs(base) < float("inf")  # an infinite base has all powers
    value = tl.where((base < 0) & finite & ~whole, float("nan"), value)
    value = tl.where((base == 0) & (exponent > 0), 0.0, value)
    value = tl.where((base == 0) & (exponent < 0), float("inf"), value)
    value = tl.where((base != base) | (exponent != exponent), float("nan"), value)
    turned = (base == -1) & (tl.abs(exponent) == float("inf"))
    value = tl.where((exponent == 0) | (base == 1) | turned, 1.0, value)
    return value.to(a.dtype)


@triton.jit
def _log(x):
    """log x of x > 0 as the sum of two: 2 artanh((m - 1) / (m + 1)) + e·log 2."""
    tiny = x < 2.2250738585072014e-308
    bits = tl.where(tiny, x * 18014398509481984.0, x).to(tl.int64, bitcast=True)
    e = ((bits >> 52) & 0x7FF) - tl.where(tiny, 1077, 1023)
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    upper = m > 1.4142135623730951
    m = tl.where(upper, m * 0.5, m)
    e = (e + upper.to(tl.int64)).to(tl.float64)
    above, below = m - 1, m + 1
    s = above / below
    rest = tl.fma(-s, below, above) - s * (m - (below - 1))
    z = s * s
    p = tl.full(z.shape, 2 / 23, tl.float64)
    for k in tl.static_range(10):
        p = _times_plus(p, z, 2 / (21 - 2 * k))
    tail = 2 * (rest / below) + s * (z * p)
    high = 2 * s
    # 0.6931471803691238 has 33 bits: its product by e is exact
    shift = e * 0.6931471803691238
    total = shift + high
    part = total - shift
    low = (shift - (total - part)) + (high - part)
    low += tail + e * 1.9082149292705877e-10
    out = total + low
    return out, low - (out - total)


@triton.jit
def _exp(x, rest):
    """exp(x + rest), rounded once."""
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    upper = x - k * 0.6931471803691238
    lower = rest - k * 1.9082149292705877e-10
    r = upper + lower
    c = lower - (r - upper)
    tail = (c + r * c) + r * r * _exp_series(r)
    head = 1 + r
    value = head + ((r - (head - 1)) + tail)
    half = tl.floor(k * 0.5)
    return value * _two_to(half) * _two_to(k - half)


@triton.jit
def _exp_series(r):
    """(exp r - 1 - r) / r² for |r| < 0.35."""
    p = tl.full(r.shape, 1 / 1307674368000, tl.float64)  # 1 / 15!
    p = _times_plus(p, r, 1 / 87178291200)
    p = _times_plus(p, r, 1 / 6227020800)
    p = _times_plus(p, r, 1 / 479001600)
    p = _times_plus(p, r, 1 / 39916800)
    p = _times_plus(p, r, 1 / 3628800)
    p = _times_plus(p, r, 1 / 362880)
    p = _times_plus(p, r, 1 / 40320)
    p = _times_plus(p, r, 1 / 5040)
    p = _times_plus(p, r, 1 / 720)
    p = _times_plus(p, r, 1 / 120)
    p = _times_plus(p, r, 1 / 24)
    p = _times_plus(p, r, 1 / 6)
    p = _times_plus(p, r, 1 / 2)
    return p


@triton.jit
def _times_plus(p, x, constant: tl.constexpr):
    return tl.fma(p, x, tl.full(p.shape, constant, tl.float64))


@triton.jit
def _two_to(k):
    """2**k of a whole k within ±1000."""
    return ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
