"""Parameters, cache sizes and least times: tess-info [DIR | ID | PRESET] [--gpu h100]

No weights are read, and a preset needs no files at all. With --gpu: the least time on one GPU of a
step of plain autoregressive decoding (AR), of a round of drafts from the multi-token predictor
(MTP), and of a denoising step over the whole target; see tess/costs/roofline.py for what is
counted.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tess.backbones.presets import PRESETS
from tess.cli import Parser, checkpoint_or_default, no_collection, run
from tess.costs.gpus import GPUS, Workload
from tess.errors import UserError

JSON_KEYS = """\
--json prints a list with one object per model in the folder; its keys are stable:
  folder                     where the model is; null for a preset
  preset                     its name; null for a folder
  kind                       "tess" or "ar"
  pattern                    a letter per layer: M Mamba-2, * attention, - MLP, E experts
  hidden_size, vocab_size    of the model
  parameters                 all but those of the multi-token predictor, tied weights once
  active_parameters          those of them that one token uses: of the routed experts the chosen
  mtp_parameters             those of the multi-token predictor; 0 without one
  mtp_active_parameters      those of them that one token uses
  kv_bytes_per_token         keys and values in bfloat16
  mtp_kv_bytes_per_token     the same of the multi-token predictor, which has its own
  state_bytes_per_sequence   Mamba states in float32 and convolution windows in bfloat16
  ssm_bytes_per_sequence, conv_bytes_per_sequence   the two parts of that
  roofline                   null without --gpu, else an object with
    gpu                      its name
    workload                 batch, source, target, drafts, acceptance: as given
    weight_bytes             all weights in bfloat16, the multi-token predictor's too
    gpu_memory_bytes         of the GPU
    weights_fit              whether they are fewer than that
    vocabulary_tensor_bytes  one [batch, target, vocabulary] float32 tensor, none of which is made
    ar_step, mtp_round, denoise_step   objects with seconds, bytes, flops and bound ("memory" or
                             "compute", of a round that of its longest pass); for the whole batch,
                             ar_step and mtp_round at the context that the source leaves
    ar_seconds, mtp_seconds  the whole target, with the context growing
    break_even_ar, break_even_mtp   denoising steps that take as long
    mtp_round, mtp_seconds, break_even_mtp   null in a model without a multi-token predictor
"""

WORK = {
    "batch": "texts at once",
    "source": "tokens of each source",
    "target": "tokens of each target",
    "drafts": "tokens that MTP drafts in a round",
    "acceptance": "tokens that a text gains in a round of MTP, the last one, which is no draft, "
    "included: an assumption, take a measured one",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read the configs, print."""
    args = make_parser().parse_args(argv)
    given = {name: getattr(args, name) for name in WORK if getattr(args, name) is not None}
    if given and args.gpu is None:
        raise UserError(f"--{next(iter(given))} belongs to the times, which need --gpu")
    model, work = checkpoint_or_default(args.model), Workload(**given)
    with no_collection():
        from tess.costs.model_info import describe

    models = describe(model, args.gpu, work)
    if args.json:
        print(json.dumps(models, indent=2))
        return
    for model in models:
        print(_sizes(model))
        if model["roofline"]:
            print(_times(model["roofline"]))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=JSON_KEYS)
    parser.add_argument(
        "model",
        metavar="DIR | ID | PRESET",
        nargs="?",
        help="a checkpoint's folder or hub id, ours or a released nemotron_h one (default: the "
        f"shipped one), or one of {', '.join(PRESETS)}; ./NAME is the folder of that name",
    )
    parser.add_argument("--gpu", choices=GPUS, help="print the least times on this GPU too")
    for field in fields(Workload):
        parser.add_argument(
            f"--{field.name}", type=field.type, help=f"{WORK[field.name]} (default {field.default})"
        )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text, see below")
    return parser


def _sizes(model: dict[str, Any]) -> str:
    lines = [
        f"{model['preset'] or model['folder']}: {model['kind']}, pattern {model['pattern']}, "
        f"hidden {model['hidden_size']}, vocabulary {model['vocab_size']}",
        f"  parameters {model['parameters']:,}, active per token {model['active_parameters']:,}",
        f"  cache: {model['kv_bytes_per_token']:,} bytes per token (keys, values: bfloat16) + "
        f"{model['state_bytes_per_sequence']:,} bytes per sequence (Mamba states)",
    ]
    if model["mtp_parameters"]:
        lines.append(
            f"  and a multi-token predictor: parameters {model['mtp_parameters']:,}, active "
            f"{model['mtp_active_parameters']:,}, {model['mtp_kv_bytes_per_token']:,} bytes of "
            "cache per token"
        )
    return "\n".join(lines)


def _times(found: dict[str, Any]) -> str:
    gpu, work, target = GPUS[found["gpu"]], found["workload"], found["workload"]["target"]
    weights, memory = f"{found['weight_bytes'] / 1e9:.4g} GB", f"{gpu.memory / 1e9:g} GB"
    fit = f"weights of {weights} fit its {memory}"
    if not found["weights_fit"]:
        fit = f"weights of {weights} DO NOT FIT its {memory}, the times are as if they did"
    lines = [
        f"  least times on one {gpu.title} ({gpu.flops / 1e12:g} TFLOP/s, "
        f"{gpu.bandwidth / 1e12:g} TB/s) with {work['source']} source and {target} target tokens, "
        f"batch {work['batch']}; {fit}",
        _pass("AR step", found["ar_step"]),
        _pass(f"MTP round, {work['drafts']} drafts", found["mtp_round"]),
        _pass("denoising step", found["denoise_step"]),
        _writing(f"{target} tokens by AR", found["ar_seconds"], found["break_even_ar"]),
    ]
    if found["mtp_round"]:
        how = f"{target} tokens by MTP, at an assumed {work['acceptance']:g} a round"
        lines.append(_writing(how, found["mtp_seconds"], found["break_even_mtp"]))
    lines.append(
        "    not counted: activations, launches, reading the source; not there: tensors over the "
        f"vocabulary, {found['vocabulary_tensor_bytes'] / 1e9:.2g} GB each"
    )
    return "\n".join(lines)


def _writing(how: str, seconds: float, steps: float) -> str:
    return f"    {how}: {seconds:.4g} s, as long as {steps:.1f} denoising steps"


def _pass(name: str, cost: dict[str, Any] | None) -> str:
    if cost is None:
        return f"    {name:22} – (no multi-token predictor)"
    return (
        f"    {name:22} {1e3 * cost['seconds']:8.4g} ms, bound by {cost['bound']}: "
        f"{cost['bytes'] / 1e9:.3g} GB, {cost['flops'] / 1e12:.3g} TFLOP"
    )


def command() -> None:
    """`tess-info`."""
    run(main)
