"""An update is one mean over all its rows, however they lie in micro-batches."""

import copy

import pytest
import torch

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.schedulers.density import LearnedDensity
from tess.schedulers.renoising import RenoisingScheduler
from tess.training.losses import ar_loss, tess_loss
from tess.training.update import Update

BOS, EOS, V, ROWS = 1, 2, 40, 8
SIZES = {
    "vocab_size": V, "hybrid_override_pattern": "M*E-", "hidden_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
    "chunk_size": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "tie_word_embeddings": True, "pad_token_id": 0,
    "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.1,
}
SCHEDULER = RenoisingScheduler(vocab_size=V)
TESS = {
    "source_drop_probability": 0.4, "self_conditioning_probability": 0.5,
    "unroll_probability": 0.5, "unroll_steps": 2,
}


def rows():
    """Rows of unlike lengths; some canvases go on over pads of weight 0.1, two texts are cut."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(3, V, (ROWS, 6), generator=generator)
    target = torch.randint(3, V, (ROWS, 9), generator=generator)
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    weights = torch.ones(target.shape)
    for i in range(ROWS):
        source_mask[i, : i % 3] = 0
        end = i + 1
        target[i, end:], weights[i, end:] = 0, 0.1
        target_mask[i, end + i % 3 :], weights[i, end + i % 3 :] = 0, 0.0
        if i % 4:
            target[i, i] = EOS
    return {
        "source_ids": source * source_mask, "source_mask": source_mask, "target_ids": target,
        "target_mask": target_mask, "noise_mask": target_mask.clone(), "loss_weights": weights,
    }


def causal():
    model = HybridForCausalLM(HybridConfig(**SIZES, num_nextn_predict_layers=1))
    return model, lambda model, batch, update: ar_loss(model, batch, update, mtp_depth=2)


def denoiser(**changes):
    backbone = HybridConfig(**SIZES, mamba_direction="bidirectional")
    config = TessConfig(backbone_config=backbone, max_target_length=16, **changes)
    losses = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    density = LearnedDensity(losses, decay=0.5)

    def loss(model, batch, update):
        return tess_loss(model, SCHEDULER, batch, update, density=density, **TESS)

    loss.density = density
    return TessDenoiser(config), loss


MODELS = {
    "ar": causal,
    "tess": denoiser,
    "tess with a length head": lambda: denoiser(source_encoding="causal", length_head=True),
    "tess joint": lambda: denoiser(source_encoding="joint"),
}


def parts_of(batch, sizes):
    return [
        dict(zip(batch, part, strict=True))
        for part in zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True)
    ]


def gradients(make, sizes, seed=3):
    """The loss and the gradients of one update in micro-batches of so many rows."""
    torch.manual_seed(0)
    model, loss_of = make()
    model.train()
    update, loss = Update(parts_of(rows(), sizes)), 0.0
    torch.manual_seed(seed)
    for turn in range(len(sizes)):
        part = loss_of(model, update.begin(turn), update)
        part.backward()
        loss += part.item()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return loss, torch.cat([g.flatten() for g in grads]), loss_of, torch.rand(())


@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [3, 3, 2]], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_of_any_size_give_the_update_of_the_whole_batch(name, sizes, seed):
    loss, grads, whole_of, after = gradients(MODELS[name], [ROWS], seed)
    split_loss, split_grads, split_of, split_after = gradients(MODELS[name], sizes, seed)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert (split_grads - grads).norm() < 1e-4 * grads.norm()
    assert torch.equal(after, split_after)  # and the next update draws the same
    if name != "ar":
        torch.testing.assert_close(whole_of.density.losses, split_of.density.losses)


def test_a_mean_of_means_is_another_update(monkeypatch):
    _, grads, *_ = gradients(causal, [ROWS])
    monkeypatch.setattr(Update, "mean_shares", lambda self, weights: torch.full((3,), 1 / 8))
    _, wrong, *_ = gradients(causal, [1] * 8)
    assert (wrong - grads).norm() > 0.1 * grads.norm()


def test_an_evaluation_is_the_mean_of_both_passes_and_throws_no_coin():
    torch.manual_seed(0)
    model, _ = denoiser()
    model.eval()

    def loss(probability, sizes=(ROWS,)):
        update = Update(parts_of(rows(), list(sizes)))
        torch.manual_seed(5)
        parts = [
            tess_loss(
                model, SCHEDULER, update.begin(turn), update,
                self_conditioning_probability=probability,
            )
            for turn in range(len(sizes))
        ]
        return sum(parts).item()

    ends = loss(0.0), loss(1.0)
    assert ends[0] != ends[1]
    assert loss(0.25) == pytest.approx(0.75 * ends[0] + 0.25 * ends[1], rel=1e-5)
    assert loss(0.25, [3, 5]) == pytest.approx(loss(0.25), rel=1e-5)


def test_micro_batches_see_the_same_coins_and_each_its_own_numbers():
    batch = rows()
    update = Update(parts_of(batch, [3, 5]))
    whole = Update([copy.copy(batch)])
    torch.manual_seed(0)
    want = torch.rand(whole.total)[whole.own], torch.rand(())
    torch.manual_seed(0)
    got = []
    for turn in range(2):
        update.begin(turn)
        got.append((torch.rand(update.total)[update.own], torch.rand(())))
    assert torch.equal(torch.cat([own for own, _ in got]), want[0])
    assert all(torch.equal(coin, want[1]) for _, coin in got)
