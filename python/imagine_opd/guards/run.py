"""The guards and metrics of a run in one place: the trainer tells it what happens, and it counts, warns, skips, stops.

What each guard is lives in a file of its own; here they meet the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from imagine_opd.answers import has_answer_tag
from imagine_opd.batches import BatchBuilder, MicroBatch
from imagine_opd.callbacks import COMPLETIONS_FILE, StepTimeCallback, append_line
from imagine_opd.config import ImagineOPDConfig
from imagine_opd.errors import RowError
from imagine_opd.evaluation import decode_completions
from imagine_opd.guards.forwards import describe_sharing, refuse_mixed_packing
from imagine_opd.guards.image_identity import refuse_foreign_images
from imagine_opd.guards.monitors import CollapseCallback
from imagine_opd.guards.nonfinite import NonfiniteGuard, describe_micro_batch
from imagine_opd.guards.repetition import measure_repetition
from imagine_opd.loss import DenseStats, Objective
from imagine_opd.memory_advice import (
    explain_out_of_memory,
    explain_pass,
    explained_memory,
    read_facts,
    read_memory_gib,
    read_pass,
)
from imagine_opd.metrics import (
    CompletionLogger,
    CompletionSample,
    TokenClassifier,
    make_thumbnails,
    note_kl,
    note_mismatch,
)
from imagine_opd.models import get_head, paused, run_inside
from imagine_opd.packing import describe_packing, refuse_unpackable
from imagine_opd.parallel import gather_parameters, sum_over_ranks
from imagine_opd.rollout.finish import find_truncated
from imagine_opd.teacher import (
    STUDENT,
    PrivilegeProbe,
    Teacher,
    TeacherRecord,
    TeacherReport,
    TeacherWatchCallback,
    build_probe,
    check_teacher,
    check_teacher_again,
    measure_sides,
    record_teacher,
    refuse_blind_batch,
    split_privilege,
)
from imagine_opd.types import PromptPair, Rollouts, Row
from imagine_opd.vision_features import VisionFeatures

# B completions, T completion tokens, N kept response tokens

DISTILLATION_LOSS = "self_distillation/distillation_loss"


class RunGuards:
    """Args: the trainer, whose parts are read when they are needed."""

    def __init__(self, trainer: Any, builder: BatchBuilder, teacher: Teacher) -> None:
        self.trainer = trainer
        self.builder = builder
        self.teacher = teacher
        self.args: ImagineOPDConfig = trainer.args
        self.metrics = builder.metrics
        self.classifier = TokenClassifier(builder.processor.tokenizer)
        self.logger = CompletionLogger(lambda: trainer.callback_handler.callbacks, trainer.say_once)
        self.nonfinite = NonfiniteGuard(
            trainer.accelerator,
            self.args.output_dir,
            self.args.max_nonfinite_steps,
            describe_micro_batch,
            trainer.say_here,
        )
        self.record: TeacherRecord | None = None
        self.probe: PrivilegeProbe | None = None
        self.vocabulary_size = 0
        self._noted: list[tuple[MicroBatch, torch.Tensor, Objective]] = []

    def make_callbacks(self) -> list[TrainerCallback]:
        """What the Trainer must call."""
        watch = TeacherWatchCallback(
            (self.args.teacher_check_steps, self.check_teacher),
            (self.args.probe_steps, lambda step: self.measure_probe()),
        )
        return [StepTimeCallback(self.metrics), CollapseCallback(self.args, self.trainer.say_once), watch, self.logger]

    # before step 0, and later

    def check_teacher_first(self, expect_identical: bool) -> TeacherReport:
        """The checks before step 0 on the first rows, logged, and what the periodic check compares with.

        expect_identical: teacher and student hold the same weights. Raises `TeacherError`, and `RowError` when no row
        can be used.
        """
        rows, model = self.trainer.train_dataset, self.trainer.model_wrapped
        count = min(self.args.teacher_check_rows, len(rows))
        pairs = [pair for pair in self.builder.build_pairs([rows[i] for i in range(count)]) if pair is not None]
        if not pairs:
            raise RowError(f"none of the first {count} rows can be used; see the messages above")
        engine, sampling = self.builder.local_engine, self.builder.sampling
        explained = self.explained_check("the teacher checks before step 0", lambda: pairs)
        with explained, self.trainer.accelerator.autocast():
            report = check_teacher(model, self.teacher, pairs, engine, sampling, self.args.seed, expect_identical)
            with self.teacher.gathered(model) as module:
                self.vocabulary_size = len(get_head(module).weight_VD)
                self.record = record_teacher(module, pairs, engine, self.args.max_completion_length)
        self.metrics.clear()  # what the probe rows cost is not the first step's
        for name, value in report.as_metrics().items():
            self.metrics.put(name, value)
        if report.privilege_gap <= 0:
            self.trainer.say_once(
                f"the teacher gains nothing from its view (privilege gap {report.privilege_gap:.4f} nats per token): "
                "check the boxes"
            )
        return report

    def start_probe(self, student: Any, rows: Sequence[Row]) -> None:
        """Make the probe of these rows and measure it. `student` may be wrapped."""
        explained = self.explained_check(
            "the privilege probe before step 0",
            lambda: [pair for pair in self.builder.build_pairs(rows) if pair is not None],
            "probe_rows",
        )
        with explained, self.teacher.gathered(student) as module:
            self.probe = build_probe(
                rows,
                self.builder.processor,
                self.builder.view_config,
                self.builder.privilege_config,
                module,
                self.builder.local_engine,
                self.args.max_completion_length,
                self.builder.student_view,
                self.builder.teacher_view,
            )
        self.measure_probe()

    def check_features(self, features: VisionFeatures) -> bool:
        """Whether both sides get from shared image features what they would make themselves; says so where not."""
        rows, model, token_ids = self.trainer.train_dataset, self.trainer.model_wrapped, self.builder.engine.token_ids
        count = min(self.args.teacher_check_rows, len(rows))
        pairs = [pair for pair in self.builder.build_pairs([rows[i] for i in range(count)]) if pair is not None][:1]
        if not pairs:
            return True  # the teacher checks end a run without a usable row with a sentence of their own
        features.start_step()
        explained = self.explained_check("the check of shared image features", lambda: pairs, None)
        with explained, self.trainer.accelerator.autocast():
            with gather_parameters(model) as module, paused(module):
                told = describe_sharing(module, [pairs[0].student], token_ids, features, "rollout")
            with self.teacher.gathered(model) as module, paused(module):
                told = told or describe_sharing(module, [pairs[0].teacher], token_ids, features, "teacher")
        features.start_step()
        self.metrics.clear()  # as for the checks below
        if told:
            self.trainer.say_here(told)
        return not sum_over_ranks({"differ": float(bool(told))})["differ"]  # all processes share, or none

    def check_packing(self) -> None:
        """Says how packed sequences are kept apart, and raises `ConfigError` where they are not."""
        rows, model, token_ids = self.trainer.train_dataset, self.trainer.model_wrapped, self.builder.engine.token_ids
        pairs = [pair for pair in self.builder.build_pairs([rows[i] for i in range(min(2, len(rows)))]) if pair]
        if not pairs:
            return  # a run without a usable row ends with a sentence of its own
        pairs = (pairs * 2)[:2]
        explained = self.explained_check("the check of packed forwards", lambda: pairs, None)
        with explained, self.trainer.accelerator.autocast():
            with gather_parameters(model) as student, paused(student):
                self.trainer.say_once(describe_packing(student))
                refuse_mixed_packing(student, [pair.student for pair in pairs], token_ids, "student")
            with self.teacher.gathered(model) as teacher, paused(teacher):
                refuse_unpackable(teacher)
                refuse_mixed_packing(teacher, [pair.teacher for pair in pairs], token_ids, "teacher")
        self.metrics.clear()  # as for the checks below

    def check_teacher(self, step: int) -> None:
        """The periodic check; raises `TeacherError`."""
        record = self.record
        if record is None:
            return
        model = self.trainer.model_wrapped
        explained = self.explained_check(f"the teacher checks at step {step}", lambda: record.pairs)
        with explained, self.trainer.accelerator.autocast(), torch.no_grad():
            figures = check_teacher_again(
                record,
                lambda function: run_inside(model, function),
                lambda function: self.teacher.run(model, function),
                self.builder.engine.token_ids.pad,
                self.vocabulary_size,
                step,
                is_frozen=self.teacher.kind == "base",
            )
        for name, value in figures.items():
            self.metrics.put(name, value)

    def measure_probe(self) -> None:
        """`gap/...` for the next log."""
        if self.probe is None:
            return
        probe, pad_id = self.probe, self.builder.engine.token_ids.pad
        size = self.args.per_device_train_batch_size
        model = self.trainer.model_wrapped
        with self.trainer.accelerator.autocast(), torch.no_grad():
            means = self.teacher.run(model, lambda module: measure_sides(module, probe, pad_id, size))
            own = run_inside(model, lambda module: measure_sides(module, probe, pad_id, size, (STUDENT,)))
        split = split_privilege(means, own.get(STUDENT))
        for name, value in split.items():
            self.metrics.put(name, value)

    # each step

    def note_rollouts(self, micro_batches: Sequence[MicroBatch], rollouts: Rollouts, step: int) -> None:
        """The step's completions: figures, checks, samples. `step` is the number that its log will have."""
        self._noted.clear()  # of a step that an error ended
        texts = decode_completions(self.builder.processor, rollouts.completion_ids_BT, rollouts.completion_mask_BT)
        count, figures = len(texts), self.metrics
        lengths = rollouts.completion_mask_BT.sum(dim=1).tolist()
        figures.add_mean("completions/mean_length", float(sum(lengths)), count)
        if lengths:
            figures.add_max("completions/max_length", float(max(lengths)))
            figures.add_min("completions/min_length", float(min(lengths)))
        figures.add_mean(
            "completions/clipped_ratio", float(find_truncated(rollouts, self.builder.engine.token_ids).sum()), count
        )
        figures.add_mean("tag_rate", float(sum(has_answer_tag(text) for text in texts)), count)
        tokens = float(sum((batch.weights_BT > 0).sum() for batch in micro_batches))
        figures.add_mean("loss_tokens", tokens, 1.0 / self.trainer.args.world_size)  # a step is one for all processes
        self._count_tokens(micro_batches, sum(lengths))
        for reason, number in rollouts.dropped.items():
            figures.add_total(f"rows_dropped/{reason}", float(number))
        ids = rollouts.completion_ids_BT.tolist()
        shares = [measure_repetition(row[:length]) for row, length in zip(ids, lengths, strict=True)]
        self.metrics.add_mean("completions/repetition", sum(shares), len(shares))
        every = self.args.teacher_check_steps
        if self.args.teacher_checks and (step == 1 or (every and step % every == 0)):
            self._check_images(micro_batches)
        if self.args.log_completions and step % max(int(self.trainer.state.logging_steps or 1), 1) == 0:
            self._log_completions(micro_batches, texts, step)

    def _count_tokens(self, micro_batches: Sequence[MicroBatch], completion_tokens: int) -> None:
        """`num_tokens`: all prompts of the student and their completions since step 0, of all processes."""
        prompts = [pair.student for batch in micro_batches if batch.is_used for pair in batch.prompts]
        own = float(sum(len(prompt.input_ids) for prompt in prompts) + completion_tokens)
        state = self.trainer.state  # where it is saved with each checkpoint
        state.num_input_tokens_seen += int(sum_over_ranks({"tokens": own})["tokens"])
        self.metrics.put("num_tokens", float(state.num_input_tokens_seen))

    def _check_images(self, micro_batches: Sequence[MicroBatch]) -> None:
        found = list_used(micro_batches)[:: self.args.num_generations][: self.args.teacher_check_rows]
        rows, pairs = [row for row, _ in found], [pair for _, pair in found]
        refuse_blind_batch(pairs)
        refuse_foreign_images(rows, pairs, self.builder.build_pairs, exact=not self.args.scaled_decode)

    def _log_completions(self, micro_batches: Sequence[MicroBatch], texts: Sequence[str], step: int) -> None:
        """A few lines in the run's file, and with thumbnails for the next log where something takes them."""
        if not self.trainer.is_world_process_zero():
            return
        shown = list(zip(list_used(micro_batches), texts, strict=True))[: self.args.num_completions_to_log]
        for (row, _), text in shown:
            line = {"step": step, "id": row.id or row.source, "question": row.question, "answer": row.answer}
            append_line(Path(self.args.output_dir, COMPLETIONS_FILE), {**line, "completion": text})
        if self.logger.has_reporter:
            self.logger.hold([self._make_sample(row, pair, text) for (row, pair), text in shown])

    def _make_sample(self, row: Row, pair: PromptPair, text: str) -> CompletionSample:
        pictures = tuple(make_thumbnails(pair.student.view, self.builder.view_config))
        return CompletionSample(row.id or row.source, row.question, row.answer, text, pictures)

    def note_objective(self, batch: MicroBatch, active_BT: torch.Tensor, result: Objective) -> None:
        """A micro-batch's per-token losses and statistics. They are read at the step's end: until then nothing waits
        for the device."""
        self._noted.append((batch, active_BT, result))

    def read_objectives(self) -> None:
        """Add what was noted since the last call to the log."""
        noted, self._noted = self._noted, []
        for batch, active_BT, result in noted:
            self._read_objective(batch, active_BT, bring_to_host(result))

    def _read_objective(self, batch: MicroBatch, active_BT: torch.Tensor, result: Objective) -> None:
        stats = result.stats
        self._note_means(result)
        row_N, position_N = active_BT.nonzero(as_tuple=True)
        lengths_B = batch.rollouts.completion_mask_BT.sum(dim=1)
        classes_BT = self.classifier.classify(batch.rollouts.completion_ids_BT, batch.rollouts.completion_mask_BT)
        note_kl(self.metrics, stats.reverse_kl_N, classes_BT[active_BT], position_N, lengths_B[row_N])
        sampled_N = batch.rollouts.sampling_logprobs_BT[active_BT]
        drift_N = (stats.student_logprob_N - sampled_N).abs()
        self.metrics.add_mean("rollout_drift", float(drift_N.sum()), len(drift_N))
        if self.args.use_vllm:
            bounds = self.trainer.objective_config.ratio_bounds
            note_mismatch(self.metrics, stats.student_logprob_N, sampled_N, bounds)

    def _note_means(self, result: Objective) -> None:
        stats = result.stats
        figures = {"reverse_kl": stats.reverse_kl_N, "entropy": stats.entropy_N, "missing_mass": stats.missing_mass_N}
        if isinstance(stats, DenseStats) and stats.student_mass_N is not None:
            figures["distillation/student_mass"] = stats.student_mass_N
            figures["distillation/teacher_mass"] = stats.teacher_mass_N
        for name, values_N in figures.items():
            assert values_N is not None
            self.metrics.add_mean(name, float(values_N.sum()), len(values_N))
        loss_N, weights_N = result.distillation_loss_N, result.weights_N
        self.metrics.add_mean(DISTILLATION_LOSS, float((weights_N * loss_N).sum()), float(weights_N.sum()))
        if len(loss_N):
            self.metrics.add_max("distillation/loss_max", float(loss_N.max()))

    def settle_step(self, model: Any, optimizer: Any, loss: torch.Tensor, batch: MicroBatch) -> None:
        """After each micro-batch's backward; at the step's last, whether the optimizer may step."""
        self.nonfinite.note_loss(loss, batch)
        if self.trainer.accelerator.sync_gradients:
            found = self.nonfinite.settle(model, optimizer, self.trainer.state.global_step + 1)
            is_counted = found is not None and self.trainer.args.process_index == 0  # all processes leave it out
            self.metrics.add_total("nonfinite_steps", float(is_counted))
            self.read_objectives()
            if (features := self.trainer.features) is not None:
                self.metrics.add_mean("vision/shared", features.asked - features.computed, features.asked)
                features.clear()

    @contextmanager
    def explained_batch(self, batch: MicroBatch) -> Iterator[None]:
        """Memory that runs out inside becomes a `DeviceMemoryError` with the micro-batch's numbers."""
        plan = self.trainer.run_plan

        def explain(error: BaseException) -> str:
            return explain_out_of_memory(
                error,
                read_facts(batch, packed=self.args.padding_free),
                batch_size=self.args.per_device_train_batch_size,
                gradient_checkpointing=self.args.gradient_checkpointing,
                memory_gib=read_memory_gib(self.args.device),
                plan_advice=plan.advise() if plan is not None else (),
            )

        with explained_memory(explain):
            yield

    @contextmanager
    def explained_check(
        self, name: str, make_pairs: Callable[[], Sequence[PromptPair]], field: str | None = "teacher_check_rows"
    ) -> Iterator[None]:
        """The same for a check on the teacher's prompts of a few rows, as many as the config's `field` says."""

        def explain(error: BaseException) -> str:
            facts = read_pass(name, [pair.teacher for pair in make_pairs()], self.args.max_completion_length)
            memory_gib = read_memory_gib(self.args.device)
            return explain_pass(error, facts, field, memory_gib=memory_gib, plan_advice=self.builder.weights_advice)

        with explained_memory(explain):
            yield


def list_used(micro_batches: Sequence[MicroBatch]) -> list[tuple[Row, PromptPair]]:
    """Row and prompts of each completion of a step, in the order of its rollouts."""
    used = [batch for batch in micro_batches if batch.is_used]
    return [item for batch in used for item in zip(batch.rows, batch.prompts, strict=True)]


def bring_to_host(result: Objective) -> Objective:
    """The objective's figures without gradient, on the CPU."""

    def bring(values: Any) -> Any:
        return values.detach().to("cpu") if isinstance(values, torch.Tensor) else values

    stats = replace(
        result.stats, **{item.name: bring(getattr(result.stats, item.name)) for item in fields(result.stats)}
    )
    own = {item.name: bring(getattr(result, item.name)) for item in fields(result) if item.name != "stats"}
    return replace(result, **own, stats=stats)
