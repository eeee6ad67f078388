"""The schedulers as a family: shared configs, folders and presets; mistakes are one sentence."""

import inspect
import itertools
import json
import logging

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import tess
from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.schedulers.base import SimplexScheduler
from tess.schedulers.ddim import SimplexDDIMScheduler
from tess.schedulers.dpm_solver import SimplexDPMSolverScheduler
from tess.schedulers.euler import SimplexEulerScheduler
from tess.schedulers.presets import SCHEDULER_PRESETS
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import DenseSimplex, SoftTokens
from tess.storage.parts import Parts, load_parts, save_parts
from tess.text.tokenization import train_tokenizer

K, V = 2.0, 5
KEYS = torch.tensor([11, -7, 2**40])
SOFT = (SimplexDDIMScheduler, SimplexEulerScheduler, SimplexDPMSolverScheduler)
EVERY = (RenoisingScheduler, *SOFT)


def dense(kind, vocab_size: int = V, **settings):
    """With a small simplex whose values can be looked at."""
    given = {"vocab_size": vocab_size, "simplex_value": K, "noise": "dense"}
    return kind(**given | settings)


def soft_tokens(logits: Tensor, num: int) -> SoftTokens:
    top = logits.softmax(-1).topk(num, dim=-1)
    return SoftTokens(top.indices, top.values)


@pytest.mark.parametrize("kind, other", list(itertools.product(EVERY, EVERY)))
def test_any_config_makes_any_scheduler(kind, other, caplog, tmp_path):
    own = {
        SimplexDDIMScheduler: {"eta": 0.5},
        SimplexEulerScheduler: {"stochastic_sampling": True},
        SimplexDPMSolverScheduler: {"solver_order": 1},
        RenoisingScheduler: {},
    }[kind]
    shared = {"beta_schedule": "sigmoid", "timestep_spacing": "uniform", "num_top": 9}
    one = dense(kind, **own, **shared)
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        two = other.from_config(one.config)
        one.save_pretrained(tmp_path)
        read = other.from_pretrained(tmp_path)
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records  # nothing was "not expected"
    for made in (two, read):
        assert type(made) is other
        for name, value in {
            "simplex_value": K,
            "vocab_size": V,
            "noise": "dense",
            **shared,
        }.items():
            assert made.config[name] == value
        back = kind.from_config(made.config)
        assert all(back.config[name] == value for name, value in own.items())
    read.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert kept["_class_name"] == other.__name__
    assert other.from_config(one.config, num_top=4).config.num_top == 4
    assert set(one.compatibles) == set(EVERY)


def test_names_on_disk_are_pinned_and_found():
    assert {kind.__name__: kind.__module__ for kind in EVERY} == {
        "RenoisingScheduler": "tess.schedulers.renoising",
        "SimplexDDIMScheduler": "tess.schedulers.ddim",
        "SimplexDPMSolverScheduler": "tess.schedulers.dpm_solver",
        "SimplexEulerScheduler": "tess.schedulers.euler",
    }
    assert [getattr(tess, kind.__name__) for kind in EVERY] == list(EVERY)


class Holder(DiffusionPipeline):
    """A pipeline of nothing but a scheduler."""

    def __init__(self, scheduler: SimplexScheduler) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)


@pytest.mark.parametrize("kind", EVERY)
def test_a_pipeline_folder_brings_its_scheduler_back(kind, tmp_path):
    """diffusers looks for `SchedulerMixin` by name in the module of the scheduler."""
    Holder(dense(kind)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == [kind.__module__, kind.__name__]
    loaded = Holder.from_pretrained(tmp_path).scheduler
    assert type(loaded) is kind and loaded.config.simplex_value == K


def test_a_checkpoint_may_name_any_of_them(tmp_path):
    tokenizer = train_tokenizer(["a cat sat", "the dog ran"] * 3, 270)
    sizes = {
        "hybrid_override_pattern": "*", "hidden_size": 16, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer),
    }
    denoiser = TessDenoiser(TessConfig(backbone_config=HybridConfig(**sizes)))
    for kind in EVERY:
        scheduler = kind(vocab_size=len(tokenizer), num_train_timesteps=77)
        save_parts(Parts(denoiser, tokenizer, scheduler), tmp_path / kind.__name__)
        loaded = load_parts(tmp_path / kind.__name__).scheduler
        assert type(loaded) is kind and loaded.config.num_train_timesteps == 77


@pytest.mark.parametrize("kind", EVERY)
def test_presets_and_spacings_serve_all(kind):
    for preset in SCHEDULER_PRESETS.values():
        scheduler = kind(vocab_size=500, **preset)
        want = RenoisingScheduler(vocab_size=500, **preset)
        for made in (scheduler, want):
            made.set_timesteps(7)
        assert torch.equal(scheduler.timesteps, want.timesteps)
        assert scheduler.order == 1 and len(scheduler) == 5000
    uniforms = torch.linspace(0.01, 1, 100)
    assert torch.equal(scheduler.training_timesteps(uniforms), want.training_timesteps(uniforms))
    ids = torch.tensor([[3, 1, 0]])
    noised = (made.add_noise(ids, torch.tensor([0.4]), keys=KEYS[:1]) for made in (scheduler, want))
    assert torch.equal(*(simplex.embedding(torch.eye(500)) for simplex in noised))


# --- mistakes ---


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (SimplexDDIMScheduler, {"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        (SimplexDDIMScheduler, {"eta": -0.1}, r"eta must be in \[0, 1\], got -0.1"),
        (
            SimplexDDIMScheduler,
            {"eta": 0.5, "noise": "order_statistics"},
            'take noise="dense" or eta=0, got eta=0.5',
        ),
        (SimplexDPMSolverScheduler, {"solver_order": 3}, "solver_order must be 1 or 2, got 3"),
        *((kind, {"num_soft_tokens": 0}, "num_soft_tokens must be at least 1") for kind in SOFT),
        *((kind, {"num_soft_tokens": 2.5}, "must be an integer, got 2.5") for kind in SOFT),
        *(
            (kind, {"prediction_type": "noise"}, "must be one of logits, sample, got 'noise'")
            for kind in SOFT
        ),
        *(
            (
                kind,
                {"prediction_type": "sample", "noise": "order_statistics"},
                'take noise="dense" with it, got noise=.order_statistics.',
            )
            for kind in SOFT
        ),
        *((kind, {"timestep_spacing": "even"}, "timestep_spacing must be one of") for kind in SOFT),
        *((kind, {"vocab_size": 1}, "needs vocab_size, .* got 1") for kind in SOFT),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        dense(kind, **settings)


@pytest.mark.parametrize("kind", EVERY)
def test_a_setting_of_another_type_is_named_with_what_was_expected(kind):
    said = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    settings = inspect.signature(kind.__init__).parameters
    for name in settings.keys() - {"self", "vocab_size", "simplex_value"}:
        expected = said[settings[name].annotation]
        for wrong in ([1], None, 7 if expected == "a string" else "7"):
            with pytest.raises(ValueError, match=f"^{name} must be {expected}, got") as error:
                kind(**{"vocab_size": 50, name: wrong})
            assert repr(wrong) in str(error.value)
    with pytest.raises(ValueError, match="num_top must be an integer, got True"):
        kind(vocab_size=50, num_top=True)
    with pytest.raises(ValueError, match="vocab_size must be an integer or null, got '50'"):
        kind(vocab_size="50")


@pytest.mark.parametrize("kind", SOFT)
def test_what_cannot_be_stepped_is_one_sentence(kind):
    scheduler, logits = dense(kind), torch.randn(3, 4, V)
    sample = scheduler.initial((3, 4), KEYS)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(logits, 1.0, sample)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not one of the 4 timesteps"):
        scheduler.step(logits, 0.123, sample)
    for output, came in (
        (logits[:, :3], r"torch.float32 \[3, 3, 5\]"),
        (logits.argmax(-1), r"torch.int64 \[3, 4\]"),
        (soft_tokens(logits, 2), "SoftTokens"),
    ):
        with pytest.raises(ValueError, match=rf"must be logits \[3, 4, 5\] as .*, got {came}"):
            scheduler.step(output, 1.0, sample)
    carried = kind(vocab_size=V, simplex_value=K).initial((3, 4), KEYS)
    with pytest.raises(ValueError, match="takes SoftTokens as the model's output, got a Tensor"):
        scheduler.step(logits, 1.0, carried)
    noised = RenoisingScheduler(vocab_size=V).initial((3, 4), KEYS)
    with pytest.raises(ValueError, match="must be what `initial` gives.*, got a NoisedSimplex"):
        scheduler.step(logits, 1.0, noised)


def test_what_a_sample_lacks_is_said():
    eta = dense(SimplexDDIMScheduler, eta=0.5)
    eta.set_timesteps(4)
    carried = SimplexDDIMScheduler(vocab_size=V, simplex_value=K).initial((3, 4), KEYS)
    with pytest.raises(ValueError, match='take noise="dense" or eta=0, got eta=0.5'):
        eta.step(soft_tokens(torch.randn(3, 4, V), 2), 1.0, carried)
    solver = dense(SimplexDPMSolverScheduler)
    solver.set_timesteps(4)
    values = torch.randn(3, 4, V)
    with pytest.raises(ValueError, match=r"pass DenseSimplex\(tensor\), or take solver_order=1"):
        solver.step(values, 1.0, values)
    with pytest.raises(ValueError, match="follow from the keys, and this simplex has none"):
        DenseSimplex(values).uniforms()
    with pytest.raises(ValueError, match="give the simplex its simplex_value"):
        DenseSimplex(values).renoised(0.5, [])
    renoising = RenoisingScheduler(vocab_size=V)
    renoising.set_timesteps(4)
    with pytest.raises(ValueError, match="takes a NoisedSimplex or a tensor, got a DenseSimplex"):
        renoising.step(values.argmax(-1), 1.0, DenseSimplex(values))
