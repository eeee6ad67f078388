"""Training in several processes that computes what one process with all the rows would.

Every process draws the random numbers of the whole step's batch and keeps those of its own rows
(`own_rows`), and every weighted mean is one over all processes' rows (`mean_shares`).
"""

# P processes, K means, N rows here

from collections.abc import Callable

import torch
from torch import Tensor, distributed


def processes() -> tuple[int, int]:
    """How many processes train together, and which of them this one is; (1, 0) alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


def own_rows(draw: Callable[[int], Tensor], count: int) -> Tensor:
    """This process's part [..., N] of random numbers drawn for all processes' rows.

    The processes' generators are in step: one seed, and the same draws in all of them. So each
    draws for all rows, in the order of the processes, which are the numbers that one process with
    all rows draws.

    Args:
        draw: how many rows -> numbers from torch's generator, rows in the last dimension.
        count: N, the same in every process.
    """
    size, index = processes()
    return draw(size * count)[..., index * count : (index + 1) * count]


def mean_shares(weights_K: Tensor) -> Tensor:
    """What each of K weighted means over this process's rows is to be multiplied by.

    The mean over the processes of these products is the weighted mean over all rows: the factors
    are P w / (sum of w over the processes), in float32. Every process has to call it, with the same
    K.

    weights_K: the sum of the weights behind each mean.
    """
    size, _ = processes()
    own_K = weights_K.detach().float()
    if size == 1:
        return torch.ones_like(own_K)
    total_K = own_K.clone()
    distributed.all_reduce(total_K)
    # where no process has a row that counts, all means are 0
    return torch.where(total_K > 0, size * own_K / total_K, 0.0)
