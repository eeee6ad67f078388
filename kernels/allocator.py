"""Keep freed memory in the process.

glibc hands the top of its heap back to the system as soon as a few megabytes of it are free, and
every forward pass then touches its pages anew: a fifth of the time of a small model on a CPU. How
much it keeps grows with the largest block that was ever freed, up to 32 MiB, of which it keeps
twice as much (mallopt(3), M_MMAP_THRESHOLD). A block that is freed without being touched costs
nothing. Other allocators are not affected.
"""

import torch

LARGEST = 31 * 2**20  # bytes


def keep_freed_memory() -> None:
    """Make glibc keep up to 62 MiB of freed memory instead of returning it at once."""
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
