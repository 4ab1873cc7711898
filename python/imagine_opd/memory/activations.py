"""What a forward pass holds besides weights: shapes and lengths in, bytes of saved activations, workspace, cache out.

The counts are those of transformers' own modules with SDPA attention, tensor by tensor as autograd keeps them; the
tests compare them with what autograd holds of real models. Linear-attention layers are counted as full attention.
"""

# D hidden, Q all query heads, K all key heads, I intermediate; all figures are bytes for one token until said otherwise

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imagine_opd.memory.shapes import LinearShape, ModelShape, TextShape, ViewSize

Training = Literal["full", "adapters", "frozen"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of one number. `operand`: of matrix products; `stream`: between blocks; `adapter`: what adapters read.

    is_autocast: weights are wider than the operands of their products, and are converted on the way.
    """

    weight: int
    operand: int
    stream: int
    adapter: int
    is_autocast: bool


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """The adapted linear layers of one tower, summed: inputs, outputs, squared inputs; rank and dropout."""

    inputs: int
    outputs: int
    squared_inputs: int
    count: int
    rank: int
    is_dora: bool
    has_dropout: bool


@dataclass(frozen=True, slots=True)
class ForwardLoad:
    """The sequences of one forward: `rows` prompts of one size, each followed by `new_tokens`. packed: in one row."""

    view: ViewSize
    rows: int
    new_tokens: int
    packed: bool = False

    @property
    def length(self) -> int:
        return self.view.tokens + self.new_tokens

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def scores(self) -> int:
        """Pairs of tokens in the model's rows, which a mask or a matrix of scores has one number for."""
        return self.tokens**2 if self.packed else self.rows * self.length**2

    @property
    def patches(self) -> int:
        return self.rows * self.view.patches


def sum_adapters(linears: Sequence[LinearShape], rank: int, is_dora: bool, has_dropout: bool) -> AdapterLoad:
    """The load of adapters on these layers."""
    return AdapterLoad(
        inputs=sum(linear.inputs for linear in linears),
        outputs=sum(linear.outputs for linear in linears),
        squared_inputs=sum(linear.inputs**2 for linear in linears),
        count=len(linears),
        rank=rank,
        is_dora=is_dora,
        has_dropout=has_dropout,
    )


def count_saved_bytes(
    shape: ModelShape,
    load: ForwardLoad,
    precision: Precision,
    training: tuple[Training, Training],
    adapters: tuple[AdapterLoad, AdapterLoad],
    checkpointing: bool,
) -> tuple[int, int]:
    """What autograd keeps of one student forward, and what backward makes again at a time. Pairs are (text, vision).

    With checkpointing the first is little more than the input of every block, and the second the inside of one.
    """
    text, vision = shape.text, shape.vision
    inside_text = load.tokens * save_text_block(text, precision, training[0]) + save_scores(shape, load, precision)
    inside_text += save_adapters(adapters[0], load.tokens, precision) // max(text.layers, 1)
    inside_vision = load.patches * save_vision_block(shape, precision) if training[1] == "full" else 0
    if training[1] != "frozen":
        inside_vision += save_adapters(adapters[1], load.patches, precision) // max(vision.layers, 1)
    outside = load.tokens * (8 + precision.operand) * text.hidden  # the last norm
    if training[1] == "full":
        outside += load.patches * vision.mergers * 4 * vision.hidden * precision.operand
        outside += load.patches * shape.vision.patch_numel * precision.operand
    if not checkpointing:
        return text.layers * inside_text + vision.layers * inside_vision + outside, 0
    inputs = text.layers * load.tokens * text.hidden * precision.stream
    if inside_vision:
        inputs += vision.layers * load.patches * vision.hidden * precision.operand
    return inputs + outside, max(inside_text, inside_vision)


def save_text_block(text: TextShape, precision: Precision, training: Training) -> int:
    """Of one decoder block, without scores and adapters."""
    operand = precision.operand
    if training == "full":
        # A norm keeps its fp32 input, the normalised values for its own weight, and what the next layer reads.
        norm = 4 + precision.stream + (0 if precision.is_autocast else operand)
        cast = (5 if text.is_gated else 4) * operand * text.hidden if precision.is_autocast else 0
        products = 4 if text.is_gated else 2
    else:  # frozen weights need no input of theirs
        norm, cast, products = 4, 0, 3 if text.is_gated else 1
    total = text.norms * norm * text.hidden + cast
    if text.has_qk_norm:
        total += (4 + (operand if training == "full" else 0)) * (text.query + text.kv)
    total += 4 * operand * text.query  # queries, keys and values repeated to as many heads, result
    return total + products * operand * text.intermediate


def save_scores(shape: ModelShape, load: ForwardLoad, precision: Precision) -> int:
    """Of one block and the whole batch: the padding mask as scores, or with eager attention the scores themselves."""
    if shape.attention == "eager":
        return shape.text.heads * load.scores * (4 + precision.operand)
    lse = load.tokens * shape.text.heads * 4
    if "flash" in shape.attention or load.rows == 1:
        return lse
    return lse + load.scores * precision.operand


def save_vision_block(shape: ModelShape, precision: Precision) -> int:
    """Of one block of the vision tower, for one patch."""
    vision = shape.vision
    return (11 * vision.hidden + (4 if vision.is_gated else 2) * vision.intermediate) * precision.operand


def save_adapters(adapters: AdapterLoad, positions: int, precision: Precision) -> int:
    """Of all adapters, for all positions: a converted input each, the low-rank product, a dropout mask.

    DoRA keeps two outputs more, and makes its weight from a whole identity matrix.
    """
    size = precision.adapter
    kept = adapters.inputs * (size + (1 if adapters.has_dropout else 0)) + adapters.count * adapters.rank * size
    if not adapters.is_dora:
        return positions * kept
    return positions * (kept + 2 * adapters.outputs * precision.operand) + adapters.squared_inputs * size


def count_workspace_bytes(shape: ModelShape, load: ForwardLoad, precision: Precision) -> int:
    """The most that one block needs while it runs, of either tower: what a forward without gradient holds."""
    text, vision, operand = shape.text, shape.vision, precision.operand
    attention = (2 * text.kv + 4 * text.query) * operand + (4 * (text.query + text.kv) if text.has_qk_norm else 0)
    feed = (3 if text.is_gated else 2) * text.intermediate * operand
    inside = load.tokens * (2 * precision.stream * text.hidden + 4 * text.hidden + max(attention, feed))
    inside += save_scores(shape, load, precision)
    feed = (3 if vision.is_gated else 2) * vision.intermediate * operand
    tower = load.patches * (2 * vision.hidden * operand + 4 * vision.hidden + max(8 * vision.hidden * operand, feed))
    return max(inside, tower) + count_feature_bytes(shape, load.view, load.rows, precision)


def count_feature_bytes(shape: ModelShape, view: ViewSize, images: int, precision: Precision) -> int:
    """What the tower made of the images of as many prompts, deepstack layers included."""
    return images * view.image_tokens * shape.vision.mergers * shape.text.hidden * precision.operand


def count_pixel_bytes(shape: ModelShape, load: ForwardLoad) -> int:
    """The views' `pixel_values` in fp32."""
    return load.patches * shape.vision.patch_numel * 4


def count_cache_bytes(shape: ModelShape, load: ForwardLoad, precision: Precision) -> int:
    """The rollout's keys and values at its last token, as `DynamicCache` holds them."""
    text = shape.text
    # Rotation multiplies the keys by cosines in the stream's dtype, and the cache takes what comes.
    key = max(precision.operand, precision.stream)
    # The last new token is sampled and never fed back.
    length, total = load.length - 1, 0
    for most in text.cached_tokens:
        if most == 0:
            total += load.rows * text.state_numel * 4
        else:
            kept = length if most is None else min(length, most - 1)
            total += load.rows * kept * text.kv * (key + precision.operand)
    return total
