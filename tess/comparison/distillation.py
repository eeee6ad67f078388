"""Sequence-level distillation in a comparison: the AR arm writes what the TESS arm learns.

Of a stage with `distilled_rows` both arms have the same training sources, as many updates and the
same batches; the targets of the AR arm are the data's, those of the TESS arm are what the finished
AR arm wrote for the sources, greedily or with beams (Kim and Rush, arXiv 1606.07947; for parallel
decoders Gu et al., arXiv 1711.02281).
"""

import json
from collections.abc import Callable

import torch

from tess.comparison.arms import Arm, finished_arm
from tess.comparison.timing import evenly_spaced
from tess.data.texts import load_data
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.storage.files import write_atomically
from tess.storage.kept import digest, keep, kept

BATCH_SIZE, CHUNK = 128, 2048


def distill(arm: Arm, advance: Callable[[int], None] = lambda rows: None) -> int:
    """Write the training file of a distilled arm with its teacher, unless it is there.

    The file's lines have `source` and `target`; empty texts are left out. Every `CHUNK` sources
    are kept as they are done.

    advance: told how many sources are done since the last call.

    Returns:
        The number of sources that were written for in this call: 0 where all were there.

    Raises:
        UserError: an unfinished teacher, training rows without a source, or only empty texts.
    """
    teacher, path = arm.teacher, arm.texts
    weights = finished_arm(teacher).weights
    rows, _ = load_data(teacher.parsed.data, want_eval=False)
    chosen = [rows[i][0] for i in evenly_spaced(len(rows), arm.distilled_rows)]
    if None in chosen:
        raise UserError(f"{arm.label}: distilled_rows needs training rows with a source")
    key = {"weights": weights, "sources": digest(chosen), "rows": len(chosen)}
    record, part = path.with_suffix(".json"), path.with_suffix(".part.json")
    if path.is_file() and kept(record, key):
        advance(len(chosen))
        return 0
    texts: list[str] = (kept(part, key) or {"texts": []})["texts"]
    advance(len(texts))
    before = len(texts)
    beams = arm.distilled_num_beams
    decoder = load_decoder(teacher.final, "ar", torch.float32, num_beams=beams)
    width = max(BATCH_SIZE // beams, 1)
    while len(texts) < len(chosen):
        now = chosen[len(texts) : len(texts) + CHUNK]
        rows = decoder.encode(now, warn=False).rows  # the training says what it drops or cuts
        written = decoder.generate_ids(
            rows, batch_size=width, on_batch=lambda batch: advance(len(batch))
        )
        texts += [one.text for one in written]
        keep(part, key, {"texts": texts})
    pairs = [
        {"source": source, "target": text}
        for source, text in zip(chosen, texts, strict=True)
        if text.strip()
    ]
    if not pairs:
        raise UserError(f"{arm.label}: {teacher.label} wrote nothing but empty texts to learn from")
    write_atomically(path, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs))
    keep(record, key, {"pairs": len(pairs)})
    part.unlink(missing_ok=True)
    return len(chosen) - before
