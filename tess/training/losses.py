"""The two losses: simplex diffusion on the target (`tess_loss`), next-token prediction (`ar_loss`).

B examples, L canvas (target) positions, S source positions, N = S + L, V vocabulary. Batches are
`tess.data.collators`'.

In a run of several processes a loss is this process's part: the mean over the processes is the loss
of all their rows, and so are the gradients (`tess.training.processes`). All numbers drawn once per
batch are then the same in every process.
"""

import torch
from torch import Tensor, nn

from tess.backbones.config import HybridConfig
from tess.errors import UserError
from tess.length import length_loss, text_lengths
from tess.schedulers.density import EARLIEST_TIME, LearnedDensity
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import Simplex
from tess.self_conditioning import Prediction
from tess.text.end_tokens import union
from tess.training.processes import mean_shares, own_rows
from tess.training.sharding import is_sharded


def sample_uniforms(
    batch_size: int, stratified: bool = True, device: torch.device | None = None
) -> Tensor:
    """Numbers [B], each uniform on (0, 1], from which training times follow.

    Stratified draws take one from each of B equal parts of the interval, in random order: the same
    density with less variance between batches (arXiv 2107.00630, appendix I.1).
    """
    if not stratified:
        return 1 - torch.rand(batch_size, device=device)
    offset = torch.rand(1, device=device)
    grid_B = (torch.arange(batch_size, device=device) + offset) / batch_size
    # Batches may be sorted by length, so the order must not say the time.
    return (1 - grid_B[torch.randperm(batch_size, device=device)]).clamp_(min=EARLIEST_TIME)


def tess_loss(
    denoiser: nn.Module,
    scheduler: RenoisingScheduler,
    batch: dict[str, Tensor],
    *,
    self_conditioning_probability: float = 0.5,
    unroll_probability: float = 0.0,
    unroll_steps: int = 1,
    stratified: bool = True,
    source_drop_probability: float = 0.0,
    length_loss_weight: float = 0.1,
    density: LearnedDensity | None = None,
) -> Tensor:
    """TESS's loss (arXiv 2305.08379, section 3): cross-entropy of clean tokens given noised ones.

    One time per example; only positions of `noise_mask` are noised; with
    `self_conditioning_probability` the batch is predicted once without gradient, at the same noised
    input, and that prediction is the second pass's input. Noise follows from keys that torch's
    generator draws. Nothing has the size of the logits.

    That pass sees the noised truth, while a sampler noises what it predicted itself. With
    `unroll_probability` one to `unroll_steps` steps of the sampler take its place, from the noised
    truth at a later time down to the batch's own, and what is noised there is the last step's
    arg-max: the model learns to mend its own mistakes (step-unrolled denoising, arXiv 2112.06749,
    on the simplex).

    Args:
        denoiser: a `TessDenoiser`, or a wrapper of one that has it as `.module`.
        scheduler: gives the forward process, and the density of times.
        batch: see `tess.data.collators`.
        self_conditioning_probability: per batch; ignored where the model has no self-conditioning.
        unroll_probability: per batch that has a first pass.
        unroll_steps: steps of the sampler, evenly likely from 1 to this number.
        stratified: see `sample_uniforms`.
        source_drop_probability: per example; such a source becomes the empty `<s> </s>`, which
            classifier-free guidance compares with.
        length_loss_weight: of the length head's cross-entropy, which is added where the model has
            one; examples whose source was dropped, or whose text does not end in the canvas, are
            left out of it.
        density: of times, in place of the scheduler's; it learns from this batch where gradients
            are on.
    """
    core = getattr(denoiser, "module", denoiser)
    target_ids_BL, weights_BL = batch["target_ids"], batch["loss_weights"]
    source = (
        {}
        if "source_ids" not in batch
        else {name: batch[name] for name in ("source_ids", "source_mask")}
    )
    kept_B = torch.ones_like(target_ids_BL[:, 0], dtype=torch.bool)
    if source and source_drop_probability:
        source, kept_B = _drop_sources(source, source_drop_probability, core.config.backbone_config)
    uniforms_B = own_rows(
        lambda count: sample_uniforms(count, stratified, target_ids_BL.device), len(target_ids_BL)
    )
    sample_times = scheduler.training_timesteps if density is None else density.sample
    timesteps_B = sample_times(uniforms_B)
    keys_B = _noise_keys(target_ids_BL)
    same = {"target_mask": batch["target_mask"]}
    if not torch.equal(batch["noise_mask"], batch["target_mask"]):
        same |= {"clean_ids": target_ids_BL, "noise_mask": batch["noise_mask"]}
    reading = core.read_source(**source) if source else None
    # No cache: the layout is joint and the source is read in every pass, or there is no source.
    same |= source | {"cache": reading.cache if source else None}

    def predict(sample: Simplex, times_B: Tensor, previous: Prediction | None) -> Prediction:
        passed = denoiser(sample=sample, timesteps=times_B, previous=previous, **same)
        return core.predict(passed.last_hidden_state)

    sample, previous = scheduler.add_noise(target_ids_BL, timesteps_B, keys=keys_B), None
    if (
        core.config.self_conditioning is not None
        and torch.rand(()).item() < self_conditioning_probability
    ):
        with torch.no_grad():
            if unroll_probability > 0 and torch.rand(()).item() < unroll_probability:
                noised_ids_BL = target_ids_BL
                steps = int(torch.randint(unroll_steps, ())) + 1
                for later_B in _later_times(timesteps_B, steps):
                    sample = scheduler.add_noise(
                        noised_ids_BL, later_B, keys=_noise_keys(target_ids_BL)
                    )
                    previous = predict(sample, later_B, previous)
                    noised_ids_BL = previous.token_ids
                sample = scheduler.add_noise(noised_ids_BL, timesteps_B, keys=keys_B)
            else:
                previous = predict(sample, timesteps_B, None)
        # Autocast keeps the low-precision copies of the weights. Those made without gradient must
        # not serve the next pass: torch 2.13 sees to that, and a version that did not would leave
        # weights untrained without a word.
        torch.clear_autocast_cache()
    out = denoiser(
        sample=sample,
        timesteps=timesteps_B,
        previous=previous,
        labels=target_ids_BL,
        loss_weights=weights_BL,
        **same,
    )
    if density is not None and torch.is_grad_enabled():
        density.update(timesteps_B, out.token_losses.sum(1) / weights_BL.sum(1))
    with_length = bool(source) and core.length_head is not None
    if with_length:
        lengths_B, ended_B = text_lengths(target_ids_BL, union(core.config.backbone_config))
        kept_B = kept_B & ended_B
    share, length_share = mean_shares(torch.stack([weights_BL.sum(), kept_B.sum()]))
    loss = share * out.loss
    if with_length:
        log_probs_BN = core.length_log_probs(reading.last_state, source["source_mask"].sum(dim=1))
        known = length_share * length_loss(log_probs_BN, lengths_B, kept_B)
        loss = loss + length_loss_weight * known
    if is_sharded(core) and reading is not None and reading.last_state is not None:
        # Weights are gathered when a gradient reaches their layer's output, and the source's last
        # layers give the target their states only.
        loss = loss + 0.0 * reading.last_state.sum()
    return loss


def _noise_keys(token_ids_BL: Tensor) -> Tensor:
    device = token_ids_BL.device
    return own_rows(
        lambda count: torch.randint(2**63 - 1, (count,), device=device), len(token_ids_BL)
    )


def _later_times(timesteps_B: Tensor, steps: int) -> list[Tensor]:
    """`steps` times per example between its own and 1, uniform, the latest first."""
    device = timesteps_B.device
    drawn = own_rows(lambda count: torch.rand(steps, count, device=device), len(timesteps_B))
    shares = drawn.sort(dim=0, descending=True).values
    return list(timesteps_B + shares * (1 - timesteps_B))


def _drop_sources(
    source: dict[str, Tensor], probability: float, config: HybridConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """The sources, some of them empty, and which were kept [B] bool."""
    ids_BS, mask_BS = source["source_ids"].clone(), source["source_mask"].clone()
    # the first end token of a config in training is the one that sources have (`start.own_ends`)
    empty = [token for token in (config.bos_token_id, *union(config)[:1]) if token is not None]
    drawn_B = own_rows(lambda count: torch.rand(count, device=ids_BS.device), len(ids_BS))
    dropped_B = drawn_B < probability
    mask_BS[dropped_B] = 0
    mask_BS[dropped_B, -len(empty) :] = 1
    ids_BS[dropped_B, -len(empty) :] = torch.tensor(empty, device=ids_BS.device)
    return {"source_ids": ids_BS, "source_mask": mask_BS}, ~dropped_B


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
    out = model(input_ids=ids_BN, attention_mask=mask_BN, loss_weights=weights_BN, mtp_depth=depth)
    # what each mean is over; the last of them may be beyond the batch's longest text
    distances = range(1, mtp_depth + 2)
    shares = mean_shares(
        torch.stack([(weights_BN[:, d:] * mask_BN[:, :-d]).sum() for d in distances])
    )
    if not next_token and depth == 0:  # nothing to learn, but a graph to go back through
        return sum(0.0 * parameter.sum() for parameter in core.mtp.parameters())
    ahead = (torch.stack(out.mtp_losses) * shares[1 : depth + 1]).mean() if depth else 0.0
    return shares[0] * out.loss + mtp_loss_scale * ahead if next_token else ahead


def _ar_source(batch: dict[str, Tensor], bos_token_id: int | None) -> tuple[Tensor, Tensor]:
    if "source_ids" in batch:
        return batch["source_ids"], batch["source_mask"]
    width = 0 if bos_token_id is None else 1
    ids_BS = batch["target_ids"].new_full((len(batch["target_ids"]), width), bos_token_id or 0)
    return ids_BS, torch.ones_like(ids_BS)
