"""Noised simplices: kept as token ids, noise level and random key, or dense."""

# B examples, L positions, V vocabulary, H width of the embedding

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tess.kernels import random


class Simplex(ABC):
    """What a denoiser reads of a noised simplex x."""

    @abstractmethod
    def logits(self) -> Tensor:
        """x itself, [B, L, V] in float32."""

    def probabilities(self) -> Tensor:
        """softmax of the simplex over the vocabulary, [B, L, V] in float32."""
        return self.logits().softmax(dim=-1)

    def embedding(self, weight_VH: Tensor) -> Tensor:
        """The expected embedding softmax(x) W, [B, L, H] in W's dtype; W receives gradients."""
        return self.probabilities().to(weight_VH.dtype) @ weight_VH


@dataclass(frozen=True, eq=False)
class DenseSimplex(Simplex):
    """A simplex given by its values."""

    values: Tensor
    """[B, L, V]."""

    def logits(self) -> Tensor:
        """The values in float32."""
        return self.values.float()


@dataclass(frozen=True, eq=False)
class NoisedSimplex(Simplex):
    """x = signal_scale S(ids) + noise_scale k eps, with S(w) = +k at token w and -k elsewhere.

    With `keys` the noise eps is counter-based: its value at (example, position, token) follows from
    the example's key and `counter` alone, whatever the batch and the padded length. With `noise` it
    is the given tensor, which is what training uses (torch's own generator is faster).
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
    keys: Tensor | None = None
    """[B] int64, one per example."""

    counter: int = 0
    """Which of the keys' draws this is; the sampler counts its steps here."""

    noise: Tensor | None = None
    """[B, L, V] float32 standard normals; then keys are not needed."""

    def __post_init__(self) -> None:
        batch, length = self.token_ids.shape
        for name in ("signal_scale", "noise_scale"):
            shape = tuple(getattr(self, name).shape)
            if shape not in ((batch, 1), (batch, length)):
                raise ValueError(
                    f"{name} must be [{batch}, 1] or [{batch}, {length}], got {list(shape)}"
                )
        if (self.keys is None) == (self.noise is None):
            raise ValueError("a noised simplex needs either keys or a noise tensor, not both")
        if self.keys is not None and self.keys.shape != (batch,):
            raise ValueError(f"keys must be [{batch}], got {list(self.keys.shape)}")
        if self.noise is not None and tuple(self.noise.shape) != self.shape:
            raise ValueError(f"noise must be {list(self.shape)}, got {list(self.noise.shape)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, V) of the dense simplex."""
        return (*self.token_ids.shape, self.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The dense simplex [B, L, V] in float32."""
        noise_BLV = self.noise
        if noise_BLV is None:
            noise_BLV = random.normal(
                self.keys, self.counter, self.token_ids.shape[1], self.vocab_size
            )
        signal_BL1 = (self.signal_scale.float() * self.simplex_value).unsqueeze(-1)
        scale_BL1 = (self.noise_scale.float() * self.simplex_value).unsqueeze(-1)
        x_BLV = (noise_BLV.float() * scale_BL1).sub_(signal_BL1)
        ids_BL1 = self.token_ids.unsqueeze(-1)
        return x_BLV.scatter_add_(-1, ids_BL1, (2 * signal_BL1).expand(*ids_BL1.shape))

    def select(self, rows: Tensor | Sequence[int]) -> "NoisedSimplex":
        """The examples `rows` (int64 indices or a bool mask over B), in that order."""
        rows = torch.as_tensor(rows, device=self.device)
        return replace(
            self,
            token_ids=self.token_ids[rows],
            signal_scale=self.signal_scale[rows],
            noise_scale=self.noise_scale[rows],
            keys=None if self.keys is None else self.keys[rows],
            noise=None if self.noise is None else self.noise[rows],
        )
