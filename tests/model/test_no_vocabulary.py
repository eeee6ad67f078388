"""The default path allocates nothing of size length x vocabulary, in training and in sampling."""

import weakref
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.kernels.head import SLAB_BYTES, slab_rows
from tess.pipeline import TessPipeline
from tess.schedulers.renoising import RenoisingScheduler
from tess.text.tokenization import train_tokenizer
from tess.training.losses import tess_loss

# A slab of logits has a fixed size, so the length is one for which it is smaller than one example's
# logits, and the width smaller than the length.
V, B, L, H = 60_000, 4, 450, 16
assert slab_rows(V, SLAB_BYTES) < L


class Guard(TorchDispatchMode):
    """Fails when an operation makes a tensor of `limit` numbers, or when all live ones have B L V.

    The second catches what is kept in pieces.
    """

    def __init__(self, limit: int = L * V, live_limit: int = 4 * B * L * V) -> None:
        super().__init__()
        self.limit, self.live_limit = limit, live_limit
        self.largest = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, function)
        return out

    def _see(self, leaf, function):
        storage = leaf.untyped_storage()
        size = storage.nbytes() // max(1, leaf.element_size())
        self.largest = max(self.largest, size)
        assert size < self.limit, f"{function} made {list(leaf.shape)}"
        place = storage._cdata
        if place not in self.known:
            self.known.add(place)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, place, storage.nbytes())
        self.peak = max(self.peak, self.live)
        assert self.live < self.live_limit, f"{function} made it {self.live} live bytes"

    def _free(self, place, size):
        self.known.discard(place)
        self.live -= size


def model(tie=True, **settings) -> TessDenoiser:
    backbone = HybridConfig(
        vocab_size=V, hidden_size=H, hybrid_override_pattern="M*E-", num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=32, ssm_state_size=4,
        mamba_num_heads=2, mamba_head_dim=8, n_groups=1, chunk_size=16, n_routed_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
        tie_word_embeddings=tie, mamba_direction="bidirectional", bos_token_id=1, eos_token_id=2,
        initializer_range=1.0,
    )
    return TessDenoiser(
        TessConfig(backbone_config=backbone, max_source_length=16, max_target_length=L, **settings)
    )


def batch():
    mask = torch.ones(B, L, dtype=torch.long)
    source = torch.randint(5, V, (B, 8))
    return {
        "source_ids": source, "source_mask": torch.ones_like(source),
        "target_ids": torch.randint(5, V, (B, L)), "target_mask": mask, "noise_mask": mask,
        "loss_weights": mask.float(),
    }


def train(denoiser, scheduler):
    optimizer = torch.optim.AdamW(denoiser.parameters())
    tess_loss(denoiser, scheduler, batch(), self_conditioning_probability=1.0).backward()
    optimizer.step()


@cache
def tokenizer():
    """One with V ids, most of them never seen."""
    made = train_tokenizer(["the cat sat on the mat"] * 3, 270)
    made.add_tokens([f"[{i}]" for i in range(V - len(made))])
    return made


def generate(denoiser, scheduler, **arguments):
    pipeline = TessPipeline(denoiser.eval(), scheduler, tokenizer())
    pipeline.set_progress_bar_config(disable=True)
    pipeline(["a cat"] * B, num_inference_steps=2, gen_length=L, output_type="seq", **arguments)


KINDS = [
    {}, {"self_conditioning": "logits"}, {"self_conditioning": "logits_with_projection"},
    {"self_conditioning": None}, {"source_encoding": "joint"}, {"label_shift": True},
    {"deepmind_conditional": True}, {"self_conditioning_mix": "embeddings"},
]


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: " ".join(map(str, s.items())))
def test_a_training_step(settings):
    with Guard() as guard:
        train(model(**settings), RenoisingScheduler(vocab_size=V))
    assert guard.largest >= H * V  # it has seen the gradient of the embedding


@pytest.mark.parametrize("tie", [True, False])
def test_a_training_step_in_bfloat16_and_the_evaluation_loss(tie):
    denoiser, scheduler = model(tie=tie), RenoisingScheduler(vocab_size=V)
    with Guard(), torch.autocast("cpu", torch.bfloat16):
        train(denoiser, scheduler)
        with torch.no_grad():
            tess_loss(denoiser.eval(), scheduler, batch(), self_conditioning_probability=1.0)


@pytest.mark.parametrize(
    "arguments", [{}, {"top_p": 0.9}, {"guidance_scale": 2.0}], ids=lambda s: str(*s) or "default"
)
def test_a_generation(arguments):
    with Guard() as guard:
        generate(model(), RenoisingScheduler(vocab_size=V), **arguments)
    assert guard.largest >= H * V


def test_dense_noise_is_streamed():
    denoiser = model(self_conditioning=None)
    scheduler = RenoisingScheduler(vocab_size=V, noise="dense")
    sample = scheduler.initial((1, L), torch.tensor([3]))
    with Guard():
        denoiser(sample, torch.ones(1)).last_hidden_state.sum().backward()


def test_the_guard_sees_a_tensor_of_that_size():
    """Wrong on purpose: dense samples, logits, and a kind that mixes over the vocabulary."""
    denoiser, sample = model(), RenoisingScheduler(vocab_size=V).initial((1, L), torch.tensor([3]))
    hidden = denoiser(sample, torch.ones(1)).last_hidden_state
    dense = RenoisingScheduler(vocab_size=V, noise="dense")
    for wrong in (
        lambda: denoiser.logits(hidden),
        lambda: dense.initial((1, L), torch.tensor([3])).logits(),
        lambda: generate(model(self_conditioning="logits_max"), dense),
    ):
        with pytest.raises(AssertionError, match=r" made \["), Guard():
            wrong()


def test_the_guard_sees_what_is_kept_in_pieces():
    denoiser, hidden = model(), torch.randn(B, L, H)
    with pytest.raises(AssertionError, match="live bytes"), Guard():
        kept = [denoiser.logits(piece) for piece in hidden.split(40, dim=1)]
    kept = None
    with Guard() as guard:  # one after the other they pass, so what is let go is seen too
        for piece in hidden.flatten(0, 1).split(250):
            denoiser.logits(piece)
    assert kept is None and guard.peak < 4 * 3 * 250 * V
