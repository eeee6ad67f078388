#!/usr/bin/env python
"""Write tess/samples/dates.{train,test}.jsonl: a date as people write it, and as ISO 8601.

No date is in both files. The same program writes the same files.
"""

import json
import random
from datetime import date, timedelta
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[1] / "tess" / "samples"
FIRST, LAST = date(1980, 1, 1), date(2029, 12, 31)
SIZES = {"train": 500, "test": 50}


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    endings = {1: "st", 2: "nd", 3: "rd"} if day // 10 != 1 else {}
    return f"{day}{endings.get(day % 10, 'th')}"


def spellings(day: date) -> list[str]:
    """Ways to write a date that nobody can take for another."""
    return [
        f"{day.day} {day:%B} {day.year}",
        f"{day:%B} {day.day}, {day.year}",
        f"{day:%b} {ordinal(day.day)} {day.year}",
        f"the {ordinal(day.day)} of {day:%B}, {day.year}",
    ]


def make_rows() -> dict[str, list[dict[str, str]]]:
    """The rows of each file."""
    rng = random.Random(0)
    days = rng.sample(range((LAST - FIRST).days + 1), sum(SIZES.values()))
    rows = []
    for day in (FIRST + timedelta(days=number) for number in days):
        source = rng.choice(spellings(day))
        rows.append({"source": source, "target": day.isoformat(), "dataset": "tess_dates"})
    return {"train": rows[: SIZES["train"]], "test": rows[SIZES["train"] :]}


if __name__ == "__main__":
    for split, rows in make_rows().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (SAMPLES / f"dates.{split}.jsonl").write_text(text, encoding="utf-8")
