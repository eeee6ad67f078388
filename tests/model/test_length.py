"""The length head: its distribution, its loss, what it reads, its fit and its place on disk."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.data.token_rows import TokenRows
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.length import (
    LengthHead,
    length_loss,
    median_lengths,
    quantile_lengths,
    text_lengths,
)
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.parts import Parts, load_parts, save_parts
from tess.text.tokenization import encode_texts, train_tokenizer
from tess.training.diffusion_settings import DiffusionArguments
from tess.training.flags import parse_settings
from tess.training.length_fitting import (
    LengthRows,
    encode_rows,
    fit_length_head,
    length_report,
    split_rows,
)
from tess.training.losses import tess_loss
from tess.training.start import build_parts, make_canvas, store_limits
from tiny import DECODER

BOS, EOS, V, N = 1, 2, 300, 24
SIZES = DECODER | {
    "vocab_size": V, "hybrid_override_pattern": "M*", "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": EOS,
}
LINES = ["the cat sat on the mat and the dog ran", "a dog ran", "one two three four five six"] * 4


def config(**settings):
    backbone = HybridConfig(**SIZES, mamba_direction="bidirectional")
    fields = {"length_head": True, "max_target_length": N, "max_source_length": 32}
    return TessConfig(backbone_config=backbone, **(fields | settings))


def denoiser(**settings):
    torch.manual_seed(0)
    return TessDenoiser(config(**settings)).eval()


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (ids != 0).long()


def batch():
    """Sources of 3 and 5 tokens, targets of 6 and 4."""
    source, source_mask = left_padded([[BOS, 11, EOS], [BOS, 12, 13, 14, EOS]])
    target = torch.tensor([[21, 22, 23, 24, 25, EOS], [31, 32, 33, EOS, 0, 0]])
    mask = (target != 0).long()
    return {
        "source_ids": source, "source_mask": source_mask, "target_ids": target,
        "target_mask": mask, "noise_mask": mask, "loss_weights": mask.float(),
    }


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES, V)


def checkpoint(tmp_path, tokenizer, dtype=None, **settings):
    model = denoiser(**settings)
    model.config.backbone_config.vocab_size = len(tokenizer)
    model = TessDenoiser(model.config).to(dtype or torch.float32)
    scheduler = RenoisingScheduler(
        vocab_size=len(tokenizer), simplex_value=model.config.simplex_value
    )
    folder = tmp_path / "checkpoint"
    save_parts(Parts(model, tokenizer, scheduler), folder)
    return folder


# The distribution


def test_quantiles_are_those_of_a_slow_count():
    probabilities = torch.randn(20, 9).softmax(dim=1)
    probabilities[3:6, :4] = 0  # lengths that cannot be
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    for quantile in (0.01, 0.3, 0.5, 0.9, 0.999999):
        expected = []
        for row in probabilities.double().tolist():
            mass, length = 0.0, 0
            while mass < quantile and length < 9:
                mass += row[length]
                length += 1
            expected.append(length)
        assert quantile_lengths(probabilities.log(), quantile).tolist() == expected


def test_a_quantile_on_a_step_of_the_distribution_takes_the_lower_length():
    log_probs = torch.tensor([[0.25, 0.25, 0.5]]).double().log()
    assert [quantile_lengths(log_probs, q).item() for q in (0.25, 0.26, 0.5, 0.51)] == [1, 2, 2, 3]
    assert median_lengths(log_probs).item() == 2
    with pytest.raises(ValueError, match="quantile must be above 0 and below 1, got 1.0"):
        quantile_lengths(log_probs, 1.0)


def test_the_median_has_the_least_expected_absolute_error():
    log_probs = torch.randn(6, 9).log_softmax(dim=1)
    lengths = torch.arange(1.0, 10)
    errors = log_probs.exp() @ (lengths[:, None] - lengths).abs()
    assert torch.equal(median_lengths(log_probs), errors.argmin(dim=1) + 1)


def test_the_head_gives_the_mixture_of_logistics_that_its_numbers_say():
    head = LengthHead(8, N).double()
    state, lengths = torch.randn(5, 8, dtype=torch.float64), torch.tensor([1, 3, 9, 20, 400])
    log_probs = head(state, lengths)
    features = torch.cat([state, lengths.double().log()[:, None]], dim=1)
    numbers = head.outer(torch.nn.functional.gelu(head.inner(features))).chunk(3, dim=1)
    places = lengths.double().log()[:, None] + numbers[1] + torch.linspace(-0.5, 0.5, 8)
    scales = 0.003 + torch.nn.functional.softplus(numbers[2] - 2)
    edges = torch.cat([torch.arange(1, N).double() + 0.5, torch.tensor([float("inf")])]).log()
    below = ((edges[:, None, None] - places) / scales).sigmoid()  # [N, B, K]
    cdf = (numbers[0].softmax(dim=1) * below).sum(dim=2).T
    torch.testing.assert_close(log_probs.exp().cumsum(dim=1), cdf, atol=1e-6, rtol=0)
    assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(5).double(), atol=1e-12)


def test_far_tails_and_sharp_components_stay_finite_with_gradients():
    head = LengthHead(4, 128)
    with torch.no_grad():
        head.outer.bias[8:16] = 3.0
        head.outer.bias[16:] = -40.0  # as sharp as can be
    log_probs = head(torch.zeros(2, 4), torch.tensor([1, 2000]))
    log_probs.sum().backward()
    assert log_probs.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_the_head_works_in_float32_under_autocast_and_with_bfloat16_weights():
    head, state, lengths = LengthHead(8, N), torch.randn(3, 8), torch.tensor([3, 9, 20])
    plain = head(state, lengths)
    exact = copy.deepcopy(head).double()(state.double(), lengths)
    torch.testing.assert_close(plain.double(), exact, atol=1e-4, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(state, lengths), plain)
    rounded = head.bfloat16()(state.bfloat16(), lengths)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, atol=0.1, rtol=0.02)


# The loss


def test_the_loss_is_the_mean_cross_entropy_of_included_lengths():
    log_probs = torch.randn(3, 5).log_softmax(dim=1).requires_grad_()
    included = torch.tensor([True, False, True])
    loss = length_loss(log_probs, torch.tensor([2, 0, 99]), included)
    assert loss.item() == pytest.approx(-(log_probs[0, 1] + log_probs[2, 4]).item() / 2)
    loss.backward()
    assert log_probs.grad.abs().sum(dim=1).bool().tolist() == [True, False, True]
    nothing = length_loss(log_probs, torch.tensor([2, 0, 99]), torch.zeros(3, dtype=torch.bool))
    assert nothing.item() == 0 and nothing.requires_grad
    with pytest.raises(ValueError, match="at least 1 token, its `</s>`; got 0"):
        length_loss(log_probs, torch.tensor([2, 0, 99]))


def test_a_text_ends_at_its_first_end_token():
    ids = torch.tensor([[5, EOS, 0, 0], [5, 6, 7, 8], [EOS, EOS, EOS, EOS]])
    lengths, ended = text_lengths(ids, EOS)
    assert lengths.tolist() == [2, 0, 1] and ended.tolist() == [True, False, True]


def grads(model, weight, **settings):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = tess_loss(
        model, RenoisingScheduler(vocab_size=V), settings.pop("batch", None) or batch(),
        length_loss_weight=weight, self_conditioning_probability=1.0, **settings,
    )
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"source_encoding": "bidirectional"}, {"label_shift": True}],
    ids=["causal", "bidirectional", "label_shift"],
)
def test_the_joint_loss_teaches_head_and_encoder(settings):
    model = denoiser(**settings)
    without, alone = grads(model, 0.0)
    both, joint = grads(model, 0.5)
    data = batch()
    reading = model.read_source(data["source_ids"], data["source_mask"])
    log_probs = model.length_log_probs(reading.last_state, torch.tensor([3, 5]))
    expected = length_loss(log_probs, torch.tensor([6, 4])).item()
    assert both - without == pytest.approx(0.5 * expected, rel=1e-4)
    for name, grad in joint.items():
        if name.startswith("length_head"):
            assert grad.any() and not alone[name].any(), name
    changed = [n for n, g in joint.items() if n.startswith("backbone") and (g != alone[n]).any()]
    assert any("embeddings" in n for n in changed) and any("layers.0" in n for n in changed)


def test_dropped_sources_and_texts_without_an_end_teach_the_head_nothing():
    model, open_ended = denoiser(), batch()
    open_ended["target_ids"] = open_ended["target_ids"].masked_fill(
        open_ended["target_ids"] == EOS, 9
    )
    for settings in ({"source_drop_probability": 1.0}, {"batch": open_ended}):
        given, learnt = grads(model, 0.5, **settings)
        assert given == grads(model, 0.0, **settings)[0]
        assert not any(g.any() for n, g in learnt.items() if n.startswith("length_head"))


def test_a_batch_without_sources_has_no_length_loss():
    data = {name: value for name, value in batch().items() if "source" not in name}
    assert grads_loss(denoiser(), data, 0.5) == grads_loss(denoiser(), data, 0.0)


def grads_loss(model, data, weight):
    torch.manual_seed(3)
    scheduler = RenoisingScheduler(vocab_size=V)
    return tess_loss(model, scheduler, data, length_loss_weight=weight).item()


# What it reads


@pytest.mark.parametrize(
    "settings",
    [{}, {"source_encoding": "bidirectional"}, {"label_shift": True}],
    ids=["causal", "bidirectional", "label_shift"],
)
def test_a_length_does_not_depend_on_the_batch(settings):
    model = denoiser(num_source_positions=32, **settings).double()
    rows = [[BOS, EOS], [BOS, 5, 6, 7, 8, 9, 10, EOS], [BOS, 40, EOS], [7]]

    def read(rows):
        ids, mask = left_padded(rows)
        state = model.read_source(ids, mask).last_state
        return model.length_log_probs(state, mask.sum(dim=1))

    together = read(rows)
    for index, row in enumerate(rows):
        torch.testing.assert_close(read([row])[0], together[index], atol=1e-10, rtol=0)
    turned = quantile_lengths(read(rows[::-1]), 0.9)
    assert torch.equal(turned.flip(0), quantile_lengths(together, 0.9))


def test_the_state_is_the_source_s_last_and_reads_all_of_it():
    ids, mask = left_padded([[BOS, 5, 6, 7, EOS], [BOS, 5, EOS]])
    model = denoiser()
    hidden = model.backbone(inputs_embeds=model.backbone.embeddings(ids), attention_mask=mask)
    reading = model.read_source(ids, mask)
    torch.testing.assert_close(reading.last_state, hidden.last_hidden_state[:, -1])
    assert reading.cache.length == model.encode_source(ids, mask).length == 5
    for settings in ({}, {"source_encoding": "bidirectional"}):
        model, other = denoiser(**settings), ids.clone()
        other[0, 1] = 9
        states = [model.read_source(each, mask).last_state[0] for each in (ids, other)]
        assert not torch.allclose(*states)


def test_with_label_shift_the_state_is_the_one_before_the_last_token():
    ids, mask = left_padded([[BOS, 5, 6, 7, EOS], [9]])
    model = denoiser(label_shift=True)
    state = model.read_source(ids, mask).last_state
    hidden = model.backbone(
        inputs_embeds=model.backbone.embeddings(ids), attention_mask=mask
    ).last_hidden_state
    torch.testing.assert_close(state[0], hidden[0, -2])
    assert not state[1].any() and hidden[1, -1].any()
    assert not model.read_source(ids[1:, -1:], None).last_state.any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="length_head .* needs source_encoding .* got 'joint'"):
        config(source_encoding="joint")
    for quantile in (0, 1.0):
        with pytest.raises(ValueError, match="target_length_quantile must be above 0 and below 1"):
            config(target_length_quantile=quantile)
    with pytest.raises(ValueError, match="no length head"):
        denoiser(length_head=False).length_log_probs(torch.zeros(1, 32), torch.tensor([3]))
    plain = denoiser(length_head=False, source_encoding="joint")
    ids, mask = left_padded([[BOS, 5, EOS]])
    assert plain.read_source(ids, mask) == (None, None)
    flags = ["--task", "simplification", "--train_tokenizer", "true", "--output_dir", "o"]
    with pytest.raises(UserError, match="length_loss_weight must not be negative, got -1"):
        parse_settings([*flags, "--length_loss_weight", "-1"])


# On disk, and in a run's settings


def test_a_head_is_saved_and_read_back(tmp_path, tokenizer):
    folder = checkpoint(tmp_path, tokenizer, target_length_quantile=0.7, target_length_margin=3)
    first, again = load_parts(folder).model, load_parts(folder).model
    assert (first.config.target_length_quantile, first.config.target_length_margin) == (0.7, 3)
    state = torch.randn(2, 32)
    lengths = torch.tensor([4, 9])
    assert torch.equal(*(m.length_log_probs(state, lengths) for m in (first, again)))
    assert any(name.startswith("length_head") for name in first.state_dict())


def test_a_checkpoint_from_before_length_heads_loads(tmp_path, tokenizer):
    folder = checkpoint(tmp_path, tokenizer, length_head=False)
    path = folder / "denoiser" / "config.json"
    fields = json.loads(path.read_text())
    del fields["length_head"], fields["target_length_quantile"]
    path.write_text(json.dumps(fields))
    model = load_parts(folder).model
    assert model.length_head is None and not model.config.length_head


def settings_for(folder, *flags):
    return parse_settings(
        ["--init_from", str(folder), "--task", "simplification", "--output_dir", "o",
         "--max_source_length", "32", "--max_target_length", "20", *flags]
    )


@pytest.mark.parametrize("has", [True, False])
def test_a_run_from_a_checkpoint_keeps_its_head_or_gets_one(tmp_path, tokenizer, has):
    folder = checkpoint(tmp_path, tokenizer, length_head=has)
    flags = [] if has else ["--length_head", "true"]
    parts = build_parts(settings_for(folder, *flags), [], load_parts(folder))
    before, after = load_parts(folder).model.state_dict(), parts.model.state_dict()
    assert parts.model.config.length_head and parts.model.length_head.max_length == 20
    assert {n for n in after if n not in before and "length_head" not in n} == set()
    for name, tensor in before.items():  # another max_target_length changes no tensor
        assert torch.equal(tensor, after[name]), name
    assert not {name for name in DiffusionArguments().denoiser_overrides() if "length" in name}


def test_the_margin_is_the_head_s_and_training_canvases_keep_the_rule_s(tmp_path, tokenizer):
    folder = checkpoint(tmp_path, tokenizer, pad_loss_weight=0.1)
    settings = settings_for(folder, "--length_quantile", "0.8", "--canvas", "rule")
    parts = build_parts(settings, [], load_parts(folder))
    targets = [" ".join(["cat"] * n) for n in (1, 1, 1, 2, 3)]
    rows = TokenRows(tokenizer, ["the dog ran"] * 5, targets, seed=0)
    store_limits(parts, settings, rows)
    fitted = parts.model.config
    assert (fitted.target_length_quantile, fitted.target_length_margin) == (0.8, 0)
    canvas = make_canvas(settings, parts, rows)
    assert canvas.length_ratio == fitted.target_length_ratio
    lengths = sorted(len(ids) + 1 for ids in rows.targets)
    assert canvas.length_margin == lengths[3] - lengths[2] > 0
    with pytest.raises(UserError, match="length_quantile must be .* below 1 with a length head"):
        store_limits(parts, settings_for(folder, "--length_quantile", "1"), rows)


# The fit


def synthetic(rows):
    """Sources of one length whose second token says the target's length."""
    generator = torch.Generator().manual_seed(1)
    lengths = 6 * torch.randint(1, 5, (rows,), generator=generator)
    ids = torch.randint(50, 60, (rows, 6), generator=generator)
    ids[:, 0], ids[:, 1], ids[:, -1] = BOS, 100 + lengths, EOS
    with torch.no_grad():
        states = denoiser(source_encoding="bidirectional").read_source(ids, None).last_state
    return LengthRows(states, torch.full((rows,), 6), lengths)


def test_the_head_learns_what_the_mean_cannot_know_and_nothing_from_other_sources():
    rows = synthetic(1500)
    shuffled = LengthRows(
        rows.states[torch.randperm(len(rows))], rows.source_lengths, rows.target_lengths
    )
    errors = []
    for each in (rows, shuffled):
        fitted_on, held_out = split_rows(each, 0.2, seed=0)
        head = fit_length_head(
            fitted_on, N, updates=400, batch_size=128, learning_rate=0.03, dropout=0.0
        )
        report = length_report(head, fitted_on, held_out, 0.9, 0)
        errors.append(report["mean_absolute_error"])
        if each is rows:
            assert report["coverage"] > 0.8 and report["canvas"] < 0.9 * N
    assert errors[0]["head"] < 0.5 * errors[0]["mean"]
    assert errors[1]["head"] > 0.9 * errors[1]["mean"]


def test_the_report_s_figures_are_those_of_a_slow_count():
    rows = synthetic(40)
    rows = LengthRows(rows.states, torch.arange(2, 42), rows.target_lengths)
    head = fit_length_head(rows, N, updates=2)
    report = length_report(head, rows, rows, 0.8, 3)
    log_probs = head(rows.states, rows.source_lengths)
    targets = rows.target_lengths.tolist()
    mean = min(max(round(sum(targets) / 40), 1), N)
    assert report["mean_absolute_error"]["mean"] == pytest.approx(
        sum(abs(mean - t) for t in targets) / 40
    )
    guesses = median_lengths(log_probs).tolist()
    assert report["mean_absolute_error"]["head"] == pytest.approx(
        sum(abs(g - t) for g, t in zip(guesses, targets, strict=True)) / 40
    )
    canvases = [min(q + 3, N) for q in quantile_lengths(log_probs, 0.8).tolist()]
    fits = [c >= t for c, t in zip(canvases, targets, strict=True) if t < N]
    assert len(fits) < 40 and report["coverage"] == pytest.approx(sum(fits) / len(fits))
    assert report["canvas"] == pytest.approx(sum(canvases) / 40)


def test_a_line_in_the_source_s_length_is_found_by_the_linear_guess():
    rows = synthetic(30)
    rows = LengthRows(rows.states, torch.arange(1, 31), (torch.arange(1, 31) + 3) // 2)
    errors = length_report(LengthHead(32, N), rows, rows, 0.9, 0)["mean_absolute_error"]
    assert errors["linear"] < 0.6 < errors["mean"]


def test_rows_are_encoded_as_they_are_in_generation(tokenizer):
    model = denoiser(max_source_length=8, max_target_length=6)
    texts = [("the cat sat on the mat and the dog ran", LINES[0]), ("a dog", "a")]
    rows = encode_rows(model, tokenizer, texts)
    assert rows.source_lengths[0] == 8 > rows.source_lengths[1] and rows.target_lengths[0] == 6
    assert rows.target_lengths[1] == len(encode_texts(tokenizer, ["a"])[0]) + 1
    alone = encode_rows(model, tokenizer, texts[1:])
    torch.testing.assert_close(alone.states[0], rows.states[1])
    with pytest.raises(UserError, match="needs source_encoding"):
        encode_rows(denoiser(length_head=False, source_encoding="joint"), tokenizer, texts)
    with pytest.raises(UserError, match="at least 2 rows, got 1"):
        split_rows(alone, 0.1, 0)


def fit_script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "fit_length.py"
    spec = importlib.util.spec_from_file_location("fit_length_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_adds_a_head_and_leaves_every_other_weight_alone(tmp_path, tokenizer, capsys):
    script = fit_script()
    folder = checkpoint(tmp_path, tokenizer, torch.bfloat16, length_head=False)
    before = load_parts(folder, dtype=None).model.state_dict()
    test_file = tmp_path / "rows.jsonl"
    row = {"source": "a dog ran", "target": "a dog"}
    test_file.write_text(json.dumps(row) + "\n")
    flags = ["--task", "simplification", "--updates", "3", "--test_file", str(test_file)]
    script.main(
        [str(folder), *flags, "--quantile", "0.8", "--margin", "1", "--max_train_samples", "20"]
    )
    printed = capsys.readouterr().out
    assert "fitted on 18 rows" in printed and f"{test_file}: 1 rows" in printed
    model = load_parts(folder, dtype=None).model
    assert (model.config.target_length_quantile, model.config.target_length_margin) == (0.8, 1)
    after = model.state_dict()
    assert {name for name in after if name not in before} == {
        f"length_head.{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")
    }
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    stored = load_file(folder / "denoiser" / "model.safetensors")
    assert stored["length_head.inner.weight"].dtype == torch.bfloat16
