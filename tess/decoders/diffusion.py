"""The `tess` decoder: all target positions at once."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from tess.costs.decoding import tess_flops
from tess.decoders.base import Decoder, Description, Generation
from tess.errors import UserError
from tess.sampling.call import TessPipelineOutput, TextDiffusion
from tess.sampling.loop import TraceHook
from tess.sampling.options import SamplerOptions
from tess.sampling.request import Request
from tess.sampling.sources import seeded_keys
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
        self.pipeline = TextDiffusion(
            denoiser=parts.model,
            scheduler=self.options.replace_scheduler(parts.scheduler),
            tokenizer=parts.tokenizer,
        )
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
        seed: int = 0,
        strict: bool = False,
        fixed_tokens: Tensor | None = None,
        on_trace: TraceHook | None = None,
        **request: Any,
    ) -> tuple[list[Generation], TessPipelineOutput]:
        """As `generate`, in one batch, beside what the pipeline gave, its trace included.

        The trace has a row for every candidate, N in a row for each source. fixed_tokens, on_trace:
        see `TextDiffusion`.
        """
        rows = self.encode(texts, strict).rows
        self.model.eval()
        out = self._run(
            rows, seeded_keys(rows, seed), Request(**request),
            fixed_tokens=fixed_tokens, return_trace=True, on_trace=on_trace,
        )
        return self._generations(out), out

    @property
    def max_source_length(self) -> int:
        return self.model.config.max_source_length

    def _flops(self, source_length: int, text: Generation) -> float:
        return self.flops(source_length, text.canvas_length, text.nfe)

    def _batch(
        self, rows: list[list[int]], keys: Tensor, request: Request
    ) -> list[Generation]:
        return self._generations(self._run(rows, keys, request))

    def _run(
        self, rows: list[list[int]], keys: Tensor, request: Request, **more: Any
    ) -> TessPipelineOutput:
        return self.pipeline(
            input_ids=rows, keys=keys, output_type="seq", options=self.options,
            **vars(request), **more,
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
