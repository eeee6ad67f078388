"""Operations of one training update, from the roofline's counts of single passes."""

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.costs.roofline import (
    Block,
    expected_embedding_cost,
    head_cost,
    noised_embedding_cost,
    stack_cost,
)

FORWARD_AND_BACKWARD = 3
"""Products of a training pass, in those of a forward pass: its own, and one for each gradient."""


def update_flops(
    config: TessConfig | HybridConfig,
    batch: int,
    source: float,
    target: float,
    first_pass: float = 0.5,
) -> float:
    """FLOP of one update on `batch` texts of `source` and `target` positions, padding included.

    A denoiser reads the source once and the canvas once, both with gradients, and with probability
    `first_pass` the canvas before that without (self-conditioning), which also takes a sweep over
    the vocabulary. In the joint layout each pass reads both. A causal model reads source and target
    once. The optimizer is not counted (about 20 FLOP for each parameter).
    """
    if isinstance(config, HybridConfig):
        block = Block(batch, source + target, 0)
        forward = stack_cost(config, config.hybrid_override_pattern, block)
        return FORWARD_AND_BACKWARD * (forward + head_cost(config, batch * target)).flops
    backbone, joint = config.backbone_config, config.source_encoding == "joint"
    pattern = backbone.hybrid_override_pattern
    read = Block(batch, source, 0, bidirectional=config.source_encoding == "bidirectional")
    canvas = Block(batch, target, source, bidirectional=True)
    if joint:
        canvas = Block(batch, source + target, 0, bidirectional=True)
    reading = 0.0 if joint else stack_cost(backbone, pattern, read).flops
    denoising = stack_cost(backbone, pattern, canvas)
    denoising += noised_embedding_cost(backbone, batch * target) + head_cost(
        backbone, batch * target
    )
    sweep = expected_embedding_cost(backbone, batch * target)
    with_gradients = FORWARD_AND_BACKWARD * (reading + denoising.flops)
    return with_gradients + first_pass * (denoising + sweep).flops
