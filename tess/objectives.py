"""The two losses: simplex diffusion on the target (`tess_loss`), next-token prediction (`ar_loss`).

B examples, L canvas (target) positions, S source positions, N = S + L, V vocabulary. Batches are
`tess.collators`'.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tess.backbones.config import HybridConfig
from tess.errors import UserError
from tess.schedulers.renoising import RenoisingScheduler


def sample_timesteps(
    batch_size: int, stratified: bool = True, device: torch.device | None = None
) -> Tensor:
    """Training times [B], each uniform on (0, 1].

    Stratified draws take one from each of B equal parts of the interval, in random order: the same
    density with less variance between batches (arXiv 2107.00630, appendix I.1).
    """
    if not stratified:
        return 1 - torch.rand(batch_size, device=device)
    offset = torch.rand(1, device=device)
    grid_B = (torch.arange(batch_size, device=device) + offset) / batch_size
    # Batches may be sorted by length, so the order must not say the time.
    return (1 - grid_B[torch.randperm(batch_size, device=device)]).clamp_(min=1e-6)


def weighted_cross_entropy(logits_BLV: Tensor, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
    """Mean of the tokens' cross-entropy under `weights_BL`, in nats, computed in float32."""
    loss_BL = F.cross_entropy(logits_BLV.float().transpose(1, 2), ids_BL, reduction="none")
    return (loss_BL * weights_BL).sum() / weights_BL.sum().clamp(min=1e-8)


def tess_loss(
    denoiser: nn.Module,
    scheduler: RenoisingScheduler,
    batch: dict[str, Tensor],
    *,
    self_conditioning_probability: float = 0.5,
    stratified: bool = True,
    source_drop_probability: float = 0.0,
) -> Tensor:
    """TESS's loss (arXiv 2305.08379, section 3): cross-entropy of clean tokens given noised ones.

    One time per example; only positions of `noise_mask` are noised; with
    `self_conditioning_probability` the batch is predicted once without gradient, at the same noised
    input, and that prediction is the second pass's input.

    Args:
        denoiser: a `TessDenoiser`, or a wrapper of one that has it as `.module`.
        scheduler: gives the forward process.
        batch: see `tess.collators`.
        self_conditioning_probability: per batch; ignored where the model has no self-conditioning.
        stratified: see `sample_timesteps`.
        source_drop_probability: per example; such a source becomes the empty `<s> </s>`, which
            classifier-free guidance compares with.
    """
    core = getattr(denoiser, "module", denoiser)
    target_ids_BL = batch["target_ids"]
    source = (
        {}
        if "source_ids" not in batch
        else {name: batch[name] for name in ("source_ids", "source_mask")}
    )
    if source and source_drop_probability:
        source = _drop_sources(source, source_drop_probability, core.config.backbone_config)
    timesteps_B = sample_timesteps(len(target_ids_BL), stratified, target_ids_BL.device)
    noise_BLV = torch.randn(
        *target_ids_BL.shape, core.config.vocab_size, device=target_ids_BL.device
    )
    sample = scheduler.add_noise(target_ids_BL, timesteps_B, noise_BLV)
    inputs = {"sample": sample, "timesteps": timesteps_B, "target_mask": batch["target_mask"]}
    if not torch.equal(batch["noise_mask"], batch["target_mask"]):
        inputs |= {"clean_ids": target_ids_BL, "noise_mask": batch["noise_mask"]}
    # No cache: the layout is joint and the source is read in every pass, or there is no source.
    context = source | {"cache": core.encode_source(**source) if source else None}

    previous_BLV = None
    if (
        core.config.self_conditioning is not None
        and torch.rand(()).item() < self_conditioning_probability
    ):
        with torch.no_grad():
            previous_BLV = denoiser(**inputs, **context).logits
        # Autocast keeps the low-precision copies of the weights. Those made without gradient must
        # not serve the next pass: torch 2.13 sees to that, and a version that did not would leave
        # weights untrained without a word.
        torch.clear_autocast_cache()
    logits_BLV = denoiser(**inputs, **context, previous=previous_BLV).logits
    return weighted_cross_entropy(logits_BLV, target_ids_BL, batch["loss_weights"])


def _drop_sources(
    source: dict[str, Tensor], probability: float, config: HybridConfig
) -> dict[str, Tensor]:
    ids_BS, mask_BS = source["source_ids"].clone(), source["source_mask"].clone()
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    empty = [token for token in (config.bos_token_id, eos) if token is not None]
    dropped_B = torch.rand(len(ids_BS), device=ids_BS.device) < probability
    mask_BS[dropped_B] = 0
    mask_BS[dropped_B, -len(empty) :] = 1
    ids_BS[dropped_B, -len(empty) :] = torch.tensor(empty, device=ids_BS.device)
    return {"source_ids": ids_BS, "source_mask": mask_BS}


def ar_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    mtp_depth: int = 0,
    mtp_loss_scale: float = 0.3,
    next_token: bool = True,
) -> Tensor:
    """Next-token cross-entropy of the target after the source, `</s>` included, in nats per token.

    Source and target become one left-padded sequence, so the causal masks and the Mamba states meet
    no padding between tokens. Rows without a source start with bos and every token of theirs is
    predicted.

    With `mtp_depth` the multi-token predictor's cross-entropy, averaged over the depths, is added
    times `mtp_loss_scale` (Megatron-LM's form; 0.3 in Nemotron 3 Super). Without `next_token` that
    average alone is the loss, for a predictor trained behind a frozen backbone.

    Raises:
        UserError: for a batch with clean context inside the target, which has no autoregressive
        form.
    """
    core = getattr(model, "module", model)
    target_mask_BL = batch["target_mask"]
    if not torch.equal(batch["noise_mask"], target_mask_BL):
        raise UserError(
            "span infilling in place has no autoregressive form; use text_infilling instead"
        )
    source_ids_BS, source_mask_BS = _ar_source(batch, core.config.bos_token_id)
    ids_BN = torch.cat([source_ids_BS, batch["target_ids"]], dim=1)
    mask_BN = torch.cat([source_mask_BS, target_mask_BL], dim=1)
    weights_BN = torch.cat([torch.zeros_like(source_mask_BS).float(), batch["loss_weights"]], dim=1)
    # A stable sort of the mask moves all padding to the front and keeps the tokens' order.
    order_BN = mask_BN.argsort(dim=1, stable=True)
    ids_BN, mask_BN, weights_BN = (t.gather(1, order_BN) for t in (ids_BN, mask_BN, weights_BN))
    depth = max(0, min(mtp_depth, ids_BN.shape[1] - 2))  # a short batch has none further ahead
    out = model(
        input_ids=ids_BN, attention_mask=mask_BN, loss_weights=weights_BN, mtp_depth=depth
    )
    if not next_token and depth == 0:  # nothing to learn, but a graph to go back through
        return sum(0.0 * parameter.sum() for parameter in core.mtp.parameters())
    ahead = torch.stack(out.mtp_losses).mean() if depth else 0.0
    return out.loss + mtp_loss_scale * ahead if next_token else ahead


def _ar_source(batch: dict[str, Tensor], bos_token_id: int | None) -> tuple[Tensor, Tensor]:
    if "source_ids" in batch:
        return batch["source_ids"], batch["source_mask"]
    width = 0 if bos_token_id is None else 1
    ids_BS = batch["target_ids"].new_full((len(batch["target_ids"]), width), bos_token_id or 0)
    return ids_BS, torch.ones_like(ids_BS)
