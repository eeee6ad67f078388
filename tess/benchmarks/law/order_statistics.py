"""Is the embedding drawn by order statistics the dense one in law? Two-sample tests over all times.

At every time one set of dense samples is compared with another dense set (the null), with samplers
by order statistics, and with samplers that leave something out, which must be told apart.
"""

# V vocabulary, H width, N samples; R rows (one a sample), K top tokens, J = K + 1

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from tess.benchmarks.law.two_sample import Probes, compare, law_samples, sample_keys, trained_like
from tess.benchmarks.turns import checkpoint_label
from tess.costs.machine import environment
from tess.errors import UserError
from tess.kernels import random
from tess.kernels.order_statistics import (
    EmbeddingMoments,
    embedding_moments,
    largest_normals,
    token_weights,
)
from tess.schedulers.noise import alpha_bar
from tess.schedulers.recoverability import auto_simplex_value

TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
NUM_TOPS = (16, 32, 64)
DENSE = "dense"
PARTS = ("bulk", "bulk noise", "own noise", "correlations", "distinct ids")
COMPARED_PARTS = PARTS[:3]
ENERGY_ROWS = 2_048
MIN_SAMPLES = 16
MATRIX_NAMES = ("embeddings.weight", "embed_tokens.weight", "word_embeddings.weight")


def benchmark_law(
    vocab_size: int = 131_072,
    width: int = 128,
    *,
    embedding: Path | None = None,
    simplex_value: float | None = None,
    times: Sequence[float] = TIMES,
    num_tops: Sequence[int] = NUM_TOPS,
    n: int = 2_048,
    token: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare samplers of softmax(x) E with the dense one, `n` samples a side.

    Args:
        vocab_size, width: of a synthetic matrix (`trained_like`), where `embedding` is None.
        embedding: a safetensors file, or a checkpoint folder, with the embedding matrix to use.
        simplex_value: k; by default `auto_simplex_value` of the vocabulary.
        times: of the cosine schedule, in [0, 1], 0 being clean.
        num_tops: the values of K; what leaves something out has the largest.
        token: the one that is noised; by default the one with the median distance from the mean.
        seed: of all samples; no two sets share a key.

    Returns a row for each time and sampler, with the statistics of
    `tess.benchmarks.law.two_sample.Comparison`.

    Raises:
        UserError: no matrix in `embedding`, fewer than 3 tokens or 16 samples a side, or a K, a
            token or a time out of range.
    """
    weight_VH = trained_like(vocab_size, width) if embedding is None else read_matrix(embedding)
    vocab_size, width = weight_VH.shape
    token = median_token(weight_VH) if token is None else token
    _check(vocab_size, times, num_tops, n, token)
    k = auto_simplex_value(vocab_size) if simplex_value is None else simplex_value
    samplers = _samplers(weight_VH, n, token, num_tops)
    probes, seeds, rows = Probes.of(weight_VH, token), itertools.count(1_000 * seed), []
    for t in times:
        share = float(alpha_bar(t))
        scales = {"signal": k * share**0.5, "sigma": k * (1 - share) ** 0.5}
        dense_NH = samplers[DENSE](**scales, seed=next(seeds))
        for name, sampler in samplers.items():
            drawn_NH = sampler(**scales, seed=next(seeds))
            found = compare(drawn_NH, dense_NH, probes, energy_rows=ENERGY_ROWS)
            figures = asdict(found) | {"rejected": found.worst > 1}
            rows.append({"time": t, "sigma": scales["sigma"], "sampler": name, **figures})
    return {
        "benchmark": "law",
        "embedding": "synthetic" if embedding is None else checkpoint_label(embedding),
        "vocab_size": vocab_size,
        "width": width,
        "simplex_value": k,
        "token": token,
        "n": n,
        "seed": seed,
        "rows": rows,
        "environment": environment(),
    }


# ---- samplers ----


def _samplers(
    weight_VH: Tensor, n: int, token: int, num_tops: Sequence[int]
) -> dict[str, Callable[..., Tensor]]:
    """By name, as functions of signal, sigma and seed."""
    common = {"weight_VH": weight_VH, "size": n, "token": token}
    samplers = {DENSE: partial(law_samples, noise=DENSE, **common)}
    common["moments"] = embedding_moments(weight_VH)
    for num_top in num_tops:
        samplers[f"K={num_top}"] = partial(law_samples, num_top=num_top, **common)
    for part in COMPARED_PARTS:
        samplers[f"K={max(num_tops)} without {part}"] = partial(
            incomplete_samples, without=part, num_top=max(num_tops), **common
        )
    return samplers


def incomplete_samples(
    weight_VH: Tensor,
    signal: float,
    sigma: float,
    size: int,
    *,
    without: str | None,
    token: int,
    seed: int,
    num_top: int = 32,
    moments: EmbeddingMoments | None = None,
) -> Tensor:
    """`law_samples` by order statistics, written out again, with one part of the law left out.

    without: "bulk" (what is not on top has no weight: plain truncation), "bulk noise" (all others
    have their mean weight each), "own noise" (the true token's logit is not noised), "correlations"
    (of the coordinates of the bulk's noise), "distinct ids" (top tokens are drawn with replacement;
    in a large vocabulary nothing can tell), or None: then these are `law_samples`, up to rounding.
    """
    if without not in (None, *PARTS):
        raise ValueError(f"without must be None or one of {', '.join(PARTS)}, got {without!r}")
    moments = embedding_moments(weight_VH) if moments is None else moments
    keys_B, positions_L = sample_keys(size, seed)
    keys_R = keys_B.repeat_interleave(len(positions_L))
    positions_R = positions_L.repeat(len(keys_B))
    others, dtype = len(weight_VH) - 1, weight_VH.dtype
    largest = largest_normals(keys_R, positions_R, 0, others, num_top)
    # of the pair, the first is the true token's noise and the second that of the bulk's sum
    kept = [float(without != "own noise"), float(without != "bulk noise")]
    largest = largest._replace(pair_R2=largest.pair_R2 * largest.pair_R2.new_tensor(kept))
    sigma_R = torch.full((len(keys_R),), sigma, dtype=torch.float64)
    gap_R = torch.full_like(sigma_R, 2 * signal)
    weights_RJ, share_R, spread_R = token_weights(gap_R, sigma_R, largest, others)
    if without == "bulk":
        share_R = torch.zeros_like(share_R)
        weights_RJ = weights_RJ / weights_RJ.sum(dim=1, keepdim=True)
    if without in ("bulk", "bulk noise"):
        spread_R = torch.zeros_like(spread_R)

    ids_RK = largest.ids_RK
    if without == "distinct ids":
        ids_RK = torch.randint(others, ids_RK.shape, generator=torch.Generator().manual_seed(seed))
    ids_RJ = torch.cat([torch.full_like(ids_RK[:, :1], token), ids_RK + (ids_RK >= token)], dim=1)
    excess_RJ = (weights_RJ - share_R[:, None]).to(dtype)
    x_RH = F.embedding_bag(ids_RJ, weight_VH, per_sample_weights=excess_RJ, mode="sum")
    width = weight_VH.shape[1]
    z_RH = random.normal_at(keys_R, positions_R, 0, 0, width, random.BULK_STREAM).to(dtype)
    factor_HH = moments.factor
    if without == "correlations":
        factor_HH = torch.diag(factor_HH.norm(dim=1))
    x_RH = x_RH + share_R[:, None] * moments.sums + spread_R[:, None] * (z_RH @ factor_HH.T)
    return x_RH.double()[:size]


# ---- the matrix ----


def read_matrix(path: Path) -> Tensor:
    """The embedding matrix [V, H], float32, of a safetensors file or of a folder with some.

    Raises:
        UserError: what cannot be read, and none or several tensors named `MATRIX_NAMES`.
    """
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    ends, found = tuple(f".{name}" for name in MATRIX_NAMES), []
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                keys = [key for key in opened.keys() if f".{key}".endswith(ends)]
                found += [(key, opened.get_tensor(key)) for key in keys]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no readable safetensors file: {error}") from error
    matrices = [(key, x) for key, x in found if x.ndim == 2 and x.is_floating_point()]
    if len(matrices) != 1:
        raise UserError(
            f"{path} must hold one floating-point matrix named {', '.join(MATRIX_NAMES[:-1])} or "
            f"{MATRIX_NAMES[-1]}, got {', '.join(key for key, _ in matrices) or 'none'} in "
            f"{len(files)} safetensors files"
        )
    return matrices[0][1].float()


def median_token(weight_VH: Tensor) -> int:
    """The token whose row is neither near to the mean row nor far from it."""
    return int((weight_VH - weight_VH.mean(0)).norm(dim=1).median(dim=0).indices)


def _check(
    vocab_size: int, times: Sequence[float], num_tops: Sequence[int], n: int, token: int
) -> None:
    if vocab_size < 3:
        raise UserError(f"vocab_size must be at least 3, got {vocab_size}")
    check_samples(n, times)
    if not 0 <= token < vocab_size:
        raise UserError(f"token must be in 0..{vocab_size - 1}, got {token}")
    for num_top in num_tops:
        if not 1 <= num_top < vocab_size:
            raise UserError(f"num_tops must be in 1..{vocab_size - 1}, got {num_top}")


def check_samples(n: int, times: Sequence[float]) -> None:
    """Refuse too few samples a side, and times outside of (0, 1]."""
    if n < MIN_SAMPLES:
        raise UserError(f"n must be at least {MIN_SAMPLES} samples a side, got {n}")
    for t in times:
        if not 0 < t <= 1:
            raise UserError(f"times must be above 0 and at most 1, got {t}")
