"""Operations of whole runs: against those that torch counts, and the laws they follow."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.costs.decoding import DecodingCost, ar_flops, mtp_flops, tess_flops
from tess.costs.roofline import Block, draft_pass, head_cost, stack_cost, verify_pass
from tess.decoders.autoregressive import ArDecoder, ArMtpDecoder
from tess.decoders.base import Generation
from tess.decoders.beam_search import BeamDecoder
from tess.decoders.diffusion import TessDecoder
from tess.decoders.verified import DraftVerifyDecoder
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.sampling.options import SamplerOptions
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.parts import Parts
from tess.text.tokenization import train_tokenizer
from tiny import WIDE

NUM_TOP = 32
SOURCES = [list(range(5, 29)), list(range(40, 56))]
CANVAS, LONGEST, DRAFTS = 12, 12, 3


@cache
def tokenizer():
    made = train_tokenizer(["a cat ran after the dog"] * 3, 270)
    made.add_tokens([f"<{index}>" for index in range(512 - len(made))])
    return made


@cache
def causal():
    """A float64 model (experts are plain products there) that never ends a text."""
    torch.manual_seed(0)
    model = HybridForCausalLM(HybridConfig(**WIDE, initializer_range=0.2)).double().eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer().eos_token_id] = 0
    model.generation_config.max_new_tokens = LONGEST
    return Parts(model, tokenizer())


@cache
def denoiser(noise="order_statistics", **options):
    torch.manual_seed(1)
    config = TessConfig(backbone_config=HybridConfig(**WIDE), max_source_length=64, **options)
    scheduler = RenoisingScheduler(
        vocab_size=512, simplex_value=config.simplex_value, num_top=NUM_TOP, noise=noise
    )
    return Parts(TessDenoiser(config).double().eval(), tokenizer(), scheduler)


def counted(decoder, rows, **options):
    """The texts, and the operations in the matrix products that ran."""
    decoder.generate_ids(rows[:1], **options)  # moments of the embedding, once for all runs
    # the counter knows no fused attention on the CPU
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        texts = decoder.generate_ids(rows, batch_size=1, **options)
    return texts, counter.get_total_flops()


def unseen_rows(texts, rows=NUM_TOP + 1):
    """The noised embedding is a weighted sum of rows, which the counter does not see.

    With dense noise there is one of all rows, and it is multiplied in place, not seen either.
    """
    return sum(2 * g.nfe * g.canvas_length * 128 * rows for g in texts)


def square(config, length):
    """What plain attention computes above the diagonal of a causal block, for nothing."""
    return 4 * config.num_attention_heads * config.head_dim * length * (length - 1) / 2


LAYOUTS = [
    {},
    {"source_encoding": "bidirectional", "self_conditioning": None},
    {"source_encoding": "joint", "self_conditioning": "logits", "self_conditioning_mlp": True},
    {"label_shift": True, "self_conditioning": "logits_with_projection"},
    {"source_encoding": "joint", "deepmind_conditional": True},
    {"noise": "dense"},
    {"noise": "dense", "self_conditioning": "logits_max"},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: "-".join(map(str, options)))
def test_tess_takes_the_operations_that_really_run(options):
    decoder = TessDecoder(denoiser(**options))
    texts, ran = counted(decoder, SOURCES, num_inference_steps=3, gen_length=CANVAS)
    assert [(g.canvas_length, g.nfe) for g in texts] == [(CANVAS, 3)] * 2
    cost = decoder.cost([len(row) for row in SOURCES], texts)
    causal_reading = decoder.model.config.source_encoding == "causal"
    shift = int(decoder.model.config.label_shift)
    above = sum(square(decoder.model.config.backbone_config, len(row) - shift) for row in SOURCES)
    unseen = unseen_rows(texts, 512 if "noise" in options else NUM_TOP + 1)
    if decoder.model.config.needs_whole_simplex:
        unseen = 0  # the mixture's embedding is a plain product
    expected = cost.total - unseen + causal_reading * above
    assert ran == pytest.approx(expected, rel=0.015)
    assert cost.per_output_token == cost.total / sum(g.num_new_tokens for g in texts)


@pytest.mark.parametrize("beams", [1, 3])
def test_ar_takes_the_operations_that_really_run(beams):
    decoder = ArDecoder(causal()) if beams == 1 else BeamDecoder(causal(), beams)
    texts, ran = counted(decoder, SOURCES)
    assert [g.nfe for g in texts] == [LONGEST] * 2
    cost = decoder.cost([len(row) for row in SOURCES], texts)
    above = beams * sum(square(decoder.model.config, len(row)) for row in SOURCES)
    # one position updates its state without a matrix product: 2 N P for each head
    updates = beams * 2 * (LONGEST - 1) * 2 * 32 * 8 * 32
    assert ran == pytest.approx(cost.total + above - updates, rel=0.015)


def test_ar_mtp_takes_the_operations_that_really_run():
    decoder = ArMtpDecoder(causal(), DRAFTS)
    texts, ran = counted(decoder, SOURCES)
    assert all(1 < g.nfe <= LONGEST for g in texts)
    cost = decoder.cost([len(row) for row in SOURCES], texts)
    # both the backbone and the predictor read the source, and a block of drafts has a mask
    above = 2 * sum(square(decoder.model.config, len(row)) for row in SOURCES)
    above += sum((g.nfe - 1) * square(decoder.model.config, DRAFTS + 1) for g in texts)
    assert ran == pytest.approx(cost.total + above, rel=0.02)
    assert [g.num_verifications for g in texts] == [g.nfe - 1 for g in texts]
    decoder.num_draft_tokens -= 1
    one_less = decoder.cost([24, 16], texts).total
    assert ran != pytest.approx(one_less + above, rel=0.05)


def test_tess_ar_takes_the_operations_that_really_run():
    decoder = DraftVerifyDecoder(denoiser(), causal(), num_inference_steps=2)
    decoder.writer.model.config.target_length_ratio = 0.5  # canvases of 12 and 8
    try:
        texts, ran = counted(decoder, SOURCES)
    finally:
        decoder.writer.model.config.target_length_ratio = None
    assert [g.canvas_length for g in texts] == [12, 8]
    cost = decoder.cost([len(row) for row in SOURCES], texts)
    unseen = sum(2 * 2 * g.canvas_length * 128 * (NUM_TOP + 1) for g in texts)
    above = 2 * sum(square(decoder.model.config, len(row)) for row in SOURCES)
    for text in texts:
        width = text.num_drafted / text.num_verifications + 1
        above += text.num_verifications * square(decoder.model.config, width)
    assert ran == pytest.approx(cost.total - unseen + above, rel=0.03)


def test_rounds_of_drafts_add_up_one_by_one():
    """Five rounds that add three tokens each, after a source of ten."""
    config, rounds, gain, k = HybridConfig(**WIDE), 5, 3, 4
    total = stack_cost(config, "M*-E", Block(1, 10, 0)) + head_cost(config, 1)
    for index in range(rounds):
        known = 10 + gain * index  # tokens in the backbone's cache; of the predictor's last round
        read = gain if index else 10
        total += draft_pass(config, 1, read, known - read)
        for i in range(k - 1):
            total += draft_pass(config, 1, 1, known + i)
        total += verify_pass(config, 1, known, k)
    run = mtp_flops(config, 10, 1 + rounds, 1 + rounds * gain, k)
    assert run == pytest.approx(total.flops, rel=1e-12)


def test_a_source_read_in_both_directions_costs_the_pairs_that_a_causal_one_leaves_out():
    config = HybridConfig(**WIDE, mamba_direction="forward")
    totals = [
        tess_flops(TessConfig(backbone_config=config, source_encoding=encoding), 24, 12, 2, NUM_TOP)
        for encoding in ("causal", "bidirectional")
    ]
    assert totals[1] - totals[0] == pytest.approx(square(config, 24))


SOURCE_LENGTHS = [24, 16, 9]
TEXTS = [
    Generation("", [], tokens, nfe, num_drafted=drafted, num_verifications=checks, canvas_length=n)
    for tokens, nfe, drafted, checks, n in ((10, 4, 20, 2, 12), (9, 9, 30, 6, 12), (1, 1, 0, 0, 5))
]
DECODERS = {
    "tess": lambda: TessDecoder(denoiser()),
    "ar": lambda: ArDecoder(causal()),
    "ar-beam": lambda: BeamDecoder(causal(), 4),
    "ar+mtp": lambda: ArMtpDecoder(causal(), DRAFTS),
    "tess+ar": lambda: DraftVerifyDecoder(denoiser(), causal()),
}


def texts(**changed):
    return [replace(text, **changed) for text in TEXTS]


@pytest.mark.parametrize("name", DECODERS)
def test_a_run_takes_what_its_texts_take_one_by_one(name):
    decoder = DECODERS[name]()
    rows = zip(SOURCE_LENGTHS, TEXTS, strict=True)
    alone = [decoder.cost([length], [text]).total for length, text in rows]
    together = decoder.cost(SOURCE_LENGTHS, TEXTS)
    assert together.total == pytest.approx(sum(alone)) and min(alone) > 0
    assert together.per_output_token == pytest.approx(together.total / 20)
    fewer = decoder.cost(SOURCE_LENGTHS, texts(num_new_tokens=1))
    assert fewer.per_output_token > together.per_output_token


def test_evaluations_of_tess_all_cost_the_same_and_the_source_is_read_once():
    decoder = TessDecoder(denoiser())
    none, one, five = (decoder.cost(SOURCE_LENGTHS, texts(nfe=n)).total for n in (1, 2, 6))
    assert five - none == pytest.approx(5 * (one - none))
    reading = none - (one - none)
    assert 0 < reading < none
    longer = decoder.cost([48, 32, 18], texts(nfe=2)).total - one
    assert longer > reading  # twice the source: the reading again, and attention to it


def test_an_ar_step_costs_more_by_one_more_key_each_time():
    decoder = ArDecoder(causal())
    totals = [decoder.cost(SOURCE_LENGTHS, texts(nfe=n)).total for n in range(1, 6)]
    steps = [after - before for before, after in zip(totals, totals[1:])]
    more = [after - before for before, after in zip(steps, steps[1:])]
    assert more == pytest.approx([3 * 4 * 4 * 32] * 3)
    plain, beams = (one.cost(SOURCE_LENGTHS, TEXTS) for one in (decoder, DECODERS["ar-beam"]()))
    assert beams.total == 4 * plain.total


def test_experts_that_no_token_is_sent_to_cost_nothing_but_their_score():
    more, few = (ar_flops(HybridConfig(**WIDE | {"n_routed_experts": n}), 24, 4) for n in (16, 8))
    assert more - few == pytest.approx(2 * 8 * 128 * (24 + 3))


def test_dense_noise_costs_a_product_over_the_vocabulary():
    few, dense = (
        TessDecoder(denoiser(noise=noise)).cost(SOURCE_LENGTHS, TEXTS).total
        for noise in ("order_statistics", "dense")
    )
    positions = 4 * 12 + 9 * 12 + 1 * 5
    difference = 2 * positions * 128 * (512 - (NUM_TOP + 1 + 128))
    assert dense - few == pytest.approx(difference)


def test_a_run_without_a_token_has_no_cost_per_token():
    decoder = ArDecoder(causal())
    assert decoder.cost(SOURCE_LENGTHS, texts(num_new_tokens=0)).per_output_token is None
    assert decoder.cost([], []) == DecodingCost(0.0, None)


def test_blocks_are_refused():
    decoder = TessDecoder(denoiser(), SamplerOptions(block_length=4))
    with pytest.raises(UserError, match="written in blocks is not known"):
        decoder.cost([3], decoder.generate_ids([[5, 6, 7]], gen_length=4))
