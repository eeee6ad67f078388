"""When a text is done: the rule itself, against a plain loop over one example."""

import math

import pytest
import torch

from tess.schedulers.stopping import StoppingRule, text_mask

EOS = 9


def stops_at(rule, tokens_by_step, entropies_by_step):
    """The first step after which the rule calls one example done, by its definition."""
    texts = []
    for step, (tokens, entropies) in enumerate(zip(tokens_by_step, entropies_by_step)):
        end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        texts.append(tokens[:end])
        before = texts[-rule.patience - 1 : -1]
        stable = len(before) == rule.patience and all(text == texts[-1] for text in before)
        if stable and sum(entropies[:end]) / end <= rule.max_entropy:
            return step
    return None


def run(rule, token_ids_SBL, entropies_SBL):
    state, first = rule.start(), [None] * token_ids_SBL.shape[1]
    for step, (token_ids, entropies) in enumerate(zip(token_ids_SBL, entropies_SBL)):
        mask = text_mask(token_ids, torch.ones_like(token_ids), EOS)
        state, done = state.update(token_ids, entropies, mask)
        for row in done.nonzero()[:, 0].tolist():
            first[row] = step if first[row] is None else first[row]
    return first


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("bound", [0.3, 0.5, math.inf])
def test_the_rule_is_its_definition(patience, bound):
    generator = torch.Generator().manual_seed(patience)
    tokens = torch.randint(0, 10, (1, 40, 6), generator=generator).repeat(12, 1, 1)
    for step in range(1, 12):  # now and then one token changes, and stays so
        changed = torch.rand(40, 6, generator=generator) < 0.06
        fresh = torch.randint(0, 10, (40, 6), generator=generator)
        tokens[step] = torch.where(changed, fresh, tokens[step - 1])
    entropies = torch.rand(12, 40, 6, generator=generator)
    rule = StoppingRule(patience, bound)
    expected = [
        stops_at(rule, tokens[:, row].tolist(), entropies[:, row].tolist()) for row in range(40)
    ]
    assert run(rule, tokens, entropies) == expected
    assert len(set(expected)) > 2


def test_what_follows_the_end_does_not_count():
    steps = torch.tensor([[[1, EOS, 3]], [[1, EOS, 4]], [[1, EOS, 5]]])
    sure = torch.tensor([0.0, 0.0, 50.0]).expand(3, 1, 3)
    assert run(StoppingRule(2, 0.1), steps, sure) == [2]
    moved = torch.tensor([[[1, 3, EOS]], [[1, EOS, 4]], [[1, EOS, 5]]])
    assert run(StoppingRule(2, 0.1), moved, sure) == [None]


def test_selected_rows_go_on_as_before():
    rule = StoppingRule(2, 1.0)
    tokens, zeros = torch.arange(12).view(3, 4), torch.zeros(3, 4)
    mask = torch.ones_like(tokens)
    state, _ = rule.start().update(tokens, zeros, mask)
    state, done = state.update(tokens, zeros, mask)
    assert not done.any()
    rows = torch.tensor([2, 0])
    _, done = state.select(rows).update(tokens[rows], zeros[rows], mask[rows])
    assert done.all()
    assert rule.start().select(rows).text_ids is None


def test_the_text_ends_with_its_first_end():
    ids = torch.tensor([[1, EOS, EOS, 2], [1, 2, 3, EOS], [EOS, 1, 1, 1]])
    canvas = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert text_mask(ids, canvas, EOS).tolist() == [
        [True, True, False, False], [True, True, False, False], [True, False, False, False]
    ]
    assert text_mask(ids, canvas, None).tolist() == canvas.bool().tolist()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"patience": 1.5}, "patience must be an integer of at least 1, got 1.5"),
        ({"max_entropy": -1}, "max_entropy must be at least 0, got -1"),
        ({"max_entropy": math.nan}, "max_entropy must be at least 0, got nan"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        StoppingRule(**settings)
