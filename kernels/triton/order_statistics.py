"""The tokens of a noised simplex and their weights, drawn by one kernel; float64 on every device.

The words, and so the ids, are those of `tess.kernels.order_statistics`.

Letters: R rows, K top values of a row, J = K + 1 tokens of a row with the true one first. A program
has one row; its numbers are blocks [1], and its K = TOP values blocks [BLOCK].
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels import random
from tess.kernels.order_statistics import SHUFFLE_BELOW
from tess.kernels.triton.launch import Config, Table, launch
from tess.kernels.triton.random import cos_sin, philox_words, polynomial

MOST_TOP = 64  # each id is compared with each

LARGEST_STREAM = tl.constexpr(random.LARGEST_STREAM)
DISTINCT_STREAM = tl.constexpr(random.DISTINCT_STREAM)
TWO_PI = tl.constexpr(2 * math.pi)
ROOT_2_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))

DRAW = Table("draw_tokens", {"sm_80": Config({}, num_warps=1, num_stages=1)})

# Inverse of the normal distribution function, to 1 part in 10^16: numerators and denominators near
# the middle, in the tails, and far out (M. J. Wichura, "Algorithm AS 241: the percentage points of
# the normal distribution", Applied Statistics 37, 1988, PPND16); highest powers first.
QUANTILE_MIDDLE = tl.constexpr((
    2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
    13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608,
    5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
    5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0,
))
QUANTILE_TAIL = tl.constexpr((
    7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177,
    1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959,
    1.42343711074968357734,
    1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
    0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187,
    1.0,
))
QUANTILE_FAR = tl.constexpr((
    2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386,
    0.026532189526576123093, 0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699,
    6.6579046435011037772,
    2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5,
    7.868691311456132591e-4, 0.0148753612908506148525, 0.13692988092273580531,
    0.59983220655588793769, 1.0,
))

# The normal distribution function, for |x| up to 0.67 and from there to sqrt(32), and 1 - x^2 times
# ... further out (W. J. Cody, "Rational Chebyshev approximations for the error function", Math.
# Comp. 23, 1969).
NORMAL_MIDDLE = tl.constexpr((
    0.065682337918207449113, 2.2352520354606839287, 161.02823106855587881, 1067.6894854603709582,
    18154.981253343561249,
    1.0, 47.20258190468824187, 976.09855173777669322, 10260.932208618978205, 45507.789335026729956,
))
NORMAL_TAIL = tl.constexpr((
    1.0765576773720192317e-8, 0.39894151208813466764, 8.8831497943883759412, 93.506656132177855979,
    597.27027639480026226, 2494.5375852903726711, 6848.1904505362823326, 11602.651437647350124,
    9842.7148383839780218,
    1.0, 22.266688044328115691, 235.38790178262499861, 1519.377599407554805, 6485.558298266760755,
    18615.571640885098091, 34900.952721145977266, 38912.003286093271411, 19685.429676859990727,
))
NORMAL_FAR = tl.constexpr((
    0.02307344176494017303, 0.21589853405795699, 0.1274011611602473639, 0.022235277870649807,
    0.001421619193227893466, 2.9112874951168792e-5,
    1.0, 1.28426009614491121, 0.468238212480865118, 0.0659881378689285515,
    0.00378239633202758244, 7.29751555083966205e-5,
))


# ---- functions, all in float64 ----


@triton.jit
def _ratio(x, coefficients: tl.constexpr, COUNT: tl.constexpr):
    """A quotient of polynomials with COUNT coefficients each."""
    over = polynomial(x, coefficients, COUNT, 2 * COUNT)
    return polynomial(x, coefficients, 0, COUNT) / over


@triton.jit
def expm1(x):
    """e^x - 1. Near 0 the rounding of e^x is undone by its logarithm (W. Kahan)."""
    y, far = tl.exp(x), tl.abs(x) > 1.0
    near = (y - 1.0) * x / tl.log(tl.where(far | (y == 1.0), 2.0, y))
    return tl.where(far, y - 1.0, tl.where(y == 1.0, x, near))


@triton.jit
def log1p(x):
    """ln(1 + x) for x > -1, the rounding of 1 + x undone as in `expm1`."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def lower_quantile(p):
    """The x with Phi(x) = p, for p in (0, 1/2]."""
    q = p - 0.5
    middle = q * _ratio(0.180625 - q * q, QUANTILE_MIDDLE, 8)
    r = tl.sqrt(-tl.log(p))
    tail = _ratio(tl.minimum(r, 5.0) - 1.6, QUANTILE_TAIL, 8)
    tail = tl.where(r > 5.0, _ratio(r - 5.0, QUANTILE_FAR, 8), tail)
    return tl.where(q < -0.425, -tail, middle)


@triton.jit
def log_normal_cdf(x):
    """log Phi(x), with all digits in both tails."""
    y, square = tl.abs(x), x * x
    near = tl.minimum(tl.maximum(x, -0.7), 0.7)
    middle = 0.5 + near * _ratio(near * near, NORMAL_MIDDLE, 5)
    inverse = 1.0 / tl.maximum(square, 1.0)
    far = (ROOT_2_PI - inverse * _ratio(inverse, NORMAL_FAR, 6)) / tl.maximum(y, 1.0)
    # Phi(-y) e^(y^2 / 2)
    scaled = tl.where(y > 5.65625, far, _ratio(tl.minimum(y, 6.0), NORMAL_TAIL, 9))
    lower = tl.log(scaled) - 0.5 * square
    upper = log1p(-scaled * tl.exp(-0.5 * square))
    return tl.where(y < 0.671875, tl.log(middle), tl.where(x < 0, lower, upper))


# ---- the draw ----


@triton.jit
def _word(index, position, key, draw, STREAM: tl.constexpr):
    """Words of rows by their number in a stream, int64."""
    w0, w1, w2, w3 = philox_words(index // 4, position, key, draw, STREAM)
    lane = index % 4
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word.to(tl.int64)


@triton.jit
def _uniform(word):
    """Half a step off both ends, so that no logarithm is 0 and no value infinite."""
    return (word.to(tl.float64) + 0.5) * 2.0**-32


@triton.jit
def _falling_normals(word, k, count):
    """The largest normals of `count`, from one word each, by Renyi's representation."""
    left = (count - k).to(tl.float64)
    sums = tl.cumsum(-tl.log(_uniform(word)) / left, axis=0)
    above, below = -expm1(-sums), tl.exp(-sums)
    side = lower_quantile(tl.minimum(above, below))
    return tl.where(above < below, -side, side)


@triton.jit
def _candidates(word, k, count, refused):
    """Ids, uniform where not negative; the others, of low words below `refused`, are none."""
    product = word * count
    return tl.where((product & 0xFFFFFFFF) < refused, -1 - k, product >> 32)


@triton.jit
def _drawn_again(ids, k, TOP: tl.constexpr):
    """Ids that are none, or equal one further left."""
    equal = (k[None, :] < k[:, None]) & (ids[None, :] == ids[:, None])
    return ((ids < 0) | (tl.max(equal.to(tl.int32), axis=1) > 0)) & (k < TOP)


@triton.jit
def _distinct_ids(k, position, key, draw, count, refused, BLOCKS: tl.constexpr, TOP: tl.constexpr):
    """Different ids [BLOCK] of 0 .. count - 1, int64; the rule is `order_statistics.py`'s."""
    word = _word(4 * (1 + BLOCKS) + k, position, key, draw, LARGEST_STREAM)
    ids = _candidates(word, k, count, refused)
    again, attempt = _drawn_again(ids, k, TOP), 0
    while tl.sum(again.to(tl.int32)) > 0:
        word = _word(4 * BLOCKS * attempt + k, position, key, draw, DISTINCT_STREAM)
        ids = tl.where(again, _candidates(word, k, count, refused), ids)
        again = _drawn_again(ids, k, TOP)
        attempt += 1
    return ids


@triton.jit
def _others(last, sigma, shift, chance, count, bulk):
    """Share and spread of the values below `last`, times e^shift less: `token_weights`."""
    base = log_normal_cdf(last)
    log_mean = sigma * sigma / 2 + (log_normal_cdf(last - sigma) - base)
    log_second = 2 * sigma * sigma + (log_normal_cdf(last - 2 * sigma) - base)
    variance = tl.maximum(expm1(log_second - 2 * log_mean), 0.0)
    mean = tl.exp(log_mean - shift)
    share = mean * tl.maximum(1 + tl.sqrt(variance / bulk) * chance, 0.0)
    return share, mean * tl.sqrt(variance * ((bulk - 1) / count))


@triton.jit
def _draw_tokens(
    keys_ptr, positions_ptr, tokens_ptr, gap_ptr, sigma_ptr, ids_ptr, weights_ptr, share_ptr,
    spread_ptr, draw, count, refused, BLOCKS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):
    """Of a row: the true token's id and weight, those of the top tokens, share and spread."""
    row, k = tl.program_id(0).to(tl.int64) + tl.arange(0, 1), tl.arange(0, BLOCK)
    key, position = tl.load(keys_ptr + row), tl.load(positions_ptr + row)
    gap, sigma = tl.load(gap_ptr + row).to(tl.float64), tl.load(sigma_ptr + row).to(tl.float64)
    w0, w1, _, _ = philox_words(row - row, position, key, draw, LARGEST_STREAM)
    radius = tl.sqrt(-2.0 * tl.log(_uniform(w0)))
    cosine, sine = cos_sin(_uniform(w1) * TWO_PI, tl.float64)
    top = _falling_normals(_word(4 + k, position, key, draw, LARGEST_STREAM), k, count)

    own, logit = gap + sigma * radius * cosine, tl.where(k < TOP, sigma * top, -float("inf"))
    shift = tl.maximum(own, tl.max(logit, axis=0))
    own, weight = tl.exp(own - shift), tl.exp(logit - shift)
    last = sigma * 0 + tl.sum(tl.where(k == TOP - 1, top, 0.0), axis=0)
    bulk = (count - TOP).to(tl.float64)
    share, spread = _others(last, sigma, shift, radius * sine, count.to(tl.float64), bulk)
    total = own + tl.sum(weight, axis=0) + bulk * share
    tl.store(share_ptr + row, share / total)
    tl.store(spread_ptr + row, spread / total)

    token = tl.load(tokens_ptr + row)
    ids = _distinct_ids(k, position, key, draw, count, refused, BLOCKS, TOP)
    ids = tl.where(ids >= token, ids + 1, ids)  # id i of the others is token i, or from it on i + 1
    first = row * (TOP + 1)
    tl.store(ids_ptr + first, token.to(tl.int32))
    tl.store(weights_ptr + first, own / total)
    tl.store(ids_ptr + first + 1 + k, ids.to(tl.int32), k < TOP)
    tl.store(weights_ptr + first + 1 + k, weight / total, k < TOP)


# ---- launch and operation ----


def can_draw(vocabulary: int, num_top: int) -> bool:
    """Whether the kernel draws this; tiny vocabularies are shuffled by `order_statistics.py`."""
    return num_top <= MOST_TOP and vocabulary - 1 >= SHUFFLE_BELOW * num_top


def draw_tokens_forward(
    keys_R: Tensor, positions_R: Tensor, tokens_R: Tensor, gap_R: Tensor, sigma_R: Tensor,
    draw: int, vocabulary: int, num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids [R, J] int32; weights [R, J], share [R] and spread [R] float64, as `token_weights`."""
    rows, count, device = len(keys_R), vocabulary - 1, keys_R.device
    ids_RJ = torch.empty((rows, num_top + 1), dtype=torch.int32, device=device)
    weights_RJ = torch.empty((rows, num_top + 1), dtype=torch.float64, device=device)
    share_R, spread_R = (torch.empty(rows, dtype=torch.float64, device=device) for _ in range(2))
    fields = [x.contiguous() for x in (keys_R, positions_R, tokens_R, gap_R, sigma_R)]

    def run(config: Config) -> None:
        launch(
            _draw_tokens, (rows,), *fields, ids_RJ, weights_RJ, share_R, spread_R, draw, count,
            2**32 % count, config=config, BLOCKS=triton.cdiv(num_top, 4), TOP=num_top,
            BLOCK=triton.next_power_of_2(num_top),
        )

    DRAW.run(weights_RJ, num_top, run)
    return ids_RJ, weights_RJ, share_R, spread_R


draw_tokens = torch.library.custom_op("tess::draw_tokens", draw_tokens_forward, mutates_args=())


@draw_tokens.register_fake
def _(keys_R, positions_R, tokens_R, gap_R, sigma_R, draw, vocabulary, num_top):
    shape = (keys_R.shape[0], num_top + 1)
    one = gap_R.new_empty(shape[0], dtype=torch.float64)
    ids_RJ = gap_R.new_empty(shape, dtype=torch.int32)
    return ids_RJ, gap_R.new_empty(shape, dtype=torch.float64), one, torch.empty_like(one)


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, hot, call) at shipped shapes; `make(*shape, dtype=...)`: a tensor without data."""
    keys, scale = make(64, dtype=torch.int64), make(64, dtype=torch.float32)
    for num_top in (16, 32, 64):
        yield (
            f"draw {num_top} tokens", True,
            lambda n=num_top: draw_tokens_forward(keys, keys, keys, scale, scale, 3, 131_072, n),
        )
