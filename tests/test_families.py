"""`view_config_from` reads each family's image processor in full, and refuses what views would not equal."""

from __future__ import annotations

import dataclasses
import types

import PIL
import pytest
import transformers
from torchvision.transforms import InterpolationMode

from imagine_opd import families
from imagine_opd.errors import ConfigError
from imagine_opd.families import view_config_from
from imagine_opd.types import Tiling, ViewConfig
from imagine_opd.view_checks import MAX_TILES

MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
PIXELS = {"image_mean": list(MEAN), "image_std": list(STD), "rescale_factor": 1 / 128}
READ = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 128}
PINPOINTS = [[336, 672], [672, 336], [1008, 336]]
LLAVA = {"size": {"shortest_edge": 336}, "crop_size": 336, "image_grid_pinpoints": PINPOINTS}
PILLOW = "pillow" if int(PIL.__version__.split(".")[0]) >= 13 else "pillow12"

# Class, its arguments, what is read.
PROCESSORS = {
    "qwen": (
        "Qwen2VLImageProcessor",
        {"patch_size": 16, "merge_size": 3, "temporal_patch_size": 1, "size": {"shortest_edge": 9, "longest_edge": 99}},
        {"patch_size": 16, "merge_size": 3, "temporal_patch_size": 1, "min_pixels": 9, "max_pixels": 99},
    ),
    "internvl": (
        "GotOcr2ImageProcessor",
        {"size": 448, "crop_to_patches": True, "min_patches": 2, "max_patches": 9, "resample": 2},
        {"tiling": Tiling("internvl", 448, min_tiles=2, max_tiles=9), "resample": "bilinear"},
    ),
    "internvl-whole": ("GotOcr2ImageProcessor", {}, {"tiling": Tiling("internvl", 384, split=False)}),
    "llava_next": (
        "LlavaNextImageProcessor",
        LLAVA,
        {"tiling": Tiling("llava_next", 336, pinpoints=((336, 672), (672, 336), (1008, 336)))},
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 336, "width": 336}, "image_grid_pinpoints": PINPOINTS},
        {"tiling": Tiling("llava_onevision", 336, pinpoints=((336, 672), (672, 336), (1008, 336)))},
    ),
    "idefics3": (
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 2000}, "max_image_size": {"longest_edge": 400}},
        {"tiling": Tiling("idefics3", 400, longest_edge_px=2000), "resample": "lanczos"},
    ),
    "smolvlm": (
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "do_image_splitting": False},
        {"tiling": Tiling("idefics3", 512, split=False, longest_edge_px=2048), "resample": "lanczos"},
    ),
    "gemma3": (
        "Gemma3ImageProcessor",
        {"size": 896, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 128, "pan_and_scan_max_num_crops": 6,
         "pan_and_scan_min_ratio_to_activate": 1.5},
        {"tiling": Tiling("gemma3", 896, min_crop_px=128, max_crops=6, min_ratio=1.5), "resample": "bilinear"},
    ),
    "gemma3-whole": (
        "Gemma3ImageProcessor",
        {},
        {"tiling": Tiling("gemma3", 224, split=False), "resample": "bilinear"},
    ),
}  # fmt: skip


def make(kind, **changes):
    name, arguments, _ = PROCESSORS[kind]
    return getattr(transformers, name)(**{**PIXELS, **arguments, **changes})


class TestReading:
    @pytest.mark.parametrize("kind", PROCESSORS)
    @pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
    def test_every_field_is_read(self, kind, pil):
        name, arguments, expected = PROCESSORS[kind]
        processor = getattr(transformers, name + "Pil" * pil)(**PIXELS, **arguments)
        parity = PILLOW if pil else "torchvision"
        assert view_config_from(processor) == ViewConfig(**READ, **expected, parity=parity)

    @pytest.mark.parametrize("kind", PROCESSORS)
    def test_what_is_read_survives_the_processors_own_file(self, kind, tmp_path):
        processor = make(kind)
        processor.save_pretrained(tmp_path)
        assert view_config_from(type(processor).from_pretrained(tmp_path)) == view_config_from(processor)

    @pytest.mark.parametrize("kind", ["internvl-whole", "gemma3-whole", "smolvlm"])
    def test_split_stands_for_the_call(self, kind):
        assert view_config_from(make(kind)).tiling.split is False
        assert view_config_from(make(kind), split=True).tiling == dataclasses.replace(
            view_config_from(make(kind)).tiling, split=True
        )

    def test_split_may_be_off_for_the_call(self):
        assert view_config_from(make("internvl"), split=False).tiling.split is False

    def test_defaults_of_the_rule_are_those_of_the_models_processor(self):
        rule = transformers.Gemma3Processor.images_kwargs
        tiling = view_config_from(make("gemma3-whole"), split=True).tiling
        assert (tiling.min_crop_px, tiling.max_crops, tiling.min_ratio) == (
            rule["pan_and_scan_min_crop_size"],
            rule["pan_and_scan_max_num_crops"],
            rule["pan_and_scan_min_ratio_to_activate"],
        )

    @pytest.mark.parametrize(
        ("resample", "expected"),
        [(1, "lanczos"), (3, "bicubic"), (InterpolationMode.BILINEAR, "bilinear"), (PIL.Image.LANCZOS, "lanczos")],
    )
    def test_filter_is_read_in_each_form(self, resample, expected):
        assert view_config_from(make("internvl", resample=resample)).resample == expected

    def test_overrides_win(self):
        tiling = Tiling("internvl", 64)
        config = view_config_from(make("internvl"), box_margin=0.3, tiling=tiling, resample="lanczos")
        assert (config.box_margin, config.tiling, config.resample) == (0.3, tiling, "lanczos")

    def test_pillow_before_13_has_its_own_parity(self, monkeypatch):
        processor = transformers.Gemma3ImageProcessorPil()
        for version, parity in [("12.1.0", "pillow12"), ("13.0.0", "pillow"), ("14.2", "pillow")]:
            monkeypatch.setattr(PIL, "__version__", version)
            assert view_config_from(processor).parity == parity


class TestKinds:
    @pytest.mark.parametrize("kind", PROCESSORS)
    def test_subclass_that_changes_no_step_is_read(self, kind):
        processor = make(kind)
        name = type(processor).__name__
        extra = {"to_dict": lambda self: {}, "describe": lambda self: "", "resample": processor.resample}
        processor.__class__ = type("Own" + name, (type(processor),), extra)
        assert view_config_from(processor) == view_config_from(make(kind))

    @pytest.mark.parametrize("method", ["_preprocess", "resize", "__call__"])
    def test_subclass_with_a_step_of_its_own_is_refused(self, method):
        processor = make("gemma3")
        processor.__class__ = type("Own", (type(processor),), {method: lambda self, image: image})
        with pytest.raises(ConfigError) as found:
            view_config_from(processor)
        expected = f"Own has its own {method} (in Own); views do what Gemma3ImageProcessor does; use that class"
        assert str(found.value).startswith(expected)

    @pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
    def test_drop_in_is_read_by_its_name(self, pil):
        name = "Gemma3ImageProcessor" + "Pil" * pil
        original = getattr(transformers, name)(**PIXELS)
        stand_in = type("Rust" + name, (types.SimpleNamespace,), {"resize": None})(**vars(original))
        assert view_config_from(stand_in) == view_config_from(original)

    @pytest.mark.parametrize("processor", [object(), transformers.CLIPImageProcessor()])
    def test_unknown_kind_is_told_the_known_ones(self, processor):
        with pytest.raises(ConfigError) as found:
            view_config_from(processor)
        assert str(found.value) == (
            f"{type(processor).__name__} is no image processor that views can equal; expected one of "
            "Gemma3ImageProcessor, GotOcr2ImageProcessor, Idefics3ImageProcessor, LlavaNextImageProcessor, "
            "LlavaOnevisionImageProcessor, Qwen2VLImageProcessor, SmolVLMImageProcessor"
        )


class TestRefusals:
    @pytest.mark.parametrize("kind", PROCESSORS)
    @pytest.mark.parametrize(
        ("field", "value", "text"),
        [
            ("do_resize", False, "is False; expected True: views are resized"),
            ("do_rescale", False, "is False; expected True: views are normalised"),
            ("do_normalize", None, "is None; expected True: views are normalised"),
            ("do_convert_rgb", False, "is False; expected True: views are RGB"),
            ("resample", 0, "is 0; expected 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"),
            ("resample", None, "is None; expected 1"),
            ("resample", True, "is True; expected 1"),
            ("image_mean", 0.5, "is 0.5; expected three finite numbers, one a channel"),
            ("image_mean", (0.5, 0.5), "is (0.5, 0.5); expected three finite numbers"),
            ("image_std", (0.5, 0.0, 0.5), "is (0.5, 0.0, 0.5); expected numbers above 0"),
            ("rescale_factor", 0.0, "is 0.0; expected a finite number above 0"),
            ("rescale_factor", float("inf"), "is inf; expected a finite number above 0"),
        ],
    )
    def test_what_no_family_of_views_does_is_named(self, kind, field, value, text):
        processor = make(kind)
        setattr(processor, field, value)
        assert_refused(processor, f"{type(processor).__name__}.{field} {text}")

    @pytest.mark.parametrize(
        ("kind", "field", "value", "text"),
        [
            ("qwen", "size", {"height": 9, "width": 9}, "expected shortest_edge and longest_edge, in square pixels"),
            ("internvl", "size", {"shortest_edge": 9}, "expected height and width, in pixels"),
            ("internvl", "size", {"height": 448, "width": 447}, "expected height equal to width: frames are square"),
            ("internvl", "size", {"height": 10**6, "width": 10**6}, "expected at most 4096 pixels"),
            ("internvl", "size", {"height": 4.0, "width": 4.0}, "expected height and width, in pixels"),
            ("internvl", "crop_to_patches", 1, "expected True or False"),
            ("internvl", "min_patches", -1, f"is -1; expected a whole number from 0 to {MAX_TILES}"),
            ("internvl", "max_patches", 10**9, f"is 1000000000; expected a whole number from 1 to {MAX_TILES}"),
            ("internvl", "max_patches", 2.0, "is 2.0; expected a whole number"),
            ("llava_next", "size", {"shortest_edge": 9, "longest_edge": 99}, "expected height and width or shortest"),
            ("llava_next", "crop_size", {"height": 224, "width": 224}, "expected the 336 pixels of size"),
            ("llava_next", "crop_size", {"height": 336, "width": 9}, "expected height equal to width"),
            ("llava_onevision", "crop_size", {"height": 224, "width": 224}, "expected the 336 pixels of size"),
            ("idefics3", "size", {"height": 9, "width": 9}, "expected longest_edge, in pixels"),
            ("idefics3", "max_image_size", {"height": 9, "width": 9}, "expected longest_edge, in pixels"),
            ("gemma3", "size", {"shortest_edge": 9}, "expected height and width, in pixels"),
            ("gemma3", "pan_and_scan_min_crop_size", 0, "is 0; expected a whole number from 1"),
            ("gemma3", "pan_and_scan_max_num_crops", 0, "is 0; expected a whole number from 1"),
            ("gemma3", "pan_and_scan_min_ratio_to_activate", float("nan"), "is nan; expected a finite number"),
        ],
    )
    def test_what_a_family_of_views_does_not_is_named(self, kind, field, value, text):
        processor = make(kind)
        setattr(processor, field, value)
        assert_refused(processor, f"{type(processor).__name__}.{field} is ", text)

    @pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
    @pytest.mark.parametrize(
        ("pinpoints", "text"),
        [
            ([], "is []; expected at least one (height, width) in pixels"),
            ([[336, 500]], "has [336, 500]; expected (height, width), multiples of the 336 pixels of a frame"),
            ([[336]], "has [336]; expected (height, width)"),
            ([[0, 336]], "has [0, 336]; expected (height, width)"),
            ([[336 * 1000, 672]], "has [336000, 672]; expected at most 1024 frames of 336 pixels"),
        ],
    )
    def test_pinpoint_that_frames_do_not_fill_is_named(self, kind, pinpoints, text):
        processor = make(kind)
        processor.image_grid_pinpoints = pinpoints
        assert_refused(processor, f"{type(processor).__name__}.image_grid_pinpoints {text}")

    @pytest.mark.parametrize(
        ("kind", "field"), [("qwen", "merge_size"), ("internvl", "max_patches"), ("idefics3", "size")]
    )
    def test_missing_field_is_named(self, kind, field):
        processor = make(kind)
        setattr(processor, field, None)
        name = type(processor).__name__
        assert_refused(processor, f"{name} has no {field}; expected a loaded image processor that sets it")

    def test_class_default_of_llava_next_is_refused_for_its_pinpoints(self):
        # Tiles of 224 out of multiples of 336: the last ones are not square.
        assert_refused(transformers.LlavaNextImageProcessor(), "image_grid_pinpoints has [336, 672]", "the 224")

    @pytest.mark.parametrize(
        ("kind", "split", "text"),
        [
            ("qwen", True, "split is True; expected nothing: a Qwen2VLImageProcessor does not tile"),
            ("llava_next", False, "split is False; expected True or nothing: a LlavaNextImageProcessor always tiles"),
            ("internvl", 1, "split is 1; expected True or False"),
        ],
    )
    def test_split_that_a_family_does_not_do_is_refused(self, kind, split, text):
        assert_refused(make(kind), text, split=split)

    def test_override_is_checked(self):
        assert_refused(make("internvl"), "ViewConfig.box_margin is -1; expected", box_margin=-1)
        assert_refused(make("internvl"), "Tiling.frame_px is 0; expected", tiling=Tiling("internvl", 0))

    def test_unknown_override_is_refused(self):
        assert_refused(make("internvl"), "ViewConfig has no field 'margin'", margin=1)

    def test_colour_of_bars_must_be_a_byte(self):
        processor = make("llava_onevision", image_mean=[-0.5, 0.5, 0.5])
        assert_refused(processor, ".image_mean is (-0.5, 0.5, 0.5); expected numbers from 0 to 1")

    def test_lanczos_that_torchvision_replaces_is_refused(self, monkeypatch):
        monkeypatch.setattr(families, "version", lambda name: "0.26.1+cpu")
        text = "before 0.27 replaces by bicubic; install torchvision>=0.27 or pass resample='bicubic'"
        assert_refused(make("idefics3"), text)
        assert view_config_from(make("idefics3"), resample="bicubic").resample == "bicubic"
        assert view_config_from(transformers.Idefics3ImageProcessorPil()).resample == "lanczos"


def assert_refused(processor, *texts, **overrides):
    with pytest.raises(ConfigError) as found:
        view_config_from(processor, **overrides)
    for text in texts:
        assert text in str(found.value)
