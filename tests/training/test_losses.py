"""The losses: what is noised, what is weighed, what gets a gradient."""

import pytest
import torch
import torch.nn.functional as F

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.density import LearnedDensity
from tess.schedulers.renoising import RenoisingScheduler
from tess.training.losses import ar_loss, sample_uniforms, tess_loss
from tiny import DECODER

BOS, EOS, V = 1, 2, 40
SIZES = DECODER | {"vocab_size": V}
SCHEDULER = RenoisingScheduler(vocab_size=V)


def denoiser(**settings):
    torch.manual_seed(0)
    return TessDenoiser(
        TessConfig(
            backbone_config=HybridConfig(**SIZES, mamba_direction="bidirectional"), **settings
        )
    )


def causal():
    torch.manual_seed(0)
    return HybridForCausalLM(HybridConfig(**SIZES)).eval()


def pairs():
    """Sources of 3 and 5 tokens, targets of 6 and 4."""
    source = torch.tensor([[0, 0, BOS, 11, EOS], [BOS, 12, 13, 14, EOS]])
    target = torch.tensor([[21, 22, 23, 24, 25, EOS], [31, 32, 33, EOS, 0, 0]])
    mask = (target != 0).long()
    return {
        "source_ids": source, "source_mask": (source != 0).long(), "target_ids": target,
        "target_mask": mask, "noise_mask": mask, "loss_weights": mask.float(),
    }


def test_uniforms_are_uniform_and_stratified_in_random_order():
    times = torch.stack([sample_uniforms(8) for _ in range(400)])
    assert (times > 0).all() and (times <= 1).all()
    parts = (times * 8).ceil().sort(dim=1).values
    assert torch.equal(parts, torch.arange(1.0, 9).expand_as(parts))
    assert times[:, 0].mean() == pytest.approx(0.5, abs=0.05)
    assert sample_uniforms(4000, stratified=False).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("label_shift", [False, True])
def test_padding_does_not_change_the_loss(label_shift):
    model, batch = denoiser(label_shift=label_shift).eval(), pairs()

    def loss(batch):
        torch.manual_seed(4)
        return tess_loss(model, SCHEDULER, batch, self_conditioning_probability=1.0).item()

    wider = {name: F.pad(t, (3, 0) if "source" in name else (0, 3)) for name, t in batch.items()}
    assert loss(wider) == pytest.approx(loss(batch), rel=1e-5)


def test_clean_context_is_seen_and_not_weighed():
    model, batch = denoiser().eval(), pairs()
    batch["noise_mask"] = batch["target_mask"].clone()
    batch["noise_mask"][0, :3] = 0
    batch["loss_weights"] = batch["noise_mask"].float()

    def loss(first_id):
        batch["target_ids"][0, 0] = first_id
        torch.manual_seed(0)
        return tess_loss(model, SCHEDULER, batch, self_conditioning_probability=0.0).item()

    assert loss(21) == loss(21)
    assert loss(21) != loss(22)  # the context is read


@pytest.mark.parametrize("encoding", ["causal", "bidirectional", "joint"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_learns_also_after_a_first_pass(encoding, bf16):
    model = denoiser(source_encoding=encoding).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        tess_loss(model, SCHEDULER, pairs(), self_conditioning_probability=1.0).backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    # With one expert per token the normalised router weight is a constant.
    assert [name for name in without if "gate.weight" not in name] == []


@pytest.mark.parametrize("encoding", ["causal", "joint"])
@pytest.mark.parametrize("with_source", [True, False])
def test_every_backbone_weight_gets_a_finite_gradient_with_label_shift(encoding, with_source):
    model = denoiser(source_encoding=encoding, label_shift=True).train()
    batch = {name: t for name, t in pairs().items() if with_source or "source" not in name}
    tess_loss(model, SCHEDULER, batch, self_conditioning_probability=1.0).backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # With one expert per token the normalised router weight is a constant.
        assert parameter.grad.any() or "gate.weight" in name, name


def test_the_first_pass_has_no_gradient_and_matters():
    model, batch = denoiser(), pairs()
    losses = []
    for probability in (0.0, 1.0):
        torch.manual_seed(0)
        losses.append(
            tess_loss(model, SCHEDULER, batch, self_conditioning_probability=probability).item()
        )
    assert losses[0] != losses[1]
    plain = denoiser(self_conditioning=None)
    torch.manual_seed(0)
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    tess_loss(plain, SCHEDULER, batch, self_conditioning_probability=1.0)
    assert len(calls) == 1


def test_times_come_from_the_scheduler_s_density_or_the_given_one(monkeypatch):
    model, batch = denoiser().train(), pairs()
    seen = []
    add_noise = RenoisingScheduler.add_noise

    def watch(self, ids, timesteps, **kwargs):
        seen.append(timesteps)
        return add_noise(self, ids, timesteps, **kwargs)

    monkeypatch.setattr(RenoisingScheduler, "add_noise", watch)
    density = LearnedDensity(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    uniform = RenoisingScheduler(vocab_size=V, timestep_density="uniform")
    before = density.losses.clone()
    for scheduler, given in ((uniform, None), (SCHEDULER, None), (SCHEDULER, density)):
        torch.manual_seed(0)
        tess_loss(model, scheduler, batch, density=given)
    torch.testing.assert_close(SCHEDULER.density().sample(seen[0]), seen[1])
    learned = LearnedDensity(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(learned.sample(seen[0]), seen[2])

    # it has taken in each example's own mean loss, and learns nothing without gradients
    bins = (seen[2] * 4).long().clamp(max=3).tolist()
    assert all((density.losses[i] != before[i]) == (i in bins) for i in range(4))
    after = density.losses.clone()
    with torch.no_grad():
        tess_loss(model, SCHEDULER, batch, density=density)
    assert torch.equal(density.losses, after)


def test_the_loss_equals_that_of_materialised_tensors():
    """The same noise, dense, through logits, softmax and torch's cross-entropy."""
    model, batch = denoiser(self_conditioning=None).eval(), pairs()
    scheduler = RenoisingScheduler(vocab_size=V, noise="dense")
    torch.manual_seed(0)
    got = tess_loss(model, scheduler, batch)
    torch.manual_seed(0)
    times = scheduler.training_timesteps(sample_uniforms(2))
    keys = torch.randint(2**63 - 1, (2,))
    dense = scheduler.add_noise(batch["target_ids"], times, keys=keys).logits()
    source = {name: batch[name] for name in ("source_ids", "source_mask")}
    hidden = model(dense, times, target_mask=batch["target_mask"], **source).last_hidden_state
    losses = F.cross_entropy(
        model.logits(hidden).transpose(1, 2), batch["target_ids"], reduction="none"
    )
    want = (losses * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(loss, model.backbone.embeddings.weight)[0] for loss in (got, want)
    ]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_dropped_sources_are_the_empty_source():
    model, batch = denoiser().eval(), pairs()

    def loss(**changes):
        torch.manual_seed(0)
        return tess_loss(model, SCHEDULER, batch | changes, source_drop_probability=1.0).item()

    assert loss() == loss(source_ids=batch["source_ids"].clamp(max=11))
    torch.manual_seed(0)
    assert loss() != tess_loss(model, SCHEDULER, batch).item()


def test_ar_loss_is_the_mean_over_target_tokens_one_row_at_a_time():
    model, batch = causal(), pairs()
    total, count = 0.0, 0
    for b in range(2):
        source = batch["source_ids"][b][batch["source_mask"][b] == 1]
        target = batch["target_ids"][b][batch["target_mask"][b] == 1]
        ids = torch.cat([source, target])[None]
        logits = model(input_ids=ids).logits[0, len(source) - 1 : -1]
        total += F.cross_entropy(logits, target, reduction="sum").item()
        count += len(target)
    assert ar_loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_ar_loss_without_source_predicts_every_token():
    model, batch = causal(), pairs()
    batch = {name: t for name, t in batch.items() if "source" not in name}
    bos = torch.full((2, 1), BOS)
    with_bos = batch | {"source_ids": bos, "source_mask": torch.ones_like(bos)}
    assert ar_loss(model, batch).item() == pytest.approx(ar_loss(model, with_bos).item(), rel=1e-6)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("after_norm", [True, False])
def test_mtp_loss_is_the_mean_over_depths_and_tokens_one_row_at_a_time(depth, after_norm):
    torch.manual_seed(0)
    options = {"num_nextn_predict_layers": 1, "mtp_after_norm_f": after_norm}
    model = HybridForCausalLM(HybridConfig(**SIZES, **options)).eval()
    with torch.no_grad():  # with weights of one, a norm of what is normalised changes nothing
        model.backbone.norm_f.weight.uniform_(0.2, 2.0)
    batch = pairs()
    # a row whose tokens begin too late for the deeper predictions
    batch["source_ids"][0], batch["source_mask"][0] = 0, 0
    head, mtp, embed = model.lm_head, model.mtp, model.backbone.embeddings
    totals, counts = [0.0] * depth, [0] * depth
    for b in range(2):
        source = batch["source_ids"][b][batch["source_mask"][b] == 1]
        target = batch["target_ids"][b][batch["target_mask"][b] == 1]
        ids = torch.cat([source, target])[None]
        out = model.backbone(ids)
        state = out.last_hidden_state if after_norm else out.pre_norm_state
        for d in range(1, depth + 1):
            n = ids.shape[1] - d
            state = mtp(embed(ids[:, d:]), state[:, :n])
            for t in range(n - 1):  # position t predicts token t + d + 1
                if t + d + 1 >= len(source):
                    logits = head(state[:, t])
                    totals[d - 1] += F.cross_entropy(logits, ids[:, t + d + 1]).item()
                    counts[d - 1] += 1
    want = sum(total / count for total, count in zip(totals, counts)) / depth
    plain = ar_loss(model, batch).item()
    with_mtp = ar_loss(model, batch, mtp_depth=depth, mtp_loss_scale=0.5).item()
    assert with_mtp == pytest.approx(plain + 0.5 * want, rel=1e-5)
    alone = ar_loss(model, batch, mtp_depth=depth, next_token=False).item()
    assert alone == pytest.approx(want, rel=1e-5)


def test_a_text_too_short_for_a_depth_has_no_such_loss():
    model = HybridForCausalLM(HybridConfig(**SIZES, num_nextn_predict_layers=1)).eval()
    ids = torch.tensor([[21, EOS]])
    ones = torch.ones_like(ids)
    batch = {
        "target_ids": ids, "target_mask": ones, "noise_mask": ones, "loss_weights": ones.float(),
    }
    assert ar_loss(model, batch, mtp_depth=3).item() == pytest.approx(
        ar_loss(model, batch, mtp_depth=1).item()
    )
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ValueError, match="mtp_depth 2 needs 4 tokens or more, got 3"):
        model(ids, loss_weights=torch.ones(1, 3), mtp_depth=2)
    with pytest.raises(ValueError, match="mtp_depth needs input_ids and loss_weights"):
        model(ids, mtp_depth=1)
    with pytest.raises(ValueError, match="loss_weights and labels exclude each other"):
        model(ids, loss_weights=torch.ones(1, 3), labels=ids)


def test_a_frozen_model_whose_batch_has_nothing_ahead_still_has_a_graph():
    model = HybridForCausalLM(HybridConfig(**SIZES, num_nextn_predict_layers=1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mtp."))
    ids = torch.tensor([[21, EOS]])
    ones = torch.ones_like(ids)
    model.config.bos_token_id = None
    batch = {
        "target_ids": ids, "target_mask": ones, "noise_mask": ones, "loss_weights": ones.float(),
    }
    loss = ar_loss(model, batch, mtp_depth=2, next_token=False)
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.mtp.parameters())


@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_loss_is_that_of_whole_logits_and_labels(weighted):
    model = HybridForCausalLM(HybridConfig(**SIZES)).double()
    ids, mask = torch.randint(3, V, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    weights = torch.rand(2, 7).double() if weighted else (torch.rand(2, 7) < 0.6).double()
    weights[1, 2:4] = 1.0  # the first is padding; the second would be predicted from padding
    got = model(ids, attention_mask=mask, loss_weights=weights)
    assert got.logits is None
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    weights = weights[:, 1:] * mask[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    want = (losses * weights).sum() / weights.sum()
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-6)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in (got.loss, want)]
    for one, other in zip(*grads):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-12


def test_ar_loss_refuses_infilling_in_place():
    batch = pairs()
    batch["noise_mask"] = torch.zeros_like(batch["target_mask"])
    with pytest.raises(UserError, match="no autoregressive form"):
        ar_loss(causal(), batch)


@pytest.mark.parametrize("objective", ["tess", "ar"])
def test_a_few_pairs_are_learnt(objective):
    batch = pairs()
    model = denoiser() if objective == "tess" else causal()
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = tess_loss(model, SCHEDULER, batch) if objective == "tess" else ar_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.4 * losses[0]
