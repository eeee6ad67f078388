"""transformers' settings of a trainer, with this project's defaults."""

from dataclasses import dataclass

import transformers

from tess.training.settings import TrainingDefaults


@dataclass
class TrainingArguments(TrainingDefaults, transformers.TrainingArguments):
    """transformers' own; `TrainingDefaults` says what differs."""
