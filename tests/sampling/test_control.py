"""Given, forbidden and certain tokens, apart from any model."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from tess.errors import UserError
from tess.sampling.control import chain, fixed_canvas, pin, template_tokens, token_processors
from tess.schedulers.simplex import SoftTokens
from tess.text.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat while it rained"] * 5, 290)


# ---- processors ----


def test_a_processor_sees_the_tokens_left_of_each_position():
    left_BL = torch.arange(12).view(2, 6)
    seen = {}

    def spy(input_ids, scores):
        for ids, row in zip(input_ids.tolist(), scores[:, 0].tolist()):
            seen[int(row)] = ids
        return scores + 1

    logits_TV = torch.arange(12.0)[:, None].expand(12, 3).clone()
    run = token_processors([spy], left_BL)
    out = torch.cat([run(0, logits_TV[:7].clone()), run(7, logits_TV[7:].clone())])  # two slabs
    assert torch.equal(out, logits_TV + 1)
    for row in range(12):
        assert seen[row] == left_BL[row // 6, : row % 6].tolist()


def test_transformers_processors_do_position_by_position_what_they_do_in_order():
    torch.manual_seed(0)
    left_BL = torch.randint(0, 5, (3, 8))
    logits_TV = torch.randn(24, 5)
    processors = [
        NoRepeatNGramLogitsProcessor(2),
        SequenceBiasLogitsProcessor({(1, 2): float("-inf"), (4,): 1.5}),
        SuppressTokensLogitsProcessor([3]),
    ]
    together = token_processors(processors, left_BL)(0, logits_TV.clone())
    for row in range(24):
        prefix = left_BL[row // 8 : row // 8 + 1, : row % 8]
        alone = LogitsProcessorList(processors)(prefix, logits_TV[row : row + 1].clone())
        assert torch.equal(together[row : row + 1], alone)
    assert not torch.equal(together, logits_TV)


def test_a_chain_runs_in_order_and_is_none_when_empty():
    assert chain(None, None) is None and token_processors([], torch.zeros(1, 1)) is None
    run = chain(lambda start, x: x + start, None, lambda start, x: x * 2)
    assert run(3, torch.tensor([1.0])).tolist() == [8.0]


# ---- certain tokens ----


def test_pinned_tokens_are_certain_in_every_kind_of_prediction():
    torch.manual_seed(1)
    logits = torch.randn(2, 4, 7)
    ids = torch.tensor([[6, 0, 3, 2], [1, 5, 5, 4]])
    where = torch.tensor([[True, False, False, True], [False, True, True, False]])
    chosen = torch.randint(0, 7, (2, 4))
    assert torch.equal(pin(chosen, ids, where), torch.where(where, ids, chosen))

    probs = pin(logits, ids, where).softmax(-1)
    expected = torch.where(
        where[..., None], torch.nn.functional.one_hot(ids, 7).float(), logits.softmax(-1)
    )
    torch.testing.assert_close(probs, expected)

    top = logits.softmax(-1).topk(3)
    soft = pin(SoftTokens(top.indices, top.values), ids, where)
    dense = torch.zeros(2, 4, 7).scatter_(-1, soft.token_ids, soft.probabilities)
    kept = torch.zeros(2, 4, 7).scatter_(-1, top.indices, top.values)
    torch.testing.assert_close(dense, torch.where(where[..., None], expected, kept))
    assert all(len(set(row)) == 3 for row in soft.token_ids.flatten(0, 1).tolist())


# ---- the canvas of given tokens ----


def test_fixed_tokens_make_the_canvas_or_fit_into_it():
    fixed = torch.tensor([[5, -1, 6], [-1, -1, -1]])
    canvas, lengths = fixed_canvas(fixed, None, 2, 10)
    assert torch.equal(canvas, fixed) and lengths == [3, 3]
    canvas, lengths = fixed_canvas(fixed, [5, 2], 2, 10)
    assert canvas.tolist() == [[5, -1, 6, -1, -1], [-1] * 5] and lengths == [5, 2]
    canvas, _ = fixed_canvas(torch.tensor([[5, -1, -1]]), [1], 1, 10)
    assert canvas.tolist() == [[5]]


@pytest.mark.parametrize(
    "fixed, lengths, message",
    [
        (torch.zeros(2, 3), None, r"must be int64 \[2, length\].*float32"),
        (torch.zeros(3, 3, dtype=torch.long), None, r"got torch.int64 \[3, 3\]"),
        (torch.full((2, 3), 10), None, r"ids in 0..9, got 10..10"),
        (torch.full((2, 3), -2), None, r"ids in 0..9, got -2..-2"),
        (torch.zeros(2, 3, dtype=torch.long), [4, 2], "beyond the canvas of at most 4 positions"),
    ],
)
def test_fixed_tokens_that_cannot_be(fixed, lengths, message):
    with pytest.raises(UserError, match=message):
        fixed_canvas(fixed, lengths, 2, 10)


def test_a_template_has_its_text_and_as_many_free_tokens_as_it_says(tokenizer):
    words = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    fixed = template_tokens(tokenizer, "the cat {3} on the mat{2}")
    assert fixed.tolist() == [words("the cat ") + [-1] * 3 + words(" on the mat") + [-1] * 2]
    assert template_tokens(tokenizer, "{1} cat").tolist() == [
        [-1, *words(" cat"), tokenizer.eos_token_id]
    ]
    for template in ("", "the cat", "{x} cat", "{} cat", "{-1} cat", "{3 cat", "{2} a} cat"):
        with pytest.raises(UserError, match="template with blanks such as .5}, five tokens"):
            template_tokens(tokenizer, template)
    for template, message in (("{0} cat", "at least 1, got 0"), ("{9999999}", "at most 1,048,576")):
        with pytest.raises(UserError, match=f"a blank of the template must be {message}"):
            template_tokens(tokenizer, template)
