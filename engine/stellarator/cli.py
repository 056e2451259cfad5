"""The command line: `stellarator <verb>`, the same as `python -m stellarator <verb>`.

defines: main

Every verb is a function that can be imported from its own module. Modules are imported when their
verb runs, so `--help` and a misspelt option answer without importing torch.
Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 75 preempted, can be resumed; 130
Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence

EXIT_CODES = {"done": 0, "preempted": 75, "interrupted": 130}
_EPILOG = "Every verb explains itself: stellarator VERB --help"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors are one line on stderr, without a traceback.

    Set STELLARATOR_TRACEBACK=1 to see the traceback of an error.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 2
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `stellarator ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("STELLARATOR_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if type(error).__name__ == "ConfigError" else 1


def _parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="stellarator",
        description="Train and try out code language models of the StarCoder family.",
        epilog=_EPILOG,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    _add_train(verbs)
    _add_data(verbs)
    _add_model(verbs)
    _add_generation(verbs)
    _add_others(verbs)
    return parser


def _verb(verbs, name: str, run, help: str, overrides: bool = False, description: str = ""):
    verb = verbs.add_parser(
        name,
        help=help,
        description=description or help,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run, takes_overrides=overrides)
    return verb


def _add_train(verbs) -> None:
    verb = _verb(
        verbs,
        "train",
        _train,
        "train a model",
        True,
        "Train a model. Values are set by the recipe, then the TOML file, then section.key=value:\n"
        "  stellarator train --recipe tiny data.train=D/train data.tokenizer=D/tokenizer\n"
        "  torchrun --nproc-per-node 2 -m stellarator.train --config run.toml optim.lr=1e-4",
    )
    add_train_options(verb)


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """The options of `train`, also those of `python -m stellarator.train`."""
    parser.add_argument("--recipe", default="tiny", help="where the values start (default: tiny)")
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with values that win over the recipe"
    )
    parser.add_argument("--print-config", action="store_true", help="print every value and stop")


def _add_data(verbs) -> None:
    data = verbs.add_parser("data", help="prepare and inspect data", allow_abbrev=False)
    data.set_defaults(run=lambda _: data.print_help() or 2)
    parts = data.add_subparsers(title="verbs", metavar="VERB")
    verb = _verb(parts, "prepare", _prepare, "source code -> tokenizer and token shards")
    verb.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folder, git checkout, .jsonl[.gz|.zst] or .parquet",
    )
    verb.add_argument("--output", required=True, metavar="FOLDER")
    verb.add_argument("--vocab-size", type=int, default=49152)
    verb.add_argument(
        "--generation",
        choices=("starcoder2", "starcoder"),
        default="starcoder2",
        help="special tokens and document format",
    )
    verb.add_argument(
        "--tokenizer", metavar="FOLDER", help="use this tokenizer instead of training one"
    )
    verb.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        help="share of the repositories that is held out (default: 0.05)",
    )
    verb.add_argument("--seed", type=int, default=1234)
    verb = _verb(
        parts,
        "inspect",
        _inspect,
        "print documents of a token shard, or rows as training sees them",
    )
    verb.add_argument("shard", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    verb.add_argument("--tokenizer", required=True, metavar="FOLDER")
    verb.add_argument("--count", type=int, default=2)
    verb.add_argument(
        "--rows", type=int, metavar="T", help="show packed rows of T tokens, with FIM"
    )


def _add_model(verbs) -> None:
    verb = _verb(verbs, "export", _export, "checkpoint -> Hugging Face folder")
    verb.add_argument("checkpoint", help="a run folder, or one checkpoint in it")
    verb.add_argument("output", metavar="FOLDER")
    verb.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    verb = _verb(verbs, "recipes", _recipes, "list the recipes, or explain one")
    verb.add_argument("name", nargs="?")


def _add_generation(verbs) -> None:
    for name, run, text in (
        ("generate", _generate, "continue a prompt"),
        ("infill", _infill, "fill the hole at a line of a file"),
    ):
        verb = _verb(verbs, name, run, text)
        verb.add_argument(
            "--model",
            default="runs/demo/model",
            metavar="FOLDER",
            help="Hugging Face folder (default: runs/demo/model)",
        )
        if name == "generate":
            verb.add_argument(
                "prompts", nargs="+", metavar="PROMPT", help="text; - reads standard input"
            )
            verb.add_argument(
                "--stop", action="append", default=[], help="stop at this text; may repeat"
            )
        else:
            verb.add_argument(
                "location",
                metavar="FILE:LINE",
                help="the line is taken out and written again by the model",
            )
            verb.add_argument("--mode", choices=("psm", "spm"), default="psm")
        verb.add_argument("--max-new-tokens", type=int, default=64)
        verb.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
        verb.add_argument("--top-p", type=float, default=0.95)
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_others(verbs) -> None:
    _verb(
        verbs, "doctor", _doctor, "print machine, versions, extensions, and what each op would run"
    )
    verb = _verb(verbs, "report", _report, "write report.html of a run again")
    verb.add_argument("folder", help="run folder")
    verb = _verb(
        verbs, "demo", _demo, "source code -> tokenizer -> training -> infilling -> report"
    )
    verb.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="default: this Python's standard library"
    )
    verb.add_argument("--output", default="runs/demo", metavar="FOLDER")
    verb.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        help="of training; the number of steps is fitted to it (default: 4)",
    )


def _train(arguments) -> int:
    from stellarator import recipes, settings

    config = settings.resolve(recipes.get(arguments.recipe), arguments.config, arguments.overrides)
    if arguments.print_config:
        print(settings.to_toml(config), end="")
        return 0
    from stellarator.train.loop import Trainer

    return EXIT_CODES[Trainer(config).run()["status"]]


def _prepare(arguments) -> int:
    from stellarator.data.prepare import prepare
    from stellarator.progress import Progress

    with Progress("prepare") as progress:
        manifest = prepare(
            arguments.sources,
            arguments.output,
            vocab_size=arguments.vocab_size,
            generation=arguments.generation,
            format=arguments.generation,
            validation_fraction=arguments.validation_fraction,
            seed=arguments.seed,
            tokenizer=arguments.tokenizer,
            progress=progress,
        )
    for line in manifest_lines(manifest):
        print(line)
    return 0


def manifest_lines(manifest: dict) -> list[str]:
    """What `data prepare` did, for the terminal."""
    lines = []
    for side in ("train", "validation"):
        part = manifest[side]
        lines.append(
            f"{side}: {part['repositories']:,} repositories, {part['documents']:,} documents, "
            f"{part['tokens']:,} tokens"
        )
    skipped = manifest["report"]["skipped"]
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        lines.append(f"skipped: {reasons}")
    return lines


def _inspect(arguments) -> int:
    from stellarator.data.inspect import documents, rows

    if arguments.rows:
        texts = rows(arguments.shard, arguments.tokenizer, arguments.rows, arguments.count)
    else:
        texts = documents(arguments.shard, arguments.tokenizer, arguments.count)
    for text in texts:
        print(text)
    return 0


def _export(arguments) -> int:
    from stellarator.train.export import export

    export(arguments.checkpoint, arguments.output, arguments.dtype)
    return 0


def _recipes(arguments) -> int:
    import inspect

    from stellarator import recipes

    if arguments.name:
        recipes.get(arguments.name)
        print(inspect.getdoc(getattr(recipes, arguments.name)))
        return 0
    for name in recipes.names():
        print(f"{name:<20} {inspect.getdoc(getattr(recipes, name)).splitlines()[0]}")
    return 0


def _sampling(arguments) -> dict:
    """The options that both ways of generating share."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "device")
    return {name: getattr(arguments, name) for name in names}


def _generate(arguments) -> int:
    from stellarator.evaluate.commands import generate_texts

    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in arguments.prompts]
    options = _sampling(arguments)
    for text in generate_texts(arguments.model, prompts, stop_strings=arguments.stop, **options):
        print(text)
    return 0


def _infill(arguments) -> int:
    from stellarator.evaluate.commands import infill_location

    options = _sampling(arguments)
    print(infill_location(arguments.model, arguments.location, mode=arguments.mode, **options))
    return 0


def _doctor(arguments) -> int:
    from stellarator import doctor

    return doctor.main([])


def _report(arguments) -> int:
    from stellarator.train.report import write_report

    print(f"wrote {write_report(arguments.folder)}")
    return 0


def _demo(arguments) -> int:
    from stellarator.demo import run

    return run(arguments.sources, arguments.output, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
