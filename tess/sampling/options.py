"""How `tess` writes, as one object: what the pipeline's call, flags, recipes and reports share.

Loads neither torch nor transformers, so that flags are read before them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Real
from typing import TYPE_CHECKING, Any

from tess.errors import UserError
from tess.options import check_count, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tess.backbones.causal_lm import HybridForCausalLM
    from tess.sampling.control import TokenProcessor
    from tess.sampling.guidance import Reward
    from tess.schedulers.base import SimplexScheduler
    from tess.schedulers.stopping import StoppingRule

# The names of `tess.schedulers` and `tess.kernels`, where they load torch; a test holds them equal.
SCHEDULERS = ("renoising", "ddim", "euler", "dpm_solver")
SPACINGS = ("recoverability", "uniform")
NOISES = ("order_statistics", "dense")

FORMS = ("logits", "probabilities")
"""Of classifier-free guidance; see `tess.sampling.guidance.Guidance`."""

CHOICES = ("confidence", "mbr_bleu", "mbr_chrf", "ar")
"""Ways to choose among candidates; see `tess.sampling.candidates.choose`."""

MOST_CANDIDATES = 2**16


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """What may be asked of a denoiser beside steps, length and seed (`Request`).

    None keeps what the checkpoint has, or leaves the option out. What has no line in `--help`:

    reward, reward_scale, reward_steps: see `tess.sampling.guidance.Guidance`.
    logits_processor: transformers' logits processors, or functions like them; see
        `tess.sampling.control.token_processors`.
    scorer: the causal model, of the same tokenizer, that chooses by "ar".

    Raises:
        UserError: a value out of range, or one that has no effect without another.
    """

    scheduler: str | None = option(None, f"one of {', '.join(SCHEDULERS)}")
    timestep_spacing: str | None = option(None, f"one of {', '.join(SPACINGS)}")
    lowest_timestep: float | None = option(None, "space the steps between 1 and this time")
    noise: str | None = option(None, f"one of {', '.join(NOISES)}")
    eta: float | None = option(None, "of ddim: 0 adds no noise, 1 is DDPM (with --noise dense)")
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 is off")
    guidance_form: str = option("logits", f"one of {', '.join(FORMS)}")
    stop_patience: int | None = option(None, "stop a text that was the same so many times")
    stop_entropy: float = option(math.inf, "and has at most this mean entropy in nats")
    confidence_threshold: float | None = option(None, "keep tokens of this probability")
    num_candidates: int = option(1, "texts per source, of which one is chosen")
    choose_by: str = option("confidence", f"one of {', '.join(CHOICES)}")
    block_length: int | None = option(None, "write in blocks, up to gen_length tokens")
    forbid: list[str] = option(
        [], "words not to write; those of several tokens from the second step on", nargs="+"
    )
    no_repeat_ngram: int | None = option(None, "forbid n-grams of so many tokens to come twice")
    reward: "Reward | None" = None
    reward_scale: float = 1.0
    reward_steps: int = 1
    logits_processor: "Sequence[TokenProcessor]" = ()
    scorer: "HybridForCausalLM | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, known in _NAMES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, most in _COUNTS.items():
            if (value := getattr(self, name)) is not None:
                check_count(name, value, most)
        for name, (fits, expected) in _RANGES.items():
            if (value := getattr(self, name)) is not None:
                number = isinstance(value, Real) and not isinstance(value, bool)
                if not (number and fits(value)):
                    raise UserError(f"{name} must be {expected}, got {value!r}")
        words = self.forbid
        if isinstance(words, str) or not all(isinstance(w, str) and w.strip() for w in words):
            raise UserError(f"forbid takes words of at least one character, got {words!r}")
        for name, partner, given in (
            ("eta", "scheduler ddim", self.scheduler == "ddim"),
            ("stop_entropy", "stop_patience", self.stop_patience is not None),
            ("guidance_form", "guidance_scale above 1", self.guidance_scale > 1),
            ("choose_by", "num_candidates above 1", self.num_candidates > 1),
            ("reward_scale", "reward", self.reward is not None),
            ("reward_steps", "reward", self.reward is not None),
        ):
            if not given and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"{name} does nothing without {partner}; give that too")

    @classmethod
    def flags(cls) -> list[Any]:
        """The fields that are plain data: flags, and keys of recipes and reports."""
        return [item for item in fields(cls) if "help" in item.metadata]

    def replace(self, changes: Mapping[str, Any], others: Sequence[str] = ()) -> "SamplerOptions":
        """The options with new values for those named; `stopping` is a `StoppingRule` or None.

        others: what else the caller takes by name, which may have been meant.

        Raises:
            UserError: a name that is no option, with near ones; values as for the class.
        """
        known = [*self.__dataclass_fields__, "stopping", *others]
        for name in changes:
            if name not in known:
                near = get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known: {sorted(known)}"
                raise UserError(f"there is no argument {name!r}; {hint}")
        changes = dict(changes)
        if "stopping" in changes:
            changes |= _stopping_options(changes.pop("stopping"))
        return replace(self, **changes) if changes else self

    @property
    def stopping(self) -> "StoppingRule | None":
        """The rule, where there is a patience."""
        from tess.schedulers.stopping import StoppingRule

        if self.stop_patience is None:
            return None
        return StoppingRule(self.stop_patience, self.stop_entropy)

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data for reports."""
        plain = SamplerOptions()
        return {
            item.name: getattr(self, item.name)
            for item in self.flags()
            if getattr(self, item.name) != getattr(plain, item.name)
        }

    @property
    def needs_scorer(self) -> bool:
        """Whether a causal model has to choose, and none is given."""
        return self.num_candidates > 1 and self.choose_by == "ar" and self.scorer is None

    def replace_scheduler(self, scheduler: "SimplexScheduler") -> "SimplexScheduler":
        """The scheduler itself where it is what is asked for; else one made of it."""
        from tess.schedulers.family import SAMPLERS

        changed = {
            name: getattr(self, name)
            for name in ("timestep_spacing", "lowest_timestep", "noise", "eta")
            if getattr(self, name) is not None
        }
        kind = type(scheduler) if self.scheduler is None else SAMPLERS[self.scheduler]
        same = all(scheduler.config.get(name) == value for name, value in changed.items())
        if kind is type(scheduler) and same:
            return scheduler
        return kind.from_config(scheduler.config, **changed)

    def processors(self, tokenizer: "PreTrainedTokenizerBase") -> "list[TokenProcessor]":
        """transformers' processors for what must not be written, and those given as such."""
        from transformers import NoRepeatNGramLogitsProcessor, SequenceBiasLogitsProcessor

        given: list[TokenProcessor] = []
        if self.no_repeat_ngram is not None:
            given.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram))
        banned = set()
        for word in self.forbid:
            for spelling in (word, f" {word}"):
                banned.add(tuple(tokenizer(spelling, add_special_tokens=False)["input_ids"]))
        if banned := {ids: float("-inf") for ids in banned if ids}:
            given.append(SequenceBiasLogitsProcessor(banned))
        return [*given, *self.logits_processor]


def _stopping_options(rule: "StoppingRule | None") -> dict[str, Any]:
    from tess.schedulers.stopping import StoppingRule

    if rule is None:
        return {"stop_patience": None, "stop_entropy": math.inf}
    if type(rule) is not StoppingRule:
        raise UserError(f"stopping must be a StoppingRule, got {type(rule).__name__}")
    return {"stop_patience": rule.patience, "stop_entropy": rule.max_entropy}


_NAMES = {
    "scheduler": SCHEDULERS,
    "timestep_spacing": SPACINGS,
    "noise": NOISES,
    "guidance_form": FORMS,
    "choose_by": CHOICES,
}
_COUNTS = {
    "stop_patience": math.inf,
    "num_candidates": MOST_CANDIDATES,
    "block_length": math.inf,
    "no_repeat_ngram": math.inf,
    "reward_steps": math.inf,
}
_RANGES = {
    "lowest_timestep": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "eta": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "guidance_scale": (lambda x: 1 <= x < math.inf, "at least 1 (1 is off) and finite"),
    "stop_entropy": (lambda x: x >= 0, "at least 0"),
    "confidence_threshold": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "reward_scale": (lambda x: 0 < x < math.inf, "above 0 and finite"),
}
