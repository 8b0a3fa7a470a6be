"""What a fit leaves of its course: history.jsonl, TensorBoard's logs, and a bar while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepmsi.data.files import write_text
from deepmsi.train.console import progress
from deepmsi.train.processes import process_rank
from deepmsi.train.record import HISTORY

if TYPE_CHECKING:
    from deepmsi.train.trainer import Fit


class Records(TrainerCallback):
    """history.jsonl, TensorBoard and the progress bar."""

    SKIPPED = ("train_runtime", "epoch", "step", "total_flos")

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.bar: Any = None
        self.writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.fit.folder / "logs"), purge_step=state.global_step or None)
        total = state.max_steps * self.fit.last_epoch // self.fit.recipe.train.epochs
        self.bar = progress(total, self.fit.name, "step", state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        split = "dev" if any(name.startswith("eval_") for name in logs) else "train"
        values = {name.removeprefix("eval_"): value for name, value in logs.items() if name not in self.SKIPPED}
        record = {"step": state.global_step, "epoch": state.epoch, "split": split, **values}
        with (self.fit.folder / HISTORY).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, state.global_step)
        shown = {"loss": values["loss"]} | {k: v for k, v in values.items() if k == self.fit.recipe.train.metric}
        self.bar.set_postfix({f"{split} {k}": f"{v:.3f}" for k, v in shown.items()}, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
        self.writer.close()


def truncate_history(path: Path, step: int) -> None:
    """Drop the events after a step: a resumed fit will write them again."""
    if process_rank()[0] or not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if step and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the end of a line that a kill cut off
    write_text(path, "".join(kept))
