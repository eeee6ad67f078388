"""Semi-autoregressive writing: block after block, each denoised with all before it as context.

The order of SSD-LM (arXiv 2210.17432) and of block diffusion (arXiv 2503.09573). A block's context
is the source followed by the blocks before it. Where the source is read causally, a finished block
is read once into the cache, from whose keys and Mamba states the next one goes on; where it is read
in both directions, every part of the context depends on all of it and is read again.
"""

# B rows (examples times candidates), L positions of a block

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from tess.errors import UserError
from tess.sampling.loop import Denoised
from tess.sampling.sources import Context, derived_keys
from tess.sampling.writer import Writer, check_canvas


@dataclass(frozen=True)
class Blocks:
    """How a text is cut: blocks of `length` tokens, `total` tokens at most.

    Raises:
        UserError: what blocks do not go with, and lengths that cannot be meant.
    """

    writer: Writer
    length: int
    total: int

    def __post_init__(self) -> None:
        if not isinstance(self.total, Integral):
            raise UserError(
                "block_length needs gen_length, the most tokens of the whole text as one number "
                f"above 0, got {self.total!r}"
            )
        if self.writer.keep_trace:
            raise UserError("return_trace belongs to one canvas; leave out block_length")
        check_canvas(self.writer.denoiser.config, [self.length])

    def write(
        self, context: Context, rows: Sequence[Sequence[int]], keys: Tensor, use_cache: bool
    ) -> Denoised:
        """All rows to their ends.

        context: the B encoded sources. rows: their ids. keys: [B] int64.
        """
        writer, sources = self.writer, [list(row) for row in rows]
        self._check_positions(sources)
        count = -(-self.total // self.length)
        keys_by_block = derived_keys(keys, count, "block").view(len(sources), count)
        texts: list[list[int]] = [[] for _ in sources]
        log_probs: list[list[float]] = [[] for _ in sources]
        nfe = [0] * len(sources)
        open_rows = list(range(len(sources)))
        for block in range(count):
            width = min(self.length, self.total - block * self.length)
            given = context if use_cache else context.without_cache()
            part = writer.write(given, [width] * len(open_rows), keys_by_block[open_rows, block])
            going_on, added = [], []
            for place, row in enumerate(open_rows):
                tokens = part.token_ids[place].tolist()
                texts[row] += tokens
                log_probs[row] += part.log_probs[place].tolist()
                nfe[row] += part.nfe[place]
                if set(writer.eos_token_id).isdisjoint(tokens):
                    going_on.append(place)
                    added.append(self._without_padding(tokens))
            if not going_on or block + 1 == count or writer.interrupted():
                break
            open_rows = [open_rows[place] for place in going_on]
            context = self._extended(
                context.select(torch.tensor(going_on, device=writer.device)),
                added,
                [sources[row] + self._without_padding(texts[row]) for row in open_rows],
                use_cache,
            )
        return self._joined(texts, log_probs, nfe)

    def _extended(
        self,
        context: Context,
        added: list[list[int]],
        whole: list[list[int]],
        use_cache: bool,
    ) -> Context:
        """The context with each row's finished block behind it."""
        writer = self.writer
        if not use_cache:
            return writer.pad(whole)
        config = writer.denoiser.config
        if config.source_encoding != "causal" or config.label_shift or not all(added):
            return writer.read(whole)[0]
        new = writer.pad(added)
        source_ids = torch.cat([context.source_ids, new.source_ids], dim=1)
        source_mask = torch.cat([context.source_mask, new.source_mask], dim=1)
        cache = context.cache.snapshot()
        writer.denoiser.extend_source(cache, source_ids, source_mask, new.source_ids.shape[1])
        return Context(source_ids, source_mask, cache)

    def _without_padding(self, tokens: list[int]) -> list[int]:
        """A row may hold padding amid its text; it is no context."""
        return [token for token in tokens if token != self.writer.pad_token_id]

    def _check_positions(self, sources: list[list[int]]) -> None:
        positions = self.writer.denoiser.config.num_source_positions
        before_last = (-(-self.total // self.length) - 1) * self.length
        longest = max(map(len, sources)) + before_last
        if 0 < positions < longest:
            raise UserError(
                f"blocks up to {self.total} tokens need {longest} source positions, and the model "
                f"has learned {positions}; ask for a shorter gen_length"
            )

    def _joined(
        self, texts: list[list[int]], log_probs: list[list[float]], nfe: list[int]
    ) -> Denoised:
        token_ids = torch.full((len(texts), self.total), self.writer.pad_token_id)
        all_log_probs = torch.zeros(len(texts), self.total)
        for row, (tokens, values) in enumerate(zip(texts, log_probs, strict=True)):
            token_ids[row, : len(tokens)] = torch.tensor(tokens)
            all_log_probs[row, : len(values)] = torch.tensor(values)
        return Denoised(token_ids, all_log_probs, nfe)
