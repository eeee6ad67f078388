"""A sweep over slabs of logits in kernels: token, log-probability, entropy and softmax in place.

A program has a row. It reads it once for what it measures, again up to the token that it draws, and
again to put the probabilities where the logits were.

Letters: T rows, R rows of a slab, V vocabulary, H width, G width of the embedding.
"""

from collections.abc import Callable, Hashable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from tess.kernels import head as public
from tess.kernels.triton.launch import Config, Table, launch, wide_type

CHOICES = ("argmax", "sample", "given")
ARGMAX, SAMPLE = tl.constexpr("argmax"), tl.constexpr("sample")
NOWHERE = tl.constexpr(2**31 - 1)


class OnceTable(Table):
    """Of a kernel that overwrites what it reads: timing it would repeat it, so it is not tuned."""

    def run(self, like: Tensor, key: Hashable, run: Callable[[Config], None]) -> None:
        """Call `run` once, with the configuration for this device."""
        self._tuned[like.device, like.dtype, key] = self.config(like)
        super().run(like, key, run)


# A thread has EACH neighbouring logits of a tile, so that a tile needs no exchange between threads.
ROWS = OnceTable("sweep_rows", {"sm_80": Config({"LANES": 512, "EACH": 8}, 16, 1)})


# ---- kernel ----


@triton.jit
def _tile(logits_ptr, start, place, width, WIDE: tl.constexpr):
    inside = start + place < width
    return tl.load(logits_ptr + start + place, mask=inside, other=-float("inf")).to(WIDE), inside


@triton.jit
def _measure(
    logits_ptr, place, width, temperature,
    SCALED: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr,
):
    """Of a row: peak, its first place, and with w = e^(x - peak) the sums of w, of w (x - peak) and
    of e^((x - peak) / temperature)."""
    peak, first = tl.full((LANES,), -float("inf"), WIDE), tl.zeros((LANES,), tl.int32)
    total, sloped, tempered = (tl.zeros((LANES,), WIDE),) * 3
    for start in range(0, width, LANES * EACH):
        x, _inside = _tile(logits_ptr, start, place, width, WIDE)
        most = tl.max(x, axis=1)
        here = tl.min(tl.where(x == most[:, None], start + place, NOWHERE), axis=1)
        first = tl.where(most > peak, here, first)
        higher = tl.maximum(peak, most)
        level = tl.where(higher == -float("inf"), 0.0, higher)
        shift = tl.where(peak == -float("inf"), 0.0, peak - level)
        below = x - level[:, None]
        w, decay = tl.exp(below), tl.exp(shift)
        sloped = decay * (sloped + shift * total)
        sloped += tl.sum(w * tl.where(w > 0, below, 0.0), axis=1)
        total = decay * total + tl.sum(w, axis=1)
        if SCALED:
            more = tl.sum(tl.exp(below / temperature), axis=1)
            tempered = tempered * tl.exp(shift / temperature) + more
        peak = higher
    top = tl.max(peak, axis=0)
    first = tl.minimum(tl.min(tl.where(peak == top, first, NOWHERE), axis=0), width - 1)
    shift = tl.where(peak == -float("inf"), 0.0, peak - top)
    decay = tl.exp(shift)
    sloped = tl.sum(decay * (sloped + shift * total), axis=0)
    total = tl.sum(decay * total, axis=0)
    if SCALED:
        tempered = tl.sum(tempered * tl.exp(shift / temperature), axis=0)
    else:
        tempered = total
    return top, first, total, sloped, tempered


@triton.jit
def _draw(
    logits_ptr, place, width, temperature, top, point,
    SCALED: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr,
):
    """The first token, in the vocabulary's order, at which the sum of weights exceeds the point.

    A token of weight 0 is never drawn; if rounding leaves the point beyond the sum, the last other.
    """
    before, token, start = point * 0, -1, 0
    last = tl.zeros((LANES,), tl.int32)
    while (token < 0) & (start < width):
        x, _inside = _tile(logits_ptr, start, place, width, WIDE)
        below = x - top
        if SCALED:
            below = below / temperature
        w = tl.exp(below)
        lanes = tl.sum(w, axis=1).to(tl.float64)
        after = before + tl.sum(lanes, axis=0)
        if after > point:
            ends = (tl.cumsum(lanes, axis=0) - lanes)[:, None] + tl.cumsum(w.to(tl.float64), axis=1)
            hit = (before + ends > point) & (w > 0)
            found = tl.min(tl.min(tl.where(hit, start + place, NOWHERE), axis=1), axis=0)
            token = tl.where(found < width, found, token)
        last = tl.maximum(last, tl.max(tl.where(w > 0, start + place, 0), axis=1))
        before = after
        start += LANES * EACH
    return tl.where(token < 0, tl.max(last, axis=0), token)


@triton.jit
def _sweep_rows(
    logits_ptr, uniform_ptr, given_ptr, tokens_ptr, log_prob_ptr, entropy_ptr, log_sum_ptr,
    row_stride, width, temperature,
    CHOICE: tl.constexpr, SCALED: tl.constexpr, PROBS: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr, WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    place = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    top, first, total, sloped, tempered = _measure(
        logits_ptr, place, width, temperature, SCALED, LANES, EACH, WIDE
    )
    if CHOICE == ARGMAX:
        token = first.to(tl.int64)
    elif CHOICE == SAMPLE:
        point = tl.load(uniform_ptr + row).to(tl.float64) * tempered.to(tl.float64)
        token = _draw(
            logits_ptr, place, width, temperature, top, point, SCALED, LANES, EACH, WIDE
        ).to(tl.int64)
    else:
        token = tl.load(given_ptr + row)
    own, log_total = tl.load(logits_ptr + token).to(WIDE), tl.log(total)
    tl.store(tokens_ptr + row, token)
    tl.store(log_prob_ptr + row, (own - top - log_total).to(tl.float32))
    tl.store(entropy_ptr + row, (log_total - sloped / total).to(tl.float32))
    tl.store(log_sum_ptr + row, (top + log_total).to(tl.float32))
    if PROBS:
        tl.debug_barrier()  # no thread may write a probability before all have read that logit
        scale = 1.0 / total
        for start in range(0, width, LANES * EACH):
            x, inside = _tile(logits_ptr, start, place, width, WIDE)
            p = tl.exp(x - top) * scale
            tl.store(logits_ptr + start + place, p.to(logits_ptr.dtype.element_ty), inside)


# ---- launch and operation ----


def sweep_rows_forward(
    logits_RV: Tensor, uniform_R: Tensor | None, tokens_R: Tensor | None, temperature: float,
    choice: str, probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [R] int64; log-probability, entropy and log-sum-exp [R] float32 of softmax(logits).

    choice: "argmax", the lowest of equals; "sample", at uniform_R from softmax(logits /
    temperature); "given", tokens_R. With `probs` the logits become softmax(logits), in place.
    """
    (rows, width), device = logits_RV.shape, logits_RV.device
    if choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    numbers = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3)]
    given = [None if x is None else x.contiguous() for x in (uniform_R, tokens_R)]

    def run(config: Config) -> None:
        launch(
            _sweep_rows, (rows,), logits_RV, *given, tokens, *numbers, logits_RV.stride(0), width,
            float(temperature), config=config, CHOICE=choice,
            SCALED=choice == "sample" and temperature != 1, PROBS=probs, WIDE=wide_type(logits_RV),
        )

    ROWS.run(logits_RV, width, run)
    return tokens, *numbers


sweep_rows = torch.library.custom_op(
    "tess::sweep_rows", sweep_rows_forward, mutates_args=("logits_RV",)
)


@sweep_rows.register_fake
def _(logits_RV, uniform_R, tokens_R, temperature, choice, probs):
    rows = logits_RV.shape[0]
    numbers = (logits_RV.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return logits_RV.new_empty(rows, dtype=torch.int64), *numbers


# ---- the sweep ----


def vocabulary_sweep(
    hidden_TH: Tensor, head_VH: Tensor, table_VG: Tensor | None, uniform_T: Tensor | None,
    rule: "public._Rule", slab_bytes: int,
) -> "list[public.SweepOutput]":
    """The outputs of each slab, as `tess.kernels.head.vocabulary_sweep` joins them.

    head: in the products' dtype, which the slab has too.
    """
    most = public.slab_rows(len(head_VH), slab_bytes, head_VH.element_size())
    rows = public.whole_groups(most - public.ROW_GROUP + 1)
    height = min(rows, public.whole_groups(len(hidden_TH)))
    slab_RV = head_VH.new_empty(height, len(head_VH))
    parts = []
    for start in range(0, len(hidden_TH), rows):
        hidden_RH = hidden_TH[start : start + rows].to(head_VH.dtype)
        draw_R = None if uniform_T is None else uniform_T[start : start + rows]
        used_RV = slab_RV[: public.whole_groups(len(hidden_RH))]
        parts.append(_sweep_slab(hidden_RH, head_VH, table_VG, used_RV, start, draw_R, rule))
    return parts


def _sweep_slab(
    hidden_RH: Tensor, head_VH: Tensor, table_VG: Tensor | None, slab_RV: Tensor, start: int,
    draw_R: Tensor | None, rule: "public._Rule",
) -> "public.SweepOutput":
    rows = len(hidden_RH)
    torch.mm(F.pad(hidden_RH, (0, 0, 0, len(slab_RV) - rows)), head_VH.T, out=slab_RV)
    logits_RV, probs = slab_RV[:rows], table_VG is not None
    processed_RV = logits_RV
    if rule.processors is not None:
        processed_RV = public.processed(rule.processors, start, logits_RV.float())
    likeliest = _likeliest(processed_RV, rule)  # before the logits are used up
    tokens_R = _chosen(processed_RV, draw_R, rule)
    choice = rule.choose if tokens_R is None else "given"
    columns = sweep_rows(logits_RV, draw_R, tokens_R, rule.temperature, choice, probs)
    embedding = (slab_RV.to(table_VG.dtype) @ table_VG)[:rows] if probs else None
    return public.SweepOutput(*columns, embedding, *likeliest)


def _likeliest(logits_RV: Tensor, rule: "public._Rule") -> tuple[Tensor | None, Tensor | None]:
    """The likeliest tokens [R, M] and their probabilities, where they are wanted."""
    if rule.num_likeliest is None:
        return None, None
    ids_RM = public.likeliest_ids(logits_RV, rule.num_likeliest)
    log_sum_R1 = logits_RV.float().logsumexp(dim=-1, keepdim=True)
    return ids_RM, (logits_RV.gather(1, ids_RM).float() - log_sum_R1).exp()


def _chosen(logits_RV: Tensor, draw_R: Tensor | None, rule: "public._Rule") -> Tensor | None:
    """Tokens [R] of rules with a cut or with processors; None where the sweep itself chooses.

    logits: the processed ones.
    """
    cut = rule.choose == "sample" and (rule.top_k is not None or rule.top_p is not None)
    if not cut:
        if rule.processors is None:
            return None
        rows = (logits_RV.contiguous(), draw_R, None, rule.temperature, rule.choose, False)
        return sweep_rows(*rows)[0]
    logits_RV = logits_RV.float()
    if rule.temperature != 1:
        logits_RV = logits_RV / rule.temperature
    return public.draw_by_rank(logits_RV.softmax(dim=-1), draw_R, rule.top_k, rule.top_p)


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, hot, call) at shipped shapes; `make(*shape, dtype=...)`: a tensor without data."""
    uniform, given = make(64, dtype=torch.float32), make(64, dtype=torch.int64)
    for dtype, choice, temperature, probs in (
        (torch.bfloat16, "argmax", 1.0, True), (torch.bfloat16, "sample", 1.0, True),
        (torch.bfloat16, "sample", 0.7, False), (torch.bfloat16, "given", 1.0, True),
        (torch.float32, "sample", 0.7, True),
    ):
        hot, logits = dtype == torch.bfloat16, make(64, 131_072, dtype=dtype)
        name = f"sweep {choice} {temperature} {str(dtype).removeprefix('torch.')}"
        yield (
            name, hot,
            lambda a=(logits, uniform, given, temperature, choice, probs): sweep_rows_forward(*a),
        )
