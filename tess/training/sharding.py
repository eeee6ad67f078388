"""FSDP2: a model whose weights, gradients and optimizer states are spread over the processes."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

FORWARD_METHODS = ("read_source", "predict", "length_log_probs")
"""Methods of a model beside `forward` that a loss calls, and that need its weights gathered."""


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model's parameters in place over all processes (`torch.distributed.fsdp`).

    Every layer of the backbone is a unit, gathered when it runs. The rest is another, which stays
    gathered from the forward to the backward pass: its weights are read past their modules (the
    embedding as a matrix by the simplex and by the head, the multi-token predictor's norms), so
    they cannot be units of their own.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in model.backbone.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in FORWARD_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to the model."""
    return isinstance(model, FSDPModule)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors; of a sharded model a copy, which all processes ask for."""
    state = model.state_dict()
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}


@torch.no_grad()
def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, sharded model or not; names have to be the model's."""
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    own = model.state_dict()
    if differing := own.keys() ^ state.keys():
        raise ValueError(f"only in the model or only in the state: {sorted(differing)[0]}")
    for name, tensor in own.items():
        value = state[name].to(tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


def whole_copy(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A model of the same config with these whole tensors, on the CPU."""
    # fully_shard gives a model a class made of FSDPModule and its own
    kind = type(model).__bases__[1] if is_sharded(model) else type(model)
    copy = kind(model.config)
    if copy.can_generate():
        copy.generation_config = model.generation_config
    copy.load_state_dict(state)
    return copy
