"""Texts of one set of rows by one sampler after another: what the sampling benchmarks share."""

# B examples, L positions

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tess.benchmarks.turns import checkpoint_label
from tess.data.rows import Example, load_rows
from tess.data.tasks.catalog import DEFAULT_DATASET, load_task
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.metrics.scores import score
from tess.sampling.call import TextDiffusion
from tess.sampling.sources import seeded_keys
from tess.sampling.steps import StepTrace
from tess.schedulers.family import SAMPLERS
from tess.schedulers.stopping import StoppingRule, text_mask
from tess.text.end_tokens import end_tokens
from tess.text.padding import right_mask
from tess.text.tokenization import decode, encode_sources

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "renoising": ("renoising", {}),
    "renoising_dense": ("renoising", {"noise": "dense"}),
    "ddim": ("ddim", {"noise": "dense"}),
    "ddim_eta1": ("ddim", {"noise": "dense", "eta": 1.0}),
    "ddim_carried": ("ddim", {"noise": "order_statistics"}),
    "euler": ("euler", {"noise": "dense"}),
    "euler_stochastic": ("euler", {"noise": "dense", "stochastic_sampling": True}),
    "euler_carried": ("euler", {"noise": "order_statistics"}),
    "dpm_solver": ("dpm_solver", {"noise": "dense"}),
    "dpm_solver_carried": ("dpm_solver", {"noise": "order_statistics"}),
}
"""Schedulers with their settings, by the names that flags and figures use; the re-noising one draws
its noise as the checkpoint does."""

SPACINGS: dict[str, dict[str, Any]] = {
    "uniform": {"timestep_spacing": "uniform", "lowest_timestep": 0.0},
    "recoverability": {"timestep_spacing": "recoverability", "lowest_timestep": 0.0},
    "early": {"timestep_spacing": "uniform", "lowest_timestep": 0.5},
}
"""Settings of the times by name: over all times, or equal steps of the noisier half alone."""

DIGITS = 4
"""Decimals that are kept: a file of a whole grid has thousands of figures."""

METRICS = (
    "sari", "bleu", "rougeL", "self_bleu", "distinct2", "repeated_words", "length_ratio",
    "exact_copies",
)


class Texts(NamedTuple):
    """What was written for each row: the text, its ids up to `</s>`, evaluations spent, and the
    length of the canvas."""

    texts: list[str]
    ids: list[list[int]]
    nfe: list[int]
    canvases: list[int]


@dataclass(frozen=True)
class Data:
    """Rows and where they came from."""

    examples: list[Example]
    label: Mapping[str, Any]

    @classmethod
    def load(
        cls,
        task: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        limit: int | None = None,
        file: Path | None = None,
    ) -> "Data":
        """Rows of a task (default: simplification, its packaged test rows) or of a file.

        limit: so many of them, spread evenly over all, as neighbours are often of one kind.

        Raises:
            UserError: a file together with a task's options, or a limit out of range.
        """
        if file is not None and (task, dataset, split) != (None, None, None):
            raise UserError("--data takes no --task, --dataset or --split")
        if file is not None:
            examples, label = load_rows(file), {"file": Path(file).name}
        else:
            task, split = task or "simplification", split or "test"
            examples = load_task(task, split, dataset)
            label = {"task": task, "dataset": dataset or DEFAULT_DATASET, "split": split}
        total = len(examples)
        if limit is not None:
            if not 1 <= limit <= total:
                raise UserError(f"--limit must be from 1 to the {total} rows, got {limit}")
            examples = [examples[i * total // limit] for i in range(limit)]
        return cls(examples, label | {"rows": len(examples), "of": total})


class Trials:
    """A model and rows; `use` takes another sampler, `write` writes one text for every row."""

    def __init__(
        self, pipeline: TextDiffusion, data: Data, batch_size: int = 16, checkpoint: str = ""
    ) -> None:
        self.pipeline, self.data, self.batch_size = pipeline, data, batch_size
        self.checkpoint = checkpoint
        self.sources = [example.source for example in data.examples]
        self.references = [list(example.references) for example in data.examples]
        longest = pipeline.denoiser.config.max_source_length
        self.rows = encode_sources(pipeline.tokenizer, self.sources, longest)
        self._first = pipeline.scheduler.config
        self._scores: dict[tuple[str, ...], dict[str, float]] = {}

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        data: Data,
        batch_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> "Trials":
        """Of the decoder `tess` of a checkpoint folder."""
        pipeline = load_decoder(checkpoint, "tess", dtype).pipeline
        return cls(pipeline, data, batch_size, checkpoint_label(checkpoint))

    def use(self, variant: str, spacing: str | None = None) -> None:
        """Sample with one of `VARIANTS` at one of `SPACINGS`; None keeps the checkpoint's."""
        if variant not in VARIANTS:
            raise UserError(f"scheduler must be one of {', '.join(VARIANTS)}, got {variant!r}")
        kind, settings = VARIANTS[variant]
        if spacing is not None:
            settings = settings | SPACINGS[spacing]
        self.pipeline.scheduler = SAMPLERS[kind].from_config(self._first, **settings)

    def batches(
        self, batch_size: int | None = None, order: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Indices of the rows in batches; without an order, rows of like length together."""
        if order is None:
            order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))
        size = batch_size or self.batch_size
        return [list(order[i : i + size]) for i in range(0, len(order), size)]

    @torch.no_grad()
    def write(
        self,
        steps: int,
        seed: int,
        rules: Sequence[StoppingRule] = (),
        batches: Sequence[Sequence[int]] | None = None,
        gen_length: Sequence[int] | int | None = None,
        **call: Any,
    ) -> tuple[Texts, list[Texts]]:
        """One text per row, and what it would have been with each of the rules.

        A rule changes nothing before it stops, so its texts are read off the trace of the run that
        goes through all steps. The noise of a row depends on the seed and the row alone.

        gen_length: one canvas length for all, or one for each row. call: further arguments of the
        pipeline.
        """
        keys = seeded_keys(self.rows, seed)
        results = [Texts([], [], [], []) for _ in range(1 + len(rules))]
        batches = self.batches() if batches is None else batches
        for chosen in batches:
            canvas = gen_length
            if gen_length is not None and not isinstance(gen_length, int):
                canvas = [gen_length[i] for i in chosen]
            out = self.pipeline(
                input_ids=[self.rows[i] for i in chosen],
                keys=keys[list(chosen)],
                num_inference_steps=steps,
                gen_length=canvas,
                return_trace=bool(rules),
                output_type="seq",
                **call,
            )
            self._add(results[0], out.sequences, out.lengths, out.nfe)
            for rule, result in zip(rules, results[1:], strict=True):
                ids_BL, nfe = stopped_early(
                    out.trace, rule, out.lengths, end_tokens(self.pipeline.tokenizer)
                )
                self._add(result, ids_BL, out.lengths, nfe)
        order = [i for chosen in batches for i in chosen]
        place = sorted(range(len(order)), key=order.__getitem__)
        sorted_texts = [Texts(*([part[i] for i in place] for part in found)) for found in results]
        return sorted_texts[0], sorted_texts[1:]

    def _add(
        self, result: Texts, ids_BL: Tensor, lengths: Sequence[int], nfe: Sequence[int]
    ) -> None:
        tokenizer = self.pipeline.tokenizer
        inside_BL = text_mask(ids_BL, right_mask(lengths), end_tokens(tokenizer))
        for row, inside in zip(ids_BL, inside_BL, strict=True):
            ids = row[inside].tolist()
            result.ids.append(ids)
            result.texts.append(decode(tokenizer, ids))
        result.nfe.extend(nfe)
        result.canvases.extend(lengths)

    def figures(self, written: Texts) -> dict[str, float]:
        """`METRICS` of the texts, and the mean and largest number of evaluations."""
        mean = round(sum(written.nfe) / len(written.nfe), DIGITS)
        nfe = {"nfe_mean": mean, "nfe_max": max(written.nfe)}
        return self.score(written.texts) | nfe

    def score(self, texts: Sequence[str]) -> dict[str, float]:
        """`METRICS` of the texts; the same texts are scored once."""
        key = tuple(texts)
        if key not in self._scores:
            found = score(texts, self.references, self.sources)
            self._scores[key] = {name: round(found[name], DIGITS) for name in METRICS}
        return self._scores[key]


def stopped_early(
    trace: Sequence[StepTrace],
    rule: StoppingRule,
    lengths: Sequence[int],
    eos_token_id: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """The tokens [B, L] and evaluations of each example, had the rule stopped it.

    trace: of a run without any rule, every step of it. lengths: each example's canvas.
    """
    target_mask = right_mask(lengths)
    ids_BL = trace[-1].token_ids.clone()
    nfe = [len(trace)] * len(ids_BL)
    open_B = torch.ones(len(ids_BL), dtype=torch.bool)
    state = rule.start()
    for number, step in enumerate(trace, 1):
        text_BL = text_mask(step.token_ids, target_mask, eos_token_id)
        state, done_B = state.update(step.token_ids, step.entropies, text_BL)
        for row in (done_B & open_B).nonzero()[:, 0].tolist():
            ids_BL[row], nfe[row], open_B[row] = step.token_ids[row], number, False
    return ids_BL, nfe
