"""Where the numbers of a run go: metrics.jsonl, TensorBoard event files, a progress bar."""

import json
import os
import pathlib
from typing import Any

from tqdm.auto import tqdm


class Logs:
    """Writes numbers by step; silent on every process but the first.

    A resumed run forgets the lines after the step that it resumes from: they will be written again.
    """

    def __init__(self, workdir: str | pathlib.Path, *, first_step: int, steps: int, active: bool):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self.active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        kept = [line for line in read(self.path) if line["step"] <= first_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self.file = self.path.open("a")
        self.tensorboard = SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=first_step + 1
        )
        # Without a terminal the bar would fill the log file: a line per evaluation says enough.
        self.bar = tqdm(total=steps, initial=first_step, unit="step", disable=None)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """`numbers` are scalars, or dictionaries of scalars (per layer)."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step} | numbers) + "\n")
        self.file.flush()
        for name, value in numbers.items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            for key, number in items:
                if number is not None:
                    self.tensorboard.add_scalar(f"{name}/{key}" if key else name, number, step)

    def progress(self, step: int, text: str) -> None:
        if self.active:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            self.tensorboard.close()


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    path = pathlib.Path(path)
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
