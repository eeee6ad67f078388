"""Text in, text out: simplex diffusion as a diffusers pipeline."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from tess.denoiser import TessDenoiser
from tess.sampling.call import TextDiffusion
from tess.schedulers import family  # noqa: F401  diffusers loads components from imported modules
from tess.schedulers.base import SimplexScheduler


class TessPipeline(DiffusionPipeline, TextDiffusion):
    """`TextDiffusion` with diffusers' saving, loading, devices and progress bar.

    Any `SimplexScheduler` of the model's simplex serves:
    `pipe.scheduler = SimplexDDIMScheduler.from_config(pipe.scheduler.config)`.

    Save with `save_pretrained`, load with `TessPipeline.from_pretrained`.

    Raises:
        UserError: when tokenizer, denoiser and scheduler do not fit each other.
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(
        self,
        denoiser: TessDenoiser,
        scheduler: SimplexScheduler,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(denoiser=denoiser, scheduler=scheduler, tokenizer=tokenizer)
        TextDiffusion.__init__(self, denoiser, scheduler, tokenizer)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "TessPipeline":
        """`DiffusionPipeline.from_pretrained`, in float32 unless `dtype` (`torch_dtype`) is given.

        In float32 a text does not depend on its batch, whatever type the folder's weights have.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(*args, **kwargs)
