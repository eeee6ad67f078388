"""The sampler's options as an object and as flags."""

import argparse
import math

import pytest

from tess.decoders.options import SamplerOptions, add_sampler_flags, sampler_options
from tess.errors import UserError
from tess.schedulers.family import SAMPLERS, name_of
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.stopping import StoppingRule
from tess.text.tokenization import train_tokenizer


def parse(*flags: str) -> SamplerOptions:
    parser = argparse.ArgumentParser()
    add_sampler_flags(parser)
    return sampler_options(parser.parse_args(flags))


def test_no_flags_are_the_defaults_and_every_flag_is_its_option():
    assert parse() == SamplerOptions() and parse().changed() == {}
    given = {
        "scheduler": "ddim", "timestep_spacing": "uniform", "lowest_timestep": 0.25,
        "noise": "dense", "eta": 0.5, "guidance_scale": 2.0, "guidance_form": "probabilities",
        "stop_patience": 2, "stop_entropy": 1.5, "confidence_threshold": 0.9, "num_candidates": 3,
        "choose_by": "mbr_chrf", "block_length": 8, "forbid": ["a", "b"], "no_repeat_ngram": 2,
    }
    flags = []
    for name, value in given.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    options = parse(*flags)
    assert options.changed() == given
    assert options.stopping == StoppingRule(2, 1.5)
    assert parse("--stop_patience", "1").stopping == StoppingRule(1, math.inf)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_scheduler_is_made_of_the_checkpoints(name):
    first = RenoisingScheduler(vocab_size=50, simplex_value=2.5, timestep_spacing="uniform")
    made = SamplerOptions(scheduler=name, lowest_timestep=0.25).replace_scheduler(first)
    assert name_of(made) == name and made.config.simplex_value == 2.5
    assert (made.config.timestep_spacing, made.config.lowest_timestep) == ("uniform", 0.25)
    made.set_timesteps(3)
    assert made.timesteps.tolist() == [1.0, 0.75, 0.5]
    assert SamplerOptions().replace_scheduler(first) is first


def test_forbidden_words_are_banned_in_both_spellings():
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 5, 290)
    ((_, ban),) = [
        (type(p).__name__, p.sequence_bias)
        for p in SamplerOptions(forbid=["cat"]).processors(tokenizer)
    ]
    words = [tuple(tokenizer(w, add_special_tokens=False)["input_ids"]) for w in ("cat", " cat")]
    assert set(map(tuple, ban)) == set(words)
    assert SamplerOptions().processors(tokenizer) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scheduler": "magic"}, "scheduler must be one of renoising, ddim, euler, dpm_solver"),
        ({"noise": "loud"}, "noise must be one of"),
        ({"eta": 0.5}, "eta does nothing without scheduler ddim"),
        ({"stop_entropy": 1.0}, "stop_entropy does nothing without stop_patience"),
        ({"guidance_form": "probabilities"}, "guidance_form does nothing without guidance_scale"),
        ({"choose_by": "mbr_bleu"}, "choose_by does nothing without num_candidates"),
    ],
)
def test_options_that_cannot_be_meant(settings, message):
    with pytest.raises(UserError, match=message):
        SamplerOptions(**settings)
