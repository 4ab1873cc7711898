"""`RecordedTrainer`: what a run says to its user and writes beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagine_opd.checkpoints import SafeSaving
from imagine_opd.config import save_recipe
from imagine_opd.outputs import guard_writing
from imagine_opd.teacher import replace_adapter


class RecordedTrainer(SafeSaving):
    """Messages, each once; the recipe beside the weights; the adapter merged where that is asked for."""

    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._messages: set[str] = set()
        super().__init__(*args, **kwargs)

    def say_once(self, message: str) -> None:
        """A line for the user about the run: from the main process, each text once."""
        if self.is_world_process_zero():
            self.say_here(message)

    def say_here(self, message: str) -> None:
        """A line for the user about this process's rows, each text once."""
        if message not in self._messages:
            self._messages.add(message)
            print(message, flush=True)

    def save_merged_model(self) -> None:
        """Write the model with its adapter merged in the place of the adapter that `save_model` wrote."""
        folder = Path(self.args.output_dir)
        with guard_writing(folder, "the merged model"):
            replace_adapter(self.accelerator.unwrap_model(self.model), folder, self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            save_recipe(self.args, folder)
            # A pickle of our settings: `run.json` and `imagine_opd.json` say the same and can be read safely.
            (folder / "training_args.bin").unlink(missing_ok=True)

    # A micro-batch is an object with two views of different lengths: the Trainer can neither move nor count it.

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: all of a step's tokens were counted with its rollouts."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the Trainer's estimate would be wrong."""
        return 0
