"""What several tests of kernels watch, and the memory that they are given."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Notes how many bytes the largest tensor has, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *found])
        self.products += "mm" in func.__name__.split(".")[0]
        return out


@pytest.fixture
def watching():
    return Watch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not yet written holds NaN or a number that is no index."""

    def poison(function):
        def make_poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(torch.nan)
            least = 0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min
            return tensor.fill_(max(-(10**6), least))

        return make_poisoned

    for home, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(home, name, poison(getattr(home, name)))
