"""BERTScore (Zhang et al. 2020) as a measure: the package `bert-score`, an optional extra.

Greedy cosine matching of contextual token vectors, F1, without idf weights and without rescaling,
the best reference of each row, 0-100: as DiffuSeq and TESS report it (with
microsoft/deberta-xlarge-mnli; TESS also with roberta-large). The figure depends on the model and
the layer, so both are in the signature.
"""

import importlib.metadata
from collections.abc import Sequence

import numpy as np
from transformers import AutoConfig

from tess.errors import UserError
from tess.metrics.measures import Measure, mean_measure
from tess.metrics.tokens import check_parallel

LONGEST = 512
"""Tokens of a text that are read where the model's tokenizer names no limit."""


class BertScore:
    """A loaded model, to score a system and its baselines with."""

    def __init__(self, model: str, *, device: str | None = None, batch_size: int = 64):
        """
        Args:
            model: a name on the hub or a folder. The layer is the one that bert-score's authors
                found best; the last one for a model that they did not try.
            device: None takes a GPU where there is one.

        Raises:
            UserError: the package is not installed, or the model cannot be loaded.
        """
        try:
            from bert_score import BERTScorer
            from bert_score.utils import model2layers
        except ImportError as error:
            raise UserError(
                "BERTScore needs the package bert-score (pip install 'tess-diffusion[bertscore]')"
            ) from error
        self.model, self.batch_size = model, batch_size
        try:
            config = AutoConfig.from_pretrained(model)
            self.layer = model2layers.get(model) or config.num_hidden_layers
            self._scorer = BERTScorer(model_type=model, num_layers=self.layer, device=device)
        except (OSError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot load the BERTScore model {model!r}: {reason}") from error
        # A tokenizer without a limit has 1e30, which today's tokenizers do not take.
        tokenizer = self._scorer._tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, LONGEST)

    @property
    def signature(self) -> str:
        """`bertscore|model:...|layer:...|...`, in the manner of sacrebleu."""
        versions = "+".join(
            f"{name}-{importlib.metadata.version(name)}" for name in ("bert-score", "transformers")
        )
        return (
            f"bertscore|model:{self.model}|layer:{self.layer}|idf:no|rescale:no|best-ref|"
            f"version:{versions}"
        )

    def measure(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
        """Mean F1 over rows, 0-100, named `bertscore`; an empty text gives 0.

        Raises:
            UserError: texts that do not line up, or a blank reference.
        """
        check_parallel(predictions, predictions, references)
        usable = [i for i, text in enumerate(predictions) if text.strip()]
        values = np.zeros(len(predictions))
        if usable:
            scores = self._scorer.score(
                [predictions[i] for i in usable],
                [list(references[i]) for i in usable],
                batch_size=self.batch_size,
            )
            values[usable] = 100.0 * scores[2].double().numpy()
        return mean_measure("bertscore", values)
