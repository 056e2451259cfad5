"""`python -m benchmarks VERB`."""

import argparse
import importlib
import os
import sys

from benchmarks.usage import UsageError

# Verb -> the module with its `arguments(parser)` and `main(arguments)`, and what it does. Only the
# module of the verb that is asked for is imported: `compile` must say how before Triton comes in.
VERBS = {
    "run": ("run", "ops beside their peers: errors, time, memory"),
    "gate": (
        "gates",
        "run or read what gates.toml asks for; fails if a gate is missed",
    ),
    "plot": ("plots", "PNG plots and a Markdown page of result files"),
    "compare": ("results", "changes between two result files"),
    "train": ("bench_train", "one training step beside transformers: time and memory"),
    "data": ("bench_data", "reading, tokenizing, packing and loading beside plain code"),
    "collectives": ("bench_collectives", "all-reduce and the others beside bare torch: times"),
    "overlap": ("overlap", "communication that lies under computation: shares, a trace"),
    "parity": ("parity", "layouts over processes beside one process: weights and losses"),
    "compile": ("bench_compile", "every kernel for GPUs compiled for some that are not here"),
    "gpu": ("gpu", "every op on a GPU at the shapes of StarCoder2-3B"),
}


def main(words: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        2 for a mistake of use, 130 for Ctrl-C, 1 if the output cannot be written (a closed pipe, a
        full disk), else the verb's own code.
    """
    try:
        try:
            return _run(sys.argv[1:] if words is None else words)
        finally:
            sys.stdout.flush()  # a closed pipe is noticed here, not when Python ends
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        # Python marks an interrupt of text in exec (dataclasses' own, while they are imported) as
        # never caught, and `python -m` then ends by the signal. The next exec takes the mark away.
        exec("")
        return 130
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `python -m benchmarks ... | head` is no error
            print(f"benchmarks: {error}", file=sys.stderr)
        _drop_stdout()
        return 1


def _run(words: list[str]) -> int:
    """Parse the words, run the verb."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    asked = next((word for word in words if word in VERBS), None)
    for verb, (name, text) in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        if verb == asked:
            module = importlib.import_module(f"benchmarks.{name}")
            module.arguments(sub)
            sub.set_defaults(main=module.main)
    given = parser.parse_args(words)
    return given.main(given)


def _drop_stdout() -> None:
    """Drop what its buffer holds: Python would fail over it again when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
