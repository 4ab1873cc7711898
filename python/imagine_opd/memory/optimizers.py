"""What optimizers keep for a tensor of weights: its shape and the optimizer's name in, bytes of states out."""

from __future__ import annotations

from imagine_opd.memory.shapes import ParameterShape


def count_state_bytes(parameter: ParameterShape, itemsize: int, optim: str) -> int:
    """The optimizer's states of one tensor of weights. An optimizer that is not known here counts as AdamW."""
    numel, name = parameter.numel, optim.removeprefix("paged_")
    if name in ("sgd", "galore_sgd"):
        return 0
    if name == "adafactor":
        if len(parameter.shape) < 2:
            return 4 * numel
        # a mean for every row and every column of each matrix
        rows, columns = parameter.shape[-2:]
        return 4 * (rows + columns) * (numel // (rows * columns))
    moments = 1 if name.startswith(("lion", "rmsprop", "adagrad")) else 2
    if name == "adamw_torch_4bit":
        return moments * numel // 2
    if name == "adamw_torch_8bit":
        return moments * numel
    if "8bit" in name:
        # bitsandbytes keeps small tensors, and transformers makes it keep embeddings, in fp32.
        if numel < 4096 or "embed" in parameter.name.rsplit(".", 2)[-2]:
            return 4 * moments * numel
        return moments * (numel + 4 * -(-numel // 256))
    if "bnb" in name or name.endswith("32bit"):
        return 4 * moments * numel
    return moments * numel * itemsize
