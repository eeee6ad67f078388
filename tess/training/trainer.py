"""transformers' Trainer for our two objectives: what is overridden, and nothing else.

Overridden: the loss, the order of the rows, checkpoints (whole or not at all, loadable by
scripts/generate.py), and evaluation (its own fixed random numbers, and the averaged weights if
there are any).
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from tess.backbones.feedforward import balance_routers
from tess.backbones.pretrained import stays_float32
from tess.data.token_rows import BucketSampler
from tess.errors import UserError
from tess.progress import Progress
from tess.schedulers.density import LearnedDensity
from tess.storage.files import replaced_folder
from tess.storage.parts import Parts, load_parts, save_parts
from tess.training.resuming import TRAINER_STATE_FILE, Place
from tess.training.sharding import full_state, is_sharded, load_full_state, shard, whole_copy
from tess.training.update import Batch, Update, processes

AVERAGE_FILE = "average.safetensors"
DENSITY_FILE = "timestep_density.safetensors"


class WeightAverage:
    """Exponential moving average of a model's parameters, in their own precision.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the random start
    is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int) -> None:
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        for name, parameter in model.named_parameters():
            self.tensors[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside the block."""
        parameters = dict(model.named_parameters())
        own = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self.tensors[name])
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(own[name])


class AfterUpdate(TrainerCallback):
    """Balances the experts and moves the average, after each optimizer step."""

    def __init__(self, trainer: "TextTrainer", balance_rate: float) -> None:
        self.trainer = trainer
        self.balance_rate = balance_rate

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        model = self.trainer.model
        if self.balance_rate:
            balance_routers(model, self.balance_rate)
        if self.trainer.average is not None:
            self.trainer.average.update(model, state.global_step)


class ProgressLines(TrainerCallback):
    """Lines of progress in place of transformers' bar, where stderr is no terminal."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress = Progress(state.max_steps, "training", "updates", done=state.global_step)
        self.progress.__enter__()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.advance()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.__exit__()


class EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins; a restart in mid-epoch begins the same one again."""

    def __init__(self, sampler: BucketSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class TextTrainer(Trainer):
    """See the module's docstring.

    Args:
        parts: model, tokenizer and scheduler; the model is trained in place.
        loss_function: (model, batch, update) -> scalar, the batch's part in the update's loss.
        train_sampler: the order of the training rows.
        ema_decay: of the weights' moving average; 0 for none.
        balance_rate: step of the experts' balancing bias; 0 for none.
        density: the learned density of times that the loss function uses, to be saved with the run.
        place: where the checkpoint stopped from which it is to go on.
        kwargs: Trainer's.
    """

    def __init__(
        self,
        *,
        parts: Parts,
        loss_function: Callable[[nn.Module, Batch, Update], Tensor],
        train_sampler: BucketSampler,
        ema_decay: float = 0.0,
        balance_rate: float = 0.0,
        density: LearnedDensity | None = None,
        place: Place = Place(),
        **kwargs: Any,
    ) -> None:
        super().__init__(model=parts.model, **kwargs)
        self.parts = parts
        self.loss_function = loss_function
        self.train_sampler = train_sampler
        self.average = WeightAverage(self.model, ema_decay) if ema_decay else None
        self.density = density
        # The parts of an update's micro-batches are to be added up.
        self.loss_is_scaled_for_ga = True
        self._update = Update([])
        self.place = place
        if place.updates:
            train_sampler.keep_order(int(place.epoch), place.order_batch)
        self._run_dir: str | None = None
        if self.is_fsdp_enabled:
            self._check_sharded()
        self.add_callback(AfterUpdate(self, balance_rate))
        self.add_callback(EpochOfSampler(train_sampler))
        if not self.args.disable_tqdm and not sys.stderr.isatty():
            self.remove_callback(ProgressCallback)
            self.add_callback(PrinterCallback)
            if self.is_world_process_zero():
                self.add_callback(ProgressLines())

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.train_sampler

    # Going on: where Trainer counts updates, rows are counted

    @property
    def _step_rows(self) -> int:
        """Rows of one micro-batch in all processes."""
        return self._train_batch_size * self.args.world_size

    @property
    def _updates_done(self) -> int:
        """Whole updates, of today's size, in the rows of the epoch in which a run goes on."""
        rows = self.place.rows(len(self.train_sampler.lengths))
        return rows // (self._step_rows * self.args.gradient_accumulation_steps)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        epochs, per_epoch, *more, max_steps = super().set_initial_training_values(args, dataloader)
        done = int(self.place.epoch) * per_epoch + self._updates_done
        if args.max_steps > 0:
            last = done + max_steps - self.place.updates
            epochs = math.ceil(last / per_epoch)
        else:
            max_steps += self.place.updates - done
        return epochs, per_epoch, *more, max_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        super()._init_training_state(*args, **kwargs)
        return int(self.place.epoch), self._updates_done * self.args.gradient_accumulation_steps

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A process that the earlier run had not takes another's state: they are all in step."""
        alone = self.args.world_size == 1
        own = "rng_state.pth" if alone else f"rng_state_{self.args.process_index}.pth"
        if checkpoint is None or (Path(checkpoint) / own).is_file():
            super()._load_rng_state(checkpoint)
            return
        with safe_globals():
            state = torch.load(min(Path(checkpoint).glob("rng_state*.pth")), weights_only=True)
        torch.set_rng_state(state["cpu"])
        if self.args.device.type == "cuda" and "cuda" in state:
            cuda = state["cuda"] if torch.is_tensor(state["cuda"]) else state["cuda"][0]
            torch.cuda.set_rng_state(cuda, self.args.device)

    # The loss of an update

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._update = Update(batches)
        return batches, None

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        turn = next(i for i, batch in enumerate(self._update.batches) if batch is inputs)
        self._update.begin(turn)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        # Accelerate puts autocast around the model's forward only, and the source is encoded
        # outside it.
        with self.accelerator.autocast():
            loss = self.loss_function(model, inputs, self._update)
        return (loss, {}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, with the averaged weights, and with the same noise every time.

        Training goes on as if there had been no evaluation.
        """
        cuda = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), self.averaged_weights():
            torch.manual_seed(self.args.seed)
            return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The loss of one update of all rows, without its step: a mean over tokens, not batches."""
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        self._update, counted = self._evaluation()
        loss = torch.zeros((), device=self.args.device)
        for turn in range(len(self._update.batches)):
            part = self.compute_loss(self.model, self._update.begin(turn))
            if turn < counted:
                loss += part
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        mean = self.accelerator.reduce(loss, "mean").item()
        metrics = {f"{metric_key_prefix}_loss": mean}
        return EvalLoopOutput(None, None, metrics, len(self.eval_dataset))

    def _evaluation(self) -> tuple[Update, int]:
        """All evaluation rows as one update, and how many of its batches count here.

        Every P-th batch is this process's. One that has fewer than the others fills up with a batch
        without weight: sharded models have to run equally often in all processes.
        """
        rows, batch_size = self.eval_dataset, self.args.per_device_eval_batch_size
        size, index = processes()
        starts = list(range(0, len(rows), batch_size))
        own = starts[index::size]
        blank = (own or starts[:1]) * (math.ceil(len(starts) / size) - len(own))
        batches = [
            self._prepare_inputs(
                self.data_collator([rows[i] for i in range(s, min(s + batch_size, len(rows)))])
            )
            for s in [*own, *blank]
        ]
        batches[len(own) :] = [
            batch
            | {
                "loss_weights": torch.zeros_like(batch["loss_weights"]),
                "target_ids": torch.full_like(
                    batch["target_ids"], self.parts.tokenizer.pad_token_id
                ),
            }
            for batch in batches[len(own) :]
        ]
        return Update(batches, [*own, *blank], len(rows)), len(own)

    def averaged_weights(self) -> Any:
        """Context in which the model has the weights that are evaluated and shipped."""
        return nullcontext() if self.average is None else self.average.swapped_into(self.model)

    def save_final(self, final: Path, dtype: torch.dtype) -> None:
        """Write the (averaged) weights as `dtype`, but what stays float32 in memory as it is.

        In a run of several processes the first one writes; all have to call this.
        """
        with self.averaged_weights():
            state = full_state(self.model)
            if not self.is_world_process_zero():
                return
            model = whole_copy(self.model, state)
        for name, parameter in model.named_parameters():
            if not stays_float32(name):
                parameter.data = parameter.data.to(dtype)
        with replaced_folder(final) as folder:
            save_parts(dataclasses.replace(self.parts, model=model), folder)

    # FSDP

    def _check_sharded(self) -> None:
        version = self.accelerator.state.fsdp_plugin.fsdp_version
        if version != 2:
            raise UserError(f"FSDP is supported in its version 2, got fsdp_version {version}")
        if self.average is not None:
            raise UserError("ema_decay has no form for sharded weights yet; train with DDP, or 0")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # Accelerate leaves a model alone that is sharded already. Its own units would be wrong: it
        # makes the embedding one, whose matrix we read outside of that module.
        if self.is_fsdp_enabled and not is_sharded(self.model):
            shard(self.model, self.args.device)
        return super().create_optimizer(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, full_state(self.model))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: transformers' estimate, 6 x parameters x tokens, is wrong for experts."""
        return 0

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        main = self.is_world_process_zero()
        # All processes write into the folder that the main one makes, and it is renamed when all
        # have.
        shared = nullcontext(final.parent / ".saving" / final.name)
        with replaced_folder(final) if main else shared as temporary:
            self.accelerator.wait_for_everyone()
            self._run_dir = str(temporary.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._run_dir = None
            if self.state.best_model_checkpoint == str(temporary):
                self.state.best_model_checkpoint = str(final)
                if main:
                    self.state.save_to_json(str(temporary / TRAINER_STATE_FILE))
            self.accelerator.wait_for_everyone()
        if main:
            self._rotate()

    def _rotate(self) -> None:
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        parts = self.parts
        if is_sharded(self.model):
            parts = dataclasses.replace(parts, model=whole_copy(self.model, state_dict))
        save_parts(parts, folder)
        if self.average is not None:
            save_file(self.average.tensors, folder / AVERAGE_FILE)
        if self.density is not None:
            save_file({"losses": self.density.losses}, folder / DENSITY_FILE)
        epoch = self.state.epoch or 0.0
        order_batch = self.train_sampler.batch_size_of(int(epoch))
        Place(self.state.global_step, epoch, self._step_rows, order_batch).save(folder)

    def load_weights(self, checkpoint: Path) -> None:
        """The weights of a checkpoint of this run, their average, and the learned density."""
        load_full_state(self.model, load_parts(checkpoint).model.state_dict())
        if self.average is not None:
            tensors = load_file(checkpoint / AVERAGE_FILE)
            for name, tensor in self.average.tensors.items():
                tensor.copy_(tensors[name])
        if self.density is not None:
            self.density.load(load_file(checkpoint / DENSITY_FILE)["losses"])

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
