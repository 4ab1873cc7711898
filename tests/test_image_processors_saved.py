"""Our image processors pass for transformers' own: saved, loaded, copied, pickled, and within whole processors."""

from __future__ import annotations

import copy
import filecmp
import pickle

import pytest
import torch
import transformers
from image_pairs import NAMES, assert_pair_agrees, assert_same, build, pictures, record_warnings, write_inputs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast

from imagine_opd import image_processors
from imagine_opd.errors import ConfigError
from imagine_opd.image_processors import use_rust_images

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(params=NAMES)
def pair(request):
    return build(request.param)


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    return record_warnings(monkeypatch)


class TestSettings:
    def test_it_passes_for_the_original(self, pair):
        original, rust = pair
        assert isinstance(rust, type(original))
        assert type(rust).__name__ == type(original).__name__
        assert repr(rust) == repr(original)
        assert rust.to_dict() == original.to_dict()
        assert type(rust) is getattr(image_processors, f"Rust{type(original).__name__}")

    def test_what_it_saves_is_the_originals_byte_for_byte(self, pair, tmp_path):
        original, rust = pair
        for processor, folder in ((original, "original"), (rust, "rust")):
            processor.save_pretrained(tmp_path / folder)
        saved = [path.name for path in (tmp_path / "original").iterdir()]
        assert filecmp.cmpfiles(tmp_path / "original", tmp_path / "rust", saved, shallow=False) == (saved, [], [])
        backend = "pil" if original.backend == "pil" else "torchvision"
        loaded = AutoImageProcessor.from_pretrained(tmp_path / "rust", backend=backend)
        assert type(loaded) is type(original)
        again = type(rust).from_pretrained(tmp_path / "original")
        assert type(again) is type(rust)
        assert_pair_agrees((loaded, again), pictures(2), return_tensors="pt")

    def test_it_is_copied_and_pickled_as_itself(self, pair):
        original, rust = pair
        for again in (copy.deepcopy(rust), copy.copy(rust), pickle.loads(pickle.dumps(rust))):
            assert type(again) is type(rust)
            assert_pair_agrees((original, again), pictures(2), return_tensors="pt")

    def test_the_original_is_left_as_it_was(self, pair):
        original, rust = pair
        before = original.to_dict()
        rust.image_mean = (0.0, 0.0, 0.0)
        rust.size["height"] = 7
        assert original.to_dict() == before
        assert use_rust_images(rust) is rust

    def test_another_processor_is_refused_by_name(self):
        with pytest.raises(ConfigError, match="CLIPImageProcessor has no Rust counterpart; expected one of Gemma3"):
            use_rust_images(transformers.CLIPImageProcessor())

    def test_a_data_loaders_worker_makes_the_same_pixels(self, tmp_path):
        original, rust = build("Qwen2VLImageProcessor")
        paths = write_inputs(tmp_path)[:3]
        rust(paths, return_tensors="pt")  # threads of the parent, which a fork does not have
        loader = torch.utils.data.DataLoader(paths, collate_fn=Collate(rust), batch_size=3, num_workers=1)
        (found,) = loader
        assert_same(found, dict(original(paths, return_tensors="pt")))


class Collate:
    def __init__(self, processor):
        self.processor = processor

    def __call__(self, paths):
        return dict(self.processor(paths, return_tensors="pt"))


def build_tokenizer(**extra):
    words = ["<unk>", "<pad>", "look", "at", "\n", "<global-img>", *extra.values()]
    words += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    backend = Tokenizer(
        models.WordLevel(vocab={word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=extra
    )


def build_processor(name):
    """A whole processor around the small image processor: `(processor, the text that stands for an image)`."""
    if name == "LlavaNextProcessor":
        tokenizer = build_tokenizer(image_token="<image>")
        image_processor, _ = build("LlavaNextImageProcessor")
        return transformers.LlavaNextProcessor(image_processor, tokenizer, 16, "default"), "<image>"
    if name == "Idefics3Processor":
        tokenizer = build_tokenizer(image_token="<image>", fake_image_token="<fake_token_around_image>")
        image_processor, _ = build("Idefics3ImageProcessor")
        return transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4), "<image>"
    if name == "Gemma3Processor":
        tokenizer = build_tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
        image_processor, _ = build("Gemma3ImageProcessor")
        return transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=4), "<boi>"
    from imagine_opd.demo.tiny import build_processor as build_qwen

    return build_qwen(), "<|vision_start|><|image_pad|><|vision_end|>"


PROCESSORS = ["Qwen3VLProcessor", "LlavaNextProcessor", "Idefics3Processor", "Gemma3Processor"]


class TestProcessors:
    @pytest.mark.parametrize("name", PROCESSORS)
    @pytest.mark.parametrize("return_tensors", ["pt", None])
    def test_text_and_images_equal_the_originals(self, name, return_tensors, tmp_path, warnings):
        processor, image = build_processor(name)
        before = processor.image_processor
        rust = use_rust_images(processor)
        assert processor.image_processor is before
        assert type(rust) is type(processor)
        assert type(rust.image_processor).__qualname__.startswith("Rust")
        paths = write_inputs(tmp_path)[:2]
        texts = [f"look at {image}", f"look at {image} look"]
        for images in (paths, pictures(2)):
            nested = [[one] for one in images]
            options = {"text": texts, "padding": True, "return_tensors": return_tensors}
            for given in [nested] if name == "Gemma3Processor" else [images, nested]:
                expected = processor(images=given, **options)
                assert_same(rust(images=given, **options), expected)
        assert not warnings

    @pytest.mark.parametrize("name", PROCESSORS)
    def test_what_it_saves_is_the_originals_byte_for_byte(self, name, tmp_path):
        processor, _ = build_processor(name)
        for one, folder in ((processor, "original"), (use_rust_images(processor), "rust")):
            one.save_pretrained(tmp_path / folder)
        saved = sorted(path.name for path in (tmp_path / "original").iterdir())
        assert saved == sorted(path.name for path in (tmp_path / "rust").iterdir())
        assert filecmp.cmpfiles(tmp_path / "original", tmp_path / "rust", saved, shallow=False) == (saved, [], [])
        loaded = AutoProcessor.from_pretrained(tmp_path / "rust")
        assert type(loaded.image_processor) is type(processor.image_processor)

    def test_files_stay_undecoded_until_rust_reads_them(self, tmp_path, monkeypatch):
        processor, image = build_processor("Qwen3VLProcessor")
        monkeypatch.setattr("imagine_opd.image_inputs.load_image", None)
        monkeypatch.setattr("transformers.image_processing_backends.load_image_as_tensor", None)
        use_rust_images(processor)(images=write_inputs(tmp_path)[:2], text=f"look at {image} {image}")

    def test_chat_templates_take_paths(self, tmp_path, warnings):
        processor, _ = build_processor("Qwen3VLProcessor")
        path = write_inputs(tmp_path)[1]
        content = [{"type": "image", "path": path}, {"type": "text", "text": "look at"}]
        chat = [{"role": "user", "content": content}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected = processor.apply_chat_template(chat, **options)
        assert_same(use_rust_images(processor).apply_chat_template(chat, **options), expected)
        assert not warnings

    def test_an_image_processor_may_be_set_by_hand(self):
        processor, image = build_processor("Qwen3VLProcessor")
        options = {"text": f"look at {image}", "images": pictures(1), "return_tensors": "pt"}
        expected = processor(**options)
        settings = processor.image_processor.to_dict()
        processor.image_processor = image_processors.RustQwen2VLImageProcessor(**settings)
        assert_same(processor(**options), expected)
