"""The chunked scan as one operation of autograd, its gradient written out by hand.

A graph of small operations would keep five matrices of all pairs of a chunk and pass over each of
them again; here they are computed a second time, piece by piece, and only states are kept.

Letters: as in `kernels/ssd_chunks.py`; a `d` before a name is the gradient of the loss by it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tess.kernels.ssd_chunks import Chunks, Forward, Place, ScanOptions, carry, write_into

LEAST_STEP = 1e-20  # stands for a step of 0 where a sum is divided by the step


def chunked_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    c_BLGN: Tensor,
    d_H: Tensor | None,
    scale_H: Tensor | None,
    initial_BHPN: Tensor | None,
    ids_BL: Tensor | None,
    options: ScanOptions,
) -> tuple[Tensor, Tensor | None]:
    """y in the dtype of x and the final state in that of dt (final steps, float32 or float64).

    b and c have the dtype of x; `scale_H` scales the reverse part, `ids_BL` are sequence ids.
    """
    tensors = (x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, d_H, scale_H, initial_BHPN)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ChunkedScan.apply(*tensors, ids_BL, options)
    return Forward(*tensors, ids_BL, options, keep=False).run()


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, ctx.options = arguments
        scan = Forward(*arguments, keep=True)
        y, final = scan.run()
        ctx.kept_at = list(scan.kept)
        ctx.save_for_backward(*tensors, *(t for pair in scan.kept.values() for t in pair))
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        if dy is None and dfinal is None:
            return (None,) * 10
        saved = ctx.saved_tensors  # once: under gradient checkpointing it computes them
        tensors, kept = saved[:9], saved[9:]
        kept = dict(zip(ctx.kept_at, zip(kept[::2], kept[1::2])))
        with torch.autocast(tensors[0].device.type, enabled=False):
            return *_Backward(*tensors, ctx.options, kept=kept).run(dy, dfinal), None, None


class _Backward(Chunks):
    """Gradients of one call, summed up over its pieces.

    A gradient by a sum of log decays is collected at the sum's end j and belongs to every position
    up to j (`upto`) or before it (`before`), from j on (`since`) or after it (`after`), or to the
    whole chunk (`over`).
    """

    def __init__(self, *arguments: Any, kept: dict[Any, tuple[Tensor, Tensor]]) -> None:
        super().__init__(*arguments)
        self.kept = kept
        self.step = self.dt.clamp_min(LEAST_STEP)
        self.dx_BLHP, self.dx = self.new_like_x()
        self.db_BCGQN, self.dc_BCGQN = (torch.empty_like(self.b_BCGQN) for _ in range(2))
        self.ddt = torch.empty_like(self.dt)
        self.upto, self.after = torch.zeros_like(self.dt), torch.zeros_like(self.dt)
        if self.bidirectional:
            self.before, self.since = torch.zeros_like(self.dt), torch.zeros_like(self.dt)
        self.over = torch.zeros_like(self.forwards.over)
        self.dd_GR, self.dscale_GR = torch.zeros_like(self.a_GR), torch.zeros_like(self.a_GR)

    def run(self, dy_BLHP: Tensor | None, dfinal_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients by x, dt, a, b, c, d, the reverse part's scale, and the initial state."""
        if dy_BLHP is None:
            dy_BLHP = torch.zeros_like(self.dx_BLHP)[:, : self.length]
        self.dy = self.cut(dy_BLHP)
        dfinal = None if dfinal_BHPN is None else self.by_group(dfinal_BHPN.to(self.wide), 1)
        dinitial = []
        for rows in self.row_pieces():
            dstate = self._sweep(rows, False, None if dfinal is None else dfinal[rows])
            dinitial.append(dstate)
            if self.bidirectional and self.chunks > 1:
                self._sweep(rows, True, None)
        dlog = self._by_logs()
        self.ddt.addcmul_(dlog, self.a_GR[..., None])
        return (
            self.dx_BLHP[:, : self.length],
            self.join(self.ddt[..., None])[..., 0],
            (dlog * self.dt).sum((0, 1, 4)).flatten(),
            self.join(self.db_BCGQN[:, :, :, None]),
            self.join(self.dc_BCGQN[:, :, :, None]),
            None if self.d_GR is None else self.dd_GR.flatten(),
            None if self.scale_GR is None else self.dscale_GR.flatten(),
            None if self.initial is None else torch.cat(dinitial).flatten(1, 2),
        )

    def _by_logs(self) -> Tensor:
        """Gradients by dt a, the logarithm of each position's decay."""
        leftwards, rightwards = self.upto, F.pad(self.after[..., :-1], (1, 0))
        if self.bidirectional:
            leftwards = leftwards + F.pad(self.before[..., 1:], (0, 1))
            rightwards = rightwards + self.since
        sums = leftwards.flip(-1).cumsum(-1).flip(-1) + rightwards.cumsum(-1)
        return sums + self.over[..., None]

    def _sweep(self, rows: slice, backwards: bool, dstate: Tensor | None) -> Tensor | None:
        """Walk over the chunks against the scan's direction; returns the gradient by the state
        that it started from, given that by the state that it left."""
        for piece in self.pieces(not backwards):
            at = rows, piece
            within = None if backwards else self._within(at)
            kept = self.kept.get((backwards, rows.start, piece.start))
            if kept is None:  # outputs of the piece read no state
                dleaving, dstate = None if dstate is None else dstate[:, None], None
            else:
                dleaving, dstate = self._through_reads(at, backwards, dstate, *kept)
            if dleaving is not None:
                entering = None if kept is None else kept[0]
                self._through_writes(at, backwards, dleaving, entering, within)
            elif within is not None:
                self.dx[at] = within
        return dstate

    def _through_reads(
        self, at: Place, backwards: bool, dstate: Tensor | None, entering: Tensor, products: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        decays, dy = self.backwards if backwards else self.forwards, self.dy[at]
        read = decays.read[at]
        by_reads = (dy * products).sum(-1, dtype=self.wide).mul_(read)
        if backwards and self.scale_GR is not None:
            self.dscale_GR += by_reads.sum((0, 1, 4))
            scale = self.scale_GR[..., None]
            read, by_reads = read * scale, by_reads * scale
        (self.since if backwards else self.upto)[at] += by_reads
        dread = self.side_by_side(dy, read)
        self._add(self.dc_BCGQN[at], torch.bmm(dread, entering))
        gained = self.outer(dread, self.c_BCGQN[at])
        return carry(gained, decays.over[at], dstate, not backwards)

    def _through_writes(
        self,
        at: Place,
        backwards: bool,
        dleaving: Tensor,
        entering: Tensor | None,
        within: Tensor | None,
    ) -> None:
        """`within`: the gradient by x so far, None if it is in its place already."""
        decays = self.backwards if backwards else self.forwards
        write, x, stacked = decays.write[at], self.x[at], self.stacked(dleaving)
        steps = write * self.dt[at]
        by_x = self.inner(self.b_BCGQN[at], stacked)
        by_steps = (x * by_x).sum(-1, dtype=self.wide)
        self.ddt[at].addcmul_(write, by_steps)
        (self.before if backwards else self.after)[at] += steps * by_steps
        dx, within = self.dx[at], self.dx[at] if within is None else within
        write_into(torch.addcmul, within, by_x, steps[..., None].to(self.low), out=dx)
        self._add(self.db_BCGQN[at], torch.bmm(self.side_by_side(x, steps), stacked))
        if entering is not None:
            products = dleaving * entering.view(dleaving.shape)
            self.over[at] += decays.over[at] * products.sum((-1, -2))

    def _within(self, at: Place) -> Tensor:
        """Gradients through the products within chunks; the first to write a piece's gradients.

        Returns that by x, which nothing else has been added to.
        """
        x, dy = self.x[at].flatten(0, 3), self.dy[at].flatten(0, 3)
        weight, products = self.pair_weights(at, self.step), self.products(at)
        dpairs = torch.bmm(dy, x.transpose(1, 2)).view(weight.shape).to(self.wide)
        if self.d_GR is not None:
            self.dd_GR += dpairs.diagonal(dim1=-2, dim2=-1).sum((0, 1, 4))
        dpairs.mul_(weight)
        scaled = dpairs
        if self.scale_GR is not None:
            scaled = dpairs * self.scale_GRQQ
            weight.mul_(self.scale_GRQQ)
        dproducts = scaled.sum(3).to(self.low).flatten(0, 2)
        self._by_pairs(at, dpairs.mul_(products.to(self.wide)))

        b, c = self.b_BCGQN[at], self.c_BCGQN[at]
        self.dc_BCGQN[at] = torch.bmm(dproducts, b.flatten(0, 2)).view(c.shape)
        self.db_BCGQN[at] = torch.bmm(dproducts.transpose(1, 2), c.flatten(0, 2)).view(b.shape)
        mixing = self.mixing(weight, products)
        return torch.bmm(mixing.transpose(1, 2), dy).view(self.x[at].shape)

    def _by_pairs(self, at: Place, dpairs: Tensor) -> None:
        """Gradients by steps and decays from those by the logarithm of every pair's weight."""
        if not self.bidirectional:
            by_inputs = dpairs.sum(-2)
            self.upto[at] += dpairs.sum(-1) - by_inputs
            self.ddt[at] = by_inputs / self.step[at]
            return
        diagonal = dpairs.diagonal(dim1=-2, dim2=-1)
        below, above = dpairs.tril(-1), dpairs.triu(1)
        by_earlier, by_later, to_later = below.sum(-2), above.sum(-2), above.sum(-1)
        if self.scale_GR is not None:
            self.dscale_GR += to_later.sum((0, 1, 4))
            scale = self.scale_GR[..., None]
            by_later, to_later = by_later * scale, to_later * scale
        self.upto[at] += below.sum(-1) - by_earlier
        self.before[at] += by_later - to_later
        self.ddt[at] = (by_earlier + by_later + diagonal) / self.step[at]

    @staticmethod
    def _add(total_BCGQN: Tensor, product: Tensor) -> None:
        total_BCGQN += product.view(total_BCGQN.shape)
