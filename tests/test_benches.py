"""The benches: the table's arithmetic by hand, peers' answers against the truth, and both commands end to end."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benches import peers, problems, shapes, table, view_runner
from benches.cases import Case, compare, make_rows
from benches.ceilings import Ceilings
from benches.environment import name_file
from benches.gpu_suite import Suite, read_tests, run_stages
from benches.measure import Timing, summarize, time_in_turns
from benches.packages import SetupError, find_wheel
from benches.sweep import pick
from benches.table import (
    OURS,
    Row,
    Work,
    compute_fraction,
    compute_rate,
    compute_ratio,
    format_figure,
    render_left_out,
    render_markdown,
    render_text,
)
from benches.view_cases import BEST, USUAL, ViewCase, ViewPeer, place_boxes
from benches.view_files import LEVELS, Pictures, Size, draw_photo
from benches.view_memory import measure_peak_mib
from benches.view_peers import is_news
from benches.view_runner import Difference, compare_all
from benches.view_table import BEGIN, END, ViewResults, ViewRow, format_view_row, read_rows, render_page, write_page

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_per_s=4000.0, gemm_tflop_per_s=800.0)


@pytest.mark.parametrize(
    ("work", "median_ms", "rate", "unit", "fraction"),
    [
        # 6 GB in 2 ms are 3000 GB/s, three quarters of 4000
        (Work(bytes_moved=6e9), 2.0, 3000.0, "GB/s", 0.75),
        # 3 products of 2 * 1000 * 1000 * 1000 operations in 0.01 ms are 600 TFLOP/s, three quarters of 800
        (Work(operations=3 * 2e9), 0.01, 600.0, "TFLOP/s", 0.75),
        # u = 8192 * 151,936 * 2 bytes = 2.489 GB; 3u at 3.2 ms
        (Work(bytes_moved=3 * 8192 * 151_936 * 2), 3.2, 2333.7, "GB/s", 0.5834),
    ],
)
def test_rates_are_work_over_time_and_fractions_of_the_ceiling_in_the_same_unit(work, median_ms, rate, unit, fraction):
    value, found_unit = compute_rate(work, median_ms)
    assert value == pytest.approx(rate, rel=1e-4)
    assert found_unit == unit
    assert compute_fraction(value, unit, CEILINGS) == pytest.approx(fraction, rel=1e-4)
    assert compute_fraction(value, unit, None) is None


@pytest.mark.parametrize(("peer_ms", "ours_ms", "ratio"), [(4.0, 2.0, 2.0), (1.0, 4.0, 0.25), (3.0, 3.0, 1.0)])
def test_a_ratio_above_one_means_that_ours_is_faster(peer_ms, ours_ms, ratio):
    assert compute_ratio(peer_ms, ours_ms) == ratio


def make_case(**options) -> Case:
    return Case("linear", "KL", "N=1", torch.float32, Work(operations=8e9), {}, dict, **options)


def test_rows_of_a_case_hold_ratios_to_ours_and_the_target_beside_ours_alone():
    timings = {OURS: Timing(2.0, 0.2, 5), "torch": Timing(5.0, 0.1, 5)}
    none = dict.fromkeys(timings)
    ours, torch_row = make_rows(make_case(target_ms=3.0), timings, none, {OURS: 1e-6, "torch": 2e-6}, CEILINGS)
    assert (ours.times_ours, ours.target_ms, ours.rate, ours.ceiling_fraction) == (1.0, 3.0, 4.0, 0.005)
    assert (torch_row.times_ours, torch_row.target_ms, torch_row.rate) == (2.5, None, 1.6)
    assert (torch_row.error, torch_row.peak_mib) == (2e-6, None)


def test_table_aligns_columns_and_shows_a_dash_where_there_is_no_figure():
    rows = [
        Row("k", "c", "N=8", OURS, 3.14159, 0.2, 9, 2333.7, "GB/s", 0.5834, 7123.4, 12.0, target_ms=3.2),
        Row("k", "c", "N=8", "torch", 31.4159, 0.2, 9, 233.37, "GB/s", times_ours=10.0),
    ]
    heading, ours, peer = render_text(rows).splitlines()
    assert re.split(r"  +", ours) == [
        "k: c", "N=8", "ours", "3.14 ± 0.1", "2,334 GB/s", "58%", "7,123", "12", "–", "3.2",
    ]  # fmt: skip
    assert re.split(r"  +", peer) == ["k: c", "N=8", "torch", "31.4 ± 0.1", "233 GB/s", "–", "–", "–", "10.00", "–"]
    assert len(heading) == len(ours)
    assert render_markdown(rows).splitlines()[2].startswith("| k: c | N=8 | ours | 3.14 ± 0.1 |")


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.0123"), (12.34, "12.3"), (999.4, "999"), (54321.0, "54,321")])
def test_figures_have_three_digits_and_no_exponent(value, text):
    assert format_figure(value) == text


def test_the_same_absence_is_told_once():
    pair = ("trl", "cannot be imported")
    assert render_left_out([pair, pair]) == "left out: trl: cannot be imported"


def test_times_are_summarized_by_median_and_quartiles():
    assert summarize([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, 2.0, 5)
    assert summarize([7.0]) == Timing(7.0, 0.0, 1)


def test_steps_take_turns_and_every_other_round_runs_backwards():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) or {} for name in "ab"}
    timings = time_in_turns(steps, CPU, seconds=0.0, rounds=(2, 2))
    assert calls == ["a", "b", "a", "b", "b", "a"]  # the first pair warms up
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 2, "b": 2}


def test_cpu_time_leaves_out_what_a_step_waits_for():
    timing = time_in_turns({"a": lambda: time.sleep(0.03) or {}}, CPU, 0.0, (3, 3), warm_up=False)["a"]
    assert timing.median_ms >= 30
    assert timing.cpu_ms < 15


def test_truth_matches_a_three_token_case_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL(p||q) = 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2; H(p) = 3/2 ln 2."""
    ln2 = torch.log(torch.tensor(2.0)).item()
    student_NV = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    ids_N, old_N, advantage_N = torch.tensor([1]), torch.tensor([-ln2]), torch.tensor([3.0])
    teacher_NV = torch.tensor([[0.25, 0.25, 0.5]]).log()
    problem = problems.LogitsProblem(student_NV, teacher_NV, ids_N, old_N, advantage_N)
    truth = problems.solve_logits(problem, uses_teacher=True)
    assert truth["kl"].tolist() == pytest.approx([ln2 / 4])
    assert truth["entropy"].tolist() == pytest.approx([1.5 * ln2])
    # dKL/ds = p (log p - log q - KL) = (1/2 * 3/4, 1/4 * -1/4, 1/4 * -5/4) ln 2
    assert truth["grad"].tolist()[0] == pytest.approx([3 / 8 * ln2, -1 / 16 * ln2, -5 / 16 * ln2])
    # ratio = (1/4) / (1/2): loss = -3/2, gradient = -3/2 (onehot - p)
    policy = problems.solve_logits(problem, uses_teacher=False)
    assert policy["loss"].item() == pytest.approx(-1.5)
    assert policy["grad"].tolist()[0] == pytest.approx([0.75, -1.125, 0.375])


@pytest.mark.parametrize("trains_head", [False, True])
def test_truth_does_not_depend_on_the_blocks_it_is_made_in(trains_head, monkeypatch):
    problem = problems.make_linear_problem(7, 103, 8, torch.float32, CPU, trains_head)
    whole = problems.solve_linear(problem, uses_teacher=True)
    monkeypatch.setattr(problems, "BLOCK_ELEMENTS", 2 * 103)
    blocks = problems.solve_linear(problem, uses_teacher=True)
    assert ("grad_weight" in whole) == trains_head
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value)


LISTS = {
    "logits stats": (peers.LOGITS_STATS_PEERS, True),
    "logits kl": (peers.LOGITS_KL_PEERS, True),
    "logits policy": (peers.LOGITS_POLICY_PEERS, False),
    "linear kl": (peers.LINEAR_KL_PEERS, True),
    "linear policy": (peers.LINEAR_POLICY_PEERS, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_peers_that_are_here_give_the_true_answer(name, trains_head):
    """Pins each peer's convention: direction of the KL, reduction, temperature. Absent packages are skipped."""
    group, uses_teacher = LISTS[name]
    if name.startswith("logits"):
        problem = problems.make_logits_problem(6, 301, torch.float32, CPU)
        truth = problems.solve_logits(problem, uses_teacher)
    else:
        problem = problems.make_linear_problem(6, 301, 16, torch.float32, CPU, trains_head)
        truth = problems.solve_linear(problem, uses_teacher)
    for peer in group:
        if peer.needs_gpu or "compile" in peer.name:
            continue
        try:
            step = peer.make(problem)
        except ImportError:
            continue
        assert compare(step, truth) < 1e-4, peer.name


def test_a_wrong_answer_and_a_nan_are_errors():
    truth = {"kl": torch.tensor([3.0, 4.0])}
    assert compare(lambda: {"kl": torch.tensor([3.0, 4.5])}, truth) == pytest.approx(0.1)
    assert not compare(lambda: {"kl": torch.tensor([3.0, torch.nan])}, truth) <= 1e9


def test_device_names_become_file_names():
    assert name_file("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3"


def test_newest_wheel_is_taken_and_its_absence_says_what_to_run(tmp_path):
    with pytest.raises(SetupError, match="maturin build"):
        find_wheel(tmp_path)
    for age, version in enumerate(("0.2.0", "0.1.0")):
        path = tmp_path / f"imagine_opd-{version}-cp310-abi3-linux_x86_64.whl"
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert find_wheel(tmp_path).name.startswith("imagine_opd-0.2.0")


def test_junit_report_is_counted_and_failures_named(tmp_path):
    path = tmp_path / "tests.xml"
    assert read_tests(path) is None
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>'
        '<testcase classname="a" name="z"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_tests(path) == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["a::y"]}


def test_targets_are_at_the_shapes_that_are_run():
    from benches.bench_linear_token_stats import TARGETS_MS as LINEAR
    from benches.bench_token_stats import TARGETS_MS as LOGITS

    assert {rows for _, rows in LOGITS} <= {shape.rows for shape in shapes.LOGITS_SHAPES["target"]}
    assert {size for _, *size in map(list, LINEAR) for size in [tuple(size)]} <= {
        (shape.rows, shape.hidden) for shape in shapes.LINEAR_SHAPES["target"]
    }


def answer(*values: float, dtype=torch.float32):
    return lambda: {"pixels": torch.tensor(values, dtype=dtype)}


def make_view_case(**options) -> ViewCase:
    pixels = answer(0.0, 1.0)
    contenders = {name: ViewPeer(pixels, BEST) for name in ("path", "tensor")}
    others = {"PIL image": ViewPeer(pixels, USUAL), "PIL backend": ViewPeer(pixels, against="ours, Pillow parity")}
    ours = {OURS: pixels, "ours, Pillow parity": pixels}
    targets = {BEST: 2.0, USUAL: 3.0, "PIL backend": 4.0}
    return ViewCase("12 MP JPEG", **{"ours": ours, "peers": contenders | others, "targets": targets, **options})


def test_fastest_contender_is_best_and_each_peer_is_held_against_its_own_way_of_ours():
    walls_ms = {OURS: 2.0, "ours, Pillow parity": 4.0, "path": 6.0, "tensor": 8.0, "PIL image": 10.0}
    # Other work on the machine made the path look faster than the tensor.
    cpus_ms = {OURS: 2.0, "ours, Pillow parity": 2.0, "path": 6.0, "tensor": 5.0, "PIL image": 9.0}
    timings = {name: Timing(wall, 0.1, 3, cpus_ms[name]) for name, wall in walls_ms.items()}
    timings["PIL backend"] = Timing(20.0, 0.1, 3)
    rows = view_runner.make_rows(make_view_case(), timings, dict.fromkeys(timings, Difference(0.0, 0.0)))
    assert [(row.peer, row.role, row.ratio, row.cpu_ratio, row.target) for row in rows] == [
        ("path", "", 3.0, 3.0, None),
        ("tensor", "best", 4.0, 2.5, 2.0),
        ("PIL image", "usual", 5.0, 4.5, 3.0),
        ("PIL backend", "", 5.0, None, 4.0),
    ]


def test_pixels_that_are_to_be_equal_and_are_not_end_the_bench():
    almost = ViewPeer(answer(0.0, 1.0 + 2**-20), BEST)
    with pytest.raises(AssertionError, match="12 MP JPEG: ours is off path by"):
        compare_all(make_view_case(peers={"path": almost}))
    with pytest.raises(AssertionError, match="2 values against 3"):
        compare_all(make_view_case(peers={"path": ViewPeer(answer(0.0, 1.0, 2.0), exact=False)}))
    with pytest.raises(AssertionError, match=r"float32 against torch.bfloat16"):
        compare_all(make_view_case(peers={"path": ViewPeer(answer(0.0, 1.0, dtype=torch.bfloat16))}))


def test_difference_of_an_inexact_way_is_told_in_levels():
    # Normalised by 0.5: one of 255 levels is 1 / 127.5.
    far = ViewPeer(answer(0.0, 1.0 - 2 / 127.5), exact=False)
    found = compare_all(make_view_case(peers={"path": far}))["path"]
    assert (found.most, found.mean) == (pytest.approx(2.0, abs=1e-4), pytest.approx(1.0, abs=1e-4))


def test_view_row_shows_its_ratios_beside_the_target():
    row = ViewRow("12 MP JPEG", 1, "tensor", "best", OURS, "ms", 150.0, 50.0, 3.0, 2.9, 2.0, 5)
    cells = ("12 MP JPEG", "tensor (best)", "ours", "1", "150 ms", "50 ms", "3.00", "2.90", "2.0", "0")
    assert format_view_row(row) == cells
    memory = ViewRow(
        "batch", 2, "path", "best", OURS, "MiB", 3000.0, 500.0, 6.0, max_difference=23, mean_difference=0.4
    )
    assert format_view_row(memory)[4:] == ("3,000 MiB", "500 MiB", "6.00", "–", "–", "23, mean 0.4")
    assert render_page([row, memory]).splitlines()[2:] == [
        "| 12 MP JPEG | 1 | tensor (best) | 3.00 | 2.90 | 2.0 |",
        "| batch, peak memory (× smaller) | 2 | path (best) | 6.00 | – | – |",
    ]


def test_kept_run_reads_back_and_fills_the_page_between_its_marks(tmp_path):
    rows = [
        ViewRow("a", 1, "path", "", OURS, "ms", 3.0, 1.0, 3.0),
        ViewRow("b", 2, "path", "", OURS, "ms", 4.0, 1.0, 4.0),
    ]
    path = tmp_path / "views.json"
    ViewResults("CPU", "full", rows).write(path, {"cpu": "one"})
    assert json.loads(path.read_text())["environment"] == {"cpu": "one"}
    assert read_rows(path) == rows
    page = write_page(rows, f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n{render_page(rows)}\n{END}\nafter\n"
    assert write_page(rows, page) == page
    with pytest.raises(ValueError, match="the page has no"):
        write_page(rows, "nothing")


def test_page_of_a_gpu_run_has_a_line_for_each_case_with_every_peers_ratio():
    rows = [
        Row("k", "c", "N=8", OURS, 2.0, 0.2, 9, 2000.0, "GB/s", 0.5, 70.0, 12.0, target_ms=3.2),
        Row("k", "c", "N=8", "torch", 20.0, 0.2, 9, 200.0, "GB/s", times_ours=10.0),
        Row("k", "c", "N=8", "trl", 1.0, 0.2, 9, 4000.0, "GB/s", times_ours=0.5),
        Row("k", "c", "N=4", OURS, 1.0, 0.2, 9, 2000.0, "GB/s", 0.5, 70.0, 6.0),
    ]
    assert table.render_page(rows).splitlines()[2:] == [
        "| k: c | N=8 | torch 10.00, trl 0.50 | 2 ± 0.1 | 3.2 | 50% | 12 |",
        "| k: c | N=4 |  | 1 ± 0.1 | – | 50% | 6 |",
    ]
    with pytest.raises(ValueError, match="the page has no"):
        table.write_page(rows, "nothing", "a.json")


def test_page_marks_what_an_earlier_run_has_timed():
    rows = [
        Row("k", "c", "N=8", OURS, 2.0, 0.2, 9, 2000.0, "GB/s", run="second"),
        Row("k", "c", "N=8", "torch", 20.0, 0.2, 9, 200.0, "GB/s", times_ours=10.0, run="second"),
        Row("k", "c", "N=8", "trl", 4.0, 0.2, 9, 1000.0, "GB/s", times_ours=2.0, run="first"),
        Row("k", "c", "N=4", OURS, 1.0, 0.2, 9, 2000.0, "GB/s", run="first"),
        Row("k", "c", "N=4", "trl", 3.0, 0.2, 9, 2000.0, "GB/s", times_ours=3.0, run="first"),
        Row("k", "c", "N=2", OURS, 1.0, 0.2, 9, 2000.0, "GB/s", run="third"),
    ]
    assert table.render_page(rows).splitlines()[2:] == [
        "| k: c | N=8 | torch 10.00, trl 2.00† | 2 ± 0.1 | – | – | – |",
        "| k: c | N=4 | trl 3.00 | 1 ± 0.1 ‡ | – | – | – |",
        "| k: c | N=2 |  | 1 ± 0.1 | – | – | – |",
        "",
        table.NOTE,
    ]


def test_page_shows_the_kept_run_of_the_kernels():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"<!-- begin: kernels, from (\S+) -->", page)
    kept = json.loads((ROOT / name).read_text(encoding="utf-8"))
    assert kept["on_gpu"]
    assert table.write_page(table.read_rows(ROOT / name), page, name) == page


def test_kept_rows_name_their_run_and_ratios_follow_from_the_times():
    kept = json.loads((ROOT / "benches/baselines/NVIDIA_H200.json").read_text(encoding="utf-8"))
    rows = [Row(**row) for row in kept["rows"]]
    ours = {(row.kernel, row.case, row.shape): row for row in rows if row.implementation == OURS}
    names = [run["name"] for run in kept["runs"]]
    for row in rows:
        own = ours[row.kernel, row.case, row.shape]
        assert row.times_ours == pytest.approx(row.median_ms / own.median_ms), row
        assert names.index(row.run) <= names.index(own.run), row


def test_page_shows_the_kept_run_of_the_views():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    baseline = ROOT / "benches/baselines/views_cpu.json"
    if baseline.exists():
        assert json.loads(baseline.read_text(encoding="utf-8"))["level"] == "full"
        assert write_page(read_rows(baseline), page) == page
    else:
        assert BEGIN in page


def test_pictures_are_the_same_in_every_run_and_their_batch_is_of_distinct_ones(tmp_path):
    pictures = Pictures(tmp_path, LEVELS["tiny"])
    first, second = pictures.write_batch(pictures.level.small)
    assert first.read_bytes() != second.read_bytes()
    size = Size("", 60, 40)
    photos = [np.asarray(draw_photo(size, number), dtype=float) for number in (0, 0, 1)]
    assert (photos[0] == photos[1]).all()
    assert 2 < (photos[0] - photos[2]).std() / 2**0.5 < 4  # the grain


def test_crops_hold_the_pixels_that_the_page_says():
    areas = [(x1 - x0) * (y1 - y0) / 1e6 for x0, y0, x1, y1 in place_boxes(LEVELS["full"].large)]
    assert areas == pytest.approx([0.3, 0.15, 0.8], rel=0.02)


def test_no_more_than_the_line_on_torchvisions_decoder_is_kept_out_of_the_log():
    def say(text):
        return logging.LogRecord("transformers.image_utils", logging.WARNING, "", 0, text, (), None)

    told = "Image decoding with `torchvision` is deprecated and will be removed in future versions ."
    assert not is_news(say(told))
    assert is_news(say("Image is too large"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted by Linux")
def test_peak_memory_of_a_call_holds_its_output_and_little_else(tmp_path):
    size = Size("", 1500, 1000)
    paths = [Pictures(tmp_path, LEVELS["tiny"]).write(size, number=number) for number in range(4)]
    output_mib = 4 * (1216 // 16) * (800 // 16) * 1536 * 4 / 2**20
    peak_mib = measure_peak_mib(OURS, 1, paths)
    assert output_mib * 0.9 < peak_mib < output_mib + 60


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_benchmark_option_prints_the_table_and_writes_json(tmp_path):
    path, baseline = tmp_path / "benches.json", tmp_path / "views.json"
    options = ["--bench-shapes", "tiny", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    options += ["--bench-baseline", str(baseline)]
    done = run("-m", "pytest", "--benchmark", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device: PyTorch twins at small shapes" in done.stdout
    assert re.search(r"^token_stats: fused +N=8 V=1003 fp32 +torch +.*GB/s", done.stdout, re.MULTILINE)
    assert re.search(r"^linear_token_stats: KL, trained head +N=8 V=1003 D=16 fp32 +ours ", done.stdout, re.MULTILINE)
    assert "tests/" not in done.stdout.split("collected")[1]
    found = json.loads(path.read_text())["benchmarks"]
    extra = next(bench["extra_info"] for bench in found if bench["name"].startswith("test_fused"))
    assert extra["rows"][0]["implementation"] == OURS
    assert extra["times_faster"]["torch"] == pytest.approx(extra["rows"][2]["times_ours"], abs=1e-3)
    assert re.search(r"^0\.2 MP JPEG +PIL image \(usual\) +ours +1 .* 3\.0 +0$", done.stdout, re.MULTILINE)
    kept = json.loads(baseline.read_text())
    assert kept["level"] == "tiny"
    assert {row["max_difference"] for row in kept["rows"] if "scaled" not in row["case"]} == {0.0}
    extra = next(bench["extra_info"] for bench in found if bench["name"] == "test_views[uint8]")
    assert set(extra["times_faster"]) == {"path", "tensor", "PIL image"}


@pytest.mark.parametrize(
    ("times_ms", "won"),
    [
        ({"default": 2.0, "other": 1.5}, "other"),
        ({"default": 2.0, "other": 1.97}, "default"),  # 1.5 % are within the spread
        ({"other": 1.5, "third": 1.4}, "third"),  # the default answered wrong, say
        ({}, "default"),
    ],
)
def test_a_launch_shape_must_win_by_more_than_the_spread(times_ms, won):
    assert pick(times_ms, "default") == won


def test_gpu_suite_runs_the_chosen_stages_alone(tmp_path, monkeypatch):
    suite = Suite(tmp_path, tmp_path, dict(os.environ), True, time.monotonic() + 60.0, ("ceilings",))
    ran: list[list[str]] = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **_: (ran.append(command), SimpleNamespace(wait=lambda _: 0, pid=0))[1]
    )
    run_stages(suite)
    assert [stage.name for stage in suite.stages] == ["ceilings"]
    assert [command[2] for command in ran] == ["benches.ceilings"]


@pytest.mark.slow
def test_gpu_suite_runs_every_stage_without_a_gpu(tmp_path):
    table = ROOT / "kernels/tuning.json"
    before = table.read_bytes()
    done = run("benches/gpu_suite.py", "--cpu", "--output", str(tmp_path), "--commit", "abc")
    assert done.returncode == 0, done.stdout + (tmp_path / "suite.log").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    known = {"summary.md", "benches.json", "sweep.json", "tuning.json", "step.json", "tests.log", "suite.log"}
    assert names >= known
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    (device,) = names - known
    kept = json.loads((tmp_path / device).read_text())
    assert [stage["outcome"] for stage in kept["stages"]] == ["passed"] * 6
    assert {row["peer"] for row in kept["step"]["rows"]} >= {"ours", "plain"}
    assert "| LoRA, 2 crops | plain |" in (tmp_path / "summary.md").read_text()
    assert kept["commit"] == "abc"
    assert {row["kernel"] for row in kept["rows"]} == {"token_stats", "linear_token_stats"}
    assert kept["ceilings"]["copy_gb_per_s"] > 0
    assert "| token_stats: fused |" in (tmp_path / "summary.md").read_text()
    assert table.read_bytes() == before, "a run without a GPU must not touch the tuning table"


@pytest.mark.slow
def test_gpu_suite_runs_the_step_alone_within_its_seconds(tmp_path):
    done = run(
        "benches/gpu_suite.py",
        "--cpu",
        "--stages",
        "environment",
        "step",
        "--step-seconds",
        "1",
        "--output",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + (tmp_path / "suite.log").read_text()
    found = json.loads((tmp_path / "step.json").read_text())
    assert {row["case"] for row in found["rows"]} == {"LoRA, 2 crops"}  # begun within the second, and let end
    assert all(reason == "no time left of 1 s" for _, reason in found["left_out"])
    assert len(found["left_out"]) == 6
