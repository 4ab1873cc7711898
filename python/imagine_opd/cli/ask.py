"""`imagine-opd ask`: one question about one image, the trace and the answer printed."""

from __future__ import annotations

from pathlib import Path


def run_ask(model: str, image: str, question: str) -> None:
    """Print the completion's trace, then its answer. Raises `ConfigError` or `ImageError`."""
    from transformers.utils.logging import disable_progress_bar

    from imagine_opd.api import ask

    disable_progress_bar()
    answer = ask(model, Path(image), question)
    print(answer.trace)
    print(f"answer: {answer.answer if answer.answer is not None else '(none)'}")
