"""Parameters and cache sizes of a checkpoint: python scripts/model_info.py [DIR] [--json]"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tess.cli import default_checkpoint, run
from tess.model_info import describe

JSON_KEYS = """\
--json prints a list with one object per model in the folder; its keys are stable:
  folder                     where the model is
  kind                       "tess" or "ar"
  pattern                    a letter per layer: M Mamba-2, * attention, - MLP, E experts
  hidden_size, vocab_size    of the model
  parameters                 all, tied weights once
  active_parameters          those that one token uses: of the routed experts the chosen ones
  kv_bytes_per_token         keys and values in bfloat16
  state_bytes_per_sequence   Mamba states in float32 and convolution windows in bfloat16
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read the configs, print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=JSON_KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "dir", type=Path, nargs="?", help="a checkpoint folder (default: the shipped one)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text, see below")
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
