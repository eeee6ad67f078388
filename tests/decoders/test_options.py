"""The sampler's options as an object and as flags."""

import argparse
import math
import subprocess
import sys

import pytest
from transformers import SuppressTokensLogitsProcessor

from tess.decoders.options import add_sampler_flags, sampler_options
from tess.errors import UserError
from tess.kernels import simplex_embedding
from tess.sampling import candidates, guidance, options
from tess.sampling.options import SamplerOptions
from tess.sampling.request import Request
from tess.schedulers import base
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
        ({"reward_scale": 2.0}, "reward_scale does nothing without reward"),
        ({"guidance_scale": math.inf}, "guidance_scale must be at least 1 .* finite, got inf"),
        ({"guidance_scale": math.nan}, "guidance_scale must be at least 1 .* finite, got nan"),
        ({"guidance_scale": "2"}, "guidance_scale must be at least 1 .* finite, got '2'"),
        ({"no_repeat_ngram": -2}, "no_repeat_ngram must be at least 1, got -2"),
        ({"no_repeat_ngram": 2.5}, "no_repeat_ngram must be an integer, got 2.5"),
        ({"stop_patience": 0}, "stop_patience must be at least 1, got 0"),
        ({"stop_patience": 1, "stop_entropy": math.nan}, "stop_entropy must be at least 0"),
        ({"block_length": True}, "block_length must be an integer, got True"),
        ({"num_candidates": 10**6}, "num_candidates must be at most 65,536, got 1000000"),
        ({"lowest_timestep": 1.0}, "lowest_timestep must be at least 0 and below 1, got 1.0"),
        ({"forbid": [""]}, r"forbid takes words of at least one character, got \[''\]"),
        ({"forbid": "cat"}, "forbid takes words of at least one character, got 'cat'"),
    ],
)
def test_options_that_cannot_be_meant(settings, message):
    with pytest.raises(UserError, match=message):
        SamplerOptions(**settings)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"gen_length": 10**7}, "gen_length must be at most 1,048,576, got 10000000"),
        ({"gen_length": 0}, "gen_length must be at least 1, got 0"),
        ({"gen_length": [3, 2.5]}, "gen_length must be an integer, got 2.5"),
        ({"top_p": math.nan}, "top_p must be a finite number, got nan"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": 0.9, "temperature": math.inf}, "temperature must be a finite number, got inf"),
        ({"temperature": 2.0}, "temperature 2.0 does nothing without top_p"),
    ],
)
def test_requests_that_cannot_be_meant(asked, message):
    with pytest.raises(UserError, match=message):
        Request(**asked)


def test_a_request_is_taken_apart_by_source():
    asked = Request(gen_length=[3, 4, 5], top_p=0.5)
    assert asked.select([2, 0]) == Request(gen_length=[5, 3], top_p=0.5)
    assert Request(gen_length=7).lengths(2) == [7, 7] and Request().lengths(2) is None
    with pytest.raises(UserError, match="gen_length must be one number or 2, got 3"):
        asked.lengths(2)


def test_the_names_that_flags_offer_are_those_that_are_carried_out():
    assert options.SCHEDULERS == tuple(SAMPLERS)
    assert options.SPACINGS == base.SPACINGS and options.NOISES == simplex_embedding.NOISES
    assert candidates.CHOICES is options.CHOICES and not hasattr(guidance, "FORMS")


def test_options_and_their_flags_load_no_library():
    code = (
        "import argparse, sys\n"
        "from tess.decoders.options import add_sampler_flags, sampler_options\n"
        "from tess.sampling.request import Request\n"
        "parser = argparse.ArgumentParser()\n"
        "add_sampler_flags(parser)\n"
        "sampler_options(parser.parse_args(['--scheduler', 'ddim'])), Request(gen_length=3)\n"
        "print({'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


def test_options_are_replaced_by_name_and_a_wrong_name_has_near_ones():
    plain = SamplerOptions(num_candidates=3)
    assert plain.replace({}) is plain
    rule = StoppingRule(2, 1.5)
    changed = plain.replace({"stopping": rule, "guidance_scale": 2.0})
    assert (changed.stopping, changed.num_candidates, changed.guidance_scale) == (rule, 3, 2.0)
    assert changed.replace({"stopping": None}).stopping is None
    for wrong, near in (("num_candidate", "num_candidates"), ("promt", "prompt")):
        with pytest.raises(UserError, match=f"no argument '{wrong}'; did you mean {near}"):
            plain.replace({wrong: 1}, others=["prompt"])
    with pytest.raises(UserError, match="no argument 'xyzzy'; known: "):
        plain.replace({"xyzzy": 1})
    with pytest.raises(UserError, match="stopping must be a StoppingRule, got int"):
        plain.replace({"stopping": 2})


def test_processors_that_were_given_come_after_those_of_words():
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 5, 290)
    own = SuppressTokensLogitsProcessor([7])
    made = SamplerOptions(forbid=["cat"], logits_processor=[own]).processors(tokenizer)
    assert len(made) == 2 and made[1] is own


def test_a_scheduler_that_has_what_is_asked_for_is_kept():
    first = RenoisingScheduler(vocab_size=50, timestep_spacing="uniform")
    assert SamplerOptions(timestep_spacing="uniform").replace_scheduler(first) is first
    assert SamplerOptions(scheduler="renoising").replace_scheduler(first) is first
    other = SamplerOptions(timestep_spacing="recoverability").replace_scheduler(first)
    assert other is not first and other.config.timestep_spacing == "recoverability"
