"""Pairs (token, slot) sorted by expert: a stable counting sort, and the row tiles it makes.

No atomics and no count that the host would have to know: the same input gives the same order.

Letters: N pairs (token * S + slot), E experts, B blocks of pairs, M row tiles.
"""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, launch

PAIRS_PER_BLOCK = 256  # ranked by comparing each with each

SORT = Table("token_sort", {"sm_80": Config({"CHUNK": 32}, num_warps=8, num_stages=1)})
RANK = Table("token_sort_rank", {"sm_80": Config({"CHUNK": 32}, num_warps=8, num_stages=1)})
SCAN = Table("token_sort_scan", {"sm_80": Config({"BLOCK": 1024}, num_warps=4, num_stages=1)})
ENDS = Table("token_sort_ends", {"sm_80": Config({}, num_warps=4, num_stages=1)})
SCATTER = Table("token_sort_scatter", {"sm_80": Config({}, num_warps=4, num_stages=1)})
TILES = Table("row_tiles", {"sm_80": Config({"CHUNK": 32}, num_warps=1, num_stages=1)})


@triton.jit
def _compare(ids_ptr, first, pairs, expert, PAIRS: tl.constexpr, CHUNK: tl.constexpr):
    """For each pair of a block: earlier ones of the same expert, and ones of a lower expert."""
    here = tl.arange(0, PAIRS)
    before, lower = tl.zeros((PAIRS,), tl.int32), tl.zeros((PAIRS,), tl.int32)
    for start in range(0, PAIRS, CHUNK):
        there = start + tl.arange(0, CHUNK)
        other = tl.load(ids_ptr + first + there, mask=first + there < pairs, other=2147483647)
        other = other.to(tl.int32)[None, :]
        same = (other == expert[:, None]) & (there[None, :] < here[:, None])
        before += tl.sum(same.to(tl.int32), axis=1)
        lower += tl.sum((other < expert[:, None]).to(tl.int32), axis=1)
    return before, lower


@triton.jit
def _count(expert, valid, BLOCK_E: tl.constexpr):
    """Valid pairs of each expert [BLOCK_E]."""
    counts = tl.histogram(tl.where(valid, expert, 0), BLOCK_E)
    invalid = tl.sum(tl.where(valid, 0, 1), axis=0)
    return counts - tl.where(tl.arange(0, BLOCK_E) == 0, invalid, 0)


@triton.jit
def _sort_block(
    ids_ptr, order_ptr, ends_ptr, pairs, experts,
    PAIRS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """Everything in one program, for as many pairs as one block holds."""
    here, index = tl.arange(0, PAIRS), tl.arange(0, BLOCK_E)
    valid = here < pairs
    expert = tl.load(ids_ptr + here, mask=valid, other=0).to(tl.int32)
    before, lower = _compare(ids_ptr, 0, pairs, expert, PAIRS, CHUNK)
    tl.store(order_ptr + lower + before, here, valid)
    tl.store(ends_ptr + index, tl.cumsum(_count(expert, valid, BLOCK_E), 0), index < experts)


@triton.jit
def _rank_pairs(
    ids_ptr, rank_ptr, count_ptr, pairs, experts, blocks,
    PAIRS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """Each pair's rank among those of its block and expert, and how many of each the block has."""
    block = tl.program_id(0).to(tl.int64)
    here, index = block * PAIRS + tl.arange(0, PAIRS), tl.arange(0, BLOCK_E)
    valid = here < pairs
    expert = tl.load(ids_ptr + here, mask=valid, other=0).to(tl.int32)
    before, _lower = _compare(ids_ptr, block * PAIRS, pairs, expert, PAIRS, CHUNK)
    tl.store(rank_ptr + here, before, valid)
    count = _count(expert, valid, BLOCK_E)
    tl.store(count_ptr + index.to(tl.int64) * blocks + block, count, index < experts)


@triton.jit
def _scan_blocks(count_ptr, offset_ptr, total_ptr, blocks, BLOCK: tl.constexpr):
    """For one expert: pairs in earlier blocks, for every block, and in all blocks."""
    expert = tl.program_id(0).to(tl.int64)
    carried = tl.sum(tl.zeros((BLOCK,), tl.int32), axis=0)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < blocks
        count = tl.load(count_ptr + expert * blocks + block, mask=inside, other=0)
        offset = carried + tl.cumsum(count, 0) - count
        tl.store(offset_ptr + expert * blocks + block, offset, inside)
        carried += tl.sum(count, axis=0)
    tl.store(total_ptr + expert, carried)


@triton.jit
def _expert_ends(total_ptr, ends_ptr, experts, BLOCK_E: tl.constexpr):
    index = tl.arange(0, BLOCK_E)
    total = tl.load(total_ptr + index, mask=index < experts, other=0)
    tl.store(ends_ptr + index, tl.cumsum(total, 0), index < experts)


@triton.jit
def _scatter_pairs(
    ids_ptr, rank_ptr, offset_ptr, ends_ptr, order_ptr, pairs, blocks, PAIRS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    here = block * PAIRS + tl.arange(0, PAIRS)
    valid = here < pairs
    expert = tl.load(ids_ptr + here, mask=valid, other=0).to(tl.int64)
    begin = tl.load(ends_ptr + expert - 1, mask=valid & (expert > 0), other=0)
    offset = tl.load(offset_ptr + expert * blocks + block, mask=valid, other=0)
    rank = tl.load(rank_ptr + here, mask=valid, other=0)
    tl.store(order_ptr + begin + offset + rank, here.to(tl.int32), valid)


@triton.jit
def _row_tiles(
    ends_ptr, tiles_ptr, experts, bound,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """One expert's tiles: expert, first row, row after the last. The program after the last expert
    marks what is left of the upper bound with an expert that does not exist."""
    own, index = tl.program_id(0), tl.arange(0, BLOCK_E)
    inside = index < experts
    end = tl.load(ends_ptr + index, mask=inside, other=0)
    begin = tl.load(ends_ptr + index - 1, mask=inside & (index > 0), other=0)
    count = (end - begin + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(index < own, count, 0), axis=0)
    last_tile = first_tile + tl.sum(tl.where(index == own, count, 0), axis=0)
    last_tile = tl.where(own == experts, bound, last_tile)
    row = tl.sum(tl.where(index == own, begin, 0), axis=0)
    end = tl.sum(tl.where(index == own, end, 0), axis=0)
    for start in range(first_tile, last_tile, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        written = tile < last_tile
        nothing = tl.zeros((CHUNK,), tl.int32)
        tl.store(tiles_ptr + tile, nothing + own, written)
        tl.store(tiles_ptr + bound + tile, row + (tile - first_tile) * BLOCK_M, written)
        tl.store(tiles_ptr + 2 * bound + tile, nothing + end, written)


def sort_by_expert(ids_N: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Order [N] (sorted position -> pair) and each expert's end in it [E], int32.

    Pairs of one expert keep their order; each id must lie in [0, experts).
    """
    pairs, blocks = len(ids_N), triton.cdiv(len(ids_N), PAIRS_PER_BLOCK)
    order_N = torch.empty(pairs, dtype=torch.int32, device=ids_N.device)
    ends_E = torch.empty(experts, dtype=torch.int32, device=ids_N.device)
    sizes = {"PAIRS": PAIRS_PER_BLOCK, "BLOCK_E": triton.next_power_of_2(experts)}
    if blocks > 1:
        _sort_blocks(ids_N, order_N, ends_E, blocks, sizes)
        return order_N, ends_E

    def run(config: Config) -> None:
        launch(_sort_block, (1,), ids_N, order_N, ends_E, pairs, experts, config=config, **sizes)

    SORT.run(ids_N, experts, run)
    return order_N, ends_E


def _sort_blocks(
    ids_N: Tensor, order_N: Tensor, ends_E: Tensor, blocks: int, sizes: dict[str, int]
) -> None:
    """Count and rank in blocks, sum the counts over blocks, then over experts, scatter."""
    pairs, experts = len(ids_N), len(ends_E)
    rank_N, total_E = torch.empty_like(order_N), torch.empty_like(ends_E)
    count_EB = torch.empty((experts, blocks), dtype=torch.int32, device=ids_N.device)
    offset_EB = torch.empty_like(count_EB)
    block_e, per_block = {"BLOCK_E": sizes["BLOCK_E"]}, {"PAIRS": sizes["PAIRS"]}

    def rank(config: Config) -> None:
        args = (ids_N, rank_N, count_EB, pairs, experts, blocks)
        launch(_rank_pairs, (blocks,), *args, config=config, **sizes)

    def scan(config: Config) -> None:
        launch(_scan_blocks, (experts,), count_EB, offset_EB, total_E, blocks, config=config)

    def ends(config: Config) -> None:
        launch(_expert_ends, (1,), total_E, ends_E, experts, config=config, **block_e)

    def scatter(config: Config) -> None:
        args = (ids_N, rank_N, offset_EB, ends_E, order_N, pairs, blocks)
        launch(_scatter_pairs, (blocks,), *args, config=config, **per_block)

    for table, run in ((RANK, rank), (SCAN, scan), (ENDS, ends), (SCATTER, scatter)):
        table.run(ids_N, experts, run)


def tile_bound(pairs: int, experts: int, block: int) -> int:
    """Most row tiles of `block` rows that any routing can need: each holds rows of one expert.

    With k experts in use the sum of ceil(count / block) is at most (pairs - k) // block + k.
    """
    used = min(pairs, experts)
    return (pairs - used) // block + used


def row_tiles(ends_E: Tensor, pairs: int, block: int) -> Tensor:
    """Expert, first row and row after the last of each row tile [3, M], M the upper bound.

    Tiles beyond those in use have the expert number E.
    """
    experts, bound = len(ends_E), tile_bound(pairs, len(ends_E), block)
    tiles_3M = torch.empty((3, bound), dtype=torch.int32, device=ends_E.device)
    sizes = {"BLOCK_M": block, "BLOCK_E": triton.next_power_of_2(experts)}

    def run(config: Config) -> None:
        grid = (experts + 1 if bound else 0,)
        launch(_row_tiles, grid, ends_E, tiles_3M, experts, bound, config=config, **sizes)

    TILES.run(ends_E, experts, run)
    return tiles_3M


@dataclass
class SortedPairs:
    """The pairs in order of their experts, with row tiles that are made once per height.

    Attributes:
        order_N: sorted position -> pair.
        ends_E: position after the last pair of each expert.
        top_k: pairs of one token.
    """

    order_N: Tensor
    ends_E: Tensor
    top_k: int
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    def tiles(self, block: int) -> Tensor:
        """`row_tiles` of this height."""
        if block not in self._tiles:
            self._tiles[block] = row_tiles(self.ends_E, len(self.order_N), block)
        return self._tiles[block]
