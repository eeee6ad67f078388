"""The Mamba-2 mixer (arXiv 2405.21060), causal or over a block in both directions.

Letters: B batch, L length, I inner channels (heads x head width), D conv channels, H heads.
"""

import torch
from torch import Tensor, nn

from tess.backbones.cache import MambaInputs, MambaState
from tess.backbones.config import HybridConfig
from tess.backbones.context import BlockContext
from tess.kernels.conv import behind_padding, causal_conv1d, next_window
from tess.kernels.norms import gated_group_rms_norm, wide_dtype
from tess.kernels.ssd import ssd_scan, ssd_step, step_sizes


class GatedNorm(nn.Module):
    """Weight of the gated group RMS norm, under the released name `norm.weight`."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.mamba_inner_size))
        self.num_groups, self.eps = config.n_groups, config.layer_norm_epsilon

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x SiLU(gate), normalised per group; shapes [B, L, I]."""
        return gated_group_rms_norm(x, gate, self.weight, self.num_groups, self.eps)


class Mamba2Mixer(nn.Module):
    """Input projection, causal convolution, selective scan, gated norm, output projection."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.width = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.states = config.n_groups, config.ssm_state_size
        self.inner, self.conv_dim = config.mamba_inner_size, config.conv_dim
        self.chunk_size, self.limits = config.chunk_size, tuple(config.time_step_limit)
        self.direction = config.mamba_direction

        rows = self.inner + self.conv_dim + self.heads
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=config.use_bias)
        self.conv1d = nn.Conv1d(  # holds the weights; kernels/conv.py does the work
            self.conv_dim, self.conv_dim, config.conv_kernel,
            groups=self.conv_dim, bias=config.use_conv_bias,
        )
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedNorm(config)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.use_bias)
        if self.direction == "gated":
            self.reverse_gate = nn.Parameter(torch.zeros(self.heads))

    def forward(self, hidden_BLH: Tensor, context: BlockContext) -> Tensor:
        """Mix positions of a block [B, L, hidden], from the cached state if there is one."""
        state = context.incoming.get(self.layer_idx)
        gate_BLI, conv_in_BLD, dt_BLH = self.in_proj(hidden_BLH).split(
            [self.inner, self.conv_dim, self.heads], dim=-1
        )
        if context.position_mask is not None:  # padding: no input to the convolution
            conv_in_BLD = conv_in_BLD * context.position_mask[..., None]

        y_BLI, new_state = self._mix(conv_in_BLD, dt_BLH, state, context)
        if context.update_cache:
            context.outgoing.by_layer[self.layer_idx] = new_state
        return self.out_proj(self.norm(y_BLI, gate_BLI))

    def _mix(
        self, conv_in_BLD: Tensor, dt_BLH: Tensor, state: MambaState | None, context: BlockContext
    ) -> tuple[Tensor, MambaState | None]:
        window = None if state is None else state.conv_window
        if window is not None and context.position_mask is not None:
            conv_in_BLD, window = behind_padding(conv_in_BLD, window, context.position_mask)
        taps = self.conv1d.weight.shape[-1]
        mixed_BLD = causal_conv1d(conv_in_BLD, self.conv1d.weight[:, 0], self.conv1d.bias, window)
        x, b, c = mixed_BLD.split([self.inner, *[self.groups * self.states] * 2], dim=-1)
        x = x.unflatten(-1, (self.heads, self.width))
        b = b.unflatten(-1, (self.groups, self.states))
        c = c.unflatten(-1, (self.groups, self.states))
        decay = -self.A_log.to(wide_dtype(x)).exp()
        steps = {"dt_bias_H": self.dt_bias, "dt_softplus": True, "dt_limits": self.limits}
        mask = context.position_mask
        if context.record is not None:
            dt = step_sizes(dt_BLH, decay.dtype, **steps, mask=mask)
            context.record[self.layer_idx] = MambaInputs(conv_in_BLD, x, dt, b, decay)

        if state is not None and x.shape[1] == 1:
            y, ssm = ssd_step(
                x[:, 0], dt_BLH[:, 0], decay, b[:, 0], c[:, 0], state.ssm_state,
                d_H=self.D, **steps, mask_B=None if mask is None else mask[:, 0],
            )
            y = y[:, None]
        else:
            both = context.bidirectional and self.direction != "forward"
            y, ssm = ssd_scan(
                x, dt_BLH, decay, b, c,
                d_H=self.D, **steps, mask_BL=mask,
                chunk_size=self.chunk_size,
                direction="bidirectional" if both else "forward",
                reverse_scale_H=self.reverse_gate if both and self.direction == "gated" else None,
                initial_state_BHPN=None if state is None else state.ssm_state,
                return_final_state=context.update_cache,
            )
        new_state = None
        if context.update_cache:
            new_state = MambaState(next_window(conv_in_BLD, taps, window), ssm)
        return y.flatten(2), new_state
