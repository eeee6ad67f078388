"""What each corruption shows to the model, hides from it and weighs."""

import random

import pytest
import torch

from tess.data.collators import Canvas, Collator, span_mask
from tess.data.settings import CORRUPTIONS, NEED_SOURCE, corruption_names
from tess.data.token_rows import BucketSampler, TokenRows, length_rule
from tess.errors import UserError
from tess.text.tokenization import train_tokenizer

PAD, BOS, EOS, MASK = 0, 1, 2, 4
KEYS = {"target_ids", "target_mask", "noise_mask", "loss_weights"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a b c d"], 261)


def make(tokenizer, corruption, **settings):
    names = corruption_names(corruption)
    return Collator(
        tokenizer, names, **({"max_source_length": 20, "max_target_length": 12} | settings)
    )


def rows(count=6, source=True):
    return [
        {
            "source": list(range(100, 104 + i)) if source else None,
            "target": list(range(50, 55 + i)),
            "seed": 17 * i,
        }
        for i in range(count)
    ]


def test_seq2seq_layout(tokenizer):
    batch = make(tokenizer, "seq2seq")(rows(2))
    assert batch["source_ids"].tolist() == [
        [PAD, BOS, 100, 101, 102, 103, EOS],
        [BOS, 100, 101, 102, 103, 104, EOS],
    ]
    assert batch["source_mask"].tolist() == [[0] + [1] * 6, [1] * 7]
    assert batch["target_ids"].tolist() == [
        [50, 51, 52, 53, 54, EOS, PAD],
        [50, 51, 52, 53, 54, 55, EOS],
    ]
    assert batch["target_mask"].tolist() == [[1] * 6 + [0], [1] * 7]
    assert torch.equal(batch["noise_mask"], batch["target_mask"])
    assert torch.equal(batch["loss_weights"], batch["target_mask"].float())


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("source", [True, False])
def test_every_corruption_keeps_the_contract(tokenizer, corruption, source):
    if corruption in NEED_SOURCE and not source:
        with pytest.raises(UserError, match=f"{corruption} needs rows with a source"):
            make(tokenizer, corruption)(rows(source=False))
        return
    collate = make(tokenizer, corruption)
    for start in range(20):
        given = [row | {"seed": row["seed"] + start} for row in rows(source=source)]
        batch = collate(given)
        assert set(batch) in (KEYS, KEYS | {"source_ids", "source_mask"})
        mask, noise, weights = batch["target_mask"], batch["noise_mask"], batch["loss_weights"]
        assert (mask.diff(dim=1) <= 0).all() and mask[:, 0].all()  # right padded
        assert (noise <= mask).all() and noise.any(dim=1).all()
        assert torch.equal(weights, noise.float())
        assert (batch["target_ids"][mask == 0] == PAD).all()
        assert batch["target_ids"].shape[1] <= 12
        if "source_ids" in batch:
            assert (batch["source_mask"].diff(dim=1) >= 0).all()  # left padded
            assert batch["source_ids"].shape[1] <= 20
        again = collate(given)
        assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_prefix_and_rest_are_the_text(tokenizer):
    collate = make(tokenizer, "prefix_lm")
    batch = collate(
        [{"source": None, "target": list(range(50, 60)), "seed": seed} for seed in range(30)]
    )
    cuts = set()
    for source, target in zip(
        batch["source_ids"].tolist(), batch["target_ids"].tolist(), strict=True
    ):
        text = [token for token in source + target if token != PAD]
        assert text == [BOS, *range(50, 60), EOS]
        cuts.add(sum(token != PAD for token in source) - 1)
    assert cuts == {1, 2, 3, 4, 5}


def test_text_infilling_hides_spans_of_the_source_and_asks_for_all(tokenizer):
    batch = make(tokenizer, "text_infilling", max_target_length=40, max_source_length=40)(
        [{"source": None, "target": list(range(50, 80)), "seed": seed} for seed in range(40)]
    )
    hidden = []
    for source, target in zip(
        batch["source_ids"].tolist(), batch["target_ids"].tolist(), strict=True
    ):
        source = [token for token in source if token != PAD]
        assert target == [*range(50, 80), EOS]
        assert (source[0], source[-1]) == (BOS, EOS)
        kept = [token for token in source[1:-1] if token != MASK]
        assert kept == sorted(set(kept))
        assert all((a, b) != (MASK, MASK) for a, b in zip(source, source[1:], strict=False))
        hidden.append(30 - len(kept))
    assert min(hidden) <= 2 and max(hidden) >= 12


def block_examples(tokenizer, row, seeds=range(60), **settings):
    """(source, target) without padding of one row, under many seeds."""
    batch = make(tokenizer, "block", **settings)([row | {"seed": seed} for seed in seeds])
    return [
        tuple(
            batch[f"{side}_ids"][i][batch[f"{side}_mask"][i].bool()].tolist()
            for side in ("source", "target")
        )
        for i in range(len(seeds))
    ]


@pytest.mark.parametrize("length", [1, 11, 12, 23, 24, 30])
def test_blocks_after_their_contexts_are_the_text(tokenizer, length):
    row = {"source": [100, 101, 102], "target": list(range(50, 50 + length))}
    text = [*row["target"], EOS]
    blocks = {}
    for source, target in block_examples(tokenizer, row, max_source_length=40):
        assert source[:5] == [BOS, 100, 101, 102, EOS]
        before = source[5:]
        assert before + target == text[: len(before) + len(target)]
        assert len(target) == 12 or target[-1] == EOS
        blocks[len(before)] = target
    assert sorted(blocks) == list(range(0, length + 1, 12))
    assert sum((blocks[start] for start in sorted(blocks)), []) == text


def test_every_block_of_a_text_is_drawn_as_often_as_the_others(tokenizer):
    row = {"source": [100], "target": list(range(50, 80))}
    got = block_examples(tokenizer, row, range(600), max_source_length=40)
    counts = [sum(target[0] == first for _, target in got) for first in (50, 62, 74)]
    assert sum(counts) == 600 and min(counts) > 160


def test_blocks_of_short_targets_are_seq2seq(tokenizer):
    batches = [make(tokenizer, name)(rows()) for name in ("block", "seq2seq")]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


def test_a_short_source_limit_cuts_the_oldest_of_the_blocks_before(tokenizer):
    row = {"source": [100, 101, 102], "target": list(range(50, 80))}
    sources = {target[0]: source for source, target in block_examples(tokenizer, row)}
    start = [BOS, 100, 101, 102, EOS]  # 15 of 20 tokens are left
    assert sources == {
        50: start,
        62: [*start, *range(50, 62)],
        74: [*start, *range(59, 74)],
    }


def test_a_source_that_leaves_no_room_has_its_first_block_alone(tokenizer):
    row = {"source": list(range(100, 130)), "target": list(range(50, 80))}
    for source, target in block_examples(tokenizer, row):
        assert (source, target) == ([BOS, *range(100, 118), EOS], list(range(50, 62)))


def test_weighted_padding_fills_a_block_as_generation_does(tokenizer):
    canvas = Canvas(pad_loss_weight=0.5, extent="rule", length_ratio=1.0)
    batch = make(tokenizer, "block", canvas=canvas)(rows(2))
    assert batch["target_mask"].sum(dim=1).tolist() == [12, 12]
    assert batch["loss_weights"][0].tolist() == [1] * 6 + [0.5] * 6


def test_long_texts_are_seen_through_windows(tokenizer):
    text = list(range(50, 150))
    batch = make(tokenizer, "unconditional")(
        [{"source": None, "target": text, "seed": s} for s in range(60)]
    )
    firsts = {row[0] for row in batch["target_ids"].tolist()}
    assert batch["target_ids"].shape == (60, 12) and len(firsts) > 20
    for row in batch["target_ids"].tolist():
        assert row in [[*text, EOS][i : i + 12] for i in range(90)]


@pytest.mark.parametrize("ratio, mean_span", [(0.15, 3), (0.5, 3), (0.5, 48)])
def test_span_masks_have_the_ratio_and_the_span_length(ratio, mean_span):
    rng = random.Random(0)
    for length in (1, 2, 3, 10, 200):
        mask = span_mask(length, ratio, mean_span, rng)
        assert len(mask) == length and any(mask) and (length == 1 or not all(mask))
    mask = span_mask(1000, ratio, mean_span, rng)
    starts = sum(b and not a for a, b in zip(mask, mask[1:], strict=False))
    assert sum(mask) == round(1000 * ratio)
    assert sum(mask) / starts == pytest.approx(mean_span, rel=0.1)


def test_mixture_takes_each_corruption_for_whole_batches(tokenizer):
    collate = make(tokenizer, "seq2seq, unconditional")
    with_source = [
        "source_ids" in collate([{**row, "seed": seed} for row in rows()]) for seed in range(200)
    ]
    assert 60 < sum(with_source) < 140


def test_pad_weight_makes_the_canvas_longer(tokenizer):
    collate = make(tokenizer, "seq2seq", canvas=Canvas(pad_loss_weight=0.25))
    batch = collate(rows(3))
    assert batch["target_mask"].all() and batch["noise_mask"].all()
    assert batch["loss_weights"][0].tolist() == [1] * 6 + [0.25] * 2
    assert batch["target_ids"][0].tolist() == [50, 51, 52, 53, 54, EOS, PAD, PAD]


def test_rule_makes_the_canvas_as_long_as_generation_does(tokenizer):
    canvas = Canvas(pad_loss_weight=1.0, extent="rule", length_ratio=1.2, length_margin=1)
    batch = make(tokenizer, "seq2seq", canvas=canvas)(rows(3))
    # sources have 6, 7 and 8 tokens, targets 6, 7 and 8: ceil(1.2 s) + 1
    assert batch["target_mask"].sum(dim=1).tolist() == [9, 10, 11]
    assert torch.equal(batch["loss_weights"] > 0, batch["target_mask"] > 0)
    batch = make(tokenizer, "span_infilling", canvas=canvas)(rows(3))
    assert batch["target_mask"].sum(dim=1).tolist() == [
        (row != PAD).sum() for row in batch["target_ids"]
    ]


def test_bad_settings_are_refused(tokenizer):
    with pytest.raises(UserError, match="the known ones are seq2seq, block, prefix_lm"):
        make(tokenizer, "mlm")
    with pytest.raises(UserError, match="pad_loss_weight"):
        Canvas(pad_loss_weight=-1)
    without = train_tokenizer(["a"], 261)
    without.mask_token = None
    with pytest.raises(UserError, match="mask_token"):
        make(without, "text_infilling")


# Rows and their order


def test_order_and_draws_follow_from_seed_and_epoch(tokenizer):
    data = TokenRows(tokenizer, ["s"] * 50 + [None] * 50, [f"text {i}" for i in range(100)], seed=1)
    sampler = BucketSampler(data.lengths(), 8, seed=1)
    orders = {}
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(index for _, index, _ in order) == list(range(100))
        assert orders.setdefault(epoch, order) == order
    assert orders[0] != orders[1]
    assert data[0, 3]["seed"] == data[3]["seed"] != data[1, 3]["seed"]
    assert data[0, 60]["source"] is None and data.has_raw_text()


def test_buckets_hold_like_lengths():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(1000)]

    def padding(bucket):
        order = [index for _, index, _ in BucketSampler(lengths, 10, 0, bucket)]
        batches = [[lengths[i] for i in order[j : j + 10]] for j in range(0, 1000, 10)]
        return sum(10 * max(batch) - sum(batch) for batch in batches)

    assert padding(True) < 0.2 * padding(False)


@pytest.mark.parametrize("bucket", [True, False])
def test_processes_share_the_batches_that_one_process_has(tokenizer, bucket):
    data = TokenRows(tokenizer, ["s"] * 30, ["text " * (i % 7 + 1) for i in range(30)], seed=1)
    alone = list(BucketSampler(data.lengths(), 8, 0, bucket))
    filled = BucketSampler(data.lengths(), 8, 0, bucket, multiple_of=8)
    together = list(filled)
    assert together[:30] == alone and len(together) == len(filled) == 32
    assert [index for _, index, _ in together[30:]] == [index for _, index, _ in alone[:2]]
    for start in range(0, 32, 8):
        firsts = {first for _, _, first in together[start : start + 8]}
        assert firsts == {together[start][1]}
    # what is drawn once per batch is the same in its parts
    collate = Collator(
        tokenizer,
        ("ul2", "unconditional", "text_infilling"),
        max_source_length=16,
        max_target_length=16,
    )
    for start in range(0, 32, 8):
        rows = [data[key] for key in together[start : start + 8]]
        whole, parts = collate(rows), [collate(rows[:4]), collate(rows[4:])]
        assert parts[0].keys() == parts[1].keys() == whole.keys()
        for i, part in enumerate(parts):
            width = part["target_ids"].shape[1]
            assert torch.equal(part["target_ids"], whole["target_ids"][4 * i : 4 * i + 4, :width])


def test_length_rule_covers_the_quantile():
    rng = random.Random(0)
    sources = [rng.randint(5, 60) for _ in range(500)]
    targets = [max(2, round(s * rng.uniform(0.5, 1.2))) for s in sources]
    for quantile in (0.5, 0.9, 1.0):
        ratio, margin = length_rule(sources, targets, quantile)
        fits = [
            target <= -(-ratio * source // 1) + margin
            for source, target in zip(sources, targets, strict=True)
        ]
        assert quantile <= sum(fits) / 500 <= quantile + 0.15
    with pytest.raises(UserError, match="length_quantile"):
        length_rule(sources, targets, 0)
