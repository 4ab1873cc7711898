"""A batch of views has the same bits however it is made, and is told of, stopped and made by many processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import CONFIG, PHOTOS, draw_image, encode, make_one
from PIL import Image
from references import FAMILIES, assert_same_views, build_processor, make_mixed_rows, read_config

from imagine_opd.errors import ConfigError
from imagine_opd.types import RowViews, ViewError
from imagine_opd.views import make_views


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_mixed_rows(tmp_path_factory.mktemp("images"))


class TestSameBits:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("options", [{}, {"neutral": "mean", "highlight": "teacher", "output": "uint8"}])
    def test_batch_equals_rows_one_by_one(self, family, options, rows):
        config = read_config(build_processor(family), **options)
        for row, views in zip(rows, make_views(rows, config), strict=True):
            assert_same_views(make_one(row, config), views)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_threads_do_not_show(self, family, rows):
        config = read_config(build_processor(family), neutral="blur", student_blur_px=1.0)
        for count in (len(rows), 1):  # of many images, images are spread over threads; of one, its views
            one, four = (make_views(rows[:count], dataclasses.replace(config, num_threads=n)) for n in (1, 4))
            for left, right in zip(one, four, strict=True):
                assert_same_views(left, right)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_bad_rows_leave_the_others_as_they_are(self, family, rows, tmp_path):
        config = read_config(build_processor(family))
        cut = encode(draw_image(180, 140), "JPEG")
        cut = cut[: len(cut) // 2]
        bad = [{"image": cut}, {"image": tmp_path / "none.png"}, {"images": [rows[1]["image"], cut]}, {}]
        bad.append({**rows[0], "boxes": [(0, 0, 999, 9)]})
        mixed = [row for pair in zip(bad, rows, strict=False) for row in pair] + rows[len(bad) :]
        found = make_views(mixed, config)
        good = [views for views in found if isinstance(views, RowViews)]
        for left, right in zip(good, make_views(rows, config), strict=True):
            assert_same_views(left, right)
        reasons = [(error.row, error.reason) for error in found if isinstance(error, ViewError)]
        assert reasons == [(0, "truncated"), (2, "missing"), (4, "truncated"), (6, "no_image"), (8, "box_outside")]

    def test_environment_says_how_many_threads(self, rows, monkeypatch):
        expected = make_views(rows[:2], CONFIG)
        monkeypatch.setenv("IMAGINE_OPD_NUM_THREADS", "3")
        for left, right in zip(make_views(rows[:2], CONFIG), expected, strict=True):
            assert_same_views(left, right)
        assert count_threads({"IMAGINE_OPD_NUM_THREADS": "3"}) == 3

    @pytest.mark.parametrize("value", ["0", "-1", "two", "1025", " ", "1.5"])
    def test_bad_number_of_threads_is_named(self, value, monkeypatch):
        monkeypatch.setenv("IMAGINE_OPD_NUM_THREADS", value)
        with pytest.raises(ConfigError) as found:
            make_views([])
        assert str(found.value) == (f"IMAGINE_OPD_NUM_THREADS is {value!r}; expected a whole number from 1 to 1024")
        assert make_views([], dataclasses.replace(CONFIG, num_threads=1)) == []  # not asked for where it is given


COUNT_THREADS = """
import os
import time
from PIL import Image
from imagine_opd.views import make_views
make_views([{"image": Image.new("RGB", (9, 9))}])
time.sleep(0.5)  # a thread names itself once it runs
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum(name.startswith("imagine-views") for name in names))
"""


def count_threads(environment):
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted through /proc")
    command = [sys.executable, "-c", COUNT_THREADS]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.fixture(scope="module")
def long_batch():
    """Rows that keep one thread busy for a second or more."""
    photo = encode(Image.open(PHOTOS / "china.jpg").resize((3000, 2000)), "JPEG")
    rows = [{"image": photo + bytes([index])} for index in range(60)]  # bytes of their own: decoded one by one
    return rows, dataclasses.replace(CONFIG, num_threads=1)


class Stopped(Exception):  # noqa: N818
    pass


class TestProgress:
    def test_it_goes_up_and_ends_at_all(self, long_batch):
        rows, config = long_batch
        told = []
        make_views(rows[:30], config, progress=lambda done, total: told.append((done, total)))
        assert len(told) > 3
        assert told == sorted(told)
        assert told[-1] == (30, 30)
        assert {total for _, total in told} <= {0, 30}  # 0 until headers are read

    def test_images_are_counted_once_and_those_of_bad_rows_not(self, rows):
        told = []
        bad = [{"image": b"bad"}, {"image": encode(draw_image(9, 9)), "boxes": [(5, 5, 5, 9)]}]
        make_views([*bad, *rows], CONFIG, progress=lambda *now: told.append(now))
        assert told[-1] == (5, 5)
        make_views(bad, CONFIG, progress=lambda *now: told.append(now))
        assert told[-1] == (0, 0)

    def test_what_it_raises_stops_the_batch(self, long_batch):
        rows, config = long_batch
        seen = []

        def stop(done, total):
            seen.append(done)
            raise Stopped(f"at {done} of {total}")

        with pytest.raises(Stopped, match="of 60"):
            make_views(rows, config, progress=lambda done, total: total and stop(done, total))
        assert len(seen) == 1
        assert seen[0] < 60
        assert isinstance(make_views(rows[:1], config)[0], RowViews)

    def test_what_it_raises_at_the_end_is_not_lost(self):
        def stop(done, total):
            raise Stopped

        with pytest.raises(Stopped):
            make_views([{"image": encode(draw_image(9, 9))}], CONFIG, progress=stop)

    @pytest.fixture
    def ctrl_c(self):
        """Python's own answer to Ctrl-C: a process started in the background may have none."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.usefixtures("ctrl_c")
    def test_ctrl_c_stops_a_long_batch(self, long_batch):
        rows, config = long_batch
        started = time.monotonic()
        make_views(rows[:10], config)
        whole_s = 6 * (time.monotonic() - started)
        timer = threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            make_views(rows, config)
        taken_s = time.monotonic() - started
        timer.join()
        assert taken_s < max(0.6 * whole_s, 0.5)
        assert isinstance(make_views(rows[:1], config)[0], RowViews)

    @pytest.mark.usefixtures("ctrl_c")
    def test_ctrl_c_stops_within_an_image(self):
        image = encode(Image.open(PHOTOS / "china.jpg").resize((9000, 6000), Image.Resampling.NEAREST), "JPEG")
        config = dataclasses.replace(CONFIG, num_threads=1)
        started = time.monotonic()
        make_one({"image": image}, config)
        whole_s = time.monotonic() - started
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        started = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            make_one({"image": image}, config)
        assert time.monotonic() - started < max(0.75 * whole_s, 0.2)
        timer.join()


class ViewsOf(torch.utils.data.Dataset):
    def __init__(self, rows, config):
        self.rows, self.config = rows, config

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return make_one(self.rows[index], self.config).teacher.pixel_values


def sum_views(row):
    return float(make_one(row, CONFIG).teacher.pixel_values.sum())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on; data loaders do fork
class TestProcesses:
    def test_forked_pool_makes_views_after_the_parent_did(self, rows):
        expected = [sum_views(row) for row in rows]
        for threads in (0, 1, 2):
            make_views(rows, dataclasses.replace(CONFIG, num_threads=threads))
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(sum_views, rows).get(timeout=60) == expected

    def test_data_loader_with_two_workers_makes_views(self, rows):
        expected = [views.teacher.pixel_values for views in make_views(rows, CONFIG)]
        loader = torch.utils.data.DataLoader(
            ViewsOf(rows, CONFIG), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        found = list(loader)
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(left), right)

    def test_many_threads_call_at_once(self, rows):
        expected = [sum_views(row) for row in rows]
        found = {}

        def work(index):
            found[index] = [sum_views(row) for row in rows]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == dict.fromkeys(range(6), expected)
