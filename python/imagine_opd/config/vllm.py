"""Fields of the vLLM engine (names of TRL), and what of the rollout it cannot do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers", "auto"),
    "vllm_server_sync": ("reload", "none"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "vllm_gpu_memory_utilization": (0.01, 1.0),
    "vllm_tensor_parallel_size": (1, None),
    "vllm_max_model_length": (1, None),
    "vllm_server_port": (1, 65_535),
    "vllm_server_timeout": (1e-3, None),
}

HONOURED_KWARGS = frozenset({"min_new_tokens", "suppress_tokens"})
"""Keys of `generation_kwargs` that vLLM has an equal of."""
DEFAULT_IS_CLIP = 2.0
"""`distillation_is_clip` with vLLM, whose log-probs differ a little from the trained model's (TRL: 2.0)."""


@dataclass
class VLLMFields:
    """Rollouts by vLLM (docs/rollout.md; `pip install 'imagine-opd[vllm]'`).

    use_vllm: vLLM samples, in place of `transformers`' generate. `distillation_is_clip` is 2.0 then, unless set.
    vllm_mode: `colocate`, an engine in this process; `server`, one that `vllm serve` runs.
    vllm_gpu_memory_utilization: share of the device that a colocated engine takes, weights included.
    vllm_enable_sleep_mode: the engine gives its memory back between rollouts.
    vllm_tensor_parallel_size: GPUs of a colocated engine.
    vllm_max_model_length: longest prompt and completion, tokens; `None`: what fits into the engine's memory.
    vllm_model_impl: `vllm`, its own code of the model; `transformers`, vLLM around the Hugging Face code; `auto`.
    vllm_server_base_url: `http://host:port` of the server, in place of vllm_server_host and vllm_server_port.
    vllm_server_timeout: seconds to wait for the server's answer.
    vllm_server_sync: `reload`, the server reads the trained weights from vllm_sync_dir before each step; `none`, it
        samples from the weights it was started with, and only the importance ratio makes up for it.
    vllm_sync_dir: folder that this process and the server both see (`None`: `vllm_weights` in output_dir).
    """

    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM."})
    vllm_mode: str = field(default="colocate", metadata={"help": "colocate or server."})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "Share of the device (colocate)."})
    vllm_enable_sleep_mode: bool = field(default=False, metadata={"help": "Give memory back between rollouts."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs of the engine (colocate)."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Prompt and completion, tokens."})
    vllm_model_impl: str = field(default="vllm", metadata={"help": "vllm, transformers or auto (colocate)."})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "http://host:port of the server."})
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Host of the server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the server."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for an answer."})
    vllm_server_sync: str = field(default="reload", metadata={"help": "reload or none."})
    vllm_sync_dir: str | None = field(default=None, metadata={"help": "Folder that the server reads weights from."})


def settle_is_clip(config: ImagineOPDConfig) -> None:
    """With vLLM the importance ratio is clipped unless the config says where; `sampled_token` clips it by `epsilon`."""
    if config.use_vllm and config.distillation_is_clip is None and config.distillation_mode != "sampled_token":
        config.distillation_is_clip = DEFAULT_IS_CLIP


def refuse_bad_vllm(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for what vLLM cannot do as the config asks."""
    if not config.use_vllm:
        return
    for name in config.generation_kwargs or {}:
        if name not in HONOURED_KWARGS:
            known = ", ".join(sorted(HONOURED_KWARGS))
            raise ConfigError(f"generation_kwargs: {name!r} cannot be honoured with use_vllm=True; expected {known}")
    if config.rollout_cache_implementation != "dynamic" or config.rollout_compile:
        raise ConfigError(
            "rollout_cache_implementation and rollout_compile are of transformers' generate: leave them out with "
            "use_vllm=True"
        )
    if config.temperature != 1.0:
        for name, value in list_shaping(config).items():
            raise ConfigError(
                f"{name}={value!r} at temperature={config.temperature!r} with use_vllm=True: vLLM gives log-probs "
                "either before the temperature or after all shaping, and the loss needs them between; set "
                f"temperature=1.0 or leave {name} out"
            )
    if config.vllm_mode == "server":
        _refuse_bad_address(config)


def list_shaping(config: ImagineOPDConfig) -> dict[str, Any]:
    """What beside the temperature changes which tokens are drawn, by name: fields and keys of `generation_kwargs`."""
    off = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    fields = {name: getattr(config, name) for name, value in off.items() if getattr(config, name) != value}
    more = {"min_p": config.min_p, **(config.generation_kwargs or {})}
    return {**fields, **{name: value for name, value in more.items() if value}}


def make_url(config: ImagineOPDConfig) -> str:
    """Of the server."""
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"


def _refuse_bad_address(config: ImagineOPDConfig) -> None:
    url = make_url(config)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # a port that is no number: ValueError
    except ValueError:
        host = ""
    is_clean = url.isascii() and not any(sign <= " " or sign in "@?#" for sign in url)
    if config.vllm_server_base_url is None:
        given = config.vllm_server_host
        if not host or not is_clean or host != given.lower().removeprefix("[").removesuffix("]"):
            raise ConfigError(f"vllm_server_host={given!r}: expected a name or an address alone, IPv6 in brackets")
    elif not host or not is_clean or parts.scheme not in ("http", "https"):
        raise ConfigError(f"vllm_server_base_url={url!r}: expected http://host:port, the port a number")
