"""The scan of `kernels/ssd.py` by matrix products, in pieces that fit a cache.

Within a chunk the scan is a product with the matrix of all pairs, between chunks it is a state
(arXiv 2405.21060, section 6). For output position t and input position s of one chunk

    y_t = d x_t + sum over s of W_ts (c_t . b_s) x_s,
    W_ts = dt_s exp(log decays summed over (s, t]) for s <= t, and over [t, s) for s > t,

the latter for the reverse direction only.

Letters: B batch, L length, C chunks, Q chunk length, H heads, R heads per group, G groups, P head
width, N state width. Decays are powers of two: `exp2` costs less than half of `exp` on a CPU.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOG2_E = 1 / math.log(2)
PIECE = 2**18  # pairs (of all heads) that a CPU thread works on at once: 1 MiB in float32

Place = tuple[slice, slice]  # rows, chunks


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


class ScanOptions(NamedTuple):
    """What is no tensor."""

    chunk_size: int
    bidirectional: bool
    return_final_state: bool


class Decays(NamedTuple):
    """Of one direction, wide: from the entering state to a position, from a position to the
    leaving state, each [B, C, G, R, Q], and from state to state [B, C, G, R]."""

    read: Tensor
    write: Tensor
    over: Tensor


class Chunks:
    """One call's tensors cut into chunks, its decays, and how many chunks make a piece."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        scale: Tensor | None,
        initial: Tensor | None,
        ids: Tensor | None,
        options: ScanOptions,
    ) -> None:
        self.low, self.wide = x.dtype, dt.dtype
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.states = b.shape[2:]
        self.shared = self.heads // self.groups
        self.bidirectional, self.return_final = options.bidirectional, options.return_final_state
        self.chunks = -(-self.length // options.chunk_size)
        self.chunk = -(-self.length // self.chunks)
        self.padding = self.chunks * self.chunk - self.length

        self.a_GR, self.d_GR, self.scale_GR = (
            None if tensor is None else self.by_group(tensor.to(self.wide), 0)
            for tensor in (a, d, scale)
        )
        self.initial = None if initial is None else self.by_group(initial.to(self.wide), 1)
        self.x = self.cut(x)
        self.b_BCGQN, self.c_BCGQN = (self.cut(t)[:, :, :, 0].contiguous() for t in (b, c))
        self.dt = self.cut(dt[..., None])[..., 0].contiguous()
        self.near = None if ids is None else Neighbours(self._cut_ids(ids))
        self._sum_decays()
        self._plan_pieces()

    def by_group(self, tensor: Tensor, dim: int) -> Tensor:
        """Heads at `dim` as groups and the heads of each."""
        return tensor.unflatten(dim, (self.groups, self.shared))

    def cut(self, tensor_BLXY: Tensor) -> Tensor:
        """[B, L, heads or groups, Y] as chunks [B, C, G, R or 1, Q, Y]."""
        if self.padding:
            tensor_BLXY = F.pad(tensor_BLXY, (0, 0, 0, 0, 0, self.padding))
        heads, width = tensor_BLXY.shape[2:]
        shape = (self.chunks, self.chunk, self.groups, heads // self.groups, width)
        return tensor_BLXY.view(self.batch, *shape).permute(0, 1, 3, 4, 2, 5)

    def join(self, tensor_BCGRQY: Tensor) -> Tensor:
        """The inverse of `cut`."""
        tensor = tensor_BCGRQY.permute(0, 1, 4, 2, 3, 5)
        return tensor.flatten(3, 4).flatten(1, 2)[:, : self.length]

    def new_like_x(self) -> tuple[Tensor, Tensor]:
        """An empty tensor [B, chunks x Q, H, P] and its chunks."""
        shape = (self.batch, self.chunks, self.chunk, self.groups, self.shared, self.width)
        flat = torch.empty(
            (self.batch, self.chunks * self.chunk, self.heads, self.width),
            dtype=self.low, device=self.x.device,
        )
        return flat, flat.view(shape).permute(0, 1, 3, 4, 2, 5)

    def _cut_ids(self, ids_BL: Tensor) -> Tensor:
        if self.padding:
            ids_BL = torch.cat([ids_BL, ids_BL[:, -1:].expand(-1, self.padding)], dim=1)
        return ids_BL.unflatten(1, (self.chunks, self.chunk))[:, :, None, None]

    def _sum_decays(self) -> None:
        incl = (self.dt * (self.a_GR * LOG2_E)[..., None]).cumsum(-1)
        total, read = incl[..., -1:], incl.exp2()
        over = read[..., -1]
        self.incl = incl
        self.forwards = Decays(read, (total - incl).exp2(), over)
        if self.bidirectional:
            self.excl = F.pad(incl[..., :-1], (1, 0))
            self.backwards = Decays((total - self.excl).exp2(), self.excl.exp2(), over)
        if self.near is not None:
            self.forwards = self.near.cut_forwards(self.forwards)
            if self.bidirectional:
                self.backwards = self.near.cut_backwards(self.backwards)

    def _plan_pieces(self) -> None:
        device, pairs = self.x.device, self.heads * self.chunk**2
        budget = self.batch * self.chunks * pairs
        if device.type == "cpu":
            budget = PIECE * _threads()
        self.rows = max(1, min(self.batch, budget // pairs))
        self.together = max(1, min(self.chunks, budget // (pairs * self.rows)))
        square = (self.chunk, self.chunk)
        if not self.bidirectional:
            self.mask = torch.full(square, -math.inf, dtype=self.wide, device=device).triu(1)
        elif self.scale_GR is not None:
            above = torch.ones(square, dtype=torch.bool, device=device).triu(1)
            self.scale_GRQQ = torch.where(above, self.scale_GR[..., None, None], 1.0)

    def row_pieces(self) -> list[slice]:
        """Rows to work on one after the other."""
        starts = range(0, max(1, self.batch), self.rows)
        return [slice(start, min(start + self.rows, self.batch)) for start in starts]

    def pieces(self, backwards: bool) -> list[slice]:
        """Chunks to work on one after the other."""
        starts = range(0, self.chunks, self.together)
        pieces = [slice(start, min(start + self.together, self.chunks)) for start in starts]
        return pieces[::-1] if backwards else pieces

    def pair_weights(self, at: Place, dt: Tensor) -> Tensor:
        """W of a piece [B, C, G, R, Q, Q], the reverse part not yet scaled."""
        incl = self.incl[at]
        weight = incl[..., :, None] - incl[..., None, :]
        if self.bidirectional:  # of the two sums, the one in the wrong direction is not negative
            excl = self.excl[at]
            other = excl[..., None, :] - excl[..., :, None]
            weight = torch.minimum(weight, other, out=weight)
        else:  # masked before the power: above the diagonal the exponent is positive
            weight.add_(self.mask)
        weight.exp2_().mul_(dt[at][..., None, :])
        return weight if self.near is None else weight.mul_(self.near.pairs[at])

    def products(self, at: Place) -> Tensor:
        """c_t . b_s of a piece [B, C, G, 1, Q, Q]."""
        b, c = self.b_BCGQN[at].flatten(0, 2), self.c_BCGQN[at].flatten(0, 2)
        products = torch.bmm(c, b.transpose(1, 2))
        return products.unflatten(0, self.b_BCGQN[at].shape[:3])[:, :, :, None]

    def mixing(self, weight: Tensor, products: Tensor) -> Tensor:
        """What takes x to y within chunks, made of the weights [B C G R, Q, Q]."""
        weight.mul_(products.to(self.wide))
        if self.d_GR is not None:
            weight.diagonal(dim1=-2, dim2=-1).add_(self.d_GR[..., None])
        return weight.to(self.low).flatten(0, 3)

    def side_by_side(self, x: Tensor, factor: Tensor) -> Tensor:
        """factor x, a group's heads side by side: [B C G, Q, R P]."""
        x, factor = x.transpose(3, 4), factor.transpose(3, 4)[..., None].to(self.low)
        out = torch.empty(x.shape, dtype=self.low, device=x.device)
        return torch.mul(x, factor, out=out).flatten(4).flatten(0, 2)

    def outer(self, left: Tensor, right_BCGQN: Tensor) -> Tensor:
        """Sums over a chunk's positions of left [B C G, Q, R P] x right: [B, C, G, R, P, N]."""
        product = torch.bmm(left.transpose(1, 2), right_BCGQN.flatten(0, 2))
        shape = (*right_BCGQN.shape[:3], self.shared, self.width, self.states)
        return product.view(shape).to(self.wide)

    def stacked(self, state_BCGRPN: Tensor) -> Tensor:
        """A group's states on top of each other, as a factor of products: [B C G, R P, N]."""
        return state_BCGRPN.to(self.low).flatten(3, 4).flatten(0, 2)

    def inner(self, left_BCGQN: Tensor, stacked: Tensor) -> Tensor:
        """left . state at every position of a chunk: a view [B, C, G, R, Q, P]."""
        product = torch.bmm(left_BCGQN.flatten(0, 2), stacked.transpose(1, 2))
        return product.view(*left_BCGQN.shape[:4], self.shared, self.width).transpose(3, 4)


class Neighbours:
    """Where positions of a chunk belong to the sequence of others: masks [B, C, 1, 1, Q]."""

    def __init__(self, ids_BC11Q: Tensor) -> None:
        first, last = ids_BC11Q[..., :1], ids_BC11Q[..., -1:]
        # next to the chunk; beyond the row's ends that of the row's own end
        before = torch.cat([first[:, :1], last[:, :-1]], dim=1)
        after = torch.cat([first[:, 1:], last[:, -1:]], dim=1)
        self.first, self.last, self.before, self.after = (
            ids_BC11Q == other for other in (first, last, before, after)
        )
        self.pairs = ids_BC11Q[..., :, None] == ids_BC11Q[..., None, :]

    def cut_forwards(self, decays: Decays) -> Decays:
        """Decays of the forward direction, 0 from one sequence to another."""
        return Decays(
            decays.read * self.before, decays.write * self.last, decays.over * self.before[..., -1]
        )

    def cut_backwards(self, decays: Decays) -> Decays:
        """The same of the reverse direction."""
        return Decays(
            decays.read * self.after, decays.write * self.first, decays.over * self.after[..., 0]
        )


def carry(
    gained_BCGRPN: Tensor, over_BCGR: Tensor, state_BGRPN: Tensor | None, backwards: bool
) -> tuple[Tensor | None, Tensor]:
    """States that enter each chunk, and the one that leaves the last; None is an empty state."""
    chunks = gained_BCGRPN.shape[1]
    if chunks == 1 and state_BGRPN is None:
        return None, gained_BCGRPN[:, 0]
    over = over_BCGR[..., None, None]
    if chunks == 1:
        leaving = torch.addcmul(gained_BCGRPN[:, 0], state_BGRPN, over[:, 0])
        return state_BGRPN[:, None], leaving
    entering = torch.empty_like(gained_BCGRPN)
    order = [slice(None), slice(None, None, -1)][backwards]
    places, gains, overs = (t.unbind(1)[order] for t in (entering, gained_BCGRPN, over))
    places[0][:] = 0 if state_BGRPN is None else state_BGRPN
    for i in range(chunks - 1):
        write_into(torch.addcmul, gains[i], places[i], overs[i], out=places[i + 1])
    return entering, torch.addcmul(gains[-1], places[-1], overs[-1])


def write_into(function: Callable[..., Tensor], *operands: Any, out: Tensor) -> None:
    """function(*operands, out=out); torch.compile takes no strided `out`."""
    if torch.compiler.is_compiling():
        out.copy_(function(*operands))
    else:
        function(*operands, out=out)


class Forward(Chunks):
    """The scan. `kept` holds what its gradient needs, by (reverse, first row, first chunk): the
    states that enter a piece, stacked, and their products with c."""

    def __init__(self, *arguments: Any, keep: bool) -> None:
        super().__init__(*arguments)
        self.keep = keep
        self.kept: dict[tuple[bool, int, int], tuple[Tensor, Tensor]] = {}

    def run(self) -> tuple[Tensor, Tensor | None]:
        """y [B, L, H, P] and the final state [B, H, P, N], None unless asked for."""
        y_BLHP, y = self.new_like_x()
        finals = []
        for rows in self.row_pieces():
            if self.bidirectional and self.chunks > 1:
                self._reverse_part(rows, y)
            finals.append(self._forward_part(rows, y))
        y_BLHP = y_BLHP[:, : self.length]
        if not self.return_final:
            return y_BLHP, None
        return y_BLHP, (finals[0] if len(finals) == 1 else torch.cat(finals)).flatten(1, 2)

    def _reverse_part(self, rows: slice, y: Tensor) -> None:
        read, state = self.backwards.read, None
        if self.scale_GR is not None:
            read = read * self.scale_GR[..., None]
        for piece in self.pieces(backwards=True):
            at = rows, piece
            entering, state = self._enter(at, state, True, needed=piece.start > 0)
            if entering is None:
                y[at] = 0
            else:
                factor = read[at][..., None].to(self.low)
                write_into(torch.mul, self._inner(at, entering, True), factor, out=y[at])

    def _forward_part(self, rows: slice, y: Tensor) -> Tensor | None:
        state = self.initial if self.initial is None else self.initial[rows]
        for piece in self.pieces(backwards=False):
            at = rows, piece
            needed = self.return_final or piece.stop < self.chunks
            entering, state = self._enter(at, state, False, needed)
            part = self._within(at)
            if self.bidirectional and self.chunks > 1:
                part += y[at]
            if entering is None:
                y[at] = part
            else:
                factor = self.forwards.read[at][..., None].to(self.low)
                operands = part, self._inner(at, entering, False), factor
                write_into(torch.addcmul, *operands, out=y[at])
        return state

    def _enter(
        self, at: Place, state: Tensor | None, backwards: bool, needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """States that enter the chunks of a piece, and the one that leaves it (where needed)."""
        if not needed and self.together == 1:
            return None if state is None else state[:, None], None
        decays = self.backwards if backwards else self.forwards
        written = self.side_by_side(self.x[at], decays.write[at] * self.dt[at])
        gained = self.outer(written, self.b_BCGQN[at])
        return carry(gained, decays.over[at], state, backwards)

    def _inner(self, at: Place, entering: Tensor, backwards: bool) -> Tensor:
        """c . the states that enter their chunks [B, C, G, R, Q, P]."""
        stacked = self.stacked(entering)
        products = self.inner(self.c_BCGQN[at], stacked)
        if self.keep:
            self.kept[backwards, at[0].start, at[1].start] = stacked, products
        return products

    def _within(self, at: Place) -> Tensor:
        """d x and what positions of one chunk give each other [B, C, G, R, Q, P]."""
        weight = self.pair_weights(at, self.dt)
        if self.scale_GR is not None:
            weight.mul_(self.scale_GRQQ)
        x = self.x[at]
        y = torch.bmm(self.mixing(weight, self.products(at)), x.flatten(0, 3))
        return y.view(x.shape)
