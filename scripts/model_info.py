"""Parameters and cache sizes of a checkpoint: python scripts/model_info.py [DIR] [--json]"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tess.cli import default_checkpoint, run
from tess.model_info import describe


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read the configs, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "dir", type=Path, nargs="?", help="a checkpoint folder (default: the shipped one)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of text")
    args = parser.parse_args(argv)
    models = describe(args.dir or default_checkpoint())
    if args.json:
        print(json.dumps(models, indent=2))
        return
    for model in models:
        print(
            f"{model['folder']}: {model['kind']}, pattern {model['pattern']}, "
            f"hidden {model['hidden_size']}, vocabulary {model['vocab_size']}\n"
            f"  parameters {model['parameters']:,}, active per token "
            f"{model['active_parameters']:,}\n"
            f"  cache: {model['kv_bytes_per_token']:,} bytes per token (keys, values: bfloat16) + "
            f"{model['state_bytes_per_sequence']:,} bytes per sequence (Mamba states)"
        )


if __name__ == "__main__":
    run(main)
