"""Settings of the denoiser: what excludes what, and how flags reach them."""

import pytest

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.training.diffusion_settings import DiffusionArguments

BACKBONE = {"vocab_size": 40, "hidden_size": 32, "hybrid_override_pattern": "M*-E"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"self_conditioning": "mean"}, "self_conditioning must be one of None, logits, .*'mean'"),
        ({"source_encoding": "both"}, "source_encoding must be one of causal, bidirectional"),
        ({"simplex_value": 0.0}, "simplex_value must be above 0"),
        ({"simplex_value": "big"}, "simplex_value must be a number or \"auto\", got 'big'"),
        ({"self_conditioning": "logits", "self_conditioning_mix": "logits"}, "needs .*embeddings"),
        ({"self_conditioning": None, "deepmind_conditional": True}, "needs self_conditioning"),
        ({"self_conditioning_mlp": True}, "self_conditioning_mlp works with"),
        (
            {"label_shift": True, "source_encoding": "bidirectional"},
            "label_shift .* needs source_encoding 'causal' or 'joint', got 'bidirectional'",
        ),
        ({"label_shift": True, "deepmind_conditional": True}, "excludes deepmind_conditional"),
        (
            {
                "self_conditioning_mix": "logits",
                "self_conditioning_zeros_after_softmax": True,
            },
            "excludes the 'logits' mix",
        ),
        ({"num_target_positions": 8, "max_target_length": 9}, "more than num_target_positions=8"),
        ({"max_source_length": 1}, "max_source_length must be at least 2"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TessConfig(backbone_config=dict(BACKBONE), **settings)


def test_label_shift_is_off_by_default_and_its_flag_reaches_the_config():
    assert not TessConfig(backbone_config=dict(BACKBONE)).label_shift
    assert "label_shift" not in DiffusionArguments().denoiser_overrides()
    for chosen in (True, False):
        fields = DiffusionArguments(label_shift=chosen).denoiser_overrides()
        assert TessConfig(backbone_config=dict(BACKBONE), **fields).label_shift is chosen


@pytest.mark.parametrize("kind", [TessConfig, HybridConfig])
def test_a_field_that_follows_from_others_may_agree_with_them_and_cannot_be_set(kind):
    given = dict(BACKBONE) if kind is HybridConfig else {"backbone_config": dict(BACKBONE)}
    plain = kind(**given)
    derived = ("vocab_size", "hidden_size", "needs_whole_simplex", "initializer_range")
    for name in derived if kind is TessConfig else ("use_return_dict",):
        agreed = kind(**given, **{name: getattr(plain, name)})
        assert agreed.to_dict() == plain.to_dict()
        with pytest.raises(ValueError, match=f"{name} cannot be set: it follows from .* got 'no'"):
            kind(**given, **{name: "no"})
