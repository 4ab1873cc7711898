"""Sample completions with the images the student saw, handed to what the run reports to.

The Trainer's own integrations hold the open writer or the imported library; they are found among its callbacks, so
nothing is imported or started here, and a run that reports nowhere makes no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from imagine_opd.pictures import Pixels

COLUMNS = ("step", "id", "question", "answer", "completion")
_NAME = "completions"


@dataclass(frozen=True, slots=True)
class CompletionSample:
    """One completion: its row, its text, and the student's images as `[height, width, 3]` uint8."""

    id: str
    question: str
    answer: str | None
    completion: str
    pictures: tuple[Pixels, ...]


class CompletionLogger(TrainerCallback):
    """Holds the samples of a step until its log, then gives them to tensorboard, wandb, trackio and swanlab.

    Args:
        list_callbacks: the Trainer's callbacks, asked for at each log: `lambda: trainer.callback_handler.callbacks`.
        say: prints a line for the user; a service that fails is named once and left out from then on.
    """

    def __init__(self, list_callbacks: Callable[[], Sequence[Any]], say: Callable[[str], None]) -> None:
        self.list_callbacks = list_callbacks
        self.say = say
        self._samples: list[CompletionSample] = []
        self._failed: set[str] = set()

    @property
    def has_reporter(self) -> bool:
        """Whether samples would go anywhere: makes pictures only then."""
        return any(type(callback).__name__ in _WRITERS for callback in self.list_callbacks())

    def hold(self, samples: Sequence[CompletionSample]) -> None:
        """The samples that go out with the next log."""
        self._samples = list(samples)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        samples, self._samples = self._samples, []
        if not samples or not state.is_world_process_zero:
            return
        for callback in self.list_callbacks():
            name = type(callback).__name__
            if name not in _WRITERS or name in self._failed:
                continue
            try:
                _WRITERS[name](callback, samples, state.global_step)
            except Exception as error:  # whatever a service raises: training goes on without its pictures
                self._failed.add(name)
                self.say(f"completions are not sent to {name}: {type(error).__name__}: {error}")


def write_tensorboard(callback: Any, samples: Sequence[CompletionSample], step: int) -> None:
    """Each sample as text under `completions/N`, its images under `completions/N/image_M`."""
    writer = callback.tb_writer
    if writer is None:
        return
    for number, sample in enumerate(samples):
        lines = [f"**{name}** {value}" for name, value in zip(COLUMNS[1:], _list_texts(sample), strict=True)]
        writer.add_text(f"{_NAME}/{number}", "\n\n".join(lines), step)
        for index, picture in enumerate(sample.pictures):
            writer.add_image(f"{_NAME}/{number}/image_{index}", picture, step, dataformats="HWC")
    writer.flush()


def write_wandb(callback: Any, samples: Sequence[CompletionSample], step: int) -> None:
    """One table a log, with images in its last columns."""
    wandb = callback._wandb
    # wandb's own step counts calls; the Trainer's x-axis is a figure of its own.
    wandb.log({_NAME: _make_table(wandb, samples, step), "train/global_step": step})


def write_trackio(callback: Any, samples: Sequence[CompletionSample], step: int) -> None:
    """As for wandb, whose names trackio keeps."""
    trackio = callback._trackio
    trackio.log({_NAME: _make_table(trackio, samples, step), "train/global_step": step})


def write_swanlab(callback: Any, samples: Sequence[CompletionSample], step: int) -> None:
    """Lists of texts and of captioned images: swanlab's tables hold no image."""
    swanlab = callback._swanlab
    texts = [swanlab.Text(sample.completion, caption=f"{sample.id}: {sample.question}") for sample in samples]
    pictures = [(sample, picture) for sample in samples for picture in sample.pictures]
    images = [swanlab.Image(picture, caption=f"{sample.id}: {sample.completion}") for sample, picture in pictures]
    swanlab.log({_NAME: texts, **({f"{_NAME}/images": images} if images else {})}, step=step)


_WRITERS: dict[str, Callable[[Any, Sequence[CompletionSample], int], None]] = {
    "TensorBoardCallback": write_tensorboard,
    "WandbCallback": write_wandb,
    "TrackioCallback": write_trackio,
    "SwanLabCallback": write_swanlab,
}


def _make_table(library: Any, samples: Sequence[CompletionSample], step: int) -> Any:
    most = max(len(sample.pictures) for sample in samples)
    columns = [*COLUMNS, *(f"image_{index}" for index in range(most))]
    data = []
    for sample in samples:
        images = [library.Image(picture) for picture in sample.pictures]
        data.append([step, *_list_texts(sample), *images, *[None] * (most - len(images))])
    return library.Table(columns=columns, data=data)


def _list_texts(sample: CompletionSample) -> list[str]:
    return [sample.id, sample.question, sample.answer or "", sample.completion]
