"""A simplex that keeps one noise over the steps, and its predictions as short lists of tokens."""

# B examples, L positions, V vocabulary, H width of the embedding, W places of a list

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tess.kernels import random
from tess.kernels.carried_embedding import carried_embedding, largest_of_list, merge_lists
from tess.kernels.order_statistics import EmbeddingMoments
from tess.schedulers.simplex import NUM_TOP, Simplex, SoftTokens, check_noise, select_rows


@dataclass(frozen=True, eq=False)
class CarriedSimplex(Simplex):
    """x = n k eps + 2 k q, with one noise eps in all steps and q a short list of token weights.

    What deterministic samplers carry: x' = A x + sum_j C_j (2 k p_j - k) keeps that form when each
    prediction p_j is cut to its likeliest tokens (`SoftTokens`); constants that all tokens have in
    common are left out, softmax does not see them. No tensor with a vocabulary dimension exists.
    How eps is drawn and what of it is approximate: `tess.kernels.carried_embedding`.

    Raises ValueError for shapes and settings that do not fit.
    """

    noise_scale: Tensor
    """n, [B, 1] float32."""

    token_ids: Tensor
    """[B, L, W] int64, different ones at each position; -1 is an empty place."""

    token_weights: Tensor
    """q, [B, L, W] float32, of any sign."""

    simplex_value: float
    """k."""

    vocab_size: int

    keys: Tensor
    """[B] int64, one per example."""

    counter: int = 0
    """Of the steps, for `uniforms`."""

    draw: int = 0
    """Which of the keys' draws eps is; the value of `counter` when it was drawn."""

    num_top: int = NUM_TOP
    """Noises of a position that are drawn exactly; with V or more nothing is approximate."""

    max_list: int = 128
    """A longer list loses its smallest weights."""

    history: tuple[Any, ...] = ()
    """What a multistep solver keeps of earlier steps; tensors in it have B rows."""

    def __post_init__(self) -> None:
        shape = tuple(self.token_ids.shape)
        if len(shape) != 3 or tuple(self.token_weights.shape) != shape:
            raise ValueError(
                "token_ids and token_weights must be [B, L, W] both, got "
                f"{list(shape)} and {list(self.token_weights.shape)}"
            )
        if tuple(self.noise_scale.shape) != (shape[0], 1):
            raise ValueError(
                f"noise_scale must be [{shape[0]}, 1], got {list(self.noise_scale.shape)}"
            )
        if self.keys.shape != (shape[0],):
            raise ValueError(f"keys must be [{shape[0]}], got {list(self.keys.shape)}")
        if self.max_list < 1:
            raise ValueError(f"max_list must be at least 1, got {self.max_list}")
        check_noise("order_statistics", self.num_top)

    @classmethod
    def initial(
        cls,
        shape: tuple[int, int],
        keys: Tensor,
        vocab_size: int,
        simplex_value: float,
        **settings: Any,
    ) -> "CarriedSimplex":
        """Pure noise k eps of a [B, L] canvas, with the other fields in `settings`."""
        return cls(
            torch.ones(shape[0], 1, device=keys.device),
            torch.empty(*shape, 0, dtype=torch.int64, device=keys.device),
            torch.empty(*shape, 0, device=keys.device),
            simplex_value,
            vocab_size,
            keys,
            **settings,
        )

    @property
    def needs_moments(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, V) of the dense simplex."""
        return (*self.token_ids.shape[:2], self.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def uniforms(self) -> Tensor:
        """[B, L] numbers in [0, 1), apart from the noise: what a sampler chooses tokens with."""
        return random.uniform(self.keys, self.counter, self.token_ids.shape[1])

    def logits(self) -> Tensor:
        """Raises ValueError: most of the noise is never drawn."""
        raise ValueError(
            "the whole simplex does not exist where soft predictions are carried as short lists; "
            'use noise="dense"'
        )

    def embedding(self, weight_VH: Tensor, moments: EmbeddingMoments | None = None) -> Tensor:
        """softmax(x) W [B, L, H] in W's dtype; for sampling, W receives no gradient.

        moments: of W; computed here when None, which reads all of W.
        """
        if len(weight_VH) != self.vocab_size:
            raise ValueError(
                f"the embedding must have {self.vocab_size} rows, as the simplex has, "
                f"got {len(weight_VH)}"
            )
        return carried_embedding(
            self.token_ids,
            self.token_weights.double() * (2 * self.simplex_value),
            self.noise_scale.double() * self.simplex_value,
            weight_VH,
            keys_B=self.keys,
            draw=self.draw,
            num_top=min(self.num_top, self.vocab_size),
            moments=moments,
        )

    def moved(
        self, scale: float, additions: Sequence[tuple[float, SoftTokens]]
    ) -> "CarriedSimplex":
        """scale x + sum of C (2 k p - k) for pairs (C, p), one step on, without history."""
        ids, weights = self._with(self.token_ids, scale * self.token_weights, additions)
        return replace(
            self,
            noise_scale=scale * self.noise_scale,
            token_ids=ids,
            token_weights=weights,
            history=(),
            counter=self.counter + 1,
        )

    def renoised(
        self, noise_scale: float | Tensor, additions: Sequence[tuple[float, SoftTokens]]
    ) -> "CarriedSimplex":
        """noise_scale k eps' + sum of C (2 k p - k), eps' fresh, one step on, without history.

        noise_scale: a number or [B, 1].
        """
        none = self.token_ids[..., :0]
        ids, weights = self._with(none, self.token_weights[..., :0], additions)
        return replace(
            self,
            noise_scale=torch.zeros_like(self.noise_scale) + noise_scale,
            token_ids=ids,
            token_weights=weights,
            history=(),
            counter=self.counter + 1,
            draw=self.counter + 1,
        )

    def _with(
        self, ids: Tensor, weights: Tensor, additions: Sequence[tuple[float, SoftTokens]]
    ) -> tuple[Tensor, Tensor]:
        for factor, (more_ids, probabilities) in additions:
            ids, weights = merge_lists(ids, weights, more_ids, factor * probabilities.float())
        return largest_of_list(ids, weights, min(self.max_list, self.vocab_size))

    def select(self, rows: Tensor | Sequence[int]) -> "CarriedSimplex":
        """The examples `rows` (int64 indices or a bool mask over B), in that order."""
        rows = torch.as_tensor(rows, device=self.device)
        names = ("noise_scale", "token_ids", "token_weights", "keys", "history")
        return replace(self, **{name: select_rows(getattr(self, name), rows) for name in names})
