"""Whatever transformers takes for an image ours take alike: files, URLs, PIL images, arrays, and bad ones."""

from __future__ import annotations

import base64
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_pairs import NAMES, assert_pair_agrees, assert_same, build, record_warnings, write_inputs
from pictures import draw_image, encode, png_rgb16
from PIL import Image
from transformers.image_utils import load_image

from imagine_opd import image_layouts
from imagine_opd.errors import ImageError
from imagine_opd.image_inputs import DeferredImage

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(params=NAMES)
def pair(request):
    return build(request.param)


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    return record_warnings(monkeypatch)


class TestInputs:
    def test_paths_urls_and_base64_follow_the_rules_of_paths(self, pair, tmp_path, warnings):
        paths = write_inputs(tmp_path)
        original, _ = pair
        if original.backend == "torchvision":
            paths.remove(str(tmp_path / "plain.bmp"))  # unknown to torchvision
        coded = base64.encodebytes(Path(paths[1]).read_bytes()).decode()
        assert_pair_agrees(pair, [*paths, coded, f"data:image/jpeg;base64,{coded}"], return_tensors="pt")
        assert_pair_agrees(pair, paths[0], return_tensors="pt")
        assert not warnings

    def test_path_objects_are_taken_too(self, pair, tmp_path):
        _, rust = pair
        path = write_inputs(tmp_path)[1]
        assert_same(rust([Path(path)], return_tensors="pt"), rust([path], return_tensors="pt"))

    def test_pil_objects_follow_the_rules_of_pil_objects(self, pair, tmp_path, warnings):
        """An orientation is not applied; transparency is laid on white."""
        paths = write_inputs(tmp_path)
        for path in paths:
            expected = pair[0](load(path), return_tensors="pt")
            with Image.open(path) as image:
                assert_same(pair[1](image, return_tensors="pt"), expected, path)
            assert_same(pair[1](load(path), return_tensors="pt"), expected, path)
        assert not warnings

    @pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
    @pytest.mark.parametrize("name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil"])
    def test_files_of_every_kind_of_sample_equal_the_originals(self, name, tmp_path, warnings):
        pair = build(name)
        rgba = draw_image(90, 60, mode="RGBA")
        rgba.putalpha(draw_image(90, 60, seed=5, mode="L"))
        rgb, grey, palette = draw_image(90, 60), draw_image(90, 60, mode="L"), draw_image(90, 60, mode="P")
        samples = np.random.default_rng(0).integers(0, 65_536, (60, 90, 3))
        wide = {"rgb16.png": png_rgb16(samples), "grey16.png": encode(Image.fromarray(samples[..., 0].astype("u2")))}
        files = {
            "bits.png": encode(draw_image(90, 60, mode="1")),
            "grey_alpha.png": encode(rgba.convert("LA")),
            "palette_alpha.png": encode(palette, transparency=bytes(range(256))),
            "palette_colour.png": encode(palette, transparency=palette.getpixel((3, 3))),
            "rgb_colour.png": encode(rgb, transparency=rgb.getpixel((3, 3))),
            "grey_colour.png": encode(grey, transparency=grey.getpixel((3, 3))),
            "alpha.webp": encode(rgba, "WEBP", lossless=True),
            "lossy.webp": encode(rgb, "WEBP", quality=70),
            "444.jpg": encode(draw_image(91, 61), "JPEG", subsampling=0),
            "422.jpg": encode(draw_image(91, 61), "JPEG", subsampling=1),
            "rough.jpg": encode(draw_image(91, 61), "JPEG", quality=10),
        }
        for file, data in {**files, **wide}.items():
            assert not warnings, file
            path = tmp_path / file
            path.write_bytes(data)
            expected = pair[0](str(path), return_tensors="pt")
            assert_same(pair[1](str(path), return_tensors="pt"), expected, file)
            if file in wide and name.endswith("Processor"):  # torchvision does not bring 16 bits to 8
                assert "uint16" in warnings.pop()
                image_layouts._warned.clear()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
    def test_frames_of_a_gif_are_what_they_are_to_the_backend(self, pair, tmp_path, warnings):
        """By path each is an image to torchvision; Pillow takes the first (and leaves the file open)."""
        path = tmp_path / "moving.gif"
        frames = [draw_image(90, 60, seed) for seed in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        if "Onevision" not in type(pair[0]).__name__ or pair[0].backend == "pil":  # it counts one image, and fails
            assert_pair_agrees(pair, [str(path)], return_tensors="pt")
        assert_pair_agrees(pair, load(path), return_tensors="pt")
        assert not warnings

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "1", "I", "F", "I;16"])
    def test_every_mode_of_pil_equals_the_originals(self, pair, mode, warnings):
        image = draw_image(90, 60, mode="L" if mode == "I;16" else mode if mode != "PA" else "P").convert(mode)
        assert_pair_agrees(pair, image, return_tensors="pt")
        assert not warnings

    def test_a_transparent_colour_of_an_rgb_image_is_laid_on_white(self, pair, warnings):
        image = draw_image(90, 60)
        image.info["transparency"] = image.getpixel((4, 5))
        assert_pair_agrees(pair, image, return_tensors="pt")
        assert not warnings

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_arrays_of_each_layout_equal_the_originals(self, pair, kind, warnings):
        rows = np.array(draw_image(90, 60))
        rgba = np.dstack([rows, np.array(draw_image(90, 60, seed=5, mode="L"))])
        wrap = torch.from_numpy if kind == "torch" else np.asarray
        planes = np.ascontiguousarray(rows.transpose(2, 0, 1))
        for array in (rows, planes, rgba, np.ascontiguousarray(rgba.transpose(2, 0, 1)), rows[:, :, :1], planes[:1]):
            assert_pair_agrees(pair, wrap(array), return_tensors="pt")
        assert_pair_agrees(pair, [wrap(rows), wrap(rows[:40, 7:].copy())], return_tensors="pt")
        assert_pair_agrees(pair, wrap(rows[5:50, 3:80]), return_tensors="pt")
        if "Onevision" not in type(pair[0]).__name__:  # its original counts a stack as one image, and fails
            assert_pair_agrees(pair, wrap(np.stack([planes, planes])), return_tensors="pt")
        assert_pair_agrees(pair, wrap(rows), return_tensors="pt", input_data_format="channels_last")
        narrow = np.ascontiguousarray(planes[:, :, :3])  # three channels first and last: the call says which
        assert_pair_agrees(pair, wrap(narrow), return_tensors="pt", input_data_format="channels_first")
        assert not warnings

    def test_kinds_of_input_may_be_mixed(self, pair, tmp_path, warnings):
        image = draw_image(90, 60)
        rows = np.array(image)
        planes = torch.from_numpy(rows.transpose(2, 0, 1).copy())
        assert_pair_agrees(pair, [image, rows, planes, write_inputs(tmp_path)[0]], return_tensors="pt")
        assert not warnings


def load(path):
    with Image.open(path) as image:
        image.load()
        return image


class TestOpenedJpegs:
    def test_an_image_that_was_opened_but_not_loaded_is_decoded_by_rust(self, tmp_path, warnings):
        original, rust = build("Qwen2VLImageProcessor")
        path = write_inputs(tmp_path)[0]
        expected = original(Image.open(path), return_tensors="pt")
        image = Image.open(path)
        file = image.fp
        assert_same(rust(image, return_tensors="pt"), expected)
        assert image._im is None
        assert file.closed  # as after loading: many opened images do not hold many files
        assert_same(rust(image, return_tensors="pt"), expected)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path)))
        stream = io.BytesIO(Path(path).read_bytes())
        assert_same(rust(Image.open(stream), return_tensors="pt"), expected)
        assert not stream.closed
        assert not warnings

    def test_a_draft_is_not_undone(self, tmp_path):
        original, rust = build("Qwen2VLImageProcessor")
        path = write_inputs(tmp_path)[4]
        for mode, size in (("RGB", (100, 75)), ("L", (200, 150)), ("YCbCr", (200, 150))):
            drafts = [Image.open(path), Image.open(path)]
            for draft in drafts:
                draft.draft(mode, size)
            assert_same(rust(drafts[1], return_tensors="pt"), original(drafts[0], return_tensors="pt"))


class TestBadImages:
    # Of a damaged file transformers leaves the handle open.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
    @pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing", "header"])
    def test_a_bad_file_raises_an_error_that_names_it(self, pair, tmp_path, damage):
        path = tmp_path / f"{damage}.png"
        whole = encode(draw_image(90, 60))
        data = {"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b"", "header": whole[:20]}
        if damage in data:
            path.write_bytes(data[damage])
        with pytest.raises(ImageError, match=path.name):
            pair[1]([draw_image(90, 60), str(path)], return_tensors="pt")

    def test_text_that_is_no_image_is_named_in_short(self, pair):
        with pytest.raises(ImageError, match="neither an image file, a URL nor base64") as caught:
            pair[1]("x" * 5_000)
        assert len(str(caught.value)) < 300

    def test_what_transformers_takes_and_rust_refuses_is_taken(self, tmp_path, monkeypatch, warnings):
        """Decoders differ in how much damage they forgive: the original's verdict stands."""
        pair = build("Qwen2VLImageProcessor")

        def refuse(samples, config):
            raise ImageError("1.png: refused")

        monkeypatch.setattr(image_layouts, "process_images", refuse)
        for _ in range(2):
            assert_pair_agrees(pair, write_inputs(tmp_path)[:2], return_tensors="pt")
        assert len(warnings) == 1
        assert "1.png: refused" in warnings[0]

    def test_a_kind_of_object_that_is_no_image_raises_the_originals_error(self, pair):
        for bad in (7, [7], {"image": 1}):
            raised = []
            for processor in pair:
                with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the original raises
                    processor(bad)
                raised.append((type(caught.value), str(caught.value)))
            assert raised[0] == raised[1]


class TestDeferredImages:
    def test_an_image_not_decoded_yet_is_a_pil_image_as_transformers_loads_it(self, tmp_path):
        _, rust = build("Qwen2VLImageProcessor")
        for path in write_inputs(tmp_path)[:5]:
            image = rust.fetch_images(path)
            expected = load_image(path)
            assert isinstance(image, DeferredImage)
            assert not image.is_loaded
            assert (image.size, image.mode) == (expected.size, expected.mode)
            assert not image.is_loaded
            again = pickle.loads(pickle.dumps(image))
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
            np.testing.assert_array_equal(
                np.asarray(again.crop((1, 2, 30, 40))), np.asarray(expected.crop((1, 2, 30, 40)))
            )

    def test_changed_pixels_are_not_lost(self, tmp_path):
        pair = build("Qwen2VLImageProcessor")
        image = pair[1].fetch_images(write_inputs(tmp_path)[0])
        image.paste((255, 0, 0), (10, 10, 60, 50))
        assert_pair_agrees(pair, image, return_tensors="pt")
        copied = pickle.loads(pickle.dumps(image))
        np.testing.assert_array_equal(np.asarray(copied), np.asarray(image))
