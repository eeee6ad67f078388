"""How far is a carried simplex from the dense one? Soft predictions as short lists, one noise.

At every time x = n k eps + 2 k q with q = sqrt(alpha_bar) p, as DDIM would have it were p predicted
in every step. The prediction follows Zipf's law over the tokens in one random order, p_r ~ r^-s:
"sharpening" has s = 1/t, the counts of words at t = 1 and ever surer as the noise falls; "unsure"
has s = 1 at all times, the hardest to cut. The dense side has all of p and all of eps, the same eps
at all times; the carried one has the M likeliest of p.
"""

# V vocabulary, H width, N samples, R rows of a piece, T times, M likeliest tokens

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tess.benchmarks.law.order_statistics import ENERGY_ROWS, check_samples, read_matrix
from tess.benchmarks.law.two_sample import Probes, compare, sample_keys, trained_like
from tess.benchmarks.turns import checkpoint_label
from tess.costs.machine import environment
from tess.errors import UserError
from tess.kernels import random
from tess.kernels.order_statistics import EmbeddingMoments, embedding_moments
from tess.schedulers.carried import CarriedSimplex
from tess.schedulers.noise import alpha_bar
from tess.schedulers.recoverability import auto_simplex_value
from tess.schedulers.simplex import NUM_TOP, SoftTokens

TIMES = (1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1)
NUM_SOFT_TOKENS = (8, 32, 128)
DENSE = "dense"
PREDICTIONS = ("sharpening", "unsure")
DENSE_VALUES = 1 << 24
MAX_VOCABULARY = 1 << 16  # of one piece of `random.normal_at`


def benchmark_carried(
    vocab_size: int = 32_768,
    width: int = 128,
    *,
    embedding: Path | None = None,
    simplex_value: float | None = None,
    times: Sequence[float] = TIMES,
    num_soft_tokens: Sequence[int] = NUM_SOFT_TOKENS,
    num_top: int = NUM_TOP,
    n: int = 2_048,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare embeddings of carried simplices with those of dense ones, `n` samples a side.

    Args:
        vocab_size, width: of a synthetic matrix (`trained_like`), where `embedding` is None.
        embedding: a safetensors file, or a checkpoint folder, with the embedding matrix to use.
        simplex_value: k; by default `auto_simplex_value` of the vocabulary.
        times: of the cosine schedule, falling, in (0, 1].
        num_soft_tokens: the values of M.
        num_top: K, the noises of a position that are drawn exactly.
        seed: of the samples; no two sets share a key.

    Returns a row for each prediction, time and sampler (another dense set, one for each M), with

        mean_error: |mean embedding - dense mean| over the root mean square distance of dense
            embeddings from E's mean row;
        correlation, dense_correlation: with the same samples' embeddings at the time before, mean
            over the probes, and correlation_error, the largest difference of a probe's two; None
            at the first time;
        the statistics of `tess.benchmarks.law.two_sample.Comparison`, and rejected: whether one of
            them tells the two sides apart.

    Raises:
        UserError: no matrix in `embedding`, or a size, a time, an M or a K out of range.
    """
    weight_VH = trained_like(vocab_size, width) if embedding is None else read_matrix(embedding)
    vocab_size, width = weight_VH.shape
    _check(vocab_size, times, num_soft_tokens, num_top, n)
    k = auto_simplex_value(vocab_size) if simplex_value is None else simplex_value
    moments, seeds = embedding_moments(weight_VH), itertools.count(1_000 * seed)
    rows = []
    for prediction in PREDICTIONS:
        path = _Path.of(prediction, vocab_size, k, times)
        dense_TNH = path.dense(weight_VH, n, next(seeds))
        samples = {DENSE: path.dense(weight_VH, n, next(seeds))}
        for most in num_soft_tokens:
            samples[f"M={most}"] = path.carried(weight_VH, moments, n, next(seeds), most, num_top)
        probes = Probes.of(weight_VH, int(path.order_V[0]))
        for (place, t), name in itertools.product(enumerate(times), samples):
            head = {"prediction": prediction, "time": t, "sigma": path.sigma(t), "sampler": name}
            rows.append(head | _figures(samples[name], dense_TNH, place, probes))
    return {
        "benchmark": "carried",
        "embedding": "synthetic" if embedding is None else checkpoint_label(embedding),
        "vocab_size": vocab_size,
        "width": width,
        "simplex_value": k,
        "num_top": num_top,
        "n": n,
        "seed": seed,
        "rows": rows,
        "environment": environment(),
    }


# ---- samples ----


@dataclass(frozen=True, eq=False)
class _Path:
    """The times, and the prediction at each."""

    prediction: str

    order_V: Tensor
    """The tokens by falling probability."""

    simplex_value: float
    times: Sequence[float]

    @classmethod
    def of(cls, prediction: str, vocab_size: int, k: float, times: Sequence[float]) -> "_Path":
        order_V = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
        return cls(prediction, order_V, k, times)

    def sigma(self, t: float) -> float:
        return self.simplex_value * (1 - float(alpha_bar(t))) ** 0.5

    def probabilities(self, t: float) -> Tensor:
        """p [V] by falling value."""
        exponent = 1.0 if self.prediction == "unsure" else 1 / t
        ranks_V = torch.arange(1, len(self.order_V) + 1, dtype=torch.float64)
        return (-exponent * ranks_V.log()).softmax(dim=0)

    def dense(self, weight_VH: Tensor, n: int, seed: int) -> Tensor:
        """Embeddings [T, N, H] float64; a sample has the same noise at all times."""
        vocabulary, rows = len(weight_VH), _rows(n, seed)
        shifts = [self._shift(t).float() for t in self.times]
        pieces = []
        for keys_R, positions_R in zip(
            *(x.split(max(1, DENSE_VALUES // vocabulary)) for x in rows)
        ):
            noise_RV = random.normal_at(keys_R, positions_R, 0, 0, vocabulary)
            embedded = [
                (noise_RV * self.sigma(t)).add_(shift_V).softmax(dim=-1) @ weight_VH
                for t, shift_V in zip(self.times, shifts)
            ]
            pieces.append(torch.stack(embedded).double())
        return torch.cat(pieces, dim=1)

    def _shift(self, t: float) -> Tensor:
        """2 k q [V], by token."""
        factor = 2 * self.simplex_value * float(alpha_bar(t)) ** 0.5
        return torch.empty_like(p_V := self.probabilities(t)).scatter_(
            0, self.order_V, factor * p_V
        )

    def carried(
        self,
        weight_VH: Tensor,
        moments: EmbeddingMoments,
        n: int,
        seed: int,
        most: int,
        num_top: int,
    ) -> Tensor:
        """Embeddings [T, N, H] float64 of `CarriedSimplex`; the same noise at all times."""
        keys_B, positions_L = sample_keys(n, seed)
        shape, vocabulary = (len(keys_B), len(positions_L)), len(weight_VH)
        start = CarriedSimplex.initial(
            shape, keys_B, vocabulary, self.simplex_value, num_top=num_top, max_list=most
        )
        embedded = []
        for t in self.times:
            share, p_V = float(alpha_bar(t)), self.probabilities(t)
            fields = (self.order_V[:most], p_V[:most].float())
            prediction = SoftTokens(*(x.expand(*shape, -1) for x in fields))
            sample = start.moved((1 - share) ** 0.5, [(share**0.5, prediction)])
            embedded.append(sample.embedding(weight_VH, moments).flatten(0, 1)[:n])
        return torch.stack(embedded).double()


def _rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and positions [N] of the samples."""
    keys_B, positions_L = sample_keys(n, seed)
    rows = keys_B.repeat_interleave(len(positions_L)), positions_L.repeat(len(keys_B))
    return rows[0][:n], rows[1][:n]


def _figures(drawn_TNH: Tensor, dense_TNH: Tensor, place: int, probes: Probes) -> dict[str, Any]:
    drawn_NH, dense_NH = drawn_TNH[place], dense_TNH[place]
    found = compare(drawn_NH, dense_NH, probes, energy_rows=ENERGY_ROWS)
    size = (dense_NH - probes.mean_H).square().sum(dim=1).mean().sqrt()
    figures = {"mean_error": float((drawn_NH.mean(0) - dense_NH.mean(0)).norm() / size)}
    names = ("correlation", "dense_correlation", "correlation_error")
    if place == 0:
        figures |= dict.fromkeys(names)
    else:
        both = [_correlations(x[place - 1], x[place], probes) for x in (drawn_TNH, dense_TNH)]
        numbers = (both[0].mean(), both[1].mean(), (both[0] - both[1]).abs().max())
        figures |= dict(zip(names, map(float, numbers)))
    return figures | asdict(found) | {"rejected": found.worst > 1}


def _correlations(one_NH: Tensor, other_NH: Tensor, probes: Probes) -> Tensor:
    """Of each probe's values in the two sets, whose rows belong together."""
    pairs = zip(probes.projections(one_NH), probes.projections(other_NH))
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


def _check(
    vocab_size: int,
    times: Sequence[float],
    num_soft_tokens: Sequence[int],
    num_top: int,
    n: int,
) -> None:
    if not 3 <= vocab_size <= MAX_VOCABULARY:
        raise UserError(f"vocab_size must be in 3..{MAX_VOCABULARY}, got {vocab_size}")
    check_samples(n, times)
    if not 1 <= num_top <= vocab_size:
        raise UserError(f"num_top must be in 1..{vocab_size}, got {num_top}")
    for most in num_soft_tokens:
        if not 1 <= most <= vocab_size:
            raise UserError(f"num_soft_tokens must be in 1..{vocab_size}, got {most}")
