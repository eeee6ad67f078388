"""The two losses: simplex diffusion on the target (`tess_loss`), next-token prediction (`ar_loss`).

B examples, L canvas (target) positions, S source positions, N = S + L, V vocabulary. Batches are
`tess.data.collators`'.

A loss is the part that a micro-batch has in that of its update (`tess.training.update`): their
sum, and its mean over the processes, is the loss of all rows, and so are the gradients. What is
drawn once for a batch is drawn once for its update.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tess.backbones.config import HybridConfig
from tess.denoiser import DenoiserOutput, SourceReading
from tess.errors import UserError
from tess.length import length_loss, text_lengths
from tess.schedulers.density import EARLIEST_TIME, LearnedDensity
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import Simplex
from tess.self_conditioning import Prediction
from tess.text.end_tokens import union
from tess.training.sharding import is_sharded
from tess.training.update import Batch, Update


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


@dataclass
class Drawn:
    """What an update draws before the network runs.

    times_B, keys_B: a training time per example, and the key of its noise.
    dropped_R: bool, which of all the update's rows have no source this time; None where none may.
    """

    times_B: Tensor
    keys_B: Tensor
    dropped_R: Tensor | None


def tess_loss(
    denoiser: nn.Module,
    scheduler: RenoisingScheduler,
    batch: Batch,
    update: Update | None = None,
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
        update: the update in which the batch has its turn; None: the batch is all of it.
        self_conditioning_probability: per update; ignored where the model has no self-conditioning.
            In evaluation mode the loss is the mean of both kinds with this weight, and no coin.
        unroll_probability: per update that has a first pass.
        unroll_steps: steps of the sampler, evenly likely from 1 to this number.
        stratified: see `sample_uniforms`.
        source_drop_probability: per example; such a source becomes the empty `<s> </s>`, which
            classifier-free guidance compares with.
        length_loss_weight: of the length head's cross-entropy, which is added where the model has
            one; examples whose source was dropped, or whose text does not end in the canvas, are
            left out of it.
        density: of times, in place of the scheduler's; it learns from the update where gradients
            are on.
    """
    core, update = getattr(denoiser, "module", denoiser), update or Update([batch])
    sample_times = scheduler.training_timesteps if density is None else density.sample
    drawn = _draw(update, sample_times, stratified, source_drop_probability)
    reading, given = _condition(core, batch, update, drawn)
    labels = {"labels": batch["target_ids"], "loss_weights": batch["loss_weights"]}

    def run(sample: Simplex, times_B: Tensor, previous: Prediction | None, **more: Any) -> Any:
        return denoiser(sample=sample, timesteps=times_B, previous=previous, **given, **more)

    def predict(sample: Simplex, times_B: Tensor, previous: Prediction | None) -> Prediction:
        return core.predict(run(sample, times_B, previous).last_hidden_state)

    sample, previous = _noised(scheduler, batch["target_ids"], drawn), None
    has_first = core.config.self_conditioning is not None
    if not core.training:
        share = self_conditioning_probability if has_first else 0.0
        labelled = partial(run, sample, drawn.times_B, **labels)
        loss = _expected_loss(labelled, core.predict, share)
        return _weighted(core, batch, update, drawn, reading, given, loss, length_loss_weight)
    if has_first and torch.rand(()).item() < self_conditioning_probability:
        with torch.no_grad():
            if unroll_probability > 0 and torch.rand(()).item() < unroll_probability:
                sample, previous = _unrolled(predict, scheduler, update, drawn, unroll_steps)
            else:
                previous = predict(sample, drawn.times_B, None)
        # Autocast keeps the low-precision copies of the weights. Those made without gradient must
        # not serve the next pass: torch 2.13 sees to that, and a version that did not would leave
        # weights untrained without a word.
        torch.clear_autocast_cache()
    out = run(sample, drawn.times_B, previous, **labels)
    if density is not None and torch.is_grad_enabled():
        seen = update.keep(drawn.times_B, out.token_losses.sum(1) / batch["loss_weights"].sum(1))
        if update.is_last:  # so that all micro-batches draw from the same density
            density.update(*seen)
    return _weighted(core, batch, update, drawn, reading, given, out.loss, length_loss_weight)


def _draw(
    update: Update,
    sample_times: Callable[[Tensor], Tensor],
    stratified: bool,
    source_drop_probability: float,
) -> Drawn:
    batch = update.batches[update.turn]
    device, dropped_R = batch["target_ids"].device, None
    if "source_ids" in batch and source_drop_probability:
        dropped_R = torch.rand(update.total, device=device) < source_drop_probability
    uniforms_R = sample_uniforms(update.total, stratified, device)
    return Drawn(sample_times(uniforms_R[update.own]), _noise_keys(update), dropped_R)


def _condition(
    core: nn.Module, batch: Batch, update: Update, drawn: Drawn
) -> tuple[SourceReading | None, dict[str, Any]]:
    """The source read once, if there is one, and what every pass is given beside the simplex."""
    given = {"target_mask": batch["target_mask"]}
    if not torch.equal(batch["noise_mask"], batch["target_mask"]):
        given |= {"clean_ids": batch["target_ids"], "noise_mask": batch["noise_mask"]}
    # No cache: the layout is joint and the source is read in every pass, or there is no source.
    if "source_ids" not in batch:
        return None, given | {"cache": None}
    source = {name: batch[name] for name in ("source_ids", "source_mask")}
    if drawn.dropped_R is not None:
        config = core.config.backbone_config
        source = _emptied(source, drawn.dropped_R[update.own], config)
    reading = core.read_source(**source)
    return reading, given | source | {"cache": reading.cache}


def _noised(scheduler: RenoisingScheduler, ids_BL: Tensor, drawn: Drawn) -> Simplex:
    return scheduler.add_noise(ids_BL, drawn.times_B, keys=drawn.keys_B)


def _expected_loss(
    run: Callable[[Prediction | None], DenoiserOutput],
    predict: Callable[[Tensor], Prediction],
    share: float,
) -> Tensor:
    """The tokens' loss, a `share` of it after a first pass: what the coin gives on average.

    An evaluation throws no coin, or its value would depend on how rows are put into batches.
    """
    first = run(None)
    if share == 0:
        return first.loss
    second = run(predict(first.last_hidden_state))
    return second.loss if share == 1 else torch.lerp(first.loss, second.loss, share)


def _unrolled(
    predict: Callable[[Simplex, Tensor, Prediction | None], Prediction],
    scheduler: RenoisingScheduler,
    update: Update,
    drawn: Drawn,
    most_steps: int,
) -> tuple[Simplex, Prediction]:
    """One to `most_steps` steps of the sampler: the simplex that it reaches, and its prediction."""
    ids_BL, previous = update.batches[update.turn]["target_ids"], None
    steps = int(torch.randint(most_steps, ())) + 1
    for later_B in _later_times(update, drawn.times_B, steps):
        sample = scheduler.add_noise(ids_BL, later_B, keys=_noise_keys(update))
        previous = predict(sample, later_B, previous)
        ids_BL = previous.token_ids
    return _noised(scheduler, ids_BL, drawn), previous


def _weighted(
    core: nn.Module,
    batch: Batch,
    update: Update,
    drawn: Drawn,
    reading: SourceReading | None,
    given: dict[str, Any],
    tokens_loss: Tensor,
    length_loss_weight: float,
) -> Tensor:
    """The batch's part in the update's mean over tokens, and in the length head's over texts."""
    eos = union(core.config.backbone_config)

    def known(turn: int) -> Tensor:  # [B] bool: there is a length to be learnt
        ids_BL = update.batches[turn]["target_ids"]
        _, ended_B = text_lengths(ids_BL, eos)
        if drawn.dropped_R is None:
            return ended_B
        return ended_B & ~drawn.dropped_R[update.rows(turn)]

    def weights(turn: int) -> Tensor:
        tokens = update.batches[turn]["loss_weights"].sum()
        return torch.stack([tokens, known(turn).sum()]) if with_length else tokens[None]

    with_length = reading is not None and core.length_head is not None
    shares = update.mean_shares(weights)
    loss = shares[0] * tokens_loss
    if with_length:
        log_probs_BN = core.length_log_probs(reading.last_state, given["source_mask"].sum(dim=1))
        lengths_B, _ = text_lengths(batch["target_ids"], eos)
        length = shares[1] * length_loss(log_probs_BN, lengths_B, known(update.turn))
        loss = loss + length_loss_weight * length
    if is_sharded(core) and reading is not None and reading.last_state is not None:
        # Weights are gathered when a gradient reaches their layer's output, and the source's last
        # layers give the target their states only.
        loss = loss + 0.0 * reading.last_state.sum()
    return loss


def _noise_keys(update: Update) -> Tensor:
    device = update.batches[update.turn]["target_ids"].device
    return torch.randint(2**63 - 1, (update.total,), device=device)[update.own]


def _later_times(update: Update, times_B: Tensor, steps: int) -> list[Tensor]:
    """`steps` times per example between its own and 1, uniform, the latest first."""
    drawn = torch.rand(steps, update.total, device=times_B.device)[:, update.own]
    shares = drawn.sort(dim=0, descending=True).values
    return list(times_B + shares * (1 - times_B))


def _emptied(
    source: dict[str, Tensor], dropped_B: Tensor, config: HybridConfig
) -> dict[str, Tensor]:
    """The sources, the dropped ones of them empty."""
    ids_BS, mask_BS = source["source_ids"].clone(), source["source_mask"].clone()
    # the first end token of a config in training is the one that sources have (`start.own_ends`)
    empty = [token for token in (config.bos_token_id, *union(config)[:1]) if token is not None]
    mask_BS[dropped_B] = 0
    mask_BS[dropped_B, -len(empty) :] = 1
    ids_BS[dropped_B, -len(empty) :] = torch.tensor(empty, device=ids_BS.device)
    return {"source_ids": ids_BS, "source_mask": mask_BS}


def ar_loss(
    model: nn.Module,
    batch: Batch,
    update: Update | None = None,
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
    core, update = getattr(model, "module", model), update or Update([batch])
    if not torch.equal(batch["noise_mask"], batch["target_mask"]):
        raise UserError(
            "span infilling in place has no autoregressive form; use text_infilling instead"
        )
    bos = core.config.bos_token_id
    ids_BN, mask_BN, weights_BN = _sequence(batch, bos)
    depth = max(0, min(mtp_depth, ids_BN.shape[1] - 2))  # a short batch has none further ahead
    out = model(input_ids=ids_BN, attention_mask=mask_BN, loss_weights=weights_BN, mtp_depth=depth)

    def weights(turn: int) -> Tensor:
        """What each mean is over; the last of them may be beyond the batch's longest text."""
        _, mask_BN, weights_BN = _sequence(update.batches[turn], bos)
        distances = range(1, mtp_depth + 2)
        return torch.stack([(weights_BN[:, d:] * mask_BN[:, :-d]).sum() for d in distances])

    shares = update.mean_shares(weights)
    if not next_token and depth == 0:  # nothing to learn, but a graph to go back through
        return sum(0.0 * parameter.sum() for parameter in core.mtp.parameters())
    ahead = 0.0
    if depth:
        losses = torch.stack(out.mtp_losses) * shares[1 : depth + 1]
        ahead = losses.sum() / (update.totals(weights)[1:] > 0).sum()
    return shares[0] * out.loss + mtp_loss_scale * ahead if next_token else ahead


def _sequence(batch: Batch, bos_token_id: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and weights [B, N] of source and target as one sequence, padded on the left."""
    source_ids_BS, source_mask_BS = _ar_source(batch, bos_token_id)
    ids_BN = torch.cat([source_ids_BS, batch["target_ids"]], dim=1)
    mask_BN = torch.cat([source_mask_BS, batch["target_mask"]], dim=1)
    weights_BN = torch.cat([torch.zeros_like(source_mask_BS).float(), batch["loss_weights"]], dim=1)
    # A stable sort of the mask moves all padding to the front and keeps the tokens' order.
    order_BN = mask_BN.argsort(dim=1, stable=True)
    return tuple(t.gather(1, order_BN) for t in (ids_BN, mask_BN, weights_BN))


def _ar_source(batch: Batch, bos_token_id: int | None) -> tuple[Tensor, Tensor]:
    if "source_ids" in batch:
        return batch["source_ids"], batch["source_mask"]
    width = 0 if bos_token_id is None else 1
    ids_BS = batch["target_ids"].new_full((len(batch["target_ids"]), width), bos_token_id or 0)
    return ids_BS, torch.ones_like(ids_BS)
