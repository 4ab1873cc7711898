"""The command line: `imagine-opd demo | train | explain | ask`.

Exit code 0 well, 1 a failed run, 2 a wrong command line, 143 or 130 stopped by SIGTERM or SIGINT with a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from imagine_opd import __version__
from imagine_opd.errors import ImagineError, RunStoppedError

_DESCRIPTION = """\
Teach a vision-language model to see fine detail without cropping tools (Imagine-OPD, arXiv 2606.08719).
"""
_TRAIN_EPILOG = """\
CONFIG.yaml holds model, data, output_dir (and optionally eval_data, teacher, processor, resume_from_checkpoint,
dry_run) and any field of imagine_opd.ImagineOPDConfig, which has all of transformers.TrainingArguments. The same names
given as options win over the file:

  imagine-opd train configs/imagine.yaml --data rows.jsonl --learning_rate 2e-6
"""
_EXPLAIN_EPILOG = """\
The run is prepared as by `imagine-opd train CONFIG.yaml [--field value ...]`, and nothing is trained.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="imagine-opd", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"imagine-opd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="watch a tiny vision-language model learn, in minutes on a CPU",
        description="Train a tiny vision-language model on the embedded tiny world: accuracy before and after, "
        "how much of the gap to the teacher is closed, a contact sheet and result.json.",
    )
    demo.add_argument("--output", metavar="DIR", default="demo", help="folder of the results (default: demo)")
    demo.add_argument("--long", action="store_true", help="train longer: up to 20 minutes on 2 cores")
    demo.add_argument(
        "--mode",
        choices=("full", "sampled_token"),
        default="full",
        help="full: exact KL; sampled_token: the paper's estimator, for the same time (default: full)",
    )
    demo.add_argument(
        "--views",
        choices=("right", "wrong"),
        default="right",
        help="wrong: the teacher sees another object's crop, a control that must not help (default: right)",
    )
    demo.add_argument(
        "--privilege",
        choices=("crops", "contrast", "hint", "resolution"),
        default="crops",
        help="what only the teacher has: crops; contrast: crops, and its target leads away from what it says without "
        "them; hint: place and digit in words; resolution: the scene that the student sees blurred (default: crops)",
    )
    demo.add_argument("--lora", action="store_true", help="train an adapter in place of the whole weights")
    demo.add_argument("--seed", metavar="N", type=int, default=0, help="seed of training (default: 0)")

    train = commands.add_parser(
        "train",
        help="train a model on your rows",
        description="Train a vision-language model by Imagine-OPD.",
        epilog=_TRAIN_EPILOG,
        usage="imagine-opd train [-h] CONFIG.yaml [--field value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="settings of the run")

    explain = commands.add_parser(
        "explain",
        help="show what one row becomes in a run, before it is trained",
        description="Show what becomes of one row in a run: both prompts and their pictures, token counts, where the "
        "response starts, one rollout with its KL token by token, the teacher checks, the settings.",
        epilog=_EXPLAIN_EPILOG,
        usage="imagine-opd explain [-h] CONFIG.yaml [--row N] [--html FILE] [--field value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    explain.add_argument("config", metavar="CONFIG.yaml", help="settings of the run")
    explain.add_argument("--row", metavar="N", type=int, default=0, help="which row, from 0 (default: 0)")
    explain.add_argument("--html", metavar="FILE", help="write the page with its pictures there")

    ask = commands.add_parser(
        "ask",
        help="ask a trained model about one image",
        description="Print the model's trace and its answer to one question, from the global image alone.",
    )
    ask.add_argument("model", metavar="MODEL", help="hub name or folder")
    ask.add_argument("image", metavar="IMAGE", help="path of a JPEG, PNG or WebP file")
    ask.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is returned."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in ("train", "explain"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "demo":
            from imagine_opd.cli.demo import run_demo

            if options.privilege == "resolution" and options.views == "wrong":
                parser.error("--views wrong: with --privilege resolution the teacher is shown no evidence to swap")
            run_demo(
                options.output,
                options.mode,
                options.views,
                options.seed,
                options.long,
                options.privilege,
                options.lora,
            )
        elif options.command in ("train", "explain"):
            from imagine_opd.cli.explain import run_explain
            from imagine_opd.cli.train import parse_overrides, run_train

            try:
                overrides = parse_overrides(rest)
            except ValueError as error:
                parser.error(str(error))
            if options.command == "train":
                run_train(options.config, overrides)
            else:
                run_explain(options.config, options.row, options.html, overrides)
        else:
            from imagine_opd.cli.ask import run_ask

            run_ask(options.model, options.image, options.question)
    except RunStoppedError as stop:  # it has said so itself
        return stop.code
    except ImagineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
