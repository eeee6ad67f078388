"""Write a text for each source: tess-generate [TEXT ...] [--input FILE] [--flag value ...]

Prints the texts, the number of network evaluations (NFE) and the time. Without --checkpoint the
shipped one is used.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tess.cli import Parser, checkpoint_or_default, no_collection, run
from tess.decoders.options import DECODERS, add_sampler_flags, sampler_options
from tess.errors import UserError
from tess.options import check_seed
from tess.sampling.request import Request

if TYPE_CHECKING:
    from tess.decoders.base import Decoder, Generation
    from tess.sampling.call import TessPipelineOutput

BYTE_ORDER_MARK = "\ufeff"

JSON_KEYS = """\
--json prints one object; its keys are stable:
  decoder              "tess", "ar", "ar+mtp" or "tess+ar"
  checkpoint           the folder that was asked for
  num_parameters       of the model
  num_inference_steps, gen_length, seed, top_p, temperature
                       as given, or the flag's default; null leaves it to the decoder
  load_seconds         wall-clock time of loading the checkpoint
  generate_seconds     wall-clock time of writing all texts
  results              a list with an object per source, in order; a blank line of --input has one
                       without a text:
      source           the source
      text             the text
      num_new_tokens   tokens of the text, </s> included
      nfe              network evaluations over the target
      num_drafted, num_accepted
                       tokens drafted, and those of them in the text (ar+mtp, tess+ar; else 0)
"""


def make_parser() -> argparse.ArgumentParser:
    """The flags; names are stable."""
    parser = Parser(description=__doc__, epilog=JSON_KEYS)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="source texts")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="a file with one source per line; - reads stdin"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR | ID",
        help="a folder or a hub id, owner/name[@revision] (default: the shipped one)",
    )
    parser.add_argument(
        "--decoder", choices=DECODERS, help="default: tess where the checkpoint has it"
    )
    parser.add_argument(
        "--num_draft_tokens", type=int, metavar="N", help="drafted at a time by ar+mtp (default 3)"
    )
    parser.add_argument(
        "--num_beams", type=int, metavar="N", help="beams of ar (default 1, greedy search)"
    )
    parser.add_argument(
        "--length_penalty",
        type=float,
        metavar="A",
        help="of --num_beams: a text's score is log p / tokens^A (default 1)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="of ar: each text is the user's turn in the tokenizer's chat template",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        metavar="N",
        help="sampling steps of tess (default 16; 1 for tess+ar)",
    )
    parser.add_argument(
        "--gen_length",
        type=int,
        metavar="N",
        help="most new tokens (default: by the source's length)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed, same text (default 0)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="sample from this mass (default: the likeliest token)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="with --top_p (default 1)"
    )
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="texts at once (default 8)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a too long text instead of cutting it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, see below")
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help='a text with blanks for tess to fill, as "The {4} museum.": {n} is n tokens',
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="also write a page of every step of tess (HTML)"
    )
    parser.add_argument(
        "--live", action="store_true", help="show the text of tess while it is being denoised"
    )
    add_sampler_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    given = [text.replace(BYTE_ORDER_MARK, "") for text in args.texts]
    sources = given + (read_lines(args.input) if args.input else [])
    if not sources:
        raise UserError("give a text, or a file of texts with --input")
    if not all(text.strip() for text in given):
        raise UserError("expected a text, got an empty one (or only white space)")
    texts = [source for source in sources if source]
    options = {
        name: getattr(args, name)
        for name in ("num_inference_steps", "gen_length", "seed", "top_p", "temperature")
    }
    Request(**{name: value for name, value in options.items() if name != "seed"})
    check_seed(args.seed)
    at_once = [flag for flag in ("trace", "live", "template") if getattr(args, flag)]
    if at_once and args.batch_size is not None:
        raise UserError(f"--{at_once[0]} writes all texts at once; leave out --batch_size")
    sampler = sampler_options(args)
    checkpoint = checkpoint_or_default(args.checkpoint)
    with no_collection():
        from tess.decoders.load import load_decoder
        from tess.storage.files import check_writable

    if args.trace is not None:
        check_writable(args.trace)
    start = time.perf_counter()
    decoder = load_decoder(
        checkpoint,
        args.decoder,
        num_draft_tokens=args.num_draft_tokens,
        options=sampler,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        chat=args.chat,
    )
    loaded = time.perf_counter()
    out = None
    if at_once:
        results, out = write_one_batch(decoder, texts, args, options)
    else:
        results = decoder.generate(
            texts,
            batch_size=8 if args.batch_size is None else args.batch_size,
            strict=args.strict,
            **options,
        )
    seconds = {"load_seconds": loaded - start, "generate_seconds": time.perf_counter() - loaded}
    head = {
        "decoder": decoder.name,
        "checkpoint": str(checkpoint),
        "num_parameters": decoder.num_parameters,
    }
    if args.json:
        rows = as_rows(sources, results)
        report = {**head, **options, **seconds, "results": rows}
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print_texts(sources, results, head, seconds)
    if args.trace is not None:  # after the texts, which are worth more
        sys.stdout.flush()
        save_trace(args.trace, decoder, texts, out, options)
    return 0


def write_one_batch(
    decoder: "Decoder", texts: list[str], args: argparse.Namespace, options: dict[str, Any]
) -> "tuple[list[Generation], TessPipelineOutput]":
    """What needs every step, or a canvas with given tokens: all texts at once.

    Raises:
        UserError: for a decoder other than tess.
    """
    from tess.decoders.diffusion import TessDecoder
    from tess.sampling.control import template_tokens
    from tess.trace.live import LiveDenoising

    if not isinstance(decoder, TessDecoder):
        raise UserError(
            f"--trace, --live and --template belong to the tess decoder, and this one is "
            f"{decoder.name}"
        )
    fixed = None
    if args.template is not None:
        fixed = template_tokens(decoder.tokenizer, args.template).repeat(len(texts), 1)
    view = LiveDenoising(decoder.tokenizer, sys.stderr) if args.live else None
    with view if view is not None else nullcontext():
        return decoder.trace(
            texts,
            strict=args.strict,
            fixed_tokens=fixed,
            on_trace=None if view is None else view.update,
            **options,
        )


def save_trace(
    path: Path,
    decoder: "Decoder",
    texts: list[str],
    out: "TessPipelineOutput",
    options: dict[str, Any],
) -> None:
    """Write the page of every step."""
    from tess.storage.files import write_atomically
    from tess.trace.page import trace_page

    described = decoder.describe()
    count = described.num_candidates
    steps = options["num_inference_steps"] or decoder.default_num_inference_steps
    page = trace_page(
        out.trace,
        decoder.tokenizer,
        [text for text in texts for _ in range(count)],
        None,
        {**options, "scheduler": described.scheduler, "num_inference_steps": steps},
        lengths=[length for length in out.lengths for _ in range(count)],
        nfe=out.nfe if count == 1 else [n for each in out.candidates.nfe for n in each],
    )
    write_atomically(path, page)
    print(f"wrote {path}", file=sys.stderr)


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without byte-order marks; a blank one is "", and a notice counts those.

    Raises:
        UserError: no such file, not UTF-8, or no text in it.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {str(path)!r}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found other bytes") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    lines = [line.replace(BYTE_ORDER_MARK, "") for line in lines]
    lines = [line if line.strip() else "" for line in lines]
    if not any(lines):
        raise UserError(f"{path}: expected at least one text, found none")
    if blank := lines.count(""):
        said = f"{blank} of {len(lines)} lines of {path} are blank, and so is their text"
        print(said, file=sys.stderr)
    return lines


def by_source(sources: list[str], results: "list[Generation]") -> "list[Generation | None]":
    """The results in the places of their sources; None for a blank one."""
    written = iter(results)
    return [next(written) if source else None for source in sources]


def as_rows(sources: list[str], results: "list[Generation]") -> list[dict[str, Any]]:
    names = ("text", "num_new_tokens", "nfe", "num_drafted", "num_accepted")
    blank = dict.fromkeys(names, 0) | {"text": ""}
    return [
        {"source": source}
        | (blank if result is None else {name: getattr(result, name) for name in names})
        for source, result in zip(sources, by_source(sources, results), strict=True)
    ]


def print_texts(
    sources: list[str],
    results: "list[Generation]",
    head: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    for result in by_source(sources, results):
        text = "" if result is None else result.text
        # with several sources a text is a line, so that lines keep their numbers
        print(text if len(sources) == 1 else " ".join(text.split("\n")))
    evaluations = [result.nfe for result in results]
    tokens = sum(result.num_new_tokens for result in results)
    most = max(evaluations)
    mean = sum(evaluations) / len(evaluations)
    nfe = f"{most}" if len(results) == 1 else f"{mean:.1f} mean, {most} most"
    drafted = sum(result.num_drafted for result in results)
    kept = sum(result.num_accepted for result in results)
    drafts = f" · {kept} of {drafted} drafted tokens kept" if drafted else ""
    print(
        f"[{head['decoder']}] network evaluations: {nfe}{drafts} · {tokens} new tokens in "
        f"{seconds['generate_seconds']:.2f} s · loading {seconds['load_seconds']:.2f} s · "
        f"{head['num_parameters'] / 1e6:.1f} M parameters"
    )


def command() -> None:
    """`tess-generate`."""
    run(main)
