"""What a model writes while it is trained."""

from functools import partial

import torch
from transformers import TrainerCallback

from tess.data.collators import Collator
from tess.data.token_rows import TokenRows
from tess.decoders.load import make_decoder
from tess.training.settings import Settings
from tess.training.trainer import TextTrainer


class PrintSamples(TrainerCallback):
    """Prints what the model writes for a few fixed sources: at the start, evaluations, the end."""

    def __init__(
        self, trainer: TextTrainer, collator: Collator, rows: TokenRows, settings: Settings
    ) -> None:
        self.trainer = trainer
        self.num_inference_steps = settings.run.num_inference_steps
        self.tokenizer = collator.tokenizer
        with_source = {
            "block": "seq2seq",
            "ul2": "prefix_lm",
            "ul2_with_unconditional": "prefix_lm",
        }
        names = [with_source.get(name, name) for name in collator.corruptions]
        self.corruption = next(
            (n for n in names if n in ("seq2seq", "prefix_lm", "text_infilling")), None
        )
        self.batch: dict[str, torch.Tensor] = {}
        if self.corruption:
            count = min(settings.run.num_samples_to_print, len(rows))
            self.batch = collator(
                [rows[i * len(rows) // count] for i in range(count)], self.corruption
            )
        self.printed_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        with self.trainer.averaged_weights():
            self._print(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._print(state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        with self.trainer.averaged_weights():
            self._print(state.global_step)

    def _print(self, step: int) -> None:
        if (
            not self.corruption
            or step == self.printed_at
            or not self.trainer.is_world_process_zero()
        ):
            return
        self.printed_at = step
        model = self.trainer.model
        was_training = model.training
        sources = [
            row[mask.bool()].tolist()
            for row, mask in zip(self.batch["source_ids"], self.batch["source_mask"], strict=True)
        ]
        decoder = make_decoder(self.trainer.parts)
        steps = self.num_inference_steps if decoder.name == "tess" else None
        generations = decoder.generate_ids(sources, num_inference_steps=steps)
        model.train(was_training)
        show = partial(
            self.tokenizer.decode, skip_special_tokens=self.corruption != "text_infilling"
        )
        print(f"--- samples at step {step} ({self.corruption}) ---")
        for source, target, generation in zip(
            sources, self.batch["target_ids"], generations, strict=True
        ):
            print(f"  source: {show(source)}")
            print(f"  target: {self.tokenizer.decode(target, skip_special_tokens=True)}")
            print(f"  output: {generation.text}", flush=True)
