"""The step bench: ours and the plain loop are equal, what its clock and meter count, the arithmetic of its table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from benches import step_ours, step_worker
from benches.step_cases import build_model, build_processor, draw_picture, make_case, make_rows, place_boxes
from benches.step_plan import LEVELS, Planned
from benches.step_plan import make_rows as make_table_rows
from benches.step_plot import draw, make_curves
from benches.step_runner import Agreement, Measured, Peer, PeerError, PeerMissingError, compare_records, take_turns
from benches.step_table import (
    BEGIN,
    END,
    MARK,
    StepResults,
    StepRow,
    list_ratios,
    list_shares,
    read_results,
    render_page,
    write_page,
)
from benches.step_turns import Clock, Meter

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Script:
    """In the place of a worker's pipes: commands to hand out, answers to keep."""

    def __init__(self, *commands: dict) -> None:
        self.commands, self.answers = [*commands, {"do": "stop"}], []

    def read(self) -> dict:
        return self.commands.pop(0)

    def answer(self, **fields) -> None:
        self.answers.append(json.loads(json.dumps(fields)))


@pytest.fixture(autouse=True)
def kept_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("trains", ["lora", "full"])
@pytest.mark.parametrize("keeps", ["all", "completion"])
def test_trainer_and_plain_loop_agree_in_loss_and_gradients_on_the_same_completions(trains, keeps, tmp_path):
    case = make_case("tiny", trains=trains, micro_rows=1)  # two micro-batches: the sums over the step agree as well
    ours = Script({"do": "step", "record": str(tmp_path / "ours.pt")})
    step_ours.run(case, ours, tmp_path)
    plain = Script(
        {"do": "step", "record": str(tmp_path / "plain.pt"), "completions": str(tmp_path / "ours.pt"), "memory": True}
    )
    step_worker.run_plain(case, plain, tmp_path, argparse.Namespace(keeps=keeps))
    agreement = compare_records("plain", case, tmp_path / "ours.pt", tmp_path / "plain.pt")
    assert agreement.loss > 1e-3, "views that say the same would make any two losses equal"
    assert len(agreement.gradient_errors) >= 2
    (ready, mine), (_, theirs) = ours.answers, plain.answers
    assert ready == {"ready": True}
    assert mine["tokens"] == theirs["tokens"] == case.rows * case.new_tokens
    assert {"views", "rollout", "teacher", "student", "loss", "backward"} <= set(mine["stages"])
    assert sum(mine["stages"].values()) == pytest.approx(mine["seconds"])
    assert sum(theirs["stages_cpu"].values()) == pytest.approx(theirs["cpu_s"])
    assert "rollout" not in theirs["stages"]
    assert theirs["held_mib"] > 100


def write_record(path: Path, **changes) -> Path:
    record = {"completion_ids_BT": torch.ones(2, 3).long(), "loss": 0.5, "gradients": {"w": torch.tensor([3.0, 4.0])}}
    torch.save({**record, **changes}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": 0.5002}, "loss 0.5002, ours 0.5"),
        ({"gradients": {"w": torch.tensor([3.0, 4.1])}}, "gradient of w is apart by 0.02"),
        ({"gradients": {}}, "no gradient was kept"),
        ({"completion_ids_BT": torch.zeros(2, 3).long()}, "other completions"),
        ({"loss": float("nan")}, "loss nan"),
    ],
)
def test_a_peer_that_computes_something_else_ends_the_bench(changes, message, tmp_path):
    case = make_case("tiny")
    own = write_record(tmp_path / "own.pt")
    assert compare_records("same", case, own, own) == Agreement(0.5, 0.0, {"w": 0.0})
    with pytest.raises(PeerError, match=message):
        compare_records("other", case, own, write_record(tmp_path / "other.pt", **changes))


def test_a_stage_inside_another_is_taken_out_of_it_and_what_is_between_is_other():
    clock = Clock(CPU)
    clock.start()
    with clock.stage("outer"):
        time.sleep(0.02)
        with clock.stage("inner"):
            time.sleep(0.05)
    time.sleep(0.03)
    found = clock.stop()
    assert 0.02 <= found["stages"]["outer"] < 0.05 <= found["stages"]["inner"]
    assert found["stages"]["other"] >= 0.03
    assert sum(found["stages"].values()) == pytest.approx(found["seconds"])
    assert found["cpu_s"] < 0.05  # asleep


def test_a_stage_of_another_thread_does_not_move_the_clock():
    clock = Clock(CPU)
    clock.start()

    def work():
        with clock.stage("background"):
            time.sleep(0.01)

    thread = threading.Thread(target=work)
    with clock.stage("front"):
        thread.start()
        thread.join()
    assert set(clock.stop()["stages"]) == {"other", "front"}


def test_what_another_thread_does_between_two_steps_is_in_the_cpu_time_of_the_second():
    def burn(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    clock = Clock(CPU)
    clock.start()
    clock.stop()
    burn(0.1)  # the peer's own preparation of the next step: no part of it
    thread = threading.Thread(target=burn, args=(0.2,))
    thread.start()
    thread.join()
    clock.start()
    found = clock.stop()
    assert 0.19 < found["cpu_s"] < 0.28
    assert found["seconds"] < 0.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted by Linux")
def test_meter_counts_the_peak_above_what_was_held():
    held = torch.ones(8 * 2**20)  # 32 MiB
    meter = Meter(CPU)
    meter.start()
    torch.ones(16 * 2**20)  # 64 MiB, let go at once
    found = meter.read()
    assert 60 < found["peak_mib"] < 90
    assert found["held_mib"] > held.numel() * 4 / 2**20


def test_a_peer_that_cannot_run_here_says_why_and_one_that_waits_holds_still(tmp_path):
    peer = Peer("trl", make_case("tiny"), tmp_path)
    try:
        with pytest.raises(PeerMissingError, match="trl (cannot be imported|shows teacher and student the same)"):
            peer.wait()
        wait_until(lambda: "State:\tT" in Path(f"/proc/{peer.process.pid}/status").read_text())
    finally:
        peer.close()
    assert peer.process.poll() is not None


def wait_until(holds) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


class Turn:
    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def step(self, memory: bool = False) -> dict:
        self.calls.append(self.name + ("*" if memory else ""))
        taken = {"seconds": 2.0, "cpu_s": 1.0, "stages": {"rollout": 0.5}, "stages_cpu": {"rollout": 0.25}, "tokens": 8}
        return {**taken, **({"peak_mib": 7.0, "held_mib": 3.0} if memory else {})}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU peers run one after another")
def test_peers_take_turns_every_other_round_backwards_and_memory_comes_last():
    calls: list[str] = []
    found = take_turns({name: Turn(name, calls) for name in "ab"}, 2, lambda text: None, lambda step: step())
    assert calls == ["a", "b", "b", "a", "a*", "b*"]
    assert len(found["a"].answers) == 2
    assert (found["b"].peak_mib, found["b"].held_mib) == (7.0, 3.0)
    assert (found["a"].read_outside_s(), found["a"].read_outside_s(cpu=True)) == (1.5, 0.75)
    calls.clear()
    assert len(take_turns({"a": Turn("a", calls)}, 0, lambda text: None, lambda step: step())["a"].answers) == 1
    assert calls == ["a*"]


def make_row(peer: str = "ours", **changes) -> StepRow:
    stages = {"views": 1.0, "rollout": 4.0, "teacher": 2.0, "vision": 1.0, "other": 2.0}
    row = StepRow(
        *("peers", "LoRA, 3 crops", 3, 32, 1000, "lora", peer, 3),
        step_s=20.0,
        step_cpu_s=10.0,
        stages_s={name: 2 * value for name, value in stages.items()},
        stages_cpu_s=stages,
        peak_mib=100.0,
        held_mib=50.0,
    )
    return dataclasses.replace(row, **changes)


PLAIN_ROW = make_row(
    "plain", step_cpu_s=20.0, step_s=30.0, stages_cpu_s={"views": 5.0, "rollout": 5.0}, peak_mib=250.0, loss_error=1e-7
)


def test_ratios_are_the_peers_figures_over_ours_beside_their_targets():
    rows = [make_row(), PLAIN_ROW, make_row(case="same"), make_row("trl", case="same", peak_mib=150.0, step_cpu_s=15.0)]
    _, plain, trl = list_ratios(rows, cpu=True)
    # 20 / 10; outside (20 - 5) / (10 - 4); rollout 5 / 4; memory 250 / 100
    assert plain == ("LoRA, 3 crops", "plain", "2.00", "2.50", "2", "1.25", "1", "2.50", "3", "1e-07")
    assert trl == ("same", "trl", "1.50 (≥ 1)", "1.83", "–", "1.00", "–", "1.50", "1", "–")
    assert list_ratios(rows, cpu=False)[1][2] == "1.50"  # by wall time 30 / 20


def test_shares_are_of_the_peers_step_and_unknown_stages_go_with_the_rest():
    headings, ours, plain = list_shares([make_row(), PLAIN_ROW], cpu=True)
    found = dict(zip(headings, ours, strict=True))
    assert (found["views"], found["rollout"], found["other"], found["step"]) == ("5.0 %", "20.0 %", "15.0 %", "50.0 %")
    assert dict(zip(headings, plain, strict=True))["step"] == "100.0 %"
    assert found["peak MiB"] == "100"


def test_kept_steps_read_back_and_fill_the_page_between_its_marks(tmp_path):
    results = StepResults("some CPU", "full", False, [make_row(), PLAIN_ROW], [("trl", "cannot be imported")])
    path = tmp_path / "step.json"
    results.write(path, {"cpu": "some CPU", "package_folder": "/x"})
    assert "package_folder" not in path.read_text()
    assert read_results(path) == results
    page = write_page(results, f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n{render_page(results)}\n{END}\nafter\n"
    assert "left out: trl: cannot be imported" in page
    with pytest.raises(ValueError, match="the page has no"):
        write_page(results, "nothing")


def test_page_and_picture_show_the_kept_run_of_the_step(tmp_path):
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    kept = ROOT / "benches/baselines/step_cpu.json"
    if not kept.exists():
        assert BEGIN in page
        return
    results = read_results(kept)
    assert write_page(results, page) == page
    drawn = tmp_path / "growth.svg"
    draw(results, drawn)
    labels = [line for line in drawn.read_text().splitlines() if "<text" in line]
    shown = [line for line in (ROOT / "docs/images/step_growth.svg").read_text().splitlines() if "<text" in line]
    assert labels == shown


def test_page_shows_the_kept_steps_of_a_gpu_by_wall_time():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    name = "benches/baselines/step_NVIDIA_H200.json"
    results = read_results(ROOT / name)
    assert results.on_gpu
    assert write_page(results, page, MARK.format(name=name)) == page
    ours, plain = results.rows[:2]
    assert f"| {plain.case} | plain | {plain.step_s / ours.step_s:.2f} | " in page
    assert results.device == "NVIDIA H200"


def test_gpu_level_fits_the_time_that_a_gpu_is_there():
    adapter, full, *_ = LEVELS["gpu"]()
    assert (adapter.case.trains, full.case.trains) == ("lora", "full")
    assert (adapter.rounds, adapter.case.new_tokens) == (1, 64)


def test_curves_hold_the_shared_point_and_times_in_multiples_of_ours_there():
    far = make_row(group="crops", case="4 crops", crops=4, step_cpu_s=16.0, peak_mib=120.0)
    (ours,) = make_curves([make_row(), far], "crops", cpu=True)
    assert (ours.values, ours.times, ours.peaks_mib) == ((3, 4), (1.0, 2.0), (100.0, 120.0))


def test_rows_of_the_table_hold_medians_and_the_worst_gradient():
    measured = Measured(peak_mib=5.0, held_mib=6.0)
    for seconds in (3.0, 1.0, 2.0):
        stages = {"rollout": seconds / 2}
        measured.answers.append({"seconds": seconds, "cpu_s": seconds, "stages": stages, "stages_cpu": stages})
    planned = Planned("peers", "x", make_case("tiny", crops=1), ("ours", "plain"), 3)
    (row,) = make_table_rows(planned, {"plain": measured}, {"plain": Agreement(0.5, 1e-6, {"a": 1e-5, "b": 1e-4})})
    assert (row.step_s, row.stages_s, row.rounds, row.crops) == (2.0, {"rollout": 1.0}, 3, 1)
    assert (row.loss_error, row.gradient_error, row.peak_mib) == (1e-6, 1e-4, 5.0)


def test_gpu_case_is_the_4b_model_and_both_keep_its_vocabulary():
    case = make_case("gpu", trains="full")
    processor = build_processor(case)
    model = build_model(case, processor, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_437_815_808
    assert len(processor.tokenizer) == case.vocabulary == make_case("cpu").vocabulary == 151_936


def test_pictures_are_the_same_in_every_run_and_as_long_as_a_cameras(tmp_path):
    case = make_case("cpu", rows=1)
    first, second, again = make_rows(case, tmp_path, 3)
    assert first.images[0].read_bytes() != second.images[0].read_bytes()
    assert first.images == again.images
    bits = 8 * first.images[0].stat().st_size / (case.picture[0] * case.picture[1])
    assert 1.2 < bits < 2.4
    assert (torch.tensor(list(draw_picture((60, 40), 1).tobytes())) == torch.tensor(
        list(draw_picture((60, 40), 1).tobytes())
    )).all()  # fmt: skip
    areas = [(x1 - x0) * (y1 - y0) / (1920 * 1080) for x0, y0, x1, y1 in place_boxes(case)]
    assert areas == pytest.approx([0.025, 0.0124, 0.066], rel=0.03)


def test_every_level_names_each_case_once_and_begins_with_the_targets():
    for make in LEVELS.values():
        planned = make()
        assert len({part.id for part in planned}) == len(planned)
        assert planned[0].group == "peers"
        assert planned[0].peers[0] == "ours"
