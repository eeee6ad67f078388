"""Trainings that tests/training/test_distributed.py compares, run by it alone and in two processes.

accelerate launch ... distributed_worker.py FOLDER: runs what FOLDER/cases.json lists, and a few
steps of sharded models; each process leaves FOLDER/results.RANK.pt.
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate.data_loader
import torch
import yaml
from torch import distributed
from torch.distributed.tensor import DTensor

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.feedforward import Router
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.schedulers.renoising import RenoisingScheduler
from tess.training import run
from tess.training.flags import parse_settings
from tess.training.losses import ar_loss, tess_loss
from tess.training.sharding import full_state, load_full_state, shard, whole_copy
from tess.training.trainer import TextTrainer
from tess.training.update import Batch, Update, processes

V, EOS = 64, 2
SIZES = {
    "vocab_size": V, "hybrid_override_pattern": "M*E-", "hidden_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
    "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": EOS, "tie_word_embeddings": True, "initializer_range": 0.1,
}


# Whole trainings


def watched_train(config: dict[str, Any], variant: str = "right") -> dict[str, Any]:
    """Train; what this process saw.

    losses: by step. start, end, average: the weights before, after, and their average. loads: how
    many tokens each expert had before an update, of this process's rows.
    """
    path = Path(config["output_dir"]).with_suffix(f".{processes()[1]}.yaml")
    path.write_text(yaml.safe_dump(config))
    seen: dict[str, Any] = {"loads": []}
    make, save, balance = run.make_trainer, TextTrainer.save_final, Router.balance

    def make_trainer(settings, prepared, *rest):
        seen["start"] = copy.deepcopy(prepared.parts.model.state_dict())
        return make(settings, prepared, *rest)

    def save_final(trainer, *rest):
        seen["end"] = copy.deepcopy(trainer.model.state_dict())
        seen["average"] = trainer.average and dict(trainer.average.tensors)
        history = trainer.state.log_history
        seen["losses"] = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
        save(trainer, *rest)

    def counted_balance(self, rate):
        seen["loads"].append(self.load.clone())
        balance(self, rate)

    with (
        patch.object(Router, "balance", counted_balance),
        patch.object(run, "make_trainer", make_trainer),
        patch.object(TextTrainer, "save_final", save_final),
        WRONG[variant](),
    ):
        run.train(parse_settings([str(path)]))
    return seen


@contextmanager
def gradients_not_averaged() -> Iterator[None]:
    right = TextTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        model.require_backward_grad_sync = False
        return right(self, model, *args, **kwargs)

    with patch.object(TextTrainer, "compute_loss", compute_loss):
        yield


@contextmanager
def the_same_rows() -> Iterator[None]:
    right = accelerate.data_loader.BatchSamplerShard.__init__

    def init(self, *args, **kwargs):
        right(self, *args, **kwargs | {"process_index": 0})

    with patch.object(accelerate.data_loader.BatchSamplerShard, "__init__", init):
        yield


@contextmanager
def buffers_of_the_first_process() -> Iterator[None]:
    right = TextTrainer.__init__

    def init(self, *, args, **kwargs):
        args.ddp_broadcast_buffers = True
        right(self, args=args, **kwargs)

    with patch.object(TextTrainer, "__init__", init):
        yield


def first_rows(update: Update, turn: int) -> slice:
    return slice(0, len(update.batches[turn]["target_ids"]))


def means_of_means(update: Update, weights_of: Callable) -> torch.Tensor:
    return torch.ones_like(weights_of(update.turn)) / len(update.batches)


WRONG: dict[str, Callable[[], Any]] = {
    "right": nullcontext,
    "gradients not averaged": gradients_not_averaged,
    "the same rows": the_same_rows,
    "the same draws": lambda: patch.object(Update, "rows", first_rows),
    "means of means": lambda: patch.object(Update, "mean_shares", means_of_means),
    "buffers of the first process": buffers_of_the_first_process,
}


# Steps of a sharded model


def rows(count: int) -> dict[str, torch.Tensor]:
    """A batch of unequal sources and targets, whose targets end in `</s>`."""
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(3, V, (count, 7), generator=generator)
    target = torch.randint(3, V, (count, 9), generator=generator)
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    for i in range(count):
        source_mask[i, : i % 3] = 0
        target[i, 8 - i], target[i, 9 - i :], target_mask[i, 9 - i :] = EOS, 0, 0
    return {
        "source_ids": source * source_mask, "source_mask": source_mask, "target_ids": target,
        "target_mask": target_mask, "noise_mask": target_mask.clone(),
        "loss_weights": target_mask.float(),
    }


def causal() -> tuple[torch.nn.Module, Callable]:
    model = HybridForCausalLM(HybridConfig(**SIZES, num_nextn_predict_layers=1))
    return model, lambda model, batch, update: ar_loss(model, batch, update, mtp_depth=2)


def denoiser(**changes: Any) -> tuple[torch.nn.Module, Callable]:
    backbone = HybridConfig(**SIZES, mamba_direction="bidirectional")
    lengths = {
        name: 16
        for name in (
            "num_source_positions", "num_target_positions", "max_source_length",
            "max_target_length",
        )
    }
    config = TessConfig(backbone_config=backbone, **lengths | changes)
    scheduler = RenoisingScheduler(vocab_size=V, simplex_value=config.simplex_value)
    options = {"self_conditioning_probability": 1.0, "unroll_probability": 0.5}

    def loss(model: torch.nn.Module, batch: Batch, update: Update | None) -> torch.Tensor:
        return tess_loss(model, scheduler, batch, update, **options)

    return TessDenoiser(config), loss


SHARDED = {
    "ar": causal,
    "tess": denoiser,
    "tess causal": lambda: denoiser(source_encoding="causal", length_head=True),
    "tess joint": lambda: denoiser(source_encoding="joint"),
}


def steps(
    model: torch.nn.Module, loss_of: Callable, batch: Batch, alone: bool = False
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """The losses, and the whole gradients, of two updates; whole weights are the last entry.

    alone: the batch is the whole update, although there are other processes.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    losses, states = [], []
    torch.manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        update = Update([batch], [0], len(batch["target_ids"])) if alone else None
        loss = loss_of(model, batch, update)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        states.append(
            {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
        )
        states[-1] = {n: g.clone() for n, g in states[-1].items()}
        losses.append(loss.item())
        optimizer.step()
    return losses, [*states, full_state(model)]


def sharded_result(make: Callable) -> dict[str, Any]:
    """Two updates of a whole model on all rows, and of a sharded one on this process's."""
    torch.manual_seed(0)
    model, loss_of = make()
    whole = copy.deepcopy(model).train()
    batch, (size, index) = rows(4), processes()
    want = steps(whole, loss_of, batch, alone=True)
    shard(model.train(), torch.device("cpu"))
    own = slice(index * 4 // size, (index + 1) * 4 // size)
    losses, states = steps(model, loss_of, {name: t[own] for name, t in batch.items()})
    copied = whole_copy(model, states[-1])
    load_full_state(model, want[1][-1])
    return {
        "sharded": [isinstance(p, DTensor) for p in model.parameters()],
        "local": [p.to_local().numel() for p in model.parameters()],
        "want": want, "got": (losses, states), "copied": copied.state_dict(),
        "loaded": full_state(model),
    }


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        if case.get("killed"):  # as if it had ended after its first checkpoint
            distributed.barrier()
            if processes()[1] == 0:
                killed = Path(case["config"]["output_dir"])
                shutil.rmtree(killed / "final")
                shutil.rmtree(killed / case["killed"])
            distributed.barrier()
        results[case["name"]] = watched_train(case["config"], case.get("variant", "right"))
    size, index = processes()
    results["processes"] = size
    results["sharded"] = {name: sharded_result(make) for name, make in SHARDED.items()}
    torch.save(results, folder / f"results.{index}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
