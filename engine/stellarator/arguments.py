"""The words of the command line: verbs, options, defaults and what each may be.

defines: make_parser, unrecognized

Numbers are checked here, so that a wrong one costs milliseconds; what depends on files or on each
other is checked by the verb. Standard library only.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Sequence

_EPILOG = """\
Every verb explains itself: stellarator VERB --help
Exit codes: 0 done, 1 failed on the way, 2 cannot be done as it was asked for, 75 preempted and can
be resumed, 130 interrupted, 143 terminated."""


def make_parser() -> argparse.ArgumentParser:
    """All verbs and their options.

    What it parses has `verb`, such as "data prepare", None where none was given; then `parser` is
    the one whose help answers.
    """
    parser = argparse.ArgumentParser(
        prog="stellarator",
        description="Train and try out code language models of the StarCoder family.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=None, parser=parser)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    _add_train(verbs)
    _add_plan(verbs)
    _add_data(verbs)
    _add_model(verbs)
    _add_generation(verbs)
    _add_others(verbs)
    return parser


class _Version(argparse.Action):
    """Prints the version; it is looked up when it is asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        import stellarator

        print(f"stellarator {stellarator.__version__}")
        parser.exit()


def unrecognized(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """What to say of words that a verb does not know, with the nearest option for each."""
    known = [name for action in parser._actions for name in action.option_strings]
    text = f"unrecognized arguments: {' '.join(words)}"
    for word in words:
        if word.startswith("-"):
            near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.6)
            text += f". Did you mean {near[0]} for {word}?" if near else ""
    return text


def _verb(verbs, name: str, help: str, description: str = ""):
    """A verb; `name` is what `verb` says of it, the last word what is typed here."""
    verb = verbs.add_parser(
        name.split()[-1],
        help=help,
        description=description or help,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(verb=name, parser=verb)
    return verb


def _option(verb, name: str, default, help: str, **rest) -> None:
    """An option whose help ends with its default."""
    verb.add_argument(name, default=default, help=f"{help} (default: %(default)s)", **rest)


def _number(kind: type, expected: str, allowed: Callable) -> Callable:
    """A reader of int or float for argparse that says what it expects."""

    def read(text: str):
        try:
            value = kind(text)
            if math.isfinite(value) and allowed(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return read


def _at_least(minimum: int) -> Callable[[str], int]:
    return _number(int, f"a whole number of at least {minimum}", lambda value: value >= minimum)


def _add_train(verbs) -> None:
    verb = _verb(
        verbs,
        "train",
        "train a model",
        "Train a model. Values are set by the recipe, then the TOML file, then section.key=value:\n"
        "  stellarator train --recipe tiny data.train=D/train data.tokenizer=D/tokenizer\n"
        "  torchrun --nproc-per-node 2 -m stellarator.train --config run.toml optim.lr=1e-4",
    )
    _option(verb, "--recipe", "tiny", "where the values start", metavar="NAME")
    verb.add_argument(
        "--config", metavar="FILE", help="TOML file with values that win over the recipe"
    )
    verb.add_argument("--print-config", action="store_true", help="print every value and stop")


def _add_plan(verbs) -> None:
    verb = _verb(
        verbs,
        "plan",
        "memory, communication and time of a run on many GPUs, before it is launched",
        "What a recipe needs on its own layout, on another one, or with --search the fastest "
        "ones.\nExit code 1: it does not fit, or none does. Values as of train:\n"
        "  stellarator plan --recipe starcoderbase --gpus 512\n"
        "  stellarator plan --recipe starcoderbase --gpus 512 --tp 4 --sp --pp 4 --zero 1\n"
        "  stellarator plan --recipe starcoder2_3b --gpus 8 --search train.micro_batch_size=2",
    )
    _option(verb, "--recipe", "tiny", "where the values start", metavar="NAME")
    verb.add_argument(
        "--config", metavar="FILE", help="TOML file with values that win over the recipe"
    )
    _option(verb, "--gpus", 1, "all of them", type=_at_least(1), metavar="N")
    for name, text in (
        ("--tp", "tensor ranks (default: 1)"),
        ("--cp", "context ranks (default: 1)"),
        ("--pp", "pipeline ranks (default: 1)"),
        ("--stages-per-rank", "of a pipeline rank (default: the fewest that the schedule has)"),
    ):
        verb.add_argument(name, type=_at_least(1), metavar="N", help=text)
    text = "how they get keys and values (default: ring)"
    verb.add_argument("--cp-form", choices=("ring", "gather"), help=text)
    verb.add_argument("--sp", action="store_true", help="tensor ranks share out the tokens, too")
    text = "gpipe, 1f1b, interleaved, zb_h1 or zb_v (default: 1f1b)"
    verb.add_argument("--schedule", metavar="NAME", help=text)
    text = "1: masters and moments, 2: and gradients, 3: and parameters are shared out (default: 0)"
    verb.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help=text)
    verb.add_argument("--search", action="store_true", help="try all layouts of the GPUs")
    text = "layouts of a search to print (default: 5)"
    verb.add_argument("--top", type=_at_least(1), metavar="N", help=text)
    above = _number(float, "a number above 0", lambda value: value > 0)
    for name, text in (
        ("--tflops", "dense peak of a GPU"),
        ("--hbm-gbps", "bandwidth of its memory, GB/s"),
        ("--memory-gib", "its memory"),
        ("--reserve-gib", "memory for what is not counted"),
        ("--link-gbps", "what it sends to others of its node, GB/s"),
        ("--network-gbps", "what it sends to other nodes, GB/s"),
    ):
        verb.add_argument(name, type=above, metavar="X", help=f"{text} (default: assumed)")
    share = _number(float, "a number above 0 and up to 1", lambda value: 0 < value <= 1)
    text = "share of the peak that layers reach (default: assumed)"
    verb.add_argument("--efficiency", type=share, metavar="P", help=text)
    text = "of a node (default: assumed)"
    verb.add_argument("--gpus-per-node", type=_at_least(1), metavar="N", help=text)


def _add_data(verbs) -> None:
    data = verbs.add_parser("data", help="prepare and inspect data", allow_abbrev=False)
    data.set_defaults(parser=data)
    parts = data.add_subparsers(title="verbs", metavar="VERB")
    _add_prepare(parts)
    verb = _verb(
        parts,
        "data inspect",
        "print documents of a token shard, or rows as training sees them",
    )
    verb.add_argument("shard", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    verb.add_argument(
        "--tokenizer", required=True, metavar="FOLDER", help="the one that made the shard"
    )
    _option(verb, "--count", 2, "documents or rows to print", type=_at_least(1), metavar="N")
    verb.add_argument(
        "--rows",
        type=_at_least(16),
        metavar="T",
        help="show packed rows of T tokens, with FIM; at least 16",
    )


def _add_prepare(parts) -> None:
    verb = _verb(parts, "data prepare", "source code -> tokenizer and token shards")
    verb.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folder, git checkout, .jsonl[.gz|.zst] or .parquet",
    )
    verb.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="made if it is not there; other files in it are left alone",
    )
    verb.add_argument(
        "--overwrite", action="store_true", help="replace the data set that FOLDER holds"
    )
    verb.add_argument(
        "--vocab-size",
        type=_at_least(1),
        metavar="N",
        help="of the tokenizer that is trained, special tokens included (default: 49152)",
    )
    verb.add_argument(
        "--generation",
        choices=("starcoder2", "starcoder"),
        help="special tokens and document format (default: those of --tokenizer, else starcoder2)",
    )
    verb.add_argument(
        "--tokenizer", metavar="FOLDER", help="use this tokenizer instead of training one"
    )
    share = _number(float, "a share from 0 to 0.5", lambda value: 0 <= value <= 0.5)
    text = "share of the bytes that is held out, as whole repositories"
    _option(verb, "--validation-fraction", 0.05, text, type=share, metavar="SHARE")
    _option(verb, "--seed", 1234, "of the split and the formats", type=_at_least(0), metavar="N")


def _add_model(verbs) -> None:
    verb = _verb(verbs, "export", "checkpoint -> Hugging Face folder")
    verb.add_argument("checkpoint", help="a run folder, or one checkpoint in it")
    verb.add_argument("output", metavar="FOLDER", help="to write; an earlier export is replaced")
    _option(verb, "--dtype", "bf16", "of the weights", choices=("bf16", "fp32"))
    verb = _verb(verbs, "recipes", "list the recipes, or explain one")
    verb.add_argument("name", nargs="?", help="the recipe to explain")


def _add_generation(verbs) -> None:
    verb = _verb(verbs, "generate", "continue a prompt")
    _add_model_option(verb)
    verb.add_argument("prompts", nargs="+", metavar="PROMPT", help="text; - reads standard input")
    verb.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop at this text; may repeat"
    )
    _add_sampling(verb)
    verb = _verb(verbs, "infill", "fill the hole at a line of a file")
    _add_model_option(verb)
    verb.add_argument(
        "location",
        metavar="FILE:LINE",
        help="the line is taken out and written again by the model",
    )
    text = "what the model reads first: the prefix, or the suffix"
    _option(verb, "--mode", "psm", text, choices=("psm", "spm"))
    verb.add_argument(
        "--context",
        type=_at_least(1),
        metavar="N",
        help="tokens of prompt and answer together, for a model that was trained on short texts "
        "(default: all positions of the model)",
    )
    _add_sampling(verb)


def _add_model_option(verb) -> None:
    _option(verb, "--model", "runs/demo/model", "exported model", metavar="FOLDER")


def _add_sampling(verb) -> None:
    """What both ways of generating share; see `_sampling`."""
    _option(verb, "--max-new-tokens", 64, "length of an answer", type=_at_least(1), metavar="N")
    warm = _number(float, "a number of at least 0", lambda value: value >= 0)
    _option(verb, "--temperature", 0.0, "0 is greedy", type=warm, metavar="X")
    share = _number(float, "a number above 0 and up to 1", lambda value: 0 < value <= 1)
    text = "sample among the tokens that reach this probability; for --temperature above 0"
    _option(verb, "--top-p", 0.95, text, type=share, metavar="P")
    _option(verb, "--seed", 0, "of the sampling", type=_at_least(0), metavar="N")
    _option(verb, "--device", "auto", "where to run", choices=("auto", "cpu", "cuda"))


def _add_others(verbs) -> None:
    _verb(verbs, "doctor", "print machine, versions, extensions, and what each op would run")
    verb = _verb(
        verbs,
        "tune",
        "measure the fastest launch configurations of this GPU",
        "Of attention and of the products of the MLP, the latter beside the plain product of the\n"
        "same operands. Writes a table for this GPU; STELLARATOR_TABLES=FOLDER makes the kernels\n"
        "use it. Nothing is tuned unasked. What no table has runs with tiles that were chosen by\n"
        "compiling. The sizes are those of StarCoder2-3B.",
    )
    _option(verb, "--output", "tables", "where the table goes", metavar="FOLDER")
    _option(verb, "--tokens", 8192, "of the row that is timed", type=_at_least(1), metavar="N")
    _option(verb, "--heads", 24, "query heads", type=_at_least(1), metavar="N")
    _option(verb, "--kv-heads", 2, "key/value heads", type=_at_least(1), metavar="N")
    _option(verb, "--head-width", 128, "64, 128 or 256", type=int, metavar="N")
    _option(verb, "--width", 3072, "of the model, for the products", type=int, metavar="N")
    _option(verb, "--ffn-width", 12288, "inside the MLP", type=int, metavar="N")
    phases = "forward,forward packed,dq,dkdv,dqdkdv,design,up,down gradient,weight gradient"
    _option(verb, "--phases", phases, "what is raced, with commas between", metavar="NAMES")
    verb = _verb(verbs, "report", "write report.html of a run again")
    verb.add_argument("folder", help="run folder")
    verb = _verb(verbs, "demo", "source code -> tokenizer -> training -> infilling -> report")
    verb.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="as of `data prepare` (default: this Python's standard library)",
    )
    _option(verb, "--output", "runs/demo", "run folder", metavar="FOLDER")
    minutes = _number(float, "a number above 0", lambda value: value > 0)
    text = "of training; the number of steps is fitted to it"
    _option(verb, "--minutes", 5.0, text, type=minutes, metavar="X")
