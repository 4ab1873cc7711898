"""Our image processors make what transformers' own make: values, types, key order, options and fallbacks."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from image_pairs import MEAN_STD, NAMES, assert_pair_agrees, assert_same, build, pictures, record_warnings, write_inputs
from pictures import draw_image, encode
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(params=NAMES)
def pair(request):
    return build(request.param)


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    return record_warnings(monkeypatch)


class TestOutputs:
    @pytest.mark.parametrize("return_tensors", ["pt", "np", None])
    def test_a_batch_of_unequal_images_equals_the_originals(self, pair, return_tensors, warnings):
        assert_pair_agrees(pair, pictures(), return_tensors=return_tensors)
        assert_pair_agrees(pair, pictures()[2], return_tensors=return_tensors)
        assert not warnings

    @pytest.mark.parametrize("return_tensors", ["pt", None])
    def test_images_of_one_size_equal_the_originals(self, pair, return_tensors, warnings):
        images = [draw_image(90, 60, seed) for seed in range(3)]
        assert_pair_agrees(pair, images, return_tensors=return_tensors)
        assert_pair_agrees(pair, images, return_tensors=return_tensors, disable_grouping=False)
        assert not warnings

    def test_nested_lists_are_taken_as_the_original_takes_them(self, pair, warnings):
        images = pictures()
        assert_pair_agrees(pair, [images[:1], images[1:3], images[3:4]], return_tensors="pt")
        assert_pair_agrees(pair, [images[:2], [], images[2:3]], return_tensors="pt")
        assert_pair_agrees(pair, tuple(images[:2]), return_tensors="pt")
        assert not warnings

    def test_outputs_are_the_callers_own_memory(self, pair):
        _, rust = pair
        first = rust(pictures(), return_tensors="pt")["pixel_values"]
        kept = first.clone()
        rust(pictures()[::-1], return_tensors="pt")
        assert torch.equal(first, kept)
        first.zero_()
        assert torch.equal(rust(pictures(), return_tensors="pt")["pixel_values"], kept)

    def test_a_part_of_a_list_is_pickled_without_the_rest_of_its_batch(self):
        for name in ("GotOcr2ImageProcessor", "LlavaNextImageProcessor"):
            parts = build(name)[1](pictures())["pixel_values"]
            assert len(parts) > 1
            assert all(len(pickle.dumps(part)) < part.nbytes + 2_000 for part in parts)

    @pytest.mark.parametrize("name", [name for name in NAMES if "Llava" in name or "Idefics3" in name])
    def test_unpadded_lists_equal_the_originals(self, name, warnings):
        nested = [[image] for image in pictures()]
        assert_pair_agrees(build(name), nested, do_pad=False)
        for return_tensors in ("pt", "np"):
            assert_pair_agrees(build(name), [nested[0], nested[0]], do_pad=False, return_tensors=return_tensors)
        assert not warnings
        for processor in build(name):
            with pytest.raises((ValueError, RuntimeError)):
                processor(nested, do_pad=False, return_tensors="pt")


class TestOptions:
    @pytest.mark.parametrize("resample", [1, 2, 3, Image.Resampling.LANCZOS])
    def test_resample_mean_and_std_at_the_call_equal_the_originals(self, pair, resample, warnings):
        assert_pair_agrees(pair, pictures(3), return_tensors="pt", resample=resample, **MEAN_STD)
        assert_pair_agrees(pair, pictures(3), return_tensors="pt")
        assert not warnings

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("Qwen2VLImageProcessor", {"size": {"shortest_edge": 1_024, "longest_edge": 5_000}}),
            ("Qwen2VLImageProcessor", {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 1}),
            ("GotOcr2ImageProcessor", {"crop_to_patches": False}),
            ("GotOcr2ImageProcessor", {"min_patches": 2, "max_patches": 12}),
            ("GotOcr2ImageProcessor", {"max_patches": 1}),
            ("GotOcr2ImageProcessor", {"size": {"height": 48, "width": 48}}),
            ("Gemma3ImageProcessor", {"do_pan_and_scan": False}),
            ("Gemma3ImageProcessor", {"pan_and_scan_max_num_crops": 2, "pan_and_scan_min_ratio_to_activate": 1.0}),
            ("Gemma3ImageProcessor", {"size": {"height": 24, "width": 24}}),
            ("LlavaNextImageProcessor", {"image_grid_pinpoints": [[64, 96], [32, 32]]}),
            ("LlavaOnevisionImageProcessor", {"image_grid_pinpoints": [[64, 96], [32, 32]]}),
            ("Idefics3ImageProcessor", {"do_image_splitting": False}),
            ("Idefics3ImageProcessor", {"size": {"longest_edge": 70}, "return_row_col_info": False}),
            ("SmolVLMImageProcessor", {"max_image_size": {"longest_edge": 48}}),
        ],
    )
    @pytest.mark.parametrize("backend", ["", "Pil"])
    def test_options_of_the_family_at_the_call_equal_the_originals(self, name, backend, options, warnings):
        assert_pair_agrees(build(name + backend), pictures(), return_tensors="pt", **options)
        assert not warnings

    @pytest.mark.parametrize("is_file", [False, True])
    def test_rgb_images_need_no_conversion(self, pair, is_file, warnings):
        for options in ({"do_convert_rgb": False}, {"do_convert_rgb": None}):
            assert_pair_agrees(pair, pictures(3), return_tensors="pt", **options)
        assert not warnings
        grey = encode(draw_image(90, 60, mode="L"), "JPEG")
        given = []
        for processor in pair:
            image = Image.open(io.BytesIO(grey))
            if not is_file:
                image.load()
            try:
                given.append(processor(image, return_tensors="pt", do_convert_rgb=False))
            except Exception as error:
                given.append((type(error).__name__, str(error)))
        assert_same(given[1], given[0])
        assert len(warnings) == 1
        assert "not RGB" in warnings[0]

    def test_another_rescale_factor_equals_the_originals(self, pair):
        assert_pair_agrees(pair, pictures(3), return_tensors="pt", rescale_factor=1 / 127)

    def test_options_may_be_set_on_the_processor(self, pair, warnings):
        for processor in pair:
            processor.image_mean = (0.1, 0.2, 0.3)
        assert_pair_agrees(pair, pictures(2), return_tensors="pt")
        assert not warnings

    def test_bad_options_raise_the_originals_error(self, pair):
        for options in ({"resample": 17}, {"no_such_option": 1}, {"size": {"bad": 3}}, {"return_tensors": "xx"}):
            raised = []
            for processor in pair:
                with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the original raises
                    processor(pictures(1), **options)
                raised.append((type(caught.value), str(caught.value)))
            assert raised[0] == raised[1]


class TestFallbacks:
    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"do_rescale": False}, "do_rescale"),
            ({"do_normalize": False}, "do_normalize"),
            ({"resample": 0}, "resample"),
        ],
    )
    def test_an_option_without_rust_warns_once_and_equals_the_original(self, pair, options, word, warnings):
        for _ in range(2):
            assert_pair_agrees(pair, pictures(3), return_tensors="pt", **options)
        assert len(warnings) == 1
        assert word in warnings[0]

    def test_images_that_are_not_resized_equal_the_originals(self, warnings):
        for name in ("Qwen2VLImageProcessor", "GotOcr2ImageProcessorPil", "Gemma3ImageProcessor"):
            images = [draw_image(56, 56)]
            assert_pair_agrees(build(name), images, return_tensors="pt", do_resize=False)
        assert len(warnings) == 3
        assert all("do_resize" in text for text in warnings)

    def test_files_are_loaded_as_the_original_loads_them(self, pair, tmp_path, warnings):
        paths = write_inputs(tmp_path)[:4]
        assert_pair_agrees(pair, paths, return_tensors="pt", do_normalize=False)
        assert len(warnings) == 1

    @pytest.mark.parametrize(("dtype", "word"), [(np.float32, "float32"), (np.int64, "int64")])
    def test_arrays_of_other_types_equal_the_originals(self, dtype, word, warnings):
        rows = np.array(draw_image(90, 60)).astype(dtype)
        for _ in range(2):
            assert_pair_agrees(build("Qwen2VLImageProcessor"), torch.from_numpy(rows), return_tensors="pt")
        assert len(warnings) == 1
        assert word in warnings[0]

    @pytest.mark.parametrize("name", ["LlavaNextImageProcessor", "LlavaNextImageProcessorPil"])
    def test_frames_of_another_size_than_the_crop_equal_the_originals(self, name, warnings):
        options = {"size": {"shortest_edge": 40}, "do_center_crop": True}
        assert_pair_agrees(build(name), pictures(3), return_tensors="pt", **options)
        assert len(warnings) == 1
        assert "size" in warnings[0]

    @pytest.mark.parametrize("name", ["LlavaOnevisionImageProcessor", "LlavaOnevisionImageProcessorPil"])
    def test_several_images_a_sample_keep_the_processors_own_mean(self, name, warnings):
        images = pictures(3)
        assert_pair_agrees(build(name), [images[:2], images[2:]], return_tensors="pt", **MEAN_STD)
        assert len(warnings) == 1
        assert "image_mean" in warnings[0]

    def test_sides_that_differ_equal_the_originals(self, warnings):
        size = {"height": 32, "width": 48}
        for name in ("GotOcr2ImageProcessor", "Gemma3ImageProcessor"):
            assert_pair_agrees(build(name), pictures(3), return_tensors="pt", size=size)
        assert len(warnings) == 2

    def test_an_empty_batch_is_answered_as_the_original_does(self, pair):
        given = []
        for processor in pair:
            try:
                given.append(processor([], return_tensors="pt"))
            except Exception as error:
                given.append((type(error).__name__, str(error)))
        assert_same(given[1], given[0])
