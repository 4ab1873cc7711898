"""Hostile image files through `make_views`: pixels or an error value with its reason, in bounded memory and time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import hostile
import numpy as np
import pytest
from pictures import CONFIG

from imagine_opd.types import RowViews, Tiling, ViewError
from imagine_opd.views import check_images, make_views

REASONS = {"truncated", "undecodable", "too_large", "aspect"}
TILINGS = (
    Tiling("internvl", 28),
    Tiling("llava_next", 28, pinpoints=((28, 56), (56, 28))),
    Tiling("llava_onevision", 28, pinpoints=((28, 56), (56, 28))),
    Tiling("idefics3", 28, longest_edge_px=56),
    Tiling("gemma3", 28, min_crop_px=8),
)
CONFIGS = (CONFIG, *(dataclasses.replace(CONFIG, tiling=tiling, alpha="white", exif=False) for tiling in TILINGS))

# What a file may do to a process of its own: address space is cut off above what the process has at its start.
PROBE = """
import json, resource, sys, time
from imagine_opd.types import ViewConfig
from imagine_opd.views import make_views

def read_mib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

make_views([{"image": sys.argv[1]}], ViewConfig(num_threads=1))  # threads and tables are there from now on
limit = int((read_mib("VmSize:") + float(sys.argv[2])) * 2**20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = {}
for path in sys.argv[3:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before, start = read_mib("VmHWM:"), time.perf_counter()
    (views,) = make_views([{"image": path}], ViewConfig(num_threads=1, max_pixels=65_536))
    reason = getattr(views, "reason", "")
    found[path] = (reason, getattr(views, "message", ""), read_mib("VmHWM:") - before, time.perf_counter() - start)
print(json.dumps(found))
"""


def measure(folder, files, room_mib):
    """Per file: reason, message, peak in MiB above the start and seconds, in a process with that much room."""
    warm = folder / "warm.png"
    warm.write_bytes(hostile.make_sound()["rgb.png"])
    paths = {name: folder / name for name in files}
    for name, path in paths.items():
        path.write_bytes(files[name])
    command = [sys.executable, "-c", PROBE, warm, room_mib, *paths.values()]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: found[str(path)] for name, path in paths.items()}


@pytest.fixture(scope="module")
def bombs():
    return {name: data for name, data in hostile.make_hostile().items() if name.startswith("bomb")}


class TestMemory:
    def test_bombs_of_every_format_are_refused_without_their_pixels(self, tmp_path, bombs):
        assert {name.partition(".")[2] for name in bombs} == {"png", "jpg", "gif", "webp"}
        for name, (reason, message, peak_mib, seconds) in measure(tmp_path, bombs, room_mib=64).items():
            assert reason == "too_large", (name, message)
            assert "over max_image_pixels=178956970" in message
            assert peak_mib < 4, name
            assert seconds < 1, name

    def test_small_files_take_little_memory_and_time_whatever_they_promise(self, tmp_path):
        files = {name: data for name, data in hostile.make_hostile().items() if not name.startswith("bomb")}
        assert files.keys() >= {"zip.png", "profile.png", "text.png", "scans.jpg", "loop.jpg", "entries.jpg"}
        for name, (reason, message, peak_mib, seconds) in measure(tmp_path, files, room_mib=256).items():
            assert reason in {"", "undecodable"}, (name, message)
            assert peak_mib < 48, name
            assert seconds < 20, name

    @pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.family)
    @pytest.mark.parametrize("size", [(1, 900_000), (900_000, 1)], ids=["tall", "wide"])
    def test_endless_line_is_not_made_into_frames(self, tiling, size):
        start = time.perf_counter()
        (found,) = make_views([{"image": hostile.png_bomb(*size)}], dataclasses.replace(CONFIG, tiling=tiling))
        assert time.perf_counter() - start < 1
        assert isinstance(found, ViewError)
        assert found.reason == "aspect", found

    def test_image_that_memory_does_not_hold_is_an_error_value(self, tmp_path):
        # Within the limits of pixels: its 300 MB are asked for, and not there.
        data = {"interlaced.png": hostile.interlaced_bomb(10_000, 10_000)}
        ((reason, message, *_),) = measure(tmp_path, data, room_mib=128).values()
        assert reason == "too_large", message
        assert "does not fit in memory" in message


class TestReasons:
    @pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.tiling.family if config.tiling else "qwen")
    def test_every_file_gives_pixels_or_a_reason(self, config):
        sound = hostile.make_sound()
        files = {**sound, **hostile.make_damaged(), **hostile.make_hostile()}
        del files["scans.jpg"]  # has a test of its own in test_views_errors
        rows = [{"image": data, "boxes": [(1, 1, 7, 3)]} for data in files.values()]
        start = time.perf_counter()
        made = make_views(rows, config)
        assert time.perf_counter() - start < 30
        checked = check_images(rows, config)
        for name, views, refused in zip(files, made, checked, strict=True):
            if isinstance(views, RowViews):
                assert np.isfinite(views.teacher.pixel_values).all(), name
                assert refused is None, name
            else:
                assert name not in sound, views
                assert views.reason in REASONS, views
                assert refused in (None, views), name

    def test_damage_is_named(self):
        files = {**hostile.make_damaged(), **hostile.make_hostile()}
        expected = {
            "baseline_cut.jpg": "truncated",
            "progressive_cut.jpg": "truncated",
            "rgb_cut.png": "truncated",
            "lossy_cut.webp": "truncated",
            "still_cut.gif": "truncated",
            "rgb_flipped.png": "undecodable",
            "short_segment.jpg": "undecodable",
            "lying_chunk.webp": "undecodable",
            "lying_canvas.webp": "undecodable",
        }
        for name, reason in expected.items():
            (found,) = make_views([{"image": files[name]}], CONFIG)
            assert isinstance(found, ViewError), name
            assert found.reason == reason, (name, found)

    def test_orientation_is_read_through_a_hostile_exif_block(self):
        for name in ("loop.jpg", "entries.jpg"):
            (found,) = make_views([{"image": hostile.make_hostile()[name]}], CONFIG)
            assert found.image_sizes == ((37, 29),), name  # it tells of none: upright
