"""Compare TESS, AR and AR + MTP on one backbone, from a recipe to a report.

Trains both arms (or takes checkpoints), writes the test rows with every system, scores them with
intervals and paired tests, times them, and writes report.json (keys: docs/comparison.md),
report.md and two figures. The same command goes on from what is finished. Example:

    tess-compare --recipe scripts/recipes/compare_smallest.yaml
"""

import argparse
from collections.abc import Sequence

from tess.cli import Parser, no_collection, run
from tess.comparison.settings import PARTS
from tess.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="YAML or JSON file; keys: docs/comparison.md")
    what.add_argument(
        "--overview", nargs="+", metavar="REPORT", help="no comparison: a table and a figure over "
        "finished ones, by their report.json or folder, into --output_dir",
    )
    add("--output_dir", help="folder of everything that is written (default: the recipe's)")
    add("--data_root", help="folder that relative file names start from (default: the recipe's)")
    add(
        "--only", choices=PARTS,
        help="train: no more than that; decode: write and time with what is trained; report: "
        "from what is written",
    )
    add(
        "--no_plots", dest="plots", action="store_false", help="draw no figures (they need "
        "matplotlib: pip install 'tess-diffusion[plots]')",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.overview:
        _overview(args)
        return
    with no_collection():
        from tess.comparison.recipe import read_recipe
        from tess.comparison.run import compare

    recipe = read_recipe(args.recipe, args.output_dir, args.data_root)
    report = compare(
        recipe, only=args.only, plots=args.plots, progress=True,
        say=lambda line: print(line, flush=True),
    )
    if report is not None:
        print(f"wrote {report} and {report.with_name('report.md').name} beside it")


def _overview(args: argparse.Namespace) -> None:
    if args.output_dir is None:
        raise UserError("--overview needs an --output_dir to write to")
    if args.only or args.data_root:
        raise UserError("--only and --data_root belong to --recipe")

    from tess.comparison.overview import read_reports, write_overview
    from tess.storage.files import prepare_output_dir

    folder = prepare_output_dir(args.output_dir)
    written = write_overview(read_reports(args.overview), folder, plots=args.plots)
    print(f"wrote {', '.join(str(path) for path in written)}")


def command() -> None:
    """`tess-compare`."""
    run(main)
