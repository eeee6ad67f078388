"""What our models add to transformers' loading: nothing may be missing, nothing unknown."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

NAMES_SHOWN = 5

KEPT_IN_FLOAT32 = ["gate.weight", "e_score_correction_bias", "A_log", "dt_bias", "mixer.D"]
"""Name parts of what stays float32 in memory whatever the weights are: step sizes and decays are
exponentiated, released router biases differ by less than bfloat16 can hold, and a step of training
that rounds router weights changes which experts are chosen."""


class StrictPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` whose checkpoints must fit exactly."""

    _skip_keys_device_placement = ["cache", "past_key_values"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`, but every tensor must be there, and no other.

        Raises:
            ValueError: naming the missing, unknown or wrongly shaped tensors.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, in one sentence
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # not transformers' table of the same
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
        problems = [
            f"{word} {name_some(_names(info[key]))}"
            for word, key in (
                ("lacks", "missing_keys"),
                ("has unknown", "unexpected_keys"),
                ("has wrongly shaped", "mismatched_keys"),
            )
            if info[key]
        ]
        if problems:
            place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise ValueError(f"the checkpoint {place} does not fit: it {' and '.join(problems)}")
        return (model, info) if with_info else model

    def _activation_checkpointing_enable(
        self, options: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if (options or {}).get("use_reentrant"):
            # it would drop the gradients that reach a layer through the cache, without a word
            raise ValueError("gradient checkpointing needs use_reentrant=False here, got True")
        super()._activation_checkpointing_enable(options, *args, **kwargs)


def stays_float32(name: str) -> bool:
    """Whether a parameter or buffer of this full name is among `KEPT_IN_FLOAT32`."""
    return any(name.endswith(part) for part in KEPT_IN_FLOAT32)


def name_some(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _names(keys: Any) -> list[str]:
    return sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in keys)
