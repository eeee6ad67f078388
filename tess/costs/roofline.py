"""The least time of one evaluation on one GPU, for each of the three ways to write.

A pass takes at least max(bytes / bandwidth, operations / peak): it has to move its weights and
caches, to do its multiplications, and can at best do both at once. What is counted:

- bytes: every weight the pass needs once, in bfloat16, of the routed experts the expected share
  (`touched_share`); keys and values in bfloat16, convolution windows in bfloat16 and SSM states in
  float32, as often as the method reads and writes them (`ar_step`, `denoise_step`, `mtp_round`);
- operations: 2 for each weight and each token that meets it, 4 for each query, key and channel of
  attention, the scan by chunks (`scan_flops`), and the products over the vocabulary.

What is not: activations, launches, the sampling itself, and the reading of the source, which is
done once in all three. Real times are longer. (Denoising holds no [batch, length, vocabulary]
tensor; `Roofline.vocabulary_tensor_bytes` is what one would take.)
"""

import math
from collections import Counter
from dataclasses import dataclass

from tess.backbones.config import HybridConfig
from tess.costs.gpus import GPUS, Gpu, Workload
from tess.errors import UserError
from tess.schedulers.simplex import NUM_TOP

BF16, FP32 = 2, 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Cost:
    """What one pass has to move (bytes) and to compute (FLOP)."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: int) -> "Cost":
        """The same `count` times."""
        return Cost(count * self.bytes, count * self.flops)

    def seconds(self, gpu: Gpu) -> float:
        """The larger of the time to move and the time to compute."""
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)

    def bound(self, gpu: Gpu) -> str:
        """Which of the two it is: "memory" or "compute"."""
        moving = self.bytes / gpu.bandwidth >= self.flops / gpu.flops
        return "memory" if moving else "compute"


@dataclass(frozen=True)
class Weights:
    """Numbers in one layer: those that every token uses, and those in all routed experts."""

    always: int
    routed: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.always + self.routed


@dataclass(frozen=True)
class Block:
    """Positions that one pass reads in every text of a batch.

    positions: per text; a mean over texts need not be whole. cached: positions before them.
    state_moves: how often the pass reads or writes a Mamba state. keeps: its keys and values are
    written to the cache.
    """

    batch: int
    positions: float
    cached: float
    bidirectional: bool = False
    state_moves: int = 2
    keeps: bool = True

    @property
    def tokens(self) -> float:
        """Positions in all texts."""
        return self.batch * self.positions

    @property
    def keys_per_query(self) -> float:
        """Keys that a query sees on average; in a causal block half of the others."""
        own = self.positions if self.bidirectional else (self.positions + 1) / 2
        return self.cached + own


# sizes


def kv_bytes_per_token(config: HybridConfig, pattern: str) -> int:
    """Keys and values of one token in all attention layers of `pattern`, bfloat16."""
    return 2 * config.num_key_value_heads * config.head_dim * BF16 * pattern.count("*")


def ssm_bytes_per_sequence(config: HybridConfig, pattern: str) -> int:
    """States of the Mamba layers, heads x head width x state size, float32."""
    return config.mamba_inner_size * config.ssm_state_size * FP32 * pattern.count("M")


def conv_bytes_per_sequence(config: HybridConfig, pattern: str) -> int:
    """Convolution windows of the Mamba layers, taps - 1 positions of x, B and C, bfloat16."""
    return (config.conv_kernel - 1) * config.conv_dim * BF16 * pattern.count("M")


def layer_weights(config: HybridConfig, letter: str) -> Weights:
    """Numbers in one layer of the stack, its norm included."""
    count = {"M": _mamba_weights, "*": _attention_weights, "-": _mlp_weights, "E": _moe_weights}
    weights = count[letter](config)
    return Weights(weights.always + config.hidden_size, weights.routed)


def _mamba_weights(config: HybridConfig) -> Weights:
    hidden, inner, heads = config.hidden_size, config.mamba_inner_size, config.mamba_num_heads
    rows = inner + config.conv_dim + heads
    convolution = config.conv_dim * (config.conv_kernel + config.use_conv_bias)
    per_head = 3 + (config.mamba_direction == "gated")  # A, D, the bias of dt; the reverse gate
    biases = config.use_bias * (rows + hidden)
    return Weights(hidden * (rows + inner) + convolution + per_head * heads + inner + biases)


def _attention_weights(config: HybridConfig) -> Weights:
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    biases = config.attention_bias * (queries + 2 * keys + hidden)
    return Weights(2 * hidden * (queries + keys) + biases)


def _mlp_weights(config: HybridConfig, inner: int | None = None) -> Weights:
    hidden, inner = config.hidden_size, inner or config.intermediate_size
    return Weights(2 * hidden * inner + config.mlp_bias * (hidden + inner))


def _moe_weights(config: HybridConfig) -> Weights:
    hidden, latent = config.hidden_size, config.moe_latent_size
    always = _mlp_weights(config, config.moe_shared_expert_intermediate_size).always
    always += config.n_routed_experts * hidden
    if latent:
        always += 2 * hidden * latent + config.mlp_bias * (hidden + latent)
    expert = 2 * (latent or hidden) * config.moe_intermediate_size
    return Weights(always, config.n_routed_experts * expert)


def backbone_weights(config: HybridConfig) -> int:
    """Numbers in the stack, the embedding and the head (one table when they are tied)."""
    layers = sum(layer_weights(config, letter).total for letter in config.hybrid_override_pattern)
    tables = 1 if config.tie_word_embeddings else 2
    return layers + config.hidden_size * (1 + tables * config.vocab_size)


def mtp_weights(config: HybridConfig) -> int:
    """Numbers in the multi-token predictor; 0 in a model without one."""
    if not config.num_nextn_predict_layers:
        return 0
    pattern = config.mtp_hybrid_override_pattern
    layers = sum(layer_weights(config, letter).total for letter in pattern)
    return layers + _mtp_joint_weights(config)


def _mtp_joint_weights(config: HybridConfig) -> int:
    """The predictor's matrix from 2 x hidden to hidden and its three norms."""
    return config.hidden_size * (2 * config.hidden_size + 3)


# passes


def touched_share(config: HybridConfig, tokens: float) -> float:
    """Expected share of the routed experts that `tokens` tokens use: 1 - (1 - k / E)^tokens.

    Every token chooses k of E experts, independently of the others. Real routing is less even and
    neighbours agree, so the share is an upper estimate.
    """
    return 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens


def scan_flops(config: HybridConfig, block: Block) -> float:
    """The Mamba-2 scan by chunks of Q positions (arXiv 2405.21060, section 6).

    Per token: 2 Q N per group for C B^T, 2 Q P per head for its product with x, 2 N P per head each
    to gather and to read the state; the last two again for the scan from the end.
    """
    chunk = min(config.chunk_size, block.positions)
    directions = 2 if block.bidirectional and config.mamba_direction != "forward" else 1
    inside = 2 * chunk * (config.ssm_state_size * config.n_groups + config.mamba_inner_size)
    across = 4 * config.ssm_state_size * config.mamba_inner_size
    return block.tokens * (inside + directions * across)


def layer_cost(config: HybridConfig, letter: str, block: Block) -> Cost:
    """One layer over a block: its weights, and what it moves of its cache."""
    weights = layer_weights(config, letter)
    read = weights.always
    used = weights.always
    if weights.routed:
        read += weights.routed * touched_share(config, block.tokens)
        used += weights.routed * config.num_experts_per_tok / config.n_routed_experts
    cost = Cost(BF16 * read, 2 * block.tokens * used)
    if letter == "M":
        state = ssm_bytes_per_sequence(config, "M") + conv_bytes_per_sequence(config, "M")
        cost += Cost(block.batch * block.state_moves * state, scan_flops(config, block))
    if letter == "*":
        moved = block.batch * (block.cached + (block.positions if block.keeps else 0))
        queries = config.num_attention_heads * config.head_dim
        cost += Cost(
            moved * kv_bytes_per_token(config, "*"),
            4 * block.tokens * queries * block.keys_per_query,
        )
    return cost


def stack_cost(config: HybridConfig, pattern: str, block: Block) -> Cost:
    """All layers of a pattern over a block."""
    kinds = Counter(pattern)  # layers of one kind cost the same
    costs = (layer_cost(config, letter, block).times(kinds[letter]) for letter in kinds)
    return sum(costs, Cost())


def head_cost(config: HybridConfig, positions: float) -> Cost:
    """The final norm and the logits of so many positions, over the whole vocabulary."""
    numbers = config.hidden_size * (config.vocab_size + 1)
    return Cost(BF16 * numbers, 2 * positions * numbers)


def lookup_cost(config: HybridConfig, tokens: float) -> Cost:
    """Rows of the embedding; none beside a tied head, which is the same table read whole."""
    if config.tie_word_embeddings:
        return Cost()
    return Cost(BF16 * config.hidden_size * min(tokens, config.vocab_size))


def expected_embedding_cost(config: HybridConfig, positions: float) -> Cost:
    """The product of predicted probabilities and embedding at so many positions.

    A tied table is read once, by the head.
    """
    numbers = config.hidden_size * config.vocab_size
    table = 0 if config.tie_word_embeddings else numbers
    return Cost(BF16 * table, 2 * positions * numbers)


def noised_embedding_cost(config: HybridConfig, positions: float, num_top: int = NUM_TOP) -> Cost:
    """The noised simplex by order statistics: rows of K + 1 tokens, and H^2 for all others."""
    width, rows = config.hidden_size, num_top + 1
    flops = 2 * positions * width * (rows + width)
    return lookup_cost(config, positions * rows) + Cost(BF16 * width**2, flops)


def ar_step(config: HybridConfig, batch: int, context: float) -> Cost:
    """One token for each of `batch` texts that hold `context` tokens: the cache read and extended.

    A Mamba state is read and written.
    """
    block = Block(batch, 1, context)
    stack = stack_cost(config, config.hybrid_override_pattern, block)
    return stack + head_cost(config, batch) + lookup_cost(config, batch)


def denoise_step(
    config: HybridConfig, batch: int, source: int, target: int, joint: bool = False
) -> Cost:
    """One evaluation over whole targets: noised simplex, stack, and the sweep over the vocabulary.

    The sweep has two products: logits, and the expected embedding for self-conditioning. The noised
    simplex costs next to nothing, whatever the vocabulary.
    The source's cache is read and left as it is: a Mamba state is read only. With `joint` there is
    no cache and the source goes through the stack again, in one block with the target.
    """
    cached, positions = (0, source + target) if joint else (source, target)
    reads = 1 if cached else 0
    block = Block(batch, positions, cached, bidirectional=True, state_moves=reads, keeps=False)
    cost = stack_cost(config, config.hybrid_override_pattern, block)
    cost += head_cost(config, batch * target) + noised_embedding_cost(config, batch * target)
    return cost + expected_embedding_cost(config, batch * target)


def draft_pass(config: HybridConfig, batch: int, positions: float, cached: float) -> Cost:
    """The multi-token predictor over a block of each text, and the logits of its last position."""
    block = Block(batch, positions, cached)
    numbers = _mtp_joint_weights(config)
    cost = stack_cost(config, config.mtp_hybrid_override_pattern, block)
    cost += Cost(BF16 * numbers, 2 * block.tokens * numbers)
    return cost + head_cost(config, batch) + lookup_cost(config, block.tokens)


def verify_pass(config: HybridConfig, batch: int, context: float, drafts: int) -> Cost:
    """The backbone over the last token and its drafts, and the logits of all of them.

    A Mamba state is read here, and read and written again when the cache moves past what was
    accepted.
    """
    block = Block(batch, drafts + 1, context, state_moves=3)
    cost = stack_cost(config, config.hybrid_override_pattern, block)
    return cost + head_cost(config, block.tokens) + lookup_cost(config, block.tokens)


def mtp_round(
    config: HybridConfig, batch: int, context: float, drafts: int, acceptance: float
) -> list[Cost]:
    """The passes of one round of self-speculative decoding, in their order.

    The predictor first reads the `acceptance` tokens that the last round added, then one draft
    after the other, each with logits of its own; the backbone checks them in one pass. Every pass
    waits for the one before, so the round takes the sum of their times.
    """
    first = draft_pass(config, batch, acceptance, max(context - acceptance, 0))
    others = [draft_pass(config, batch, 1, context + i) for i in range(drafts - 1)]
    return [first, *others, verify_pass(config, batch, context, drafts)]


# summary


@dataclass(frozen=True)
class PassTime:
    """One step or round: seconds, and the bytes and FLOP behind them.

    bound: "memory" or "compute", of a round that of its longest pass.
    """

    seconds: float
    bytes: float
    flops: float
    bound: str


@dataclass(frozen=True)
class Roofline:
    """Least times of a model on a GPU, all in seconds for the whole batch.

    weight_bytes: all weights in bfloat16, the predictor's too. weights_fit: they are less than the
    GPU's memory; where they are not, the times are those of a GPU of this speed with more memory.
    ar_step, mtp_round: at the context that the source leaves. ar_seconds, mtp_seconds: `target`
    tokens, with the context growing. break_even_*: evaluations of the denoiser that cost as much.
    mtp_*: None in a model without a multi-token predictor. vocabulary_tensor_bytes: what one
    [batch, target, vocabulary] tensor would take in float32; denoising makes none.
    """

    gpu: str
    workload: Workload
    weight_bytes: int
    gpu_memory_bytes: float
    weights_fit: bool
    vocabulary_tensor_bytes: int
    ar_step: PassTime
    denoise_step: PassTime
    mtp_round: PassTime | None
    ar_seconds: float
    mtp_seconds: float | None
    break_even_ar: float
    break_even_mtp: float | None


def pass_time(costs: list[Cost], gpu: Gpu) -> PassTime:
    """Passes that run one after the other."""
    together = sum(costs, Cost())
    longest = max(costs, key=lambda cost: cost.seconds(gpu))
    seconds = math.fsum(cost.seconds(gpu) for cost in costs)
    return PassTime(seconds, together.bytes, together.flops, longest.bound(gpu))


def ar_seconds(config: HybridConfig, gpu: Gpu, work: Workload) -> float:
    """Time to write the targets by one step per token."""
    return math.fsum(
        ar_step(config, work.batch, work.source + i).seconds(gpu) for i in range(work.target)
    )


def mtp_seconds(config: HybridConfig, gpu: Gpu, work: Workload) -> float:
    """Time to write the targets in rounds: a token costs 1 / acceptance of a round at its place."""
    rounds = (
        mtp_round(config, work.batch, work.source + i, work.drafts, work.acceptance)
        for i in range(work.target)
    )
    return math.fsum(pass_time(passes, gpu).seconds for passes in rounds) / work.acceptance


def roofline(config: HybridConfig, gpu_name: str, work: Workload, joint: bool = False) -> Roofline:
    """All of it for one model, GPU and workload; `joint` as in `denoise_step`.

    Raises:
        UserError: a GPU that is not in `GPUS`.
    """
    if gpu_name not in GPUS:
        raise UserError(f"unknown GPU {gpu_name!r}; known are {', '.join(GPUS)}")
    gpu, has_mtp = GPUS[gpu_name], bool(config.num_nextn_predict_layers)
    weight_bytes = BF16 * (backbone_weights(config) + mtp_weights(config))
    step = pass_time([denoise_step(config, work.batch, work.source, work.target, joint)], gpu)
    plain, drafted, round_time = ar_seconds(config, gpu, work), None, None
    if has_mtp:
        drafted = mtp_seconds(config, gpu, work)
        passes = mtp_round(config, work.batch, work.source, work.drafts, work.acceptance)
        round_time = pass_time(passes, gpu)
    return Roofline(
        gpu=gpu_name,
        workload=work,
        weight_bytes=weight_bytes,
        gpu_memory_bytes=gpu.memory,
        weights_fit=weight_bytes < gpu.memory,
        vocabulary_tensor_bytes=FP32 * work.batch * work.target * config.vocab_size,
        ar_step=pass_time([ar_step(config, work.batch, work.source)], gpu),
        denoise_step=step,
        mtp_round=round_time,
        ar_seconds=plain,
        mtp_seconds=drafted,
        break_even_ar=plain / step.seconds,
        break_even_mtp=None if drafted is None else drafted / step.seconds,
    )
