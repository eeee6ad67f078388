"""What the samplers share that keep a noise over the steps and carry soft predictions."""

# B examples, L positions, V vocabulary, M likeliest tokens

from dataclasses import dataclass, replace
from typing import Literal

from diffusers.utils import BaseOutput
from torch import Tensor

from tess.kernels import random
from tess.schedulers.base import SimplexScheduler
from tess.schedulers.carried import CarriedSimplex
from tess.schedulers.simplex import DenseSimplex, SoftTokens

NUM_SOFT_TOKENS = 32
"""M, the likeliest tokens of a prediction that a carried simplex keeps."""

MAX_LIST = 128
"""Tokens with a weight that a carried simplex keeps at a position, or four predictions' worth."""

PREDICTION_TYPES = ("logits", "sample")

Sample = DenseSimplex | CarriedSimplex


@dataclass
class SoftSchedulerOutput(BaseOutput):
    """Result of one step.

    prev_sample: the state at the next, less noisy time, of the kind of the sample that was given.
    pred_original_sample: the clean simplex x0 that was predicted, [B, L, V]; the `SoftTokens` it
        was given as, for a `CarriedSimplex`.
    """

    prev_sample: Sample | Tensor
    pred_original_sample: Tensor | SoftTokens


class SoftScheduler(SimplexScheduler):
    """Base of the samplers whose step is x' = A x + sum_j C_j x0_j, noise added where there is any.

    x0 = E[S(tokens) | x] = 2k p - k is the posterior mean that belongs to the predicted
    distributions p, exactly; no token is chosen on the way. With noise="dense" the sample is a
    `DenseSimplex`; with noise="order_statistics" a `CarriedSimplex`, whose predictions are cut to
    their likeliest tokens.

    Shared settings, beside those of `SimplexScheduler`:
        prediction_type: what a dense step reads: "logits" [B, L, V], or "sample", x0 itself.
        num_soft_tokens: M, the likeliest tokens of a prediction that a carried simplex keeps.
    """

    @property
    def reads(self) -> Literal["logits", "soft_tokens"]:
        """What `step` takes as the model's output of a sample from `initial`."""
        return "logits" if self.config.noise == "dense" else "soft_tokens"

    def _set_up(self) -> None:
        super()._set_up()
        kind, number = self.config.prediction_type, self.config.num_soft_tokens
        if kind not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type must be one of {known}, got {kind!r}")
        if number < 1:
            raise ValueError(f"num_soft_tokens must be at least 1, got {number}")
        if kind == "sample" and self.reads == "soft_tokens":
            raise ValueError(
                'prediction_type="sample" gives the whole simplex: take noise="dense" with it, got '
                f"noise={self.config.noise!r}"
            )

    def initial(self, shape: tuple[int, int], keys: Tensor) -> Sample:
        """Pure noise k eps at t = 1 for a [B, L] canvas, on the device of the keys ([B] int64)."""
        size, value = self.config.vocab_size, self.config.simplex_value
        if self.reads == "soft_tokens":
            top, most = self.config.num_top, max(MAX_LIST, 4 * self.config.num_soft_tokens)
            return CarriedSimplex.initial(shape, keys, size, value, num_top=top, max_list=most)
        noise_BLV = random.normal(keys, 0, shape[1], size)
        return DenseSimplex(noise_BLV * value, keys=keys, simplex_value=value)

    def _read(
        self, model_output: Tensor | SoftTokens, sample: Sample | Tensor
    ) -> tuple[Sample, Tensor | SoftTokens]:
        """The sample as an object, and x0 in the form in which it takes additions."""
        if isinstance(sample, CarriedSimplex):
            if not isinstance(model_output, SoftTokens):
                raise ValueError(
                    "a carried simplex takes SoftTokens as the model's output, got a "
                    f"{type(model_output).__name__}"
                )
            return sample, model_output
        if isinstance(sample, Tensor):
            sample = DenseSimplex(sample)
        if not isinstance(sample, DenseSimplex):
            raise ValueError(
                "the sample must be what `initial` gives or a tensor [B, L, V], got a "
                f"{type(sample).__name__}"
            )
        if sample.simplex_value is None:
            sample = replace(sample, simplex_value=self.config.simplex_value)
        return sample, self._clean(model_output, sample)

    def _clean(self, model_output: Tensor | SoftTokens, sample: DenseSimplex) -> Tensor:
        """x0 [B, L, V], in the sample's type."""
        fits = isinstance(model_output, Tensor) and model_output.is_floating_point()
        if not (fits and model_output.shape == sample.shape):
            came = type(model_output).__name__
            if isinstance(model_output, Tensor):
                came = f"{model_output.dtype} {list(model_output.shape)}"
            what = "logits" if self.config.prediction_type == "logits" else "a clean sample"
            raise ValueError(
                f"the model's output must be {what} {list(sample.shape)} as the sample is, got "
                f"{came}"
            )
        output_BLV = model_output.to(sample.values.dtype)
        if self.config.prediction_type == "sample":
            return output_BLV
        value = sample.simplex_value
        return output_BLV.softmax(dim=-1) * (2 * value) - value

    def _result(
        self, moved: Sample, clean: Tensor | SoftTokens, given: Sample | Tensor, return_dict: bool
    ) -> SoftSchedulerOutput | tuple[Sample | Tensor, Tensor | SoftTokens]:
        prev_sample = moved.values if isinstance(given, Tensor) else moved
        if not return_dict:
            return prev_sample, clean
        return SoftSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)
