"""The choice among candidates, against brute force and figures worked out by hand."""

import itertools
import random

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.errors import UserError
from tess.sampling.candidates import (
    CHOICES,
    ar_log_probs,
    choose,
    choose_by_confidence,
    choose_by_mbr,
)
from tess.text.padding import pad_left, right_mask
from tess.training.losses import ar_loss

TEXTS = [
    "a dog slept by the door",
    "the cat sat on a mat and slept",
    "the cat sat on the mat",
    "",
    "the cat was on the mat today",
    "Rain fell.",
]
SOURCES = [[1, 9, 4, 7, 2], [1, 2], [1, 9, 4, 7, 2], [1, 30, 31, 32, 33, 34, 35, 2]]
TARGETS = [[5, 6, 7, 2], [2], [8, 8, 9, 3, 12, 2], [14]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    config = HybridConfig(
        vocab_size=40, hidden_size=32, hybrid_override_pattern="M*E-", num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, ssm_state_size=8,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=4, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
        initializer_range=0.4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    return HybridForCausalLM(config).eval().double()


# ---- minimum Bayes risk ----


@pytest.mark.parametrize(
    "utility, metric", [("bleu", BLEU(effective_order=True)), ("chrf", CHRF())]
)
def test_mbr_is_the_candidate_of_the_highest_mean_utility(utility, metric):
    chosen = set()
    for texts in itertools.combinations([text for text in TEXTS if text], 4):
        means = [
            sum(
                metric.sentence_score(text, [other]).score
                for j, other in enumerate(texts)
                if j != i
            )
            / 3
            for i, text in enumerate(texts)
        ]
        chosen.add(choose_by_mbr(texts, utility))
        assert means[choose_by_mbr(texts, utility)] == pytest.approx(max(means))
    assert len(chosen) > 1


@pytest.mark.parametrize("utility", ["bleu", "chrf"])
def test_mbr_takes_the_same_text_in_any_order(utility):
    best = TEXTS[choose_by_mbr(TEXTS, utility)]
    for order in itertools.islice(itertools.permutations(TEXTS), 0, None, 17):
        assert order[choose_by_mbr(order, utility)] == best


@pytest.mark.parametrize("utility", ["bleu", "chrf"])
def test_mbr_by_hand(utility):
    def take(*texts):
        return choose_by_mbr(texts, utility)

    assert take("x y z w", "a b c d", "a b c d") == 1  # the two that agree; the first of equals
    assert take("a b c d", "a b c d", "x y z w") == 0
    assert take("a b c d w x", "z q e f g h", "a b c d e f g h") == 2  # agrees with both
    assert take("q r s", "a b c", "x y z") == 0  # no two share a thing
    assert take("one") == take("") == take("", " ") == 0
    assert take("", "", "a word") == 2  # empty texts agree about nothing
    assert take("", "x y z w", "a b c d e", "a b c d") in (2, 3)


@pytest.mark.parametrize("utility", ["bleu", "chrf"])
def test_mbr_takes_the_first_of_equal_texts(utility):
    rng = random.Random(0)
    for _ in range(60):
        texts = [" ".join(rng.choices("a cat sat on the mat".split(), k=6)) for _ in range(5)]
        texts = rng.sample(texts * 2, 10)
        place = choose_by_mbr(texts, utility)
        assert place == texts.index(texts[place])


def test_mbr_utilities_do_not_always_agree():
    texts = ["walking dogs barked", "walked dog barks", "a dog barked", "a walked dog"]
    assert choose_by_mbr(texts, "bleu") != choose_by_mbr(texts, "chrf")


# ---- confidence ----


def test_confidence_takes_the_highest_and_the_first_among_equals():
    assert choose_by_confidence([-2.0, -0.5, -0.5, -1.0]) == 1
    assert choose_by_confidence([float("-inf"), float("-inf")]) == 0
    assert choose_by_confidence([float("-inf"), -90.0]) == 1


# ---- a causal model ----


@torch.no_grad()
def plain(model, source, target):
    """Mean and total log-probability from the logits of source and target as one text."""
    logits = model(torch.tensor([source + target])).logits[0]
    rows = logits.log_softmax(-1)[len(source) - 1 : -1]
    total = rows.gather(1, torch.tensor(target)[:, None]).sum()
    return float(total / len(target)), float(total)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_ar_log_probs_are_those_of_the_logits_in_any_batch(model, batch_size):
    got = ar_log_probs(model, SOURCES, TARGETS, batch_size)
    for place, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        mean, total = plain(model, source, target)
        assert float(got.mean[place]) == pytest.approx(mean, abs=1e-5)
        assert float(got.total[place]) == pytest.approx(total, abs=1e-5)


def test_ar_log_probs_are_minus_the_training_loss(model):
    source = pad_left(SOURCES, 0)
    mask = right_mask([len(row) for row in TARGETS])
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in TARGETS for token in row])
    batch = {
        **source, "target_ids": ids, "target_mask": mask, "noise_mask": mask,
        "loss_weights": mask.float(),
    }
    with torch.no_grad():
        loss = ar_loss(model, batch)
    total = ar_log_probs(model, SOURCES, TARGETS).total.sum()
    assert float(-total / mask.sum()) == pytest.approx(float(loss), abs=1e-5)


def test_a_source_of_several_candidates_is_read_once(model, monkeypatch):
    read = []
    forward = model.backbone.forward

    def counted(input_ids, **options):
        read.append(tuple(input_ids.shape))
        return forward(input_ids, **options)

    monkeypatch.setattr(model.backbone, "forward", counted)
    ar_log_probs(model, [SOURCES[0]] * 4, [[5, 6, 2], [7, 2], [2], [8, 9, 2]])
    assert read == [(1, 5), (4, 2)]


def test_no_targets_have_no_log_probs(model):
    assert ar_log_probs(model, [], []).mean.shape == (0,)


# ---- all of them ----


@pytest.mark.parametrize("choose_by", CHOICES)
def test_choices_differ_between_sources_and_follow_a_permutation(model, choose_by):
    generator = torch.Generator().manual_seed(0)
    words = "the cat sat on a mat while it fell".split()
    count, each = 8, 4
    ids = torch.randint(3, 9, (count, each, 5), generator=generator)
    texts = [[" ".join(words[i] for i in row) for row in rows] for rows in ids.tolist()]
    log_probs = -torch.rand(count, each, generator=generator)
    sources = [[1, 10 + i, 2] for i in range(count)]
    shared = {"sources": sources, "scorer": model, "batch_size": 5}

    def chosen(order):
        return choose(
            choose_by,
            [[row[i] for i in order] for row in texts],
            log_probs=log_probs[:, list(order)],
            targets=[[row[i] for i in order] for row in ids.tolist()],
            **shared,
        )

    places = chosen(range(each))
    assert len(set(places)) > 1
    order = (2, 0, 3, 1)
    taken = [row[place] for row, place in zip(texts, places, strict=True)]
    again = [row[order[place]] for row, place in zip(texts, chosen(order), strict=True)]
    assert again == taken
    if choose_by == "confidence":
        assert places == log_probs.argmax(dim=1).tolist()
    if choose_by == "ar":
        means = [[plain(model, s, t)[0] for t in row] for s, row in zip(sources, ids.tolist())]
        assert places == [row.index(max(row)) for row in means]


def test_rows_may_have_different_numbers_of_candidates(model):
    targets = [[[5, 2], [6, 2]], [[7, 8, 2]], [[5, 2], [6, 9, 11, 6, 9, 11, 2], [9, 2]]]
    texts = [[str(target) for target in row] for row in targets]
    sources = [[1, 4, 2], [1, 5, 2], [1, 6, 2]]
    got = choose("ar", texts, sources=sources, targets=targets, scorer=model)
    by_mean, by_total = (
        [
            max(range(len(row)), key=lambda i: plain(model, source, row[i])[which])
            for source, row in zip(sources, targets, strict=True)
        ]
        for which in (0, 1)
    )
    assert got == by_mean != by_total


def test_what_cannot_be_chosen_is_refused(model):
    for call, part in (
        (lambda: choose("luck", [["a"]]), "one of confidence, mbr_bleu, mbr_chrf, ar, got 'luck'"),
        (lambda: choose("confidence", [["a"]]), "needs log_probs"),
        (lambda: choose("ar", [["a"]], sources=[[1]], targets=[[[2]]]), "scorer"),
        (lambda: choose_by_mbr(["a"], "rouge"), "utility must be one of bleu, chrf"),
        (lambda: choose_by_mbr([]), "at least one candidate"),
        (lambda: choose_by_confidence([]), "at least one candidate"),
        (lambda: choose_by_confidence([0.0, float("nan")]), "must be numbers"),
        (lambda: ar_log_probs(model, [[1]], []), "1 sources and 0 targets"),
        (lambda: ar_log_probs(model, [[1], [1]], [[2], []]), "target 1 has no token"),
        (lambda: ar_log_probs(model, [[]], [[2]]), "source 0 has no token"),
        (lambda: ar_log_probs(model, [[1]], [[40]]), "token id 40 of target 0 is outside"),
        (lambda: ar_log_probs(model, [[1]], [[2]], 0), "batch_size must be at least 1"),
    ):
        with pytest.raises(UserError, match=part):
            call()
