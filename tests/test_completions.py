"""Completions and images reach what the run reports to: tensorboard for real, the others by fakes of their API."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from imagine_opd.metrics.completions import CompletionLogger, CompletionSample

RED = np.zeros((8, 12, 3), np.uint8)
RED[..., 0] = 250
SAMPLES = [
    CompletionSample("row-1", "what is it?", "B", "look left. <answer>B</answer>", (RED,)),
    CompletionSample("row-2", "and this?", None, "<answer>C</answer>", (RED, RED[:4])),
]


def send(callbacks, samples=SAMPLES, step=7, main=True) -> list[str]:
    said: list[str] = []
    logger = CompletionLogger(lambda: callbacks, said.append)
    logger.hold(samples)
    state = TrainerState(global_step=step, is_world_process_zero=main)
    logger.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    logger.on_log(None, state, TrainerControl(), logs={"loss": 1.0})  # nothing is sent twice
    return said


def test_tensorboard_files_hold_texts_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    callback = TensorBoardCallback(SummaryWriter(log_dir=str(tmp_path)))
    assert send([SimpleNamespace(), callback]) == []
    callback.tb_writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["completions/0/image_0", "completions/1/image_0", "completions/1/image_1"]
    assert tags["tensors"] == ["completions/0/text_summary", "completions/1/text_summary"]
    (image,) = events.Images("completions/1/image_1")
    assert (image.step, image.height, image.width) == (7, 4, 12)
    from io import BytesIO

    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(BytesIO(image.encoded_image_string)).convert("RGB")), RED[:4])
    (text,) = events.Tensors("completions/0/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert text.step == 7
    assert "**id** row-1" in written
    assert "**completion** look left. <answer>B</answer>" in written


class FakeTables:
    """wandb 0.31 and trackio 0.43: `Image(pixels)`, `Table(columns=, data=)`, `log(figures)`."""

    def __init__(self) -> None:
        self.logged: list[dict] = []

    def Image(self, data_or_path):  # noqa: N802
        return ("image", data_or_path.shape)

    def Table(self, columns, data):  # noqa: N802
        assert all(len(row) == len(columns) for row in data)
        return columns, data

    def log(self, figures) -> None:
        self.logged.append(figures)


@pytest.mark.parametrize(("name", "attribute"), [("WandbCallback", "_wandb"), ("TrackioCallback", "_trackio")])
def test_tables_hold_a_row_for_each_completion(name, attribute):
    library = FakeTables()
    callback = type(name, (), {attribute: library})()
    assert send([callback]) == []
    (figures,) = library.logged
    assert figures["train/global_step"] == 7
    columns, data = figures["completions"]
    assert columns == ["step", "id", "question", "answer", "completion", "image_0", "image_1"]
    assert data == [
        [7, "row-1", "what is it?", "B", "look left. <answer>B</answer>", ("image", (8, 12, 3)), None],
        [7, "row-2", "and this?", "", "<answer>C</answer>", ("image", (8, 12, 3)), ("image", (4, 12, 3))],
    ]


def test_swanlab_gets_texts_and_captioned_images():
    """swanlab 0.10: `Text(text, caption=)`, `Image(pixels, caption=)`, `log(figures, step=)`."""
    logged = []
    library = SimpleNamespace(
        Text=lambda text, caption: (text, caption),
        Image=lambda pixels, caption: (pixels.shape, caption),
        log=lambda figures, step: logged.append((step, figures)),
    )
    assert send([type("SwanLabCallback", (), {"_swanlab": library})()]) == []
    ((step, figures),) = logged
    assert step == 7
    assert figures["completions"][0] == ("look left. <answer>B</answer>", "row-1: what is it?")
    assert [shape for shape, _ in figures["completions/images"]] == [(8, 12, 3), (8, 12, 3), (4, 12, 3)]


def test_a_service_that_fails_is_named_once_and_training_goes_on():
    def refuse(figures):
        raise ConnectionError("no route")

    broken, sound = FakeTables(), FakeTables()
    broken.log = refuse
    callbacks = [type("WandbCallback", (), {"_wandb": broken})(), type("TrackioCallback", (), {"_trackio": sound})()]
    said: list[str] = []
    logger = CompletionLogger(lambda: callbacks, said.append)
    for step in (1, 2):
        logger.hold(SAMPLES)
        logger.on_log(None, TrainerState(global_step=step), TrainerControl(), logs={})
    assert said == ["completions are not sent to WandbCallback: ConnectionError: no route"]
    assert len(sound.logged) == 2


def test_other_processes_and_runs_that_report_nowhere_send_nothing():
    library = FakeTables()
    callback = type("WandbCallback", (), {"_wandb": library})()
    assert send([callback], main=False) == []
    assert library.logged == []
    assert not CompletionLogger(lambda: [SimpleNamespace()], print).has_reporter
    assert CompletionLogger(lambda: [callback], print).has_reporter
