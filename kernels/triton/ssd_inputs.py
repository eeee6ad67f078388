"""What the backward passes of the scan share: its inputs, its gradients, sizes and block constants.

Letters: B batch, L length, Q chunk length, C chunks, H heads, P head width, G groups, N states.
"""

from typing import NamedTuple

import triton
from torch import Tensor

from tess.kernels.triton.launch import dot_precision, wide_type
from tess.kernels.triton.ssd_forward import CHUNK


class ScanGradients(NamedTuple):
    """Of one scan; each in the dtype of what it belongs to, those of numbers per head float32."""

    x_BLHP: Tensor
    dt_BLH: Tensor
    a_H: Tensor
    b_BLGN: Tensor
    c_BLGN: Tensor
    d_H: Tensor
    bias_H: Tensor
    scale_H: Tensor
    initial_BHPN: Tensor


class ScanInputs(NamedTuple):
    """What the forward pass was given and what it left for here."""

    x_BLHP: Tensor
    raw_BLH: Tensor
    a_H: Tensor
    b_BLGN: Tensor
    c_BLGN: Tensor
    d_H: Tensor | None
    bias_H: Tensor | None
    mask_BL: Tensor | None
    sequence_BL: Tensor | None
    scale_H: Tensor | None
    initial_BHPN: Tensor | None
    dt_BHL: Tensor
    incl_BHL: Tensor
    cb: Tensor

    def rows(self, part: slice) -> "ScanInputs":
        """Some rows of the batch."""
        per_head = ("a_H", "d_H", "bias_H", "scale_H")
        return ScanInputs(
            *(
                value if value is None or name in per_head else value[part]
                for name, value in self._asdict().items()
            )
        )


class PositionParts(NamedTuple):
    """What each position adds to sums over positions; all [B, H, L']."""

    dt: Tensor
    sum: Tensor
    """To the gradient by the decays up to here, and up to before here."""
    excl: Tensor
    """Of that, up to before here; only with a reverse scan."""
    over: Tensor
    """To the gradient by all decays of the chunk."""
    d: Tensor
    scale: Tensor


def sizes(inputs: ScanInputs) -> tuple[int, ...]:
    _, length, heads, width = inputs.x_BLHP.shape
    groups, states = inputs.b_BLGN.shape[2:]
    return length, inputs.cb.shape[1], heads, heads // groups, width, states


def block_constants(inputs: ScanInputs) -> dict:
    x = inputs.x_BLHP
    states = inputs.b_BLGN.shape[3]
    return {
        "Q": CHUNK, "BLOCK_N": max(16, triton.next_power_of_2(states)), "WIDE": wide_type(x),
        "PRECISION": dot_precision(x),
    }


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])
