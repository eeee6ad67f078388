"""The position-wise mixers: squared-ReLU MLP and the (latent) mixture of experts.

Letters: T tokens, E experts, S experts per token, D width.
"""

import torch
from torch import Tensor, nn

from tess.backbones.config import HybridConfig
from tess.backbones.context import BlockContext
from tess.kernels.activation import squared_relu
from tess.kernels.experts import experts, route_tokens
from tess.kernels.norms import wide_dtype


class MLP(nn.Module):
    """down relu(up x)^2, no gate (arXiv 2109.08668 for the activation)."""

    def __init__(self, config: HybridConfig, inner_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, inner_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, context: BlockContext | None = None) -> Tensor:
        """[..., hidden] -> [..., hidden]; the context is not needed."""
        return self.down_proj(squared_relu(self.up_proj(hidden)))


class Router(nn.Module):
    """Sigmoid router whose bias steers the choice of experts but not their weights."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        experts_, hidden = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(experts_, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts_, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(experts_, dtype=torch.int64), persistent=False)
        self.choice = {
            "top_k": config.num_experts_per_tok,
            "num_groups": config.n_group,
            "top_groups": config.topk_group,
            "normalize": config.norm_topk_prob,
            "scaling": config.routed_scaling_factor,
        }

    def forward(self, hidden_TD: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Expert ids [T, S] and weights [T, S] float32; scores are float32 under autocast too.

        `real_T` is False at padding, which does not count as load; None: no padding.
        """
        with torch.autocast(hidden_TD.device.type, enabled=False):
            wide = wide_dtype(hidden_TD)
            logits = nn.functional.linear(hidden_TD.to(wide), self.weight.to(wide))
            bias_E = self.e_score_correction_bias.to(wide)
            ids, weights = route_tokens(logits, bias_E, **self.choice)
        if self.training:
            with torch.no_grad():  # no count that the host would wait for
                chosen = ids.flatten()
                counted = torch.ones_like(chosen)
                if real_T is not None:
                    counted = real_T.long().repeat_interleave(ids.shape[1])
                self.load.index_add_(0, chosen, counted)
        return ids, weights

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Raise the bias of experts used less than average since the last call, lower the others'.

        Auxiliary-loss-free balancing (arXiv 2408.15664). In a distributed run loads are summed.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load)
        load = self.load.float()
        self.e_score_correction_bias += rate * (load.mean() - load).sign()
        self.load.zero_()


def balance_routers(model: nn.Module, rate: float) -> None:
    """One step of auxiliary-loss-free balancing in every mixture of experts that is trained."""
    for module in model.modules():
        if isinstance(module, Router) and module.weight.requires_grad:
            module.balance(rate)


class StackedExperts(nn.Module):
    """All routed experts' weights as two tensors [E, out, in]; files hold them one by one."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        width = config.moe_latent_size or config.hidden_size
        inner, count = config.moe_intermediate_size, config.n_routed_experts
        self.up_proj = nn.Parameter(torch.empty(count, inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, hidden_TD: Tensor, ids_TS: Tensor, weights_TS: Tensor) -> Tensor:
        """Weighted sum of each token's experts."""
        return experts(hidden_TD, ids_TS, weights_TS, self.up_proj, self.down_proj)


class MixtureOfExperts(nn.Module):
    """Routed experts plus one shared expert; with `moe_latent_size` the experts work in a latent.

    In LatentMoE (arXiv 2601.18089) router and shared expert still see the full hidden state.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = StackedExperts(config)
        self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size)
        self.latent = config.moe_latent_size is not None
        if self.latent:
            hidden, latent, bias = config.hidden_size, config.moe_latent_size, config.mlp_bias
            self.fc1_latent_proj = nn.Linear(hidden, latent, bias=bias)
            self.fc2_latent_proj = nn.Linear(latent, hidden, bias=bias)

    def forward(self, hidden: Tensor, context: BlockContext | None = None) -> Tensor:
        """[..., hidden] -> [..., hidden]; every token is routed on its own."""
        flat_TD = hidden.flatten(0, -2)
        mask = None if context is None else context.position_mask
        ids, weights = self.gate(flat_TD, None if mask is None else mask.flatten())
        # the expert weights bypass nn.Linear, so autocast has to be asked what it would choose
        if torch.is_autocast_enabled(flat_TD.device.type):
            flat_TD = flat_TD.to(torch.get_autocast_dtype(flat_TD.device.type))
        routed = self.fc1_latent_proj(flat_TD) if self.latent else flat_TD
        routed = self.experts(routed, ids, weights)
        if self.latent:
            routed = self.fc2_latent_proj(routed)
        return (routed + self.shared_experts(flat_TD)).view_as(hidden)
