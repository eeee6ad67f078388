"""What all schedulers of the noised simplex share: settings, times, and the forward process."""

# B examples, L positions, V vocabulary, N sampling steps

import inspect
import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from types import NoneType
from typing import Literal, get_args

import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor

from tess.schedulers.noise import SCHEDULES, alpha_bar
from tess.schedulers.recoverability import (
    RecoverabilityDensity,
    auto_simplex_value,
    recoverability_grid,
)
from tess.schedulers.simplex import NoisedSimplex, Simplex, check_noise, dense_logits

SPACINGS = ("recoverability", "uniform")

MOST_TRAIN_TIMESTEPS = 10**6
"""Tables have an entry for each."""

KINDS = {
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "a string"),
    bool: (bool, "true or false"),
    NoneType: (NoneType, "null"),
}
"""What a setting's annotation takes, and how messages say it."""

TIME_TOLERANCE = 1e-6
"""Two times of a grid closer than this are one: float32 has 6e-8 at 1."""

SMALLEST_SCALE = 1e-30
"""What solvers take for no signal or no noise, to divide by it; cosine has 6e-17 at t = 1."""


class SimplexScheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers that denoise x = sqrt(a) S(tokens) + sqrt(1 - a) k eps.

    a = alpha_bar(t), and S(w) is +k at token w and -k elsewhere. Times are reals in (0, 1],
    decreasing; the last step lands at t = 0, where a = 1.

    A subclass lists the shared settings in its own `__init__`, as diffusers reads them there, and
    calls `_set_up`; it names `SchedulerMixin` too, which its module has to hold for a pipeline's
    folder to load. Any config of the family makes any of its members by `from_config`; what only
    the other class knows is kept in the config and comes back with it.

    Shared settings, by name only:
        vocab_size: V, the dimension of the simplex.
        num_train_timesteps: T, the number of discrete times in training; the most steps allowed.
        simplex_value: k, or "auto" for (ln V - 0.82) / 2, which is saved as a number.
        beta_schedule, cosine_s, beta_start, beta_end: see `tess.schedulers.noise.alpha_bar`.
        timestep_spacing: of sampling steps: "recoverability" (equal steps of the probability that
            a noised token can be told, `recoverability_grid`) or "uniform" (1, (N-1)/N, ..., 1/N).
        timestep_density: of training times: the same two names (`RecoverabilityDensity`).
        timestep_uniform_share: of both "recoverability" ways, the share that is uniform in t.
        lowest_timestep: in [0, 1); sampling steps are spaced between 1 and this time, and the step
            after the last lands on the text from there. 0 spaces them over all times.
        noise: how noise is drawn, "order_statistics" or "dense" (`NoisedSimplex`).
        num_top: order statistics that are drawn exactly.
    """

    order = 1

    reads: Literal["tokens", "logits", "soft_tokens"]
    """What `step` takes as the model's output: chosen tokens, logits, or `SoftTokens`."""

    @classmethod
    def _get_compatibles(cls) -> list[type["SimplexScheduler"]]:
        # diffusers looks the names up in its own package, where these are not
        from tess.schedulers.family import SAMPLERS

        return list(SAMPLERS.values())

    def _set_up(self) -> None:
        """Check the shared settings, which are in the config, and start without timesteps."""
        config = self.config
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name not in ("self", "simplex_value"):  # which is looked at below
                _check_type(name, config[name], parameter.annotation)
        if config.vocab_size is None or config.vocab_size < 2:
            raise ValueError(
                "the scheduler needs vocab_size, the number of tokens of the simplex (at least 2), "
                f"got {config.vocab_size}; a scheduler_config.json from before has none: add it "
                "there"
            )
        if not 1 <= config.num_train_timesteps <= MOST_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_train_timesteps must be from 1 to {MOST_TRAIN_TIMESTEPS:,}, got "
                f"{config.num_train_timesteps}"
            )
        if not 0 <= config.cosine_s < math.inf:
            raise ValueError(f"cosine_s must be at least 0 and finite, got {config.cosine_s}")
        if not 0 <= config.beta_start <= config.beta_end < 1:
            raise ValueError(
                "beta_start and beta_end must rise within [0, 1), got "
                f"{config.beta_start} and {config.beta_end}"
            )
        value = resolve_simplex_value(config.simplex_value, config.vocab_size)
        self.register_to_config(simplex_value=value)
        if config.beta_schedule not in SCHEDULES:
            raise ValueError(
                f"unknown beta_schedule {config.beta_schedule!r}; known are {', '.join(SCHEDULES)}"
            )
        for name in ("timestep_spacing", "timestep_density"):
            if config[name] not in SPACINGS:
                known = ", ".join(SPACINGS)
                raise ValueError(f"{name} must be one of {known}, got {config[name]!r}")
        if not 0 < config.timestep_uniform_share <= 1:
            raise ValueError(
                f"timestep_uniform_share must be in (0, 1], got {config.timestep_uniform_share}"
            )
        if not 0 <= config.lowest_timestep < 1:
            raise ValueError(f"lowest_timestep must be in [0, 1), got {config.lowest_timestep}")
        check_noise(config.noise, config.num_top)
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._density: RecoverabilityDensity | None = None
        self._grids: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        """This scheduler's signal share at times t in [0, 1]."""
        return alpha_bar(
            t,
            self.config.beta_schedule,
            self.config.cosine_s,
            num_train_timesteps=self.config.num_train_timesteps,
            beta_start=self.config.beta_start,
            beta_end=self.config.beta_end,
        )

    def scales(self, t: float) -> tuple[float, float]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at a time in [0, 1], in double precision.

        Solvers divide by both, so neither is below 1e-30 but for the noise at t = 0, which is 0.
        """
        share = float(self.alpha_bar(float(t)))
        floor = SMALLEST_SCALE if t > 0 else 0.0
        return max(math.sqrt(share), SMALLEST_SCALE), max(math.sqrt(1 - share), floor)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the sampling steps; `timesteps` becomes [N] float32, decreasing.

        num_inference_steps: N, at the configured spacing, from exactly 1 down.
        timesteps: the times themselves, decreasing in (0, 1], in place of a number. `initial` is
        pure noise, so the first should be 1 or close to it; the step after the last lands at 0.
        Raises ValueError unless exactly one of the two is given, and for values out of range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "set_timesteps takes either num_inference_steps or timesteps, not both"
            )
        if timesteps is not None:
            grid_N = _custom_grid(timesteps)
        else:
            grid_N = self._spaced_grid(num_inference_steps)
        self.num_inference_steps = len(grid_N)
        self.timesteps = grid_N.to(device)

    def _spaced_grid(self, num_steps: int) -> Tensor:
        most = self.config.num_train_timesteps
        if not isinstance(num_steps, Integral):
            raise ValueError(f"num_inference_steps must be an integer, got {num_steps!r}")
        if not 1 <= num_steps <= most:
            raise ValueError(
                f"num_inference_steps must be from 1 to {most}, the number of training steps, "
                f"got {num_steps}"
            )
        if num_steps not in self._grids:  # the same for every batch of an evaluation
            self._grids[num_steps] = self._grid(int(num_steps))
        return self._grids[num_steps]

    def _grid(self, num_steps: int) -> Tensor:
        lowest = self.config.lowest_timestep
        if self.config.timestep_spacing == "uniform":
            done_N = torch.arange(num_steps, dtype=torch.float64) / num_steps
            return (1 - (1 - lowest) * done_N).float()
        share, size = self.config.timestep_uniform_share, self.config.vocab_size
        return recoverability_grid(num_steps, self.alpha_bar, size, share, lowest).float()

    def training_timesteps(self, uniforms: Tensor) -> Tensor:
        """Training times in (0, 1], from numbers that are uniform on (0, 1]; the same shape."""
        if self.config.timestep_density == "uniform":
            return uniforms
        return self.density().sample(uniforms)

    def density(self) -> RecoverabilityDensity:
        """The density of training times that is even in recoverability, whatever is configured."""
        if self._density is None:
            self._density = RecoverabilityDensity(
                self.alpha_bar, self.config.vocab_size, self.config.timestep_uniform_share
            )
        return self._density

    def scale_model_input(
        self, sample: Simplex | Tensor, timestep: Tensor | float | None = None
    ) -> Simplex | Tensor:
        """The sample itself: this process needs no scaling of the network's input."""
        return sample

    def add_noise(
        self,
        token_ids: Tensor,
        timesteps: Tensor,
        noise: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        counter: int = 0,
    ) -> NoisedSimplex | Tensor:
        """The forward process x_t = sqrt(a) S(ids) + sqrt(1 - a) k eps, a = alpha_bar(t).

        token_ids: [B, L]. timesteps: [B] or [B, L] in [0, 1]. With `keys` [B] a `NoisedSimplex`
        comes back, the same in every batch; with `noise`, [B, L, V] standard normals, the dense
        tensor [B, L, V].
        """
        if (noise is None) == (keys is None):
            raise ValueError("add_noise needs either keys or a noise tensor, not both")
        t = timesteps.double().to(token_ids.device)
        share = self.alpha_bar(t[:, None] if t.dim() == 1 else t)
        scales = share.sqrt().float(), (1 - share).sqrt().float()
        if keys is not None:
            return self._simplex(token_ids, *scales, keys, counter)
        shape = [*token_ids.shape, self.config.vocab_size]
        if list(noise.shape) != shape:
            raise ValueError(f"noise must be {shape}, got {list(noise.shape)}")
        return dense_logits(token_ids, *scales, self.config.simplex_value, noise)

    def _simplex(
        self, token_ids: Tensor, signal: Tensor, noise: Tensor, keys: Tensor, counter: int
    ) -> NoisedSimplex:
        return NoisedSimplex(
            token_ids=token_ids,
            signal_scale=signal,
            noise_scale=noise,
            simplex_value=self.config.simplex_value,
            vocab_size=self.config.vocab_size,
            keys=keys,
            counter=counter,
            noise=self.config.noise,
            num_top=self.config.num_top,
        )

    def previous_timestep(self, timestep: Tensor | float) -> float:
        """The time after `timestep` in the current grid; 0 after the last."""
        index = self.index_of(timestep)
        return float(self.timesteps[index + 1]) if index + 1 < len(self.timesteps) else 0.0

    def index_of(self, timestep: Tensor | float) -> int:
        """The place of `timestep` in the current grid.

        Raises ValueError before `set_timesteps` and for a time that is not of the grid.
        """
        if self.timesteps is None:
            raise ValueError("call set_timesteps before step")
        gap_N = (self.timesteps.double() - float(timestep)).abs()
        index = int(gap_N.argmin())
        if not float(gap_N[index]) <= TIME_TOLERANCE:
            raise ValueError(f"timestep {float(timestep)} is not one of the {len(gap_N)} timesteps")
        return index


def _check_type(name: str, value: object, annotation: type) -> None:
    """Raises ValueError for a setting of another type; a bool is no number here."""
    kinds = [KINDS[kind] for kind in get_args(annotation) or (annotation,)]
    fits = any(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        for kind, _ in kinds
    )
    if not fits:
        expected = " or ".join(said for _, said in kinds)
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def resolve_simplex_value(simplex_value: float | str, vocab_size: int) -> float:
    """k as a number.

    Raises ValueError for a name other than "auto", for "auto" below 3 tokens, and for what is no
    finite number above 0.
    """
    if isinstance(simplex_value, str):
        if simplex_value != "auto":
            raise ValueError(f'simplex_value must be a number or "auto", got {simplex_value!r}')
        return auto_simplex_value(vocab_size)
    number = isinstance(simplex_value, Real) and not isinstance(simplex_value, bool)
    if not (number and 0 < simplex_value < math.inf):
        raise ValueError(f"simplex_value must be above 0 and finite, got {simplex_value}")
    return float(simplex_value)


def _custom_grid(timesteps: Sequence[float] | Tensor) -> Tensor:
    given = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
    try:
        times_N = torch.tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        times_N = torch.empty(0)
    fits = times_N.dim() == 1 and len(times_N) > 0 and bool(times_N[0] <= 1)
    # the step after the last goes to 0
    if not (fits and (-times_N.diff(append=torch.zeros(1)) > TIME_TOLERANCE).all()):
        raise ValueError(
            f"timesteps must be one or more numbers in (0, 1], each more than {TIME_TOLERANCE:g} "
            f"below the one before, got {reprlib.repr(given)}"
        )
    return times_N
