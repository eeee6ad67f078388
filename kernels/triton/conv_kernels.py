"""Kernels of the depthwise causal convolution with SiLU, forward and backward.

A program walks along a run of positions with a block of channels, and has the last inputs in
registers: every input is read once and every activation computed once. Four positions are loaded
at a time, to have as many loads under way. The backward pass computes the pre-activations again;
the gradient by an input is complete K - 1 positions later, and so the walk goes that far on.

Letters: K taps. A digit is the distance from the current position: inputs x0 to x3, weights w0 to
w3, gradients by inputs g0 to g3; a to d are four positions in a row.
"""

import triton
import triton.language as tl


@triton.jit
def _weights(weight_ptr, bias_ptr, column, inside, K: tl.constexpr, WIDE: tl.constexpr):
    """Weights by distance, zeros beyond the taps, and the bias."""
    row = weight_ptr + column * K
    w0 = tl.load(row + (K - 1), mask=inside, other=0.0).to(WIDE)
    w1 = tl.load(row + (K - 2), mask=inside, other=0.0).to(WIDE)
    w2, w3, bias = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    if K > 2:
        w2 += tl.load(row + (K - 3), mask=inside, other=0.0).to(WIDE)
    if K > 3:
        w3 += tl.load(row, mask=inside, other=0.0).to(WIDE)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + column, mask=inside, other=0.0).to(WIDE)
    return w0, w1, w2, w3, bias


@triton.jit
def _is_real(mask_ptr, place, length):
    """Whether a position lies in the block and is not padding."""
    real = (place >= 0) & (place < length)
    if mask_ptr is not None:
        real = real & (tl.load(mask_ptr + place, mask=real, other=0) != 0)
    return real


@triton.jit
def _input(x_ptr, mask_ptr, place, length, stride, column, inside, UNIT: tl.constexpr):
    here = inside & _is_real(mask_ptr, place, length)
    return tl.load(x_ptr + place.to(tl.int64) * stride * UNIT + column, mask=here, other=0.0)


@triton.jit
def _earlier(
    x_ptr, window_ptr, mask_ptr, place, length, stride, width, column, inside,
    UNIT: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):
    """The input at a position before the run, perhaps from the window."""
    x = _input(x_ptr, mask_ptr, place, length, stride, column, inside, UNIT).to(WIDE)
    if window_ptr is not None:
        slot = place + (K - 1)
        here = inside & (place < 0) & (slot >= 0)
        x += tl.load(window_ptr + slot * width + column, mask=here, other=0.0).to(WIDE)
    return x


@triton.jit
def _history(
    x_ptr, window_ptr, mask_ptr, first, length, stride, width, column, inside,
    UNIT: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):
    """The three inputs before the run."""
    x1 = _earlier(
        x_ptr, window_ptr, mask_ptr, first - 1, length, stride, width, column, inside, UNIT, K, WIDE
    )
    x2 = _earlier(
        x_ptr, window_ptr, mask_ptr, first - 2, length, stride, width, column, inside, UNIT, K, WIDE
    )
    x3 = _earlier(
        x_ptr, window_ptr, mask_ptr, first - 3, length, stride, width, column, inside, UNIT, K, WIDE
    )
    return x1, x2, x3


@triton.jit
def _id(ids_ptr, place, length):
    """The sequence of a position, clamped to the block: the window is of the first sequence."""
    return tl.load(ids_ptr + tl.maximum(tl.minimum(place, length - 1), 0), length > 0, 0)


@triton.jit
def _reach(ids_ptr, first, length):
    """Before a run: how far back the sequence reaches, as far as it matters, and its number."""
    reach, before = first * 0, first * 0
    if ids_ptr is not None:
        before = _id(ids_ptr, first - 1, length)
        reach += (_id(ids_ptr, first - 2, length) == before).to(tl.int32)
        reach += (_id(ids_ptr, first - 3, length) == before).to(tl.int32)
    return reach, before


@triton.jit
def _advance(ids_ptr, place, length, reach, before):
    """How many positions of its own sequence come before this one, and its number."""
    if ids_ptr is not None:
        here = _id(ids_ptr, place, length)
        reach = tl.where(here == before, reach + 1, 0)
        before = here
    return reach, before


@triton.jit
def _cut(ids_ptr, reach, x1, x2, x3):
    """What belongs to the last three positions, with zeros where that is another sequence."""
    if ids_ptr is not None:
        x1 = tl.where(reach >= 1, x1, 0.0)
        x2 = tl.where(reach >= 2, x2, 0.0)
        x3 = tl.where(reach >= 3, x3, 0.0)
    return x1, x2, x3


@triton.jit
def _preactivation(x0, x1, x2, x3, w0, w1, w2, w3, bias, K: tl.constexpr):
    z = bias + w0 * x0 + w1 * x1
    if K > 2:
        z += w2 * x2
    if K > 3:
        z += w3 * x3
    return z


@triton.jit
def _forward_step(
    y_ptr, ids_ptr, place, end, width, column, inside, reach,
    x0, x1, x2, x3, w0, w1, w2, w3, bias, K: tl.constexpr,
):
    """Write one position's output."""
    x1, x2, x3 = _cut(ids_ptr, reach, x1, x2, x3)
    z = _preactivation(x0, x1, x2, x3, w0, w1, w2, w3, bias, K)
    y = z / (1.0 + tl.exp(-z))
    y_ptr += place.to(tl.int64) * width
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), inside & (place < end))


@triton.jit
def conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, window_ptr, ids_ptr, mask_ptr, y_ptr, x_b, x_l, length, units,
    runs, tiles, steps,
    UNIT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr,
):
    run = tl.program_id(0) // tiles
    row, first = (run // runs).to(tl.int64), run % runs * steps * STEP
    end = tl.minimum(first + steps * STEP, length)
    width = units * UNIT
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x_ptr += row * x_b * UNIT
    y_ptr += row * length * width
    if window_ptr is not None:
        window_ptr += row * (K - 1) * width
    if ids_ptr is not None:
        ids_ptr += row * length
    if mask_ptr is not None:
        mask_ptr += row * length
    w0, w1, w2, w3, bias = _weights(weight_ptr, bias_ptr, column, inside, K, WIDE)
    x1, x2, x3 = _history(
        x_ptr, window_ptr, mask_ptr, first, length, x_l, width, column, inside, UNIT, K, WIDE
    )
    reach, before = _reach(ids_ptr, first, length)
    for i in range(0, steps):
        a = first + i * STEP
        b, c, d = a + 1, a + 2, a + 3
        xa = _input(x_ptr, mask_ptr, a, length, x_l, column, inside, UNIT)
        xb = _input(x_ptr, mask_ptr, b, length, x_l, column, inside, UNIT)
        xc = _input(x_ptr, mask_ptr, c, length, x_l, column, inside, UNIT)
        xd = _input(x_ptr, mask_ptr, d, length, x_l, column, inside, UNIT)
        xa, xb, xc, xd = xa.to(WIDE), xb.to(WIDE), xc.to(WIDE), xd.to(WIDE)
        reach, before = _advance(ids_ptr, a, length, reach, before)
        _forward_step(
            y_ptr, ids_ptr, a, end, width, column, inside, reach,
            xa, x1, x2, x3, w0, w1, w2, w3, bias, K,
        )
        reach, before = _advance(ids_ptr, b, length, reach, before)
        _forward_step(
            y_ptr, ids_ptr, b, end, width, column, inside, reach,
            xb, xa, x1, x2, w0, w1, w2, w3, bias, K,
        )
        reach, before = _advance(ids_ptr, c, length, reach, before)
        _forward_step(
            y_ptr, ids_ptr, c, end, width, column, inside, reach,
            xc, xb, xa, x1, w0, w1, w2, w3, bias, K,
        )
        reach, before = _advance(ids_ptr, d, length, reach, before)
        _forward_step(
            y_ptr, ids_ptr, d, end, width, column, inside, reach,
            xd, xc, xb, xa, w0, w1, w2, w3, bias, K,
        )
        x1, x2, x3 = xd, xc, xb


@triton.jit
def _backward_step(
    ids_ptr, place, end, reach, x0, x1, x2, x3, w0, w1, w2, w3, bias, dy, g1, g2, g3,
    dw0, dw1, dw2, dw3, dbias, K: tl.constexpr, WIDE: tl.constexpr,
):
    """Add one position's share to the gradients by the last inputs, the weights and the bias."""
    x1, x2, x3 = _cut(ids_ptr, reach, x1, x2, x3)
    z = _preactivation(x0, x1, x2, x3, w0, w1, w2, w3, bias, K)
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    dz = dy.to(WIDE) * sigmoid * (1.0 + z * (1.0 - sigmoid))
    dz1, dz2, dz3 = _cut(ids_ptr, reach, dz, dz, dz)
    own = tl.where(place < end, dz, 0.0)  # the next run has the others
    dbias += own
    dw0 += own * x0
    dw1 += own * x1
    g1 += w1 * dz1
    if K > 2:
        dw2 += own * x2
        g2 += w2 * dz2
    if K > 3:
        dw3 += own * x3
        g3 += w3 * dz3
    return w0 * dz, g1, g2, g3, dw0, dw1, dw2, dw3, dbias


@triton.jit
def _store_gradient(
    dx_ptr, dwindow_ptr, mask_ptr, place, first, end, width, column, inside, g1, g2, g3,
    K: tl.constexpr,
):
    """Write the gradient by the input K - 1 positions back, which is complete."""
    gradient = g1 if K == 2 else g2 if K == 3 else g3
    place -= K - 1
    if dwindow_ptr is not None:
        slot = place + (K - 1)
        value = gradient.to(dwindow_ptr.dtype.element_ty)
        tl.store(dwindow_ptr + slot * width + column, value, inside & (place < 0))
    own = (place >= first) & (place < end)
    if mask_ptr is not None:
        real = tl.load(mask_ptr + place, mask=own, other=0) != 0
        gradient = tl.where(real, gradient, 0.0)
    value = gradient.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + place.to(tl.int64) * width + column, value, inside & own)


@triton.jit
def conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, window_ptr, ids_ptr, mask_ptr, dy_ptr,
    dx_ptr, dwindow_ptr, dweight_ptr, dbias_ptr, x_b, x_l, dy_b, dy_l, length, units,
    runs, tiles, steps,
    UNIT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr,
):
    run = tl.program_id(0) // tiles
    row, first = (run // runs).to(tl.int64), run % runs * steps * STEP
    end = tl.minimum(first + steps * STEP, length)
    width = units * UNIT
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x_ptr += row * x_b * UNIT
    dy_ptr += row * dy_b * UNIT
    dx_ptr += row * length * width
    if window_ptr is not None:
        window_ptr += row * (K - 1) * width
        dwindow_ptr += row * (K - 1) * width
    if ids_ptr is not None:
        ids_ptr += row * length
    if mask_ptr is not None:
        mask_ptr += row * length
    w0, w1, w2, w3, bias = _weights(weight_ptr, bias_ptr, column, inside, K, WIDE)
    x1, x2, x3 = _history(
        x_ptr, window_ptr, mask_ptr, first, length, x_l, width, column, inside, UNIT, K, WIDE
    )
    reach, before = _reach(ids_ptr, first, length)
    none = tl.zeros((BLOCK,), WIDE)
    g1, g2, g3 = none, none, none
    dw0, dw1, dw2, dw3, dbias = none, none, none, none, none
    for i in range(0, steps + 1):
        a = first + i * STEP
        b, c, d = a + 1, a + 2, a + 3
        xa = _input(x_ptr, mask_ptr, a, length, x_l, column, inside, UNIT)
        xb = _input(x_ptr, mask_ptr, b, length, x_l, column, inside, UNIT)
        xc = _input(x_ptr, mask_ptr, c, length, x_l, column, inside, UNIT)
        xd = _input(x_ptr, mask_ptr, d, length, x_l, column, inside, UNIT)
        dya = _input(dy_ptr, None, a, length, dy_l, column, inside, UNIT)
        dyb = _input(dy_ptr, None, b, length, dy_l, column, inside, UNIT)
        dyc = _input(dy_ptr, None, c, length, dy_l, column, inside, UNIT)
        dyd = _input(dy_ptr, None, d, length, dy_l, column, inside, UNIT)
        xa, xb, xc, xd = xa.to(WIDE), xb.to(WIDE), xc.to(WIDE), xd.to(WIDE)
        reach, before = _advance(ids_ptr, a, length, reach, before)
        ga, g1, g2, g3, dw0, dw1, dw2, dw3, dbias = _backward_step(
            ids_ptr, a, end, reach, xa, x1, x2, x3, w0, w1, w2, w3, bias, dya, g1, g2, g3,
            dw0, dw1, dw2, dw3, dbias, K, WIDE,
        )
        _store_gradient(
            dx_ptr, dwindow_ptr, mask_ptr, a, first, end, width, column, inside,
            g1, g2, g3, K,
        )
        reach, before = _advance(ids_ptr, b, length, reach, before)
        gb, ga, g1, g2, dw0, dw1, dw2, dw3, dbias = _backward_step(
            ids_ptr, b, end, reach, xb, xa, x1, x2, w0, w1, w2, w3, bias, dyb, ga, g1, g2,
            dw0, dw1, dw2, dw3, dbias, K, WIDE,
        )
        _store_gradient(
            dx_ptr, dwindow_ptr, mask_ptr, b, first, end, width, column, inside,
            ga, g1, g2, K,
        )
        reach, before = _advance(ids_ptr, c, length, reach, before)
        gc, gb, ga, g1, dw0, dw1, dw2, dw3, dbias = _backward_step(
            ids_ptr, c, end, reach, xc, xb, xa, x1, w0, w1, w2, w3, bias, dyc, gb, ga, g1,
            dw0, dw1, dw2, dw3, dbias, K, WIDE,
        )
        _store_gradient(
            dx_ptr, dwindow_ptr, mask_ptr, c, first, end, width, column, inside,
            gb, ga, g1, K,
        )
        reach, before = _advance(ids_ptr, d, length, reach, before)
        gd, gc, gb, ga, dw0, dw1, dw2, dw3, dbias = _backward_step(
            ids_ptr, d, end, reach, xd, xc, xb, xa, w0, w1, w2, w3, bias, dyd, gc, gb, ga,
            dw0, dw1, dw2, dw3, dbias, K, WIDE,
        )
        _store_gradient(
            dx_ptr, dwindow_ptr, mask_ptr, d, first, end, width, column, inside,
            gc, gb, ga, K,
        )
        x1, x2, x3 = xd, xc, xb
        g1, g2, g3 = gd, gc, gb
    run = run.to(tl.int64)
    partial = dweight_ptr + run * K * width + column
    tl.store(partial + (K - 1) * width, dw0, inside)
    tl.store(partial + (K - 2) * width, dw1, inside)
    if K > 2:
        tl.store(partial + (K - 3) * width, dw2, inside)
    if K > 3:
        tl.store(partial, dw3, inside)
    if bias_ptr is not None:
        tl.store(dbias_ptr + run * width + column, dbias, inside)
