"""Which path an operation takes, and a whole backbone on either path, compiled as one graph."""

import pytest
import torch

from tess.backbones.config import HybridConfig
from tess.backbones.hybrid import HybridModel
from tess.kernels import dispatch
from tess.kernels.dispatch import BackendError, use_triton

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 32, "ssm_state_size": 16, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "n_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 32,
}
DIRECTIONS = ("forward", "bidirectional", "gated")


def small_model(pattern="ME*-", direction="bidirectional"):
    torch.manual_seed(0)
    config = HybridConfig(**SIZES, hybrid_override_pattern=pattern, mamba_direction=direction)
    model = HybridModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("reverse_gate"):  # at zero it would hide the reverse part
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def interpreter(monkeypatch):
    if not torch.cuda.is_available():
        pytest.importorskip("triton", reason="the Triton kernels need the package triton")
    monkeypatch.setenv("TESS_KERNELS", "triton")


def test_a_cpu_takes_pytorch_unless_told(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.delenv("TESS_KERNELS", raising=False)
    assert not use_triton(x) and not use_triton(x, "auto") and not use_triton(x, "torch")
    monkeypatch.setenv("TESS_KERNELS", "torch")
    assert not use_triton(x)


def test_the_argument_wins_over_the_environment(monkeypatch):
    pytest.importorskip("triton")
    x = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("TESS_KERNELS", "triton")
    assert use_triton(x) and not use_triton(x, "torch")
    monkeypatch.setenv("TESS_KERNELS", "torch")
    assert use_triton(x, "triton") and not use_triton(x)


def test_an_unknown_backend_is_named_with_its_source(monkeypatch):
    with pytest.raises(BackendError, match="backend must be one of auto, torch, triton, got 'gpu'"):
        use_triton(torch.zeros(1), "gpu")
    monkeypatch.setenv("TESS_KERNELS", "cuda")
    with pytest.raises(BackendError, match="environment variable TESS_KERNELS must be .* 'cuda'"):
        use_triton(torch.zeros(1))


def test_a_forced_path_that_cannot_run_is_an_error(monkeypatch):
    x = torch.zeros(1)
    with pytest.raises(BackendError, match="cannot run: too odd"):
        use_triton(x, "triton", unsupported="too odd")
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(BackendError, match="the package triton is not installed"):
        use_triton(x, "triton")
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    with pytest.raises(BackendError, match="needs a CUDA device or TRITON_INTERPRET=1, got .* cpu"):
        use_triton(x, "triton")
    with pytest.raises(BackendError, match="takes float32, bfloat16 and float16, got float64"):
        use_triton(x.double(), "triton")


@pytest.mark.parametrize("mode", ["causal", "denoise"])
def test_backbone_is_the_same_on_both_paths(mode, monkeypatch, interpreter):
    model, ids = small_model(), torch.randint(0, 64, (2, 9))
    outputs, gradients = [], []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TESS_KERNELS", backend)
        out = model(input_ids=ids, mode=mode).last_hidden_state
        outputs.append(out)
        loss = (out * torch.linspace(-1, 1, 32)).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert (outputs[1] - outputs[0]).norm() < 1e-5 * outputs[0].norm()
    for (name, _), one, other in zip(model.named_parameters(), *gradients):
        assert (one - other).norm() < 1e-4 * one.norm() + 1e-7, name


@pytest.mark.parametrize("mode", ["causal", "denoise"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backbone_compiles_as_one_graph(backend, mode, monkeypatch, interpreter):
    torch.compiler.reset()
    monkeypatch.setenv("TESS_KERNELS", backend)
    model, ids = small_model(), torch.randint(0, 64, (2, 9))

    def function(ids):
        return model(input_ids=ids, mode=mode).last_hidden_state

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want, got = function(ids), compiled(ids)
    assert (got - want).norm() < 1e-6 * want.norm()
    weight = model.layers[1].mixer.experts.up_proj
    upstream = torch.randn_like(want)  # the sum of squares of normalised states has no gradient
    expected, actual = (torch.autograd.grad(y, weight, upstream)[0] for y in (want, got))
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_24_layers_train_with_finite_gradients(direction):
    model = small_model("M*E-ME" * 4, direction)
    ids, target = torch.randint(0, 64, (2, 40)), torch.randn(2, 40, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = (model(input_ids=ids, mode="denoise").last_hidden_state - target).square().mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("direction", ["forward", "gated"])
def test_24_layers_of_kernels_have_finite_gradients_close_to_pytorch(
    direction, monkeypatch, interpreter
):
    model = small_model("M*E-ME" * 4, direction)
    ids = torch.randint(0, 64, (1, 5))
    gradients = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TESS_KERNELS", backend)
        model.zero_grad()
        states = model(input_ids=ids, mode="denoise").last_hidden_state
        (states * torch.linspace(-1, 1, 32)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[1].isfinite().all()
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()
