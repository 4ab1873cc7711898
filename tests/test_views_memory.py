"""The memory of views lies in one piece and in order, is cached within its bound, used again and never leaked."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import CONFIG, draw_image, encode, make_one
from PIL import Image
from references import FAMILIES, assert_same_views, build_processor, make_mixed_rows, read_config

from imagine_opd._rust import cache_stats
from imagine_opd.views import clear_cache, make_views


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_mixed_rows(tmp_path_factory.mktemp("images"))


def address(array):
    return array.__array_interface__["data"][0]


class TestMemory:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_lie_one_behind_the_other(self, family, rows):
        config = read_config(build_processor(family))
        found = make_views(rows, config)
        start = None
        for views in found:
            student, teacher = views.student.pixel_values, views.teacher.pixel_values
            if np.shares_memory(student, teacher):
                assert address(student) == address(teacher)
                row = [teacher]
            else:  # what both see is not the same: one image is cut, several are not
                assert family == "llava_onevision"
                row = [student, teacher]
            for pixels in row:
                assert pixels.flags.c_contiguous
                assert start in (None, address(pixels))
                start = address(pixels) + pixels.nbytes
        base = found[0].teacher.pixel_values.base
        assert all(np.shares_memory(base, views.teacher.pixel_values) for views in found)

    def test_student_is_the_leading_part_of_the_teacher(self, rows):
        for views in make_views(rows, CONFIG):
            student, teacher = views.student.pixel_values, views.teacher.pixel_values
            assert len(student) == sum(views.teacher.frame_counts[: len(views.image_sizes)])
            student[:] = 7
            assert (teacher[: len(student)] == 7).all()
            assert not (teacher[len(student) :] == 7).all() or len(student) == len(teacher)


@pytest.fixture
def empty_cache():
    clear_cache()
    yield
    clear_cache()


@pytest.mark.usefixtures("empty_cache")
class TestCache:
    CACHED = dataclasses.replace(CONFIG, cache_bytes=64 << 20)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("output", ["float32", "bfloat16", "uint8"])
    def test_second_batch_is_taken_from_it(self, family, output, rows):
        config = read_config(build_processor(family), output=output, neutral="mean")
        expected = make_views(rows, config)
        assert cache_stats() == (0, 0, 0)
        config = dataclasses.replace(config, cache_bytes=64 << 20)
        first = make_views(rows, config)
        held, held_bytes, hits = cache_stats()
        # One view of a shared image is asked for by both rows at once, before either of them is kept.
        assert hits == 0
        assert 0 < held_bytes <= 64 << 20
        second = make_views(rows, config)
        assert cache_stats()[:2] == (held, held_bytes)
        assert cache_stats()[2] >= held
        for left, right, plain in zip(first, second, expected, strict=True):
            assert_same_views(left, plain)
            assert_same_views(right, plain)

    def test_a_hit_needs_no_decoding(self):
        data = encode(draw_image(2000, 1500), "PNG")
        make_one({"image": data}, self.CACHED)
        started = time.perf_counter()
        make_one({"image": data}, self.CACHED)
        hit_s = time.perf_counter() - started
        clear_cache()
        started = time.perf_counter()
        make_one({"image": data}, self.CACHED)
        assert hit_s < 0.5 * (time.perf_counter() - started)

    def test_held_bytes_stay_under_the_bound(self):
        images = [encode(draw_image(128, 128, seed)) for seed in range(12)]
        view_bytes = make_one({"image": images[0]}).teacher.pixel_values.nbytes
        config = dataclasses.replace(CONFIG, cache_bytes=3 * view_bytes + 5)
        for image in images:
            make_one({"image": image}, config)
            assert cache_stats()[1] <= config.cache_bytes
        assert cache_stats() == (3, 3 * view_bytes, 0)
        make_one({"image": images[-1]}, config)  # the last ones stayed
        assert cache_stats()[2] == 1
        make_one({"image": images[0]}, config)
        assert cache_stats()[2] == 1

    def test_a_view_larger_than_the_bound_is_not_kept(self):
        config = dataclasses.replace(CONFIG, cache_bytes=1000)
        make_one({"image": encode(draw_image(128, 128))}, config)
        assert cache_stats() == (0, 0, 0)

    def test_smaller_bound_lets_views_go(self):
        images = [encode(draw_image(128, 128, seed)) for seed in range(6)]
        make_views([{"image": image} for image in images], self.CACHED)
        _, held_bytes, _ = cache_stats()
        config = dataclasses.replace(CONFIG, cache_bytes=held_bytes // 2)
        make_one({"image": encode(draw_image(128, 128, 99))}, config)
        assert cache_stats()[1] <= held_bytes // 2

    def test_changed_file_is_a_miss(self, tmp_path):
        path = tmp_path / "image.png"
        first, second = draw_image(128, 128, 1), draw_image(128, 128, 2)
        path.write_bytes(encode(first, compress_level=0))
        stamp = path.stat().st_mtime_ns
        before = make_one({"image": path}, self.CACHED)
        path.write_bytes(encode(second, compress_level=0))
        os.utime(path, ns=(stamp, stamp))  # as old and as large as it was
        after = make_one({"image": path}, self.CACHED)
        assert cache_stats()[2] == 0
        assert_same_views(after, make_one({"image": path}))
        assert not np.array_equal(before.student.pixel_values, after.student.pixel_values)

    def test_same_content_elsewhere_is_a_hit(self, tmp_path):
        data = encode(draw_image(128, 128))
        (tmp_path / "copy.png").write_bytes(data)
        make_one({"image": data}, self.CACHED)
        make_one({"image": tmp_path / "copy.png"}, self.CACHED)
        assert cache_stats()[2] == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"max_pixels": 20_000},
            {"resample": "bilinear"},
            {"parity": "pillow"},
            {"image_mean": (0.1, 0.5, 0.5)},
            {"image_std": (0.1, 0.5, 0.5)},
            {"rescale_factor": 1 / 128},
            {"output": "uint8"},
            {"output": "bfloat16"},
            {"alpha": "white"},
            {"exif": False},
            {"patch_size": 32, "merge_size": 1},
            {"temporal_patch_size": 1},
            {"student_scale": 0.5},
            {"student_blur_px": 1.0},
        ],
        ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()),
    )
    def test_other_config_is_a_miss(self, change):
        exif = Image.Exif()
        exif[0x0112] = 6
        image = draw_image(200, 133, mode="RGBA")
        image.putalpha(draw_image(200, 133, 5, mode="L"))
        row = {"image": encode(image, exif=exif)}
        make_one(row, self.CACHED)
        held, _, hits = cache_stats()
        config = dataclasses.replace(self.CACHED, **change)
        found = make_one(row, config)
        # The teacher of a degraded student is as it was.
        assert cache_stats()[2] == hits + any(name.startswith("student") for name in change)
        assert cache_stats()[0] == held + 1
        assert_same_views(found, make_one(row, dataclasses.replace(config, cache_bytes=0)))

    def test_other_crops_of_an_image_are_misses(self):
        data = encode(draw_image(200, 150))
        make_one({"image": data, "boxes": [(0, 0, 50, 50)]}, self.CACHED)
        found = make_one({"image": data, "boxes": [(0, 0, 50, 50), (1, 0, 51, 50)]}, self.CACHED)
        assert cache_stats()[0] == 3
        assert cache_stats()[2] == 2
        assert_same_views(found, make_one({"image": data, "boxes": [(0, 0, 50, 50), (1, 0, 51, 50)]}))

    def test_scaled_decoding_does_not_depend_on_what_it_holds(self):
        data = encode(draw_image(640, 640), "JPEG")
        config = dataclasses.replace(self.CACHED, min_pixels=1_024, max_pixels=4_096, scaled_decode=True)
        # The crop is not shrunk: with it the whole image is decoded in full, alone it is not.
        make_views([{"image": data}, {"image": data, "boxes": [(0, 0, 60, 60)]}], config)
        found = make_one({"image": data}, config)
        assert_same_views(found, make_one({"image": data}, dataclasses.replace(config, cache_bytes=0)))

    def test_views_may_be_changed_without_harm_to_it(self):
        row = {"image": encode(draw_image(128, 128))}
        make_one(row, self.CACHED).teacher.pixel_values[:] = 0
        make_one(row, self.CACHED).teacher.pixel_values[:] = 1
        assert_same_views(make_one(row, self.CACHED), make_one(row))

    def test_failed_images_are_not_kept(self):
        data = encode(draw_image(180, 140), "JPEG")
        for _ in range(2):
            assert make_views([{"image": data[: len(data) // 2]}], self.CACHED)[0].reason == "truncated"
        assert cache_stats() == (0, 0, 0)

    def test_cleared_cache_holds_nothing(self):
        make_one({"image": encode(draw_image(128, 128))}, self.CACHED)
        assert cache_stats()[0] == 1
        clear_cache()
        assert cache_stats() == (0, 0, 0)


def read_rss_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
class TestLeaks:
    def test_memory_stays_flat_over_ten_thousand_images(self):
        rng = np.random.default_rng(8)
        files = []
        for index in range(20):
            image = draw_image(int(rng.integers(64, 401)), int(rng.integers(64, 401)), index)
            kind = ("JPEG", "PNG", "WEBP", "GIF")[index % 4]
            files.append(encode(image, kind, **({"quality": 60} if kind == "WEBP" else {})))
        files[5] = files[4][: len(files[4]) // 2]  # errors must not leak either
        config = dataclasses.replace(CONFIG, min_pixels=4096, max_pixels=8192, num_threads=2, cache_bytes=1 << 20)
        rows = [{"image": data, "boxes": [(3, 3, 60, 50)]} for data in files]

        def make(count):
            for index in range(count):
                # Bytes of their own: neither cached nor shared.
                make_views([{**row, "image": row["image"] + index.to_bytes(4, "big")} for row in rows], config)

        make(100)
        held_mib = [read_rss_mib()]
        for _ in range(5):
            make(100)
            held_mib.append(read_rss_mib())
        # Allocators take a step now and then; a leak of half a kilobyte an image is a MiB in every round.
        assert np.median(np.diff(held_mib)) < 0.5, held_mib


class TestSpareMemory:
    def test_memory_of_a_batch_that_is_gone_is_used_again(self):
        clear_cache()
        config = dataclasses.replace(CONFIG, num_threads=1)
        rows = [{"image": encode(draw_image(1200, 900, seed)), "boxes": []} for seed in range(8)]
        first = make_views(rows, config)
        expected = [views.student.pixel_values.copy() for views in first]
        place = first[0].student.pixel_values.ctypes.data
        kept = make_views(rows, config)  # while the first is there: elsewhere
        assert kept[0].student.pixel_values.ctypes.data != place
        del first
        again = make_views(rows, config)
        assert again[0].student.pixel_values.ctypes.data == place
        for views, pixels in zip(again, expected, strict=True):
            np.testing.assert_array_equal(views.student.pixel_values, pixels)
        for views, pixels in zip(kept, expected, strict=True):
            np.testing.assert_array_equal(views.student.pixel_values, pixels)

    def test_a_single_array_keeps_its_memory(self):
        config = dataclasses.replace(CONFIG, num_threads=1)
        rows = [{"image": encode(draw_image(1200, 900, seed))} for seed in range(8)]
        last = make_views(rows, config)[-1].student.pixel_values[3:]
        expected = last.copy()
        make_views([{"image": encode(draw_image(1200, 900, seed + 50))} for seed in range(8)], config)
        np.testing.assert_array_equal(last, expected)
