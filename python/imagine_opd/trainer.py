"""`ImagineOPDTrainer`: rows in; rollout, scores of both views, objective and step by `transformers.Trainer`.

Read downwards: `get_batch_samples` makes views, prompts and rollouts for one optimizer step; `compute_loss` scores a
micro-batch of them and calls the objective. All rollouts of a step are drawn before its first backward, from seeds
that depend only on (seed, step, place in the step): accumulation 1 x 4 equals 4 x 1, two processes equal one, and a
resumed run equals the whole one.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import get_last_checkpoint

from imagine_opd.adapters import write_budget
from imagine_opd.answers import has_answer_tag
from imagine_opd.batches import BatchBuilder, MicroBatch
from imagine_opd.callbacks import COMPLETIONS_FILE, RunFolderCallback, StepProgressCallback, append_line
from imagine_opd.config import ImagineOPDConfig, save_recipe
from imagine_opd.distributed import gather_figures
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.evaluation import decode_completions, evaluate_model
from imagine_opd.loss import Objective, ObjectiveConfig, objective
from imagine_opd.metrics import StepMetrics
from imagine_opd.models import get_head, load_model, load_processor, read_token_ids
from imagine_opd.rollout import HFEngine
from imagine_opd.rollout.finish import find_truncated
from imagine_opd.scoring import score_student, score_teacher
from imagine_opd.settings import make_view_config
from imagine_opd.student import open_forward, run_inside
from imagine_opd.teacher import build_teacher, refuse_other_teacher, save_teacher_fingerprint
from imagine_opd.teacher_checks import TeacherReport, check_teacher
from imagine_opd.types import Rollouts, Row


class ImagineOPDTrainer(Trainer):
    """A `transformers.Trainer` for Imagine-OPD. Optimizer, schedule, checkpoints and callbacks are the Trainer's.

    Args:
        model: hub name, folder or loaded model; it is trained.
        args: an `ImagineOPDConfig`.
        train_dataset, eval_dataset: sequences of `Row` (see `imagine_opd.data.load_rows`).
        processor: the model's processor; `None` takes the one beside the model.
        teacher: another checkpoint or model as teacher, which is frozen; `None` copies the model's weights as they
            are now and freezes the copy.
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
        refuse_bad_run(args, train_dataset, eval_dataset)
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split the rows of a micro-batch under our feet
        self.processor = copy.deepcopy(load_processor(processor, model))
        student = load_model(model, args.model_dtype)
        self.view_config = make_view_config(self.processor, args, training=True)
        # The budget the model is trained with travels in its own processor, for every tool that loads it.
        write_budget(self.processor, self.view_config)
        self.objective_config = ObjectiveConfig(
            **{name: getattr(args, name) for name in ObjectiveConfig.__dataclass_fields__}
        )
        self.token_ids = read_token_ids(student, self.processor)
        self.engine = HFEngine(self.token_ids)
        self.teacher = build_teacher(student, self.processor, teacher, args.model_dtype)
        self.teacher_is_copy = teacher is None
        self.teacher_report: TeacherReport | None = None
        self.step_metrics = StepMetrics(torch.cuda.synchronize if args.device.type == "cuda" else lambda: None)
        self._messages: set[str] = set()
        super().__init__(
            model=open_forward(student),
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processor,
            callbacks=[RunFolderCallback(run_description or {}), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.teacher.to(args.device)
        self.builder = BatchBuilder(
            self.processor,
            self.engine,
            self.view_config,
            args,
            self.accelerator,
            self.step_metrics,
            self.say_once,
            train_dataset,
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StepProgressCallback)
        # The loss is divided by the step's token count, not by the number of micro-batches.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in student.parameters()):
            self.say_once(
                "the trained weights are 16-bit: updates at small learning rates round to nothing; "
                "load the model in float32 and set bf16=True"
            )

    # rows -> views -> prompts -> rollouts, for one optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], torch.Tensor]:
        """The next micro-batches with their rollouts, and the number of tokens in the step's loss."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        micro_batches, rollouts, total = self.builder.build(self.model, batches, self.state.global_step)
        self._note_rollouts(micro_batches, rollouts)
        return micro_batches, total.to(device)

    # scores -> loss, for one micro-batch

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's weighted token losses, over the sum of the weights of the whole step on all processes."""
        # The student's body, the head and the loss run inside the model's forward, where DDP and FSDP2 expect them.
        # Autocast here: the Trainer's own covers `forward` as it was, not what runs inside.
        active_BT = inputs.weights_BT > 0
        stage = self.step_metrics.stage
        with self.accelerator.autocast():
            with stage("teacher"):
                teacher_hidden_ND = score_teacher(self.teacher, inputs, active_BT, self.token_ids.pad)

            def compute(student: Any) -> Objective:
                with stage("student"):
                    scores = score_student(student, teacher_hidden_ND, inputs, active_BT, self.token_ids.pad)
                with stage("loss"):
                    return objective(scores, get_head(student), get_head(self.teacher), self.objective_config)

            result = run_inside(model, compute)
        total = inputs.weights_BT.sum() if num_items_in_batch is None else num_items_in_batch
        # DDP and FSDP2 average gradients over the processes; the sum is meant.
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = result.loss_sum * (ranks / max(float(total), 1e-8))
        self._note_objective(result)
        return (loss, result) if return_outputs else loss

    def _note_objective(self, result: Objective) -> None:
        stats = result.stats
        figures = {"reverse_kl": stats.reverse_kl_N, "entropy": stats.entropy_N, "missing_mass": stats.missing_mass_N}
        for name, values_N in figures.items():
            assert values_N is not None
            self.step_metrics.add_mean(name, float(values_N.detach().sum()), len(values_N))

    def training_step(self, model: Any, inputs: MicroBatch, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's step, timed."""
        with self.step_metrics.stage("step"):
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
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if isinstance(resume_from_checkpoint, (str, Path)):
            refuse_other_teacher(self.teacher, Path(resume_from_checkpoint))
        if self.args.teacher_checks:
            self.run_teacher_checks()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def run_teacher_checks(self) -> TeacherReport:
        """The start-up checks of `imagine_opd.teacher_checks` on the first rows; raises `TeacherError`."""
        count = min(self.args.teacher_check_rows, len(self.train_dataset))
        pairs = [
            pair for pair in self.builder.build_pairs([self.train_dataset[i] for i in range(count)]) if pair is not None
        ]
        if not pairs:
            raise RowError(f"none of the first {count} rows can be used; see the messages above")
        with self.accelerator.autocast():
            self.teacher_report = check_teacher(
                self.model,
                self.teacher,
                pairs,
                self.engine,
                self.builder.sampling,
                self.args.seed,
                self.teacher_is_copy,
            )
        self.step_metrics.clear()  # what the probe rows cost is not the first step's
        for name, value in self.teacher_report.as_metrics().items():
            self.step_metrics.add_mean(name, value)
        if self.teacher_report.privilege_gap <= 0:
            self.say_once(
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
        with self.accelerator.autocast():
            result = evaluate_model(
                model, self.processor, rows, self.view_config, self.args, ("imagine",), self.args.eval_batch_size
            )
        found = result["imagine"]
        figures = {
            "accuracy": found.accuracy,
            "rows": float(found.rows),
            "left_out": float(result.left_out),
            "unparsed": float(found.unparsed),
            "mean_tokens": found.mean_tokens,
            "runtime": found.seconds,
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with the step's own figures since the last one."""
        if "loss" in logs:
            logs = {**logs, **self.step_metrics.drain(gather_figures)}
        super().log(logs, start_time)

    def say_once(self, message: str) -> None:
        """A line for the user, each text once a run."""
        if message not in self._messages:
            self._messages.add(message)
            print(message, flush=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            save_recipe(self.args, folder)
            save_teacher_fingerprint(self.teacher, folder)
            # A pickle of our settings: `run.json` and `imagine_opd.json` say the same and can be read safely.
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _note_rollouts(self, micro_batches: Sequence[MicroBatch], rollouts: Rollouts) -> None:
        texts = decode_completions(self.processor, rollouts.completion_ids_BT, rollouts.completion_mask_BT)
        count, figures = len(texts), self.step_metrics
        lengths = rollouts.completion_mask_BT.sum(dim=1).tolist()
        figures.steps += 1
        figures.add_mean("completions/mean_length", float(sum(lengths)), count)
        figures.add_max("completions/max_length", float(max(lengths, default=0)))
        figures.add_mean("completions/clipped_ratio", float(find_truncated(rollouts, self.token_ids).sum()), count)
        figures.add_mean("tag_rate", float(sum(has_answer_tag(text) for text in texts)), count)
        figures.add_mean("loss_tokens", float(sum((batch.weights_BT > 0).sum() for batch in micro_batches)))
        for reason, number in rollouts.dropped.items():
            figures.add_total(f"rows_dropped/{reason}", float(number))
        step = self.state.global_step + 1
        if not self.args.log_completions or step % max(int(self.state.logging_steps or 1), 1):
            return
        if not self.is_world_process_zero():
            return
        rows = [row for batch in micro_batches if batch.is_used for row in batch.rows]
        for row, text in list(zip(rows, texts, strict=True))[: self.args.num_completions_to_log]:
            line = {"step": step, "id": row.id or row.source, "question": row.question, "answer": row.answer}
            append_line(Path(self.args.output_dir, COMPLETIONS_FILE), {**line, "completion": text})


def refuse_bad_run(args: ImagineOPDConfig, train_rows: Sequence[Row], eval_rows: Sequence[Row] | None) -> None:
    """Raise `ConfigError` or `RowError` for settings that do not go with the rows or the machine."""
    if args.kernel_backend == "triton" and args.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"kernel_backend='triton' needs a CUDA device, this run has {args.device}; use 'auto'")
    if str(args.eval_strategy.value) != "no" and eval_rows is None:
        raise ConfigError(f"eval_strategy={args.eval_strategy.value!r} needs eval_data")
    if eval_rows is not None and not any(row.answer is not None for row in eval_rows):
        raise RowError(f"none of the {len(eval_rows)} rows of eval_data has an answer to compare with")
    if args.dataloader_drop_last and len(train_rows) < args.train_batch_size:
        raise ConfigError(
            f"dataloader_drop_last=True with {len(train_rows)} rows and a batch of {args.train_batch_size} leaves none"
        )
