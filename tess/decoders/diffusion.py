"""The `tess` decoder: all target positions at once."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tess.costs.decoding import tess_flops
from tess.decoders.base import Decoder, Description, Generation, check_request
from tess.errors import UserError
from tess.pipeline import TessPipeline, TessPipelineOutput
from tess.sampling.loop import TraceHook
from tess.sampling.options import SamplerOptions
from tess.sampling.sources import draw_seed, example_keys
from tess.schedulers.family import name_of
from tess.storage.parts import Parts


class TessDecoder(Decoder):
    """All target positions at once, in a few network evaluations.

    options: scheduler, stopping, guidance, candidates and the like.
    """

    name = "tess"

    def __init__(self, parts: Parts, options: SamplerOptions | None = None) -> None:
        super().__init__(parts)
        self.options = SamplerOptions() if options is None else options
        self.pipeline = TessPipeline(
            denoiser=parts.model,
            scheduler=self.options.replace_scheduler(parts.scheduler),
            tokenizer=parts.tokenizer,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.default_num_inference_steps = self.pipeline.default_num_inference_steps
        self.max_target_length = self.model.config.max_target_length

    def describe(self) -> Description:
        scheduler, config, rule = self.pipeline.scheduler, self.model.config, self.options.stopping
        stopping, several = None, self.options.num_candidates > 1
        if rule is not None:
            bound = rule.max_entropy if math.isfinite(rule.max_entropy) else None
            stopping = {"patience": rule.patience, "max_entropy": bound}
        by_rule = "fixed" if config.target_length_ratio is None else "rule"
        return Description(
            scheduler=name_of(scheduler),
            timestep_spacing=scheduler.config.timestep_spacing,
            stopping=stopping,
            length="predicted" if config.length_head else by_rule,
            sampler=self.options.changed(),
            num_candidates=self.options.num_candidates,
            choose_by=self.options.choose_by if several else None,
        )

    def flops(self, source_length: int, canvas: int, evaluations: int) -> float:
        """Operations of so many evaluations over one canvas, the reading of the source included.

        Raises:
            UserError: texts that are written in blocks, whose contexts nobody has noted.
        """
        if "block_length" in self.options.changed():
            raise UserError("the cost of texts written in blocks is not known; leave block_length")
        settings, num_top = self.pipeline.scheduler.config, None
        if settings.noise != "dense":
            num_top = min(settings.num_top, self.model.config.vocab_size - 1)
        return tess_flops(self.model.config, source_length, canvas, evaluations, num_top)

    def trace(
        self,
        texts: list[str],
        *,
        num_inference_steps: int | None = None,
        gen_length: int | None = None,
        seed: int = 0,
        top_p: float | None = None,
        temperature: float = 1.0,
        strict: bool = False,
        fixed_tokens: Tensor | None = None,
        on_trace: TraceHook | None = None,
    ) -> tuple[list[Generation], TessPipelineOutput]:
        """As `generate`, in one batch, beside what the pipeline gave, its trace included.

        The trace has a row for every candidate, N in a row for each source. fixed_tokens, on_trace:
        see `TessPipeline`.
        """
        rows = self.encode(texts, strict).rows
        check_request(gen_length, len(rows), 1, top_p, temperature)
        self.model.eval()
        keys = example_keys(rows, draw_seed(torch.Generator().manual_seed(seed)))
        out = self._run(
            rows, keys, num_inference_steps, gen_length, top_p, temperature,
            fixed_tokens=fixed_tokens, return_trace=True, on_trace=on_trace,
        )
        return self._generations(out), out

    @property
    def max_source_length(self) -> int:
        return self.model.config.max_source_length

    def _flops(self, source_length: int, text: Generation) -> float:
        return self.flops(source_length, text.canvas_length, text.nfe)

    def _batch(
        self, rows, keys, num_inference_steps, gen_length, top_p, temperature
    ) -> list[Generation]:
        out = self._run(rows, keys, num_inference_steps, gen_length, top_p, temperature)
        return self._generations(out)

    def _run(
        self, rows, keys, num_inference_steps, gen_length, top_p, temperature, **more: Any
    ) -> TessPipelineOutput:
        return self.pipeline(
            input_ids=rows,
            gen_length=gen_length,
            num_inference_steps=num_inference_steps,
            top_p=top_p,
            temperature=temperature,
            keys=keys,
            output_type="seq",
            options=self.options,
            **more,
        )

    def _generations(self, out: TessPipelineOutput) -> list[Generation]:
        # Cut to the canvas: what follows it is padding, which may be spelled as `</s>` is.
        firsts: list[Generation | None] = [None] * len(out.lengths)
        if (several := out.candidates) is not None:
            firsts = [
                self._generation(ids[:length], nfe[0])
                for ids, length, nfe in zip(
                    several.sequences[:, 0].tolist(), out.lengths, several.nfe, strict=True
                )
            ]
        return [
            replace(self._generation(ids[:length], nfe), first=first, canvas_length=length)
            for ids, length, nfe, first in zip(
                out.sequences.tolist(), out.lengths, out.nfe, firsts, strict=True
            )
        ]
