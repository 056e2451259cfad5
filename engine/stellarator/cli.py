"""The command line: `stellarator <verb>`, the same as `python -m stellarator <verb>`.

defines: main

Every verb is a function that can be imported from its own module. Modules are imported when their
verb runs, so `--help` and a misspelt option answer without importing torch.

Exit codes:
      0  done
      1  failed on the way: the machine, the disk, a damaged checkpoint (RuntimeError, OSError)
      2  cannot be done as it was asked for: an option, a configuration, a file or folder that was
         named is wrong (ValueError, and what argparse refuses); the same command fails again
     75  preempted, can be resumed
    130  Ctrl-C
    143  SIGTERM; 129 the terminal was closed
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from stellarator.arguments import make_parser, unrecognized

EXIT_CODES = {"done": 0, "preempted": 75, "interrupted": 130}
# When one process has ended torchrun ends them all: those who would say the same wait for the one
# that tells, which may have started later. Who is still there then has to tell by itself.
_OTHER_TELLS_SECONDS = 10
_LAYOUTS = 5  # that a search prints


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors are one line on stderr, without a traceback.

    Set STELLARATOR_TRACEBACK=1 to see the traceback of an error.
    """
    parser = make_parser()
    arguments, arguments.overrides = parser.parse_known_args(argv)
    words = arguments.overrides
    if arguments.verb == "plan":  # as train it takes section.key=value, but no --section.key=value
        words = [word for word in words if word.startswith("-")]
    if words and arguments.verb != "train":
        arguments.parser.error(unrecognized(arguments.parser, words))
    if arguments.verb not in _VERBS:
        arguments.parser.print_help()
        return 2
    try:
        with _leaving_on_signals():
            code = _VERBS[arguments.verb](arguments)
        sys.stdout.flush()  # a closed pipe or a full disk is noticed here, not when Python ends
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # Python marks an interrupt of text in exec (dataclasses' own, while they are imported) as
        # never caught, and `python -m` then ends by the signal. The next exec takes the mark away.
        exec("")
        return 130
    except BrokenPipeError:  # `stellarator ... | head`
        _empty_stdout()
        return 1
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("STELLARATOR_TRACEBACK") == "1":
            raise
        if getattr(error, "told", False):  # by another process of the same run, if it fails, too
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(_OTHER_TELLS_SECONDS)
        # In one piece: the lines of several ranks do not run into each other.
        sys.stderr.write(f"error: {_line(error)}\n")
        _empty_stdout()
        return 2 if isinstance(error, ValueError) else 1


@contextlib.contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a verb as Ctrl-C does: what is half done is cleaned up on the way."""

    def leave(number: int, frame) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # only there Python allows it
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _empty_stdout() -> None:
    """Write what its buffer holds, or drop it: Python would fail over it again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _line(error: Exception) -> str:
    """What an error says, without `[Errno 13]`."""
    if isinstance(error, ImportError):
        return f"{error}. `stellarator doctor` shows what is installed."
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__


def _train(arguments) -> int:
    from stellarator import recipes, settings

    try:
        base = recipes.get(arguments.recipe)
        size = None if arguments.print_config else int(os.environ.get("WORLD_SIZE", 1))
        config = settings.resolve(base, arguments.config, arguments.overrides, size)
        if arguments.print_config:
            print(settings.to_toml(config), end="")
            return 0
        from stellarator.train.loop import Trainer

        trainer = Trainer(config)
    except ValueError as error:  # the same for every process that torchrun started on this machine
        error.told = os.environ.get("LOCAL_RANK", "0") != "0"
        raise
    return EXIT_CODES[trainer.run()["status"]]


def _plan(arguments) -> int:
    from dataclasses import fields

    from stellarator import recipes, settings
    from stellarator.config import ParallelConfig
    from stellarator.plan import Machine
    from stellarator.plan.command import run

    base = recipes.get(arguments.recipe)
    config = settings.resolve(base, arguments.config, arguments.overrides)
    names = [field.name for field in fields(ParallelConfig) if field.name in arguments]
    parallel = {name: getattr(arguments, name) for name in names}
    words = [word.lstrip("-") for word in arguments.overrides]
    twice = [w for w in words if w.partition("=")[0].removeprefix("parallel.") in names]
    if twice and (arguments.search or any(parallel.values())):
        raise ValueError(
            f"plan: expected the layout by options or by words, got {', '.join(twice)} beside "
            "options. Give all of it as options (--tp ...), or none."
        )
    figures = {field.name: getattr(arguments, field.name) for field in fields(Machine)}
    figures = {name: value for name, value in figures.items() if value is not None}
    top = None
    if arguments.search:
        top = _LAYOUTS if arguments.top is None else arguments.top
    elif arguments.top is not None:
        raise ValueError(
            f"plan: expected --top with --search, got --top {arguments.top} alone. "
            "Add --search, or leave it out."
        )
    lines, fits = run(config, arguments.gpus, parallel, figures, top)
    print("\n".join(lines))
    return 0 if fits else 1


def _prepare(arguments) -> int:
    from stellarator.data.prepare import prepare
    from stellarator.progress import Progress

    if arguments.tokenizer is not None and arguments.vocab_size is not None:
        raise ValueError(
            "prepare: expected --tokenizer or --vocab-size, got both. "
            "The size of a tokenizer that exists is its own: leave out --vocab-size."
        )
    chosen = {"vocab_size": arguments.vocab_size, "generation": arguments.generation}
    with Progress("prepare") as progress:
        manifest = prepare(
            arguments.sources,
            arguments.output,
            **{name: value for name, value in chosen.items() if value is not None},
            format=arguments.generation,
            validation_fraction=arguments.validation_fraction,
            seed=arguments.seed,
            tokenizer=arguments.tokenizer,
            progress=progress,
            overwrite=arguments.overwrite,
        )
    for line in manifest_lines(manifest):
        print(line)
    return 0


def manifest_lines(manifest: dict) -> list[str]:
    """What `data prepare` did, for the terminal."""
    from stellarator.data.documents import account

    lines = []
    for side in ("train", "validation"):
        part = manifest[side]
        counts = (
            _count(part["repositories"], "repository", "repositories"),
            _count(part["documents"], "document", "documents"),
            _count(part["tokens"], "token", "tokens"),
        )
        lines.append(f"{side}: {', '.join(counts)}")
    report = manifest["report"]
    return lines + account(report) + [f"note: {note}" for note in report["notes"]]


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _inspect(arguments) -> int:
    from stellarator.data.inspect import documents, rows

    if arguments.rows is not None:
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

    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in arguments.prompts]
    options = _sampling(arguments)
    texts = generate_texts(arguments.model, prompts, stop_strings=arguments.stop, **options)
    for number, text in enumerate(texts, 1):
        _print_answer(text, f" of prompt {number}" if len(texts) > 1 else "", arguments.stop)
    return 0


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            "generate: expected UTF-8 text on standard input, got other bytes at "
            f"{error.start}. Convert it."
        ) from None


def _infill(arguments) -> int:
    from stellarator.evaluate.commands import infill_location

    options = _sampling(arguments)
    options.update(mode=arguments.mode, context=arguments.context)
    text = infill_location(arguments.model, arguments.location, **options)
    _print_answer(text)
    return 0


def _print_answer(text: str, which: str = "", stops: Sequence[str] = ()) -> None:
    """The answer on stdout, and if that is an empty line, why on stderr."""
    print(text, flush=True)
    if not text:
        began = ", or began with a --stop text" if stops else ""
        note = f"note: the answer{which} is empty: the model ended at once{began}"
        print(note, file=sys.stderr)


def _doctor(arguments) -> int:
    from stellarator import doctor

    return doctor.main([])


def _tune(arguments) -> int:
    from stellarator import tune

    given = arguments
    heads = tune.Heads(given.heads, given.kv_heads, given.head_width)
    widths = tune.Widths(given.width, given.ffn_width)
    phases = given.phases.split(",")
    return tune.run(given.output, given.tokens, heads, widths, phases, sys.argv[1:])


def _report(arguments) -> int:
    from stellarator.train.report import write_report

    print(f"wrote {write_report(arguments.folder)}")
    return 0


def _demo(arguments) -> int:
    from stellarator.demo import run

    return run(arguments.sources, arguments.output, arguments.minutes)


_VERBS = {
    "train": _train,
    "plan": _plan,
    "data prepare": _prepare,
    "data inspect": _inspect,
    "export": _export,
    "recipes": _recipes,
    "generate": _generate,
    "infill": _infill,
    "doctor": _doctor,
    "tune": _tune,
    "report": _report,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
