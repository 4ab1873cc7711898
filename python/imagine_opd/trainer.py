"""`ImagineOPDTrainer`: rows in; rollout, scores of both views, objective and step by `transformers.Trainer`.

Read downwards: `get_batch_samples` makes views, prompts and rollouts for one optimizer step; `compute_loss` scores a
micro-batch of them and calls the objective. All rollouts of a step are drawn before its first backward, from a seed
that depends only on (seed, step, rank): accumulation 1 x 4 equals 4 x 1, and a resumed run equals the whole one.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, Trainer

from imagine_opd.answers import has_answer_tag
from imagine_opd.callbacks import COMPLETIONS_FILE, RunFolderCallback, StepProgressCallback, append_line
from imagine_opd.config import ImagineOPDConfig, save_recipe
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.evaluation import decode_completions, evaluate_model
from imagine_opd.loss import ObjectiveConfig, objective, select_active_tokens
from imagine_opd.models import get_head, load_model, load_processor, read_token_ids
from imagine_opd.prompts import PromptConfig, build_prompts
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.rollout.finish import find_truncated
from imagine_opd.scoring import score
from imagine_opd.teacher import TeacherReport, build_teacher, check_teacher
from imagine_opd.types import PromptPair, Rollouts, Row, ViewConfig, ViewError
from imagine_opd.views import make_views, view_config_from


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward needs: prompts, their completions, and the tokens that enter the loss."""

    prompts: tuple[PromptPair, ...]
    rollouts: Rollouts
    active_BT: torch.Tensor


class ImagineOPDTrainer(Trainer):
    """A `transformers.Trainer` for Imagine-OPD. Optimizer, schedule, checkpoints and callbacks are the Trainer's.

    Args:
        model: hub name, folder or loaded model; it is trained.
        args: an `ImagineOPDConfig`.
        train_dataset, eval_dataset: sequences of `Row` (see `imagine_opd.data.load_rows`).
        processor: the model's processor; `None` takes the one beside the model.
        teacher: another checkpoint as teacher; `None` copies the model's weights as they are now and freezes them.
    """

    args: ImagineOPDConfig
    control: Any

    def __init__(
        self,
        model: Any,
        args: ImagineOPDConfig,
        train_dataset: Sequence[Row],
        eval_dataset: Sequence[Row] | None = None,
        processor: Any = None,
        teacher: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        run_description: dict[str, Any] | None = None,
    ) -> None:
        if args.world_size > 1:
            raise ConfigError(
                f"world_size={args.world_size}: this version trains in one process; start without a launcher"
            )
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split the rows of a micro-batch under our feet
        self.processor = load_processor(processor, model)
        student = load_model(model, args.model_dtype)
        self.view_config = make_view_config(self.processor, args)
        self.prompt_config = make_prompt_config(args)
        self.objective_config = ObjectiveConfig(
            **{name: getattr(args, name) for name in ObjectiveConfig.__dataclass_fields__}
        )
        self.token_ids = read_token_ids(student, self.processor)
        self.engine = HFEngine(self.token_ids)
        self.teacher = build_teacher(student, self.processor, teacher, args.model_dtype)
        self.teacher_is_copy = teacher is None
        self.teacher_report: TeacherReport | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._steps = 0
        super().__init__(
            model=student,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processor,
            callbacks=[RunFolderCallback(run_description or {}), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.teacher.to(args.device)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StepProgressCallback)
        # The loss is divided by the step's token count, not by the number of micro-batches.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    # rows -> views -> prompts -> rollouts, for one optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], torch.Tensor]:
        """The next micro-batches with their rollouts, and the number of tokens in the step's loss."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        rows = [row for batch in batches for row in batch]
        pairs = self._build_pairs(rows)
        rollouts = self._sample(pairs)
        active_BT = select_active_tokens(
            rollouts, self.token_ids, self.args.num_loss_tokens_to_skip, self.args.mask_truncated_completions
        )
        self._note_rollouts(rows, pairs, rollouts, active_BT)
        self._steps += 1
        micro_batches, start = [], 0
        for batch in batches:
            kept = [pair for pair in pairs[start : start + len(batch)] for _ in range(self.args.num_generations)]
            begin = sum(pair is not None for pair in pairs[:start]) * self.args.num_generations
            prompts = tuple(pair for pair in kept if pair is not None)
            part = slice(begin, begin + len(prompts))
            micro_batches.append(MicroBatch(prompts, rollouts.select(part), active_BT[part]))
            start += len(batch)
        return micro_batches, active_BT.sum().to(device)

    def _build_pairs(self, rows: Sequence[Row]) -> list[PromptPair | None]:
        """Both prompts of each row; `None` where the views failed, counted and said once a row."""
        with self._stage("views"):
            pairs: list[PromptPair | None] = []
            for row, views in zip(rows, make_views(rows, self.view_config), strict=True):
                if isinstance(views, ViewError):
                    self._add("rows_dropped/" + views.reason, 1.0)
                    self.log_once(views.message)
                    pairs.append(None)
                else:
                    pairs.append(build_prompts(row, views, self.processor, self.prompt_config))
        return pairs

    def _sample(self, pairs: Sequence[PromptPair | None]) -> Rollouts:
        prompts = [pair.student for pair in pairs if pair is not None for _ in range(self.args.num_generations)]
        if not prompts:
            raise RowError(f"none of the {len(pairs)} rows of this step has readable images; see the messages above")
        with self._stage("rollout"), self.compute_loss_context_manager():
            return self.engine.generate(
                self.accelerator.unwrap_model(self.model), prompts, make_sampling_config(self.args), self._step_seed()
            )

    def _step_seed(self) -> int:
        """A seed for this step's rollouts that depends on the run's seed, the step and the rank alone."""
        seed: int = (self.args.seed * 1_000_003 + self.state.global_step) * 1_009 + self.args.process_index
        return seed % 2**63

    # scores -> loss, for one micro-batch

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the micro-batch's token losses over the step's token count."""
        if not inputs.prompts:
            return sum(parameter.sum() for parameter in model.parameters()) * 0.0
        scores = score(
            model, self.teacher, inputs.prompts, inputs.rollouts, inputs.active_BT, self.token_ids.pad, self._stage
        )
        with self._stage("loss"):
            result = objective(scores, get_head(model), get_head(self.teacher), self.objective_config)
        kept = len(scores.token_ids_N)
        total = kept if num_items_in_batch is None else num_items_in_batch
        loss = result.loss_sum / max(int(total), 1)
        for name, values_N in (("reverse_kl", result.stats.reverse_kl_N), ("entropy", result.stats.entropy_N)):
            self._add(name, float(values_N.detach().sum()), kept)
        return (loss, result) if return_outputs else loss

    def training_step(self, model: Any, inputs: MicroBatch, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's step, timed."""
        with self._stage("step"):
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs

    def floating_point_ops(self, inputs: Any) -> int:
        """0: a micro-batch holds two views of different lengths; the Trainer's estimate would be wrong."""
        return 0

    # before, during, after

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Check the teacher, then train. See `transformers.Trainer.train`."""
        if self.args.teacher_checks:
            self.run_teacher_checks()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def run_teacher_checks(self) -> TeacherReport:
        """The start-up checks of `imagine_opd.teacher` on the first rows; raises `TeacherError`."""
        rows = [
            self.train_dataset[index] for index in range(min(self.args.teacher_check_rows, len(self.train_dataset)))
        ]
        pairs = [pair for pair in self._build_pairs(rows) if pair is not None]
        if not pairs:
            raise RowError(f"none of the first {len(rows)} rows has readable images")
        with self.compute_loss_context_manager():
            self.teacher_report = check_teacher(
                self.model, self.teacher, pairs, self.engine, self.args.max_completion_length, self.teacher_is_copy
            )
        for name, value in self.teacher_report.as_metrics().items():
            self._add(name, value)
        if self.teacher_report.privilege_gap <= 0:
            self.log_once(
                f"the teacher gains nothing from its view (privilege gap {self.teacher_report.privilege_gap:.4f} nats "
                "per token): check the boxes"
            )
        return self.teacher_report

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy accuracy of the student's view on the held-out rows, logged as `eval_accuracy`."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ConfigError("evaluation was asked for without eval_data")
        model = self.accelerator.unwrap_model(self.model)
        result = evaluate_model(
            model, self.processor, rows, self.view_config, self.args, batch_size=self.args.per_device_eval_batch_size
        )["imagine"]
        metrics = {
            f"{metric_key_prefix}_accuracy": result.accuracy,
            f"{metric_key_prefix}_unparsed": float(result.unparsed),
            f"{metric_key_prefix}_mean_tokens": result.mean_tokens,
            f"{metric_key_prefix}_runtime": result.seconds,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with the step's own figures added: means since the last log."""
        if "loss" in logs:
            logs = {**logs, **self._drain_metrics()}
        super().log(logs, start_time)

    def log_once(self, message: str) -> None:
        """A warning for the user, each text once a run."""
        seen: set[str] = self.__dict__.setdefault("_messages", set())
        if message not in seen:
            seen.add(message)
            print(message, flush=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            save_recipe(self.args, folder)
            # A pickle of our settings: `run.json` and `imagine_opd.json` say the same and can be read safely.
            (folder / "training_args.bin").unlink(missing_ok=True)

    # figures of the run

    def _note_rollouts(
        self, rows: Sequence[Row], pairs: Sequence[PromptPair | None], rollouts: Rollouts, active_BT: torch.Tensor
    ) -> None:
        texts = decode_completions(self.processor, rollouts.completion_ids_BT, rollouts.completion_mask_BT)
        count = len(texts)
        lengths_B = rollouts.completion_mask_BT.sum(dim=1)
        self._add("completions/mean_length", float(lengths_B.sum()), count)
        self._add("completions/max_length", float(lengths_B.max()))
        self._add("completions/clipped_ratio", float(find_truncated(rollouts, self.token_ids).sum()), count)
        self._add("tag_rate", float(sum(has_answer_tag(text) for text in texts)), count)
        self._add("loss_tokens", float(active_BT.sum()))
        for reason, number in rollouts.dropped.items():
            self._add("rows_dropped/" + reason, float(number))
        step = self.state.global_step + 1
        if (
            self.args.log_completions
            and self.args.should_save
            and step % max(int(self.state.logging_steps or 1), 1) == 0
        ):
            kept = [row for row, pair in zip(rows, pairs, strict=True) if pair is not None]
            for index in range(min(self.args.num_completions_to_log, count)):
                row = kept[index // self.args.num_generations]
                line = {"step": step, "id": row.id or row.source, "question": row.question}
                append_line(
                    Path(self.args.output_dir, COMPLETIONS_FILE),
                    {**line, "answer": row.answer, "completion": texts[index]},
                )

    def _add(self, name: str, value: float, count: float = 1.0) -> None:
        self._sums[name] += value
        self._counts[name] += count

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Seconds of a stage, summed until the next log and shown per step."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.args.device.type == "cuda":
                torch.cuda.synchronize()
            self._sums[f"time/{name}_s"] += time.perf_counter() - started

    def _drain_metrics(self) -> dict[str, float]:
        metrics = {}
        for name in sorted(self._sums):
            if name.startswith("rows_dropped/"):
                metrics[name] = self._sums[name]
            elif name.startswith("time/"):
                metrics[name] = self._sums[name] / max(self._steps, 1)
            else:
                metrics[name] = self._sums[name] / max(self._counts[name], 1e-9)
        self._steps = 0
        self._sums.clear()
        self._counts.clear()
        return metrics


def make_view_config(processor: Any, args: ImagineOPDConfig) -> ViewConfig:
    """The processor's image settings with the config's own where it has some."""
    names = ("min_pixels", "max_pixels", "crop_min_pixels", "crop_max_pixels")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return view_config_from(
        processor.image_processor,
        **overrides,
        box_margin=args.box_margin,
        min_crop_px=args.min_crop_px,
        max_image_pixels=args.max_image_pixels,
        num_threads=args.view_threads,
    )


def make_prompt_config(args: ImagineOPDConfig) -> PromptConfig:
    """The prompt fields of the config."""
    return PromptConfig(
        student_template=args.student_prompt_template,
        teacher_template=args.teacher_prompt_template,
        answer_hint_template=args.answer_hint_template if args.answer_hint else None,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def make_sampling_config(args: ImagineOPDConfig) -> SamplingConfig:
    """The rollout fields of the config."""
    return SamplingConfig(
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        generation_kwargs=args.generation_kwargs or {},
    )
