"""Noised simplices: kept as token ids, noise level and random key, or dense."""

# B examples, L positions, V vocabulary, H width of the embedding

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tess.kernels import random
from tess.kernels.order_statistics import EmbeddingMoments
from tess.kernels.simplex_embedding import NOISES, simplex_embedding

NUM_TOP = 32
"""Noises of a position that are drawn exactly: twice the 16 that already pass every test of the
law (docs/proof.md), for a quarter more time."""


class SoftTokens(NamedTuple):
    """The M likeliest tokens of a prediction at every position.

    What is left of the mass counts as spread evenly over all tokens: a constant in every logit,
    which softmax does not see.
    """

    token_ids: Tensor
    """[B, L, M] int64, different ones at each position."""

    probabilities: Tensor
    """[B, L, M] float32."""


class Simplex(ABC):
    """What a denoiser reads of a noised simplex x."""

    needs_moments = False
    """Whether `embedding` is faster when it is given the matrix's moments."""

    @abstractmethod
    def logits(self) -> Tensor:
        """x itself, [B, L, V] in float32."""

    @abstractmethod
    def embedding(self, weight_VH: Tensor, moments: EmbeddingMoments | None = None) -> Tensor:
        """The expected embedding softmax(x) W, [B, L, H] in W's dtype; W receives gradients."""

    def probabilities(self) -> Tensor:
        """softmax of the simplex over the vocabulary, [B, L, V] in float32."""
        return self.logits().softmax(dim=-1)


@dataclass(frozen=True, eq=False)
class DenseSimplex(Simplex):
    """A simplex given by its values.

    Samplers that carry soft predictions work on it. With keys its noise is counter-based, as that
    of `NoisedSimplex` is.
    """

    values: Tensor
    """[B, L, V], floating; arithmetic stays in their type."""

    keys: Tensor | None = None
    """[B] int64, one per example; None: noise comes from a generator."""

    counter: int = 0
    """Which of the keys' draws the last noise was; the sampler counts its steps here."""

    history: tuple[Tensor, ...] = ()
    """Earlier predictions of the clean simplex [B, L, V], latest first, for multistep solvers."""

    simplex_value: float | None = None
    """k; only `renoised` needs it."""

    def logits(self) -> Tensor:
        """The values in float32."""
        return self.values.float()

    def embedding(self, weight_VH: Tensor, moments: EmbeddingMoments | None = None) -> Tensor:
        """softmax(x) W by one product; moments have no part in it."""
        return self.probabilities().to(weight_VH.dtype) @ weight_VH

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, V)."""
        return tuple(self.values.shape)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def uniforms(self) -> Tensor:
        """[B, L] numbers in [0, 1), apart from the noise: what a sampler chooses tokens with.

        Raises ValueError without keys.
        """
        if self.keys is None:
            raise ValueError("uniforms follow from the keys, and this simplex has none")
        return random.uniform(self.keys, self.counter, self.values.shape[1])

    def moved(self, scale: float, additions: Sequence[tuple[float, Tensor]]) -> "DenseSimplex":
        """scale x + sum_j c_j a_j for pairs (c_j, a_j [B, L, V]), one step on, without history."""
        values_BLV = self.values * scale
        for factor, term_BLV in additions:
            # two roundings, not a fused one, which may differ in a vector's tail: an example's
            # values would depend on its batch
            values_BLV += term_BLV * factor
        return replace(self, values=values_BLV, counter=self.counter + 1, history=())

    def renoised(
        self,
        noise_scale: float,
        additions: Sequence[tuple[float, Tensor]],
        generator: torch.Generator | None = None,
    ) -> "DenseSimplex":
        """noise_scale k eps + sum_j c_j a_j with fresh noise eps, one step on, without history."""
        if self.simplex_value is None:
            raise ValueError("fresh noise has scale k: give the simplex its simplex_value")
        noise_BLV = self.fresh_noise(generator)
        return self.moved(0.0, [(noise_scale * self.simplex_value, noise_BLV), *additions])

    def fresh_noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Standard normals [B, L, V] of the next step: of the keys, or of the generator."""
        if self.keys is not None:
            noise_BLV = random.normal(self.keys, self.counter + 1, *self.values.shape[1:])
            return noise_BLV.to(self.values.dtype)
        source = self.device if generator is None else generator.device
        noise_BLV = torch.randn(
            self.values.shape, generator=generator, device=source, dtype=self.values.dtype
        )
        return noise_BLV.to(self.device)

    def select(self, rows: Tensor | Sequence[int]) -> "DenseSimplex":
        """The examples `rows` (int64 indices or a bool mask over B), in that order."""
        rows = torch.as_tensor(rows, device=self.device)
        return replace(
            self,
            values=self.values[rows],
            keys=None if self.keys is None else self.keys[rows],
            history=tuple(clean_BLV[rows] for clean_BLV in self.history),
        )


@dataclass(frozen=True, eq=False)
class NoisedSimplex(Simplex):
    """x = signal_scale S(ids) + noise_scale k eps, with S(w) = +k at token w and -k elsewhere.

    The noise eps is counter-based: what belongs to (example, position) follows from the example's
    key and `counter` alone, whatever the batch and the padded length. No tensor with a vocabulary
    dimension exists unless `logits` is called.

    Raises ValueError for shapes, scales and settings that do not fit.
    """

    token_ids: Tensor
    """[B, L] int64."""

    signal_scale: Tensor
    """sqrt(alpha_bar), [B, 1] or [B, L] float32."""

    noise_scale: Tensor
    """sqrt(1 - alpha_bar), the same shape."""

    simplex_value: float
    """k."""

    vocab_size: int

    keys: Tensor
    """[B] int64, one per example."""

    counter: int = 0
    """Which of the keys' draws this is; the sampler counts its steps here."""

    noise: str = "order_statistics"
    """How eps is drawn: "order_statistics" draws what the embedding needs of it, in time that does
    not grow with V; "dense" draws all of it, as TESS does. The two have the same law, but not the
    same values, and only the dense one has logits."""

    num_top: int = NUM_TOP
    """Order statistics that are drawn exactly; with V - 1, the most there are, nothing is
    approximate, and a larger number means that one."""

    def __post_init__(self) -> None:
        batch, length = self.token_ids.shape
        for name in ("signal_scale", "noise_scale"):
            shape = tuple(getattr(self, name).shape)
            if shape not in ((batch, 1), (batch, length)):
                raise ValueError(
                    f"{name} must be [{batch}, 1] or [{batch}, {length}], got {list(shape)}"
                )
        if self.keys.shape != (batch,):
            raise ValueError(f"keys must be [{batch}], got {list(self.keys.shape)}")
        check_noise(self.noise, self.num_top)

    @property
    def needs_moments(self) -> bool:
        """True for order statistics."""
        return self.noise == "order_statistics"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, V) of the dense simplex."""
        return (*self.token_ids.shape, self.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def uniforms(self) -> Tensor:
        """[B, L] numbers in [0, 1), apart from the noise: what a sampler chooses tokens with."""
        return random.uniform(self.keys, self.counter, self.token_ids.shape[1])

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The dense simplex [B, L, V] in float32.

        Raises ValueError for order statistics, which leave most of the noise undrawn.
        """
        if self.noise != "dense":
            raise ValueError(
                f'the whole simplex exists only with noise="dense", got noise={self.noise!r}'
            )
        noise_BLV = random.normal(self.keys, self.counter, self.token_ids.shape[1], self.vocab_size)
        scales = (self.signal_scale, self.noise_scale)
        return dense_logits(self.token_ids, *scales, self.simplex_value, noise_BLV)

    def embedding(self, weight_VH: Tensor, moments: EmbeddingMoments | None = None) -> Tensor:
        """softmax(x) W [B, L, H] in W's dtype, computed in float32.

        moments: of W, for order statistics; computed here when None, which reads all of W.
        """
        if len(weight_VH) != self.vocab_size:
            raise ValueError(
                f"the embedding must have {self.vocab_size} rows, as the simplex has, "
                f"got {len(weight_VH)}"
            )
        return simplex_embedding(
            self.token_ids,
            self.signal_scale * self.simplex_value,
            self.noise_scale * self.simplex_value,
            weight_VH,
            keys_B=self.keys,
            counter=self.counter,
            noise=self.noise,
            num_top=min(self.num_top, self.vocab_size - 1),
            moments=moments,
        )

    def select(self, rows: Tensor | Sequence[int]) -> "NoisedSimplex":
        """The examples `rows` (int64 indices or a bool mask over B), in that order."""
        rows = torch.as_tensor(rows, device=self.device)
        return replace(
            self,
            token_ids=self.token_ids[rows],
            signal_scale=self.signal_scale[rows],
            noise_scale=self.noise_scale[rows],
            keys=self.keys[rows],
        )


def select_rows(value: Any, rows: Tensor) -> Any:
    """`rows` of every tensor in nested tuples, named ones too; anything else stays as it is."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, tuple):
        parts = [select_rows(part, rows) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def check_noise(noise: str, num_top: int) -> None:
    """Raises ValueError for an unknown way to draw noise, and for fewer than one exact value."""
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
    if not isinstance(num_top, Integral) or num_top < 1:
        raise ValueError(f"num_top must be an integer of at least 1, got {num_top}")


def dense_logits(
    token_ids: Tensor,
    signal_scale: Tensor,
    noise_scale: Tensor,
    simplex_value: float,
    noise: Tensor,
) -> Tensor:
    """signal_scale S(ids) + noise_scale k eps, [B, L, V] in float32.

    token_ids: [B, L]. Scales: [B, 1] or [B, L]. noise: eps, [B, L, V].
    Raises ValueError for ids outside the vocabulary.
    """
    if token_ids.numel():
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= noise.shape[-1]:
            raise ValueError(f"token ids must be in 0..{noise.shape[-1] - 1}, got {low}..{high}")
    signal_BL1 = (signal_scale.float() * simplex_value).unsqueeze(-1)
    scale_BL1 = (noise_scale.float() * simplex_value).unsqueeze(-1)
    x_BLV = (noise.float() * scale_BL1).sub_(signal_BL1)
    ids_BL1 = token_ids.unsqueeze(-1)
    return x_BLV.scatter_add_(-1, ids_BL1, (2 * signal_BL1).expand(*ids_BL1.shape))
