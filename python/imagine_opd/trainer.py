"""`ImagineOPDTrainer`: rows in; rollout, scores of both views, objective and step by `transformers.Trainer`.

Read downwards: `get_batch_samples` makes views, prompts and rollouts for one optimizer step; `compute_loss` scores a
micro-batch of them and calls the objective. All rollouts of a step are drawn before its first backward, from seeds
that depend only on (seed, step, place in the step): accumulation 1 x 4 equals 4 x 1, two processes equal one, and a
resumed run equals the whole one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import ProgressCallback

from imagine_opd.adapters import find_adapter, write_budget
from imagine_opd.batches import BatchBuilder, MicroBatch
from imagine_opd.callbacks import (
    RunFolderCallback,
    StepProgressCallback,
    TeacherUpdateCallback,
)
from imagine_opd.config import ImagineOPDConfig
from imagine_opd.devices import move_to
from imagine_opd.engines import build_engine
from imagine_opd.errors import ConfigError
from imagine_opd.evaluation import evaluate_model
from imagine_opd.guards import RunGuards
from imagine_opd.lookahead import Lookahead
from imagine_opd.loss import Objective, ObjectiveConfig, objective
from imagine_opd.metrics import StepMetrics, describe_times, make_clock
from imagine_opd.micro_batches import plan_parts, score_parts, step_parts
from imagine_opd.models import (
    get_head,
    load_model,
    load_processor,
    open_forward,
    prepare_student,
    read_token_ids,
    run_inside,
)
from imagine_opd.packing import refuse_unpackable
from imagine_opd.parallel import (
    count_own_rows,
    gather_figures,
    gather_parameters,
    is_sharded,
    keep_fp32_results,
    settle_launch,
    shard_like,
)
from imagine_opd.privilege import ViewFunction
from imagine_opd.recording import RecordedTrainer
from imagine_opd.rewards import read_reward_functions
from imagine_opd.rollout import HFEngine
from imagine_opd.run_checks import refuse_bad_run, refuse_idle_rewards, refuse_own_folder
from imagine_opd.run_plan import plan_run, settle_placement
from imagine_opd.scoring import pick_tokens, score_student, score_teacher
from imagine_opd.settings import make_view_config
from imagine_opd.step_advantages import add_step_advantages
from imagine_opd.teacher import MOVING_TEACHER, TeacherReport, build_teacher, refuse_unmergeable
from imagine_opd.types import Row
from imagine_opd.vision_features import VisionFeatures, make_vision_features


class ImagineOPDTrainer(RecordedTrainer):
    """A `transformers.Trainer` for Imagine-OPD. Optimizer, schedule, checkpoints and callbacks are the Trainer's.

    Args:
        model: hub name, folder or loaded model; it is trained.
        args: an `ImagineOPDConfig`.
        train_dataset, eval_dataset: sequences of `Row` (see `imagine_opd.data.load_rows`).
        processor: the model's processor; `None` takes the one beside the model.
        teacher: another checkpoint or model as teacher, which is frozen; `None`: the model's weights as they are now
            (with an adapter: without it).
        peft_config: a ready `peft.LoraConfig`; without it `args.use_peft` makes one of the `lora_` fields.
        student_view, teacher_view: functions of a row to a `SideView`, in place of the config's privilege.
        reward_funcs: functions of (rows, completions) to rewards, or `"accuracy"`, beside the teacher.
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
        peft_config: Any = None,
        student_view: ViewFunction | None = None,
        teacher_view: ViewFunction | None = None,
        reward_funcs: Any = None,
    ) -> None:
        refuse_bad_run(args, train_dataset, eval_dataset)
        settle_launch(args)
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split the rows of a micro-batch under our feet
        self.processor = copy.deepcopy(load_processor(processor, model))
        student = prepare_student(load_model(model, args.model_dtype), args, peft_config)
        refuse_own_folder(student, args)
        if args.padding_free:
            refuse_unpackable(student)
        if args.merge_adapter:
            refuse_unmergeable(student)
        self.view_config = make_view_config(self.processor, args, training=True)
        # The budget the model is trained with travels in its own processor, for every tool that loads it.
        write_budget(self.processor, self.view_config)
        self.objective_config = ObjectiveConfig(
            **{name: getattr(args, name) for name in ObjectiveConfig.__dataclass_fields__}
        )
        self.token_ids = read_token_ids(student, self.processor)
        with gather_parameters(student):  # ZeRO-3 splits it while it is loaded
            self.run_plan = plan_run(
                student, args, self.processor, self.view_config, train_dataset, teacher, student_view, teacher_view
            )
            self.teacher = build_teacher(
                student,
                self.processor,
                teacher,
                args.model_dtype,
                kind=args.teacher_model_kind,
                placement=settle_placement(args.teacher_placement, self.run_plan),
                teacher_dtype=args.teacher_dtype,
                update_rate=args.teacher_update_rate,
                sync_steps=args.teacher_sync_steps,
            )
            self.features: VisionFeatures | None = None
            if args.share_vision_features:
                tower = self.teacher.list_tower(student)
                self.features = make_vision_features(student, find_adapter(self.processor).family, tower)
        self.engine = build_engine(student, args, self.token_ids, self.processor, self.view_config, self.features)
        self.teacher_report: TeacherReport | None = None
        self.step_metrics = StepMetrics(make_clock(args.device))
        self._checks_wait = False
        self.has_moved = False
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
        keep_fp32_results(self.accelerator)
        if self.place_model_on_device:  # else the student is not there yet either: it may be split first
            self.teacher.prepare(args.device)
        self.saved_parts.append(self.teacher)
        self.add_callback(TeacherUpdateCallback(self.teacher))
        if self.teacher.kind != "base":
            self.say_once(MOVING_TEACHER.format(kind=self.teacher.kind))
        self.builder = BatchBuilder(
            self.processor,
            self.engine,
            self.view_config,
            args,
            self.accelerator,
            self.step_metrics,
            self.say_here,
            train_dataset,
            student_view,
            teacher_view,
            refuse_idle_rewards(read_reward_functions(reward_funcs), args),
            self.run_plan.advise_weights() if self.run_plan is not None else (),
        )
        self.guards = RunGuards(self, self.builder, self.teacher)
        self.lookahead = Lookahead(
            self.builder.build_ahead, lambda: self.accelerator.gradient_state.end_of_dataloader, args.prefetch_views
        )
        for callback in self.guards.make_callbacks():
            self.add_callback(callback)
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
        self.step_metrics.start_step()
        if self.features is not None:
            self.features.start_step()
        more = self.state.global_step + 1 < self.state.max_steps
        rows = self.lookahead.take(epoch_iterator, num_batches, more)
        batches, size, args = rows.batches, self.args.train_batch_size, self.args
        if args.world_size > 1 and rows.is_last and not args.dataloader_drop_last:
            own = count_own_rows(len(self.train_dataset), size, args.process_index, args.world_size)
            batches[-1] = batches[-1][:own]
        step = self.state.global_step
        micro_batches, rollouts, total = self.builder.build(self.model_wrapped, batches, step, rows.made)
        self.guards.note_rollouts(micro_batches, rollouts, self.state.global_step + 1)
        if self.features is not None:
            self.features.expect([pair.student for batch in micro_batches for pair in batch.prompts])
        micro_batches = plan_parts(micro_batches, self.args, self.say_here)
        if self.objective_config.shapes_advantages:
            stage = self.step_metrics.stage("advantages")
            with stage, self.accelerator.autocast(), self.teacher.open_head(self.model_wrapped) as teacher_head:
                micro_batches = add_step_advantages(
                    micro_batches,
                    lambda batch: score_parts(batch, lambda part: self._score_teacher(self.model_wrapped, part)),
                    teacher_head,
                    self.objective_config,
                    self.args.max_completion_length,
                    self.args.device,
                )
        return micro_batches, total  # on the host, where it is needed as a number

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
        row_N, device = active_BT.nonzero(as_tuple=True)[0], self.args.device
        stage = self.step_metrics.stage
        with self.accelerator.autocast():
            teacher_hidden_ND, neutral_hidden_ND = inputs.teacher_hidden_ND, inputs.neutral_hidden_ND
            if teacher_hidden_ND is None:
                teacher_hidden_ND, neutral_hidden_ND = self._score_teacher(model, inputs)

            results: list[Objective] = []

            def compute(student: Any) -> torch.Tensor:
                with stage("student"):
                    pad_id, packed = self.token_ids.pad, self.args.padding_free
                    scores = score_student(student, teacher_hidden_ND, inputs, active_BT, pad_id, self.features, packed)
                    scores = dataclasses.replace(
                        scores,
                        weights_N=move_to(inputs.weights_BT[active_BT], device),
                        neutral_hidden_ND=neutral_hidden_ND,
                        advantages_N=inputs.advantages_N,
                        distill_N=pick_tokens(inputs.distill_B, row_N, device),
                        reward_advantages_N=pick_tokens(inputs.reward_advantages_B, row_N, device),
                        leaked_N=pick_tokens(inputs.leaked_BT, active_BT, device),
                    )
                with stage("loss"):
                    results.append(objective(scores, get_head(student), teacher_head, self.objective_config))
                # Alone: wrappers hang their hooks on what a forward returns, and DeepSpeed knows no slots.
                return results[0].loss_sum

            with self.teacher.open_head(model) as teacher_head:
                loss_sum = run_inside(model, compute)
        total = inputs.weights_BT.sum() if num_items_in_batch is None else num_items_in_batch
        # DDP and FSDP2 average gradients over the processes; the sum is meant.
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = loss_sum * (ranks / max(float(total), 1e-8))
        self.guards.note_objective(inputs, active_BT, results[0])
        self.step_metrics.begin("backward")
        return (loss, results[0]) if return_outputs else loss

    def _score_teacher(self, model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's hidden states with the evidence and, for a contrast, with neutral evidence."""
        active_BT, pad_id = batch.weights_BT > 0, self.token_ids.pad
        features, packed = self.features, self.args.padding_free

        def compute(teacher: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            hidden_ND = score_teacher(teacher, batch, active_BT, pad_id, False, features, packed)
            if self.view_config.neutral == "none":
                return hidden_ND, None
            return hidden_ND, score_teacher(teacher, batch, active_BT, pad_id, True, features, packed)

        # Here too: with step advantages the teacher runs before the step, outside of `training_step`.
        with self.guards.explained_batch(batch), self.step_metrics.stage("teacher"):
            return self.teacher.run(model, compute)

    def training_step(self, model: Any, inputs: MicroBatch, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's step, timed and guarded."""

        def step(part: MicroBatch) -> torch.Tensor:
            with self.guards.explained_batch(part):
                loss: torch.Tensor = super(ImagineOPDTrainer, self).training_step(model, part, num_items_in_batch)
            self.step_metrics.finish("backward")
            return loss

        with self.step_metrics.stage("step"):
            loss = step_parts(self.accelerator, model, inputs, step)
            self.guards.settle_step(model, self.optimizer, loss, inputs)
        self.step_metrics.begin("update")  # ends with the step
        # The guard has noted one that is not finite; asked for by the Trainer, each step would wait for the device.
        return torch.where(torch.isfinite(loss), loss, 0.0)

    # before, during, after

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Check the teacher, then train. See `SafeSaving.train` and `transformers.Trainer.train`."""
        checkpoint = self.open_checkpoint(resume_from_checkpoint)
        if self.run_plan is not None:
            self.say_once(self.run_plan.describe())
        # A checkpoint's weights are loaded, and a split model brought to its device, while training is prepared.
        self._checks_wait = checkpoint is not None or not self.place_model_on_device
        self.has_moved = self.has_moved or checkpoint is not None or self.state.global_step > 0
        if not self._checks_wait:
            self.check_before_training()
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.lookahead.close()
        self.step_metrics.drain()  # what no log has shown counts too
        if times := describe_times(self.step_metrics.run_seconds, self.step_metrics.run_steps):
            self.say_once(times)
        return output

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        splits = is_sharded(self.model_wrapped)
        if splits:  # a forward of the whole model brings its weights together, none of the tower alone does
            self.stop_sharing()
        self.teacher.prepare(
            self.args.device, (lambda module: shard_like(module, self.model_wrapped)) if splits else None
        )
        if self._checks_wait:
            self.check_before_training()
        return prepared

    def stop_sharing(self) -> None:
        """Every forward makes its own image features from here on."""
        self.features = None
        if isinstance(self.engine, HFEngine):
            self.engine.features = None

    def load_weights(self, checkpoint: str) -> None:
        """Student and teacher as they are in a checkpoint, to be looked at; nothing else of it is loaded."""
        self._load_from_checkpoint(checkpoint)
        self.teacher.load(checkpoint)
        self.has_moved = True

    def check_before_training(self) -> None:
        """The checks of packed forwards, of shared features, of the teacher, and the probe, each where it is on."""
        if self.args.padding_free:
            self.guards.check_packing()
        if self.args.teacher_checks:
            if self.features is not None and not self.guards.check_features(self.features):
                self.stop_sharing()
            self.run_teacher_checks()
        if self.args.probe_rows and (self.args.teacher_checks or self.args.probe_steps):
            with self.accelerator.autocast():
                rows = [self.train_dataset[i] for i in range(min(self.args.probe_rows, len(self.train_dataset)))]
                self.guards.start_probe(self.model_wrapped, rows)

    def run_teacher_checks(self) -> TeacherReport:
        """The start-up checks of `imagine_opd.teacher.checks` on the first rows; raises `TeacherError`."""
        # Weights that have moved since step 0 need not agree under one view.
        self.teacher_report = self.guards.check_teacher_first(self.teacher.equals_student and not self.has_moved)
        return self.teacher_report

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy accuracy of the student's view on the held-out rows, logged as `eval_accuracy`."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ConfigError("evaluation was asked for without eval_data")
        view_config = make_view_config(self.processor, self.args)  # what a user will show: nothing degraded
        with self.accelerator.autocast(), gather_parameters(self.model_wrapped) as model:
            result = evaluate_model(
                model,
                self.processor,
                rows,
                view_config,
                self.args,
                ("imagine",),
                self.args.eval_batch_size,
                shared=True,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.list_figures("imagine").items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with the step's own figures since the last one."""
        if "loss" in logs:
            logs = {**logs, **self.step_metrics.drain(gather_figures)}
        super().log(logs, start_time)
