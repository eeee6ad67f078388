"""Step-unrolled training: what the earlier passes see, what they hand on, and what they leave."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.renoising import RenoisingScheduler
from tess.training.flags import parse_settings
from tess.training.losses import _later_times, sample_uniforms, tess_loss
from tess.training.start import make_loss
from tess.training.update import Update

BOS, EOS, V = 1, 2, 40
SIZES = {
    "vocab_size": V, "hybrid_override_pattern": "M*", "hidden_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16,
    "ssm_state_size": 4, "mamba_num_heads": 2, "mamba_head_dim": 16, "n_groups": 1,
    "chunk_size": 8, "tie_word_embeddings": True, "initializer_range": 0.3,
}
SCHEDULER = RenoisingScheduler(vocab_size=V)


class Recorder(nn.Module):
    """A wrapper as those of distributed training, which notes every pass."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.module = TessDenoiser(TessConfig(backbone_config=HybridConfig(**SIZES), **settings))
        self.passes = []

    def forward(self, **inputs):
        out = self.module(**inputs)
        self.passes.append(
            SimpleNamespace(
                **inputs, learns=torch.is_grad_enabled(), hidden=out.last_hidden_state.detach()
            )
        )
        return out


def pairs():
    """Sources of 3 and 5 tokens, targets of 6 and 4."""
    source = torch.tensor([[0, 0, BOS, 11, EOS], [BOS, 12, 13, 14, EOS]])
    target = torch.tensor([[21, 22, 23, 24, 25, EOS], [31, 32, 33, EOS, 0, 0]])
    mask = (target != 0).long()
    return {
        "source_ids": source, "source_mask": (source != 0).long(), "target_ids": target,
        "target_mask": mask, "noise_mask": mask, "loss_weights": mask.float(),
    }


def run(model, batch=None, seed=3, **options):
    """The loss of a batch that has a first pass, and the passes."""
    model.passes.clear()
    torch.manual_seed(seed)
    options = {"self_conditioning_probability": 1.0, "unroll_probability": 1.0} | options
    loss = tess_loss(model, SCHEDULER, pairs() if batch is None else batch, **options)
    return loss, list(model.passes)


def unrolled(model, batch=None, steps=3):
    """Loss and passes of a seed with which all of 3 steps are taken."""
    for seed in range(50):
        loss, passes = run(model, batch, seed=seed, unroll_steps=steps)
        if len(passes) == steps + 1:
            return loss, passes
    raise AssertionError(f"none of 50 batches had {steps} steps")


def test_with_probability_0_losses_and_random_numbers_are_those_of_plain_self_conditioning():
    """The loss written out again, bit for bit, draw for draw."""
    model, batch = Recorder(), pairs()
    for given in ({}, {"unroll_probability": 0.0}, {"unroll_probability": 0.0, "unroll_steps": 5}):
        torch.manual_seed(3)
        loss = tess_loss(model, SCHEDULER, batch, self_conditioning_probability=1.0, **given)
        state = torch.random.get_rng_state()

        torch.manual_seed(3)
        times_B = SCHEDULER.training_timesteps(sample_uniforms(2))
        keys_B = torch.randint(2**63 - 1, (2,))
        torch.rand(())
        assert torch.equal(state, torch.random.get_rng_state())
        core = model.module
        inputs = {
            "sample": SCHEDULER.add_noise(batch["target_ids"], times_B, keys=keys_B),
            "timesteps": times_B, "target_mask": batch["target_mask"],
            "source_ids": batch["source_ids"], "source_mask": batch["source_mask"],
            "cache": core.encode_source(batch["source_ids"], batch["source_mask"]),
        }
        with torch.no_grad():
            previous = core.predict(core(**inputs).last_hidden_state)
        plain = core(
            **inputs, previous=previous, labels=batch["target_ids"],
            loss_weights=batch["loss_weights"],
        ).loss
        assert torch.equal(loss, plain)


@pytest.mark.parametrize("encoding", ["causal", "joint"])
def test_each_pass_gets_the_noised_prediction_of_the_one_before_and_that_prediction(encoding):
    model, target = Recorder(source_encoding=encoding), pairs()["target_ids"]
    _, passes = unrolled(model)
    assert torch.equal(passes[0].sample.token_ids, target) and passes[0].previous is None
    for before, after in zip(passes, passes[1:]):
        predicted = model.module.predict(before.hidden)
        assert torch.equal(after.sample.token_ids, predicted.token_ids)
        assert torch.equal(after.previous.token_ids, predicted.token_ids)
        torch.testing.assert_close(after.previous.embedding, predicted.embedding)
        assert not torch.equal(after.sample.token_ids, target)  # so that the above says something
    assert torch.equal(passes[-1].labels, target)  # what is to be learnt stays the truth


def test_noise_is_that_of_each_pass_time_and_drawn_anew():
    _, passes = unrolled(Recorder())
    for one in passes:
        again = SCHEDULER.add_noise(one.sample.token_ids, one.timesteps, keys=one.sample.keys)
        assert torch.equal(one.sample.signal_scale, again.signal_scale)
        assert torch.equal(one.sample.noise_scale, again.noise_scale)
    assert len({key for one in passes for key in one.sample.keys.tolist()}) == 2 * len(passes)


def test_earlier_passes_are_at_later_times_that_fall_to_the_batch_s_own():
    model = Recorder()
    for seed in range(8):
        _, passes = run(model, seed=seed, unroll_steps=4)
        times = torch.stack([one.timesteps for one in passes])
        assert (times[:-1] > times[1:]).all() and (times <= 1).all()
        _, plain = run(model, seed=seed, unroll_probability=0.0)
        # the batch's own time and noise are those that it would have had
        assert torch.equal(plain[-1].timesteps, times[-1])
        assert torch.equal(plain[-1].sample.keys, passes[-1].sample.keys)


@pytest.mark.parametrize("steps", [1, 3])
def test_later_times_are_uniform_on_what_is_left(steps):
    torch.manual_seed(0)
    own_B = torch.tensor([0.0, 0.4, 0.9]).repeat(1000)
    update = Update([{"target_ids": own_B}])
    later = torch.stack(_later_times(update, own_B, steps))
    assert later.shape == (steps, 3000) and (later[:-1] > later[1:]).all()
    found = ((later - own_B) / (1 - own_B)).flatten().sort().values
    even = (torch.arange(len(found)) + 0.5) / len(found)
    assert (found - even).abs().max() < 0.03  # Kolmogorov-Smirnov
    assert (found.square() - even).abs().max() > 0.1


def test_steps_are_evenly_likely_and_batches_are_drawn():
    """90 batches, half of them with a first pass that is plain, half with 1 to 3 steps."""
    model, counts = Recorder(), Counter()
    for seed in range(90):
        _, passes = run(model, seed=seed, unroll_probability=0.5, unroll_steps=3)
        plain = torch.equal(passes[0].timesteps, passes[-1].timesteps)
        counts["plain" if plain else len(passes) - 1] += 1
    assert counts.keys() == {"plain", 1, 2, 3}
    assert 30 <= counts["plain"] <= 60
    assert all(5 <= counts[steps] <= 27 for steps in (1, 2, 3))  # 15, deviation 3.5


def test_a_batch_without_a_first_pass_is_not_unrolled():
    _, passes = run(Recorder(), self_conditioning_probability=0.0)
    assert len(passes) == 1 and torch.equal(passes[0].sample.token_ids, pairs()["target_ids"])


def test_no_gradient_flows_through_the_earlier_passes():
    model = Recorder()
    loss, passes = unrolled(model)
    assert [one.learns for one in passes] == [False] * 3 + [True]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.module.named_parameters()}
    assert any(gradient.abs().max() > 0 for gradient in found.values())

    # the last pass alone, all that came before as constants
    model.zero_grad()
    core, last, batch = model.module, passes[-1], pairs()
    constant = replace(last.previous, embedding=last.previous.embedding.detach())
    core(
        sample=last.sample, timesteps=last.timesteps, previous=constant,
        target_mask=last.target_mask, source_ids=last.source_ids, source_mask=last.source_mask,
        cache=core.encode_source(last.source_ids, last.source_mask),
        labels=batch["target_ids"], loss_weights=batch["loss_weights"],
    ).loss.backward()
    for name, parameter in core.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


@pytest.mark.parametrize("deepmind", [False, True])
def test_in_place_infilling_keeps_its_clean_tokens_in_every_pass(deepmind):
    model, batch = Recorder(deepmind_conditional=deepmind), pairs()
    batch["noise_mask"] = batch["target_mask"].clone()
    batch["noise_mask"][0, :3] = 0
    batch["loss_weights"] = batch["noise_mask"].float()
    loss, passes = unrolled(model, batch)
    for one in passes:
        assert torch.equal(one.clean_ids, batch["target_ids"])
        assert torch.equal(one.noise_mask, batch["noise_mask"])

    # what was predicted there, and what noise it got, reach nothing
    last = passes[-1]
    clean_BL = batch["noise_mask"] == 0
    assert not torch.equal(last.sample.token_ids[clean_BL], batch["target_ids"][clean_BL])
    given = {name: value for name, value in vars(last).items() if name not in ("learns", "hidden")}

    def loss_with(ids, where_BL):
        sample = replace(last.sample, token_ids=last.sample.token_ids.masked_fill(where_BL, ids))
        return model.module(**given | {"sample": sample}).loss

    where_BL = clean_BL & (batch["target_mask"] == 1)
    assert torch.equal(loss_with(7, where_BL), loss)
    assert not torch.equal(loss_with(7, ~where_BL), loss)


def settings(tmp_path, *flags):
    return parse_settings(
        ["--train_file", "my.jsonl", "--train_tokenizer", "--output_dir", str(tmp_path), *flags]
    )


def test_flags_reach_the_loss(tmp_path):
    model = Recorder().train()
    given = settings(
        tmp_path, "--unroll_probability", "1", "--unroll_steps", "3",
        "--self_conditioning_probability", "1",
    )
    loss = make_loss(given, SimpleNamespace(scheduler=SCHEDULER))
    lengths = set()
    for seed in range(20):
        model.passes.clear()
        torch.manual_seed(seed)
        loss(model, pairs())
        assert not torch.equal(model.passes[-1].sample.token_ids, pairs()["target_ids"])
        lengths.add(len(model.passes))
    assert lengths == {2, 3, 4}


def test_without_flags_nothing_is_unrolled(tmp_path):
    diffusion = settings(tmp_path).diffusion
    assert (diffusion.unroll_probability, diffusion.unroll_steps) == (0.0, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--unroll_probability", "1.5"), "unroll_probability must be between 0 and 1, got 1.5"),
        (("--unroll_probability", "-0.1"), "unroll_probability must be between 0 and 1, got -0.1"),
        (("--unroll_steps", "0"), "unroll_steps must be at least 1, got 0"),
        (("--unroll_steps", "2"), "--unroll_steps does nothing without --unroll_probability"),
        (
            ("--unroll_probability", "1", "--self_conditioning_probability", "0"),
            "without self-conditioning there are none",
        ),
    ],
)
def test_flags_out_of_range_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        settings(tmp_path, *flags)
