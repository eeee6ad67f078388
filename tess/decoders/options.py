"""How `tess` writes, as one object and as flags: what generate.py and evaluate.py share."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    SequenceBiasLogitsProcessor,
)

from tess.backbones.causal_lm import HybridForCausalLM
from tess.errors import UserError
from tess.kernels.simplex_embedding import NOISES
from tess.options import option
from tess.sampling.candidates import CHOICES
from tess.sampling.guidance import FORMS
from tess.schedulers.base import SPACINGS, SimplexScheduler
from tess.schedulers.family import SAMPLERS
from tess.schedulers.stopping import StoppingRule


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """What may be asked of the `tess` decoder beside steps, length and seed; None keeps what the
    checkpoint has, or leaves the option out."""

    scheduler: str | None = option(None, f"one of {', '.join(SAMPLERS)}")
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
    scorer: HybridForCausalLM | None = field(default=None, metadata={"flag": False})

    def __post_init__(self) -> None:
        for name, known in (
            ("scheduler", SAMPLERS),
            ("timestep_spacing", SPACINGS),
            ("noise", NOISES),
            ("guidance_form", FORMS),
            ("choose_by", CHOICES),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")

        for name, partner, given in (
            ("eta", "scheduler ddim", self.scheduler == "ddim"),
            ("stop_entropy", "stop_patience", self.stop_patience is not None),
            ("guidance_form", "guidance_scale above 1", self.guidance_scale > 1),
            ("choose_by", "num_candidates above 1", self.num_candidates > 1),
        ):
            if not given and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"{name} does nothing without {partner}; give that too")

    @property
    def stopping(self) -> StoppingRule | None:
        """The rule, where there is a patience."""
        if self.stop_patience is None:
            return None
        return StoppingRule(self.stop_patience, self.stop_entropy)

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data for reports."""
        plain = SamplerOptions()
        return {
            item.name: getattr(self, item.name)
            for item in _flags()
            if getattr(self, item.name) != getattr(plain, item.name)
        }

    @property
    def needs_scorer(self) -> bool:
        """Whether a causal model has to choose, and none is given."""
        return self.num_candidates > 1 and self.choose_by == "ar" and self.scorer is None

    def replace_scheduler(self, scheduler: SimplexScheduler) -> SimplexScheduler:
        """The checkpoint's scheduler, or the one asked for with its settings."""
        changed = {
            name: getattr(self, name)
            for name in ("timestep_spacing", "lowest_timestep", "noise", "eta")
            if getattr(self, name) is not None
        }
        kind = type(scheduler) if self.scheduler is None else SAMPLERS[self.scheduler]
        if kind is type(scheduler) and not changed:
            return scheduler
        return kind.from_config(scheduler.config, **changed)

    def processors(self, tokenizer: PreTrainedTokenizerBase) -> list[LogitsProcessor]:
        """transformers' processors for what must not be written."""
        given: list[LogitsProcessor] = []
        if self.no_repeat_ngram is not None:
            given.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram))
        banned = set()
        for word in self.forbid:
            for spelling in (word, f" {word}"):
                banned.add(tuple(tokenizer(spelling, add_special_tokens=False)["input_ids"]))
        if banned := {ids: float("-inf") for ids in banned if ids}:
            given.append(SequenceBiasLogitsProcessor(banned))
        return given

    def call_arguments(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The pipeline's arguments."""
        return {
            "guidance_scale": self.guidance_scale,
            "guidance_form": self.guidance_form,
            "stopping": self.stopping,
            "confidence_threshold": self.confidence_threshold,
            "num_candidates": self.num_candidates,
            "choose_by": self.choose_by,
            "scorer": self.scorer,
            "block_length": self.block_length,
            "logits_processor": self.processors(tokenizer),
        }


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """A group of flags, one per option."""
    group = parser.add_argument_group("how tess writes")
    for item in _flags():
        kind = _KINDS.get(item.type, str)
        default = item.default if item.default_factory is _MISSING else []
        more = {key: value for key, value in item.metadata.items() if key != "help"}
        more.setdefault("type", kind)
        shown = "" if default in (None, []) else f" (default {default})"
        group.add_argument(
            f"--{item.name}", default=default, help=item.metadata["help"] + shown,
            metavar={int: "N", float: "X"}.get(kind, "NAME"), **more,
        )


def sampler_options(args: argparse.Namespace, **more: Any) -> SamplerOptions:
    """The options that were given as flags."""
    return SamplerOptions(**{item.name: getattr(args, item.name) for item in _flags()}, **more)


def _flags() -> Sequence[Any]:
    return [item for item in fields(SamplerOptions) if item.metadata.get("flag", True)]


_MISSING = field().default_factory
_KINDS = {int: int, int | None: int, float: float, float | None: float}
