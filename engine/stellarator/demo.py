"""The whole path of a byte on this machine's own Python sources, in minutes.

defines: run

Sources -> filters -> held-out split by repository -> tokenizer -> shards -> training with
fill-in-the-middle -> evaluation on held-out files -> export -> report. Every part is the one that
real runs use; only the sizes are small. An interrupted demo goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from stellarator import recipes
from stellarator.config import RunConfig
from stellarator.files import replace_text

_CALIBRATION_STEPS = 6
_MIN_STEPS, _MAX_STEPS = 40, 20_000
_ANSWER = 12  # tokens of an answer
_CONTEXT = (
    44  # tokens of prompt and answer: a text of the length that was trained on, and an answer
)
_HOLES = {"short": 400, "token": 400, "line": 100}
_NOTE = (
    "The part in colour was written by the model, given what stands before and after it, and cut "
    "where it began to repeat the text after it. What stood there: {expected!r}."
)


def run(sources: Sequence[str] = (), output: str = "runs/demo", minutes: float = 5.0) -> int:
    """Run the demo; returns the exit code.

    Args:
        sources: folders or files with code; none: the standard library of this Python.
        output: run folder; summary.json, report.html and model/ are what to look at.
        minutes: time for training; the number of steps is fitted to it.
    """
    from stellarator.cli import EXIT_CODES
    from stellarator.train.loop import Trainer

    started = time.monotonic()
    folder = Path(output)
    _prepare_data(list(sources) or [sysconfig.get_paths()["stdlib"]], folder)
    config = _configure(folder, minutes)
    summary = _summary_of_before(config)
    if summary is None:
        result = Trainer(config).run()
        if result["status"] != "done":
            return EXIT_CODES[result["status"]]
        _say("evaluating on held-out files")
        summary = _evaluate(config, result)
        summary["total_seconds"] = round(time.monotonic() - started, 1)
        replace_text(folder / "summary.json", _json(summary))
    from stellarator.train.report import write_report

    report = write_report(folder)
    _print_summary(summary, folder, report)
    return 0


def _summary_of_before(config: RunConfig) -> dict | None:
    """The summary of a demo that was finished, whose times are those of that run; else None."""
    folder = Path(config.folder)
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        finished = (status["status"], status["step"]) == ("done", config.train.steps)
    except (OSError, ValueError, KeyError):
        return None
    if not finished or not (folder / "model" / "config.json").exists():
        return None
    _say(f"finished before; these are its figures. For another run remove {folder}")
    return summary


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def _prepare_data(sources: list[str], folder: Path) -> None:
    """Tokenizer and shards in `folder/data`, unless an earlier demo of these sources made them.

    sources.json is written first: where it stands, what is in the folder is a demo's, and what an
    interrupted one left is replaced.
    """
    from stellarator.cli import manifest_lines
    from stellarator.data.prepare import prepare
    from stellarator.progress import Progress

    data, noted = folder / "data", folder / "sources.json"
    request = _json({"sources": [str(Path(s).resolve()) for s in sources]})
    ours = _check_folder(folder, request)
    if ours and (data / "manifest.json").exists():
        _say(f"data of an earlier demo found in {data}")
        return
    _say(f"reading {', '.join(sources)}")
    with _noted(noted, request), Progress("demo: prepare") as progress:
        manifest = prepare(
            sources,
            data,
            vocab_size=recipes.demo().model.vocab_size,
            generation="starcoder2",
            format="starcoder2",
            validation_fraction=0.08,
            seed=1234,
            overwrite=ours,
            progress=progress,
        )
    for line in manifest_lines(manifest):
        _say(line)


def _check_folder(folder: Path, request: str) -> bool:
    """Whether a demo of these sources began in `folder`.

    Raises:
        ValueError: it holds what is not to be replaced, or cannot be a folder.
    """
    noted = folder / "sources.json"
    if noted.exists():
        if noted.read_text(encoding="utf-8", errors="replace") == request:
            return True
        raise ValueError(
            f"{folder}: expected a new folder, got the demo of other sources. "
            "Choose another one (make demo OUTPUT=...) or remove it."
        )
    for path in (folder / "data", folder / "config.toml", folder / "checkpoints"):
        if path.exists():
            raise ValueError(
                f"{folder}: expected a new folder, got one with {path} that no demo made. "
                "Choose another one (make demo OUTPUT=...)."
            )
    return False


@contextlib.contextmanager
def _noted(path: Path, request: str):
    """`path` says for whom the folder is; after a failure only if something else is there, too."""
    from stellarator.data.prepare import make_folder

    made = make_folder(path.parent)
    replace_text(path, request)
    try:
        yield
    except BaseException:
        if not any(other != path for other in path.parent.iterdir()):
            path.unlink()
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def _configure(folder: Path, minutes: float) -> RunConfig:
    """The demo's recipe on the prepared data, as many steps as fit; the same again on resume."""
    from stellarator import settings
    from stellarator.data.tokenizer import Tokenizer

    written = folder / "config.toml"
    if written.exists():
        config = settings.resolve(recipes.demo(), str(written))
        there = [Path(path).resolve() for path in (config.folder, *config.data.train)]
        if there != [folder.resolve(), (folder / "data" / "train").resolve()]:
            raise ValueError(
                f"{written}: expected the configuration of a demo in {folder}, got one in "
                f"{config.folder}. Choose another folder (make demo OUTPUT=...) or remove it."
            )
        _say(f"going on with the steps of {written}")
        return config
    base, data = recipes.demo(), folder / "data"
    config = dataclasses.replace(
        base,
        name="demo",
        folder=str(folder),
        # A small corpus may not have enough distinct words for the whole vocabulary.
        model=dataclasses.replace(
            base.model, vocab_size=Tokenizer.load(data / "tokenizer").vocab_size
        ),
        data=dataclasses.replace(
            base.data,
            train=(str(data / "train"),),
            validation=(str(data / "validation"),),
            tokenizer=str(data / "tokenizer"),
        ),
    )
    steps = _steps_that_fit(config, minutes)
    warmup = max(1, min(base.optim.warmup_steps, steps // 10))
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_steps=warmup),
        train=dataclasses.replace(config.train, steps=steps, eval_interval=max(1, steps // 8)),
        checkpoint=dataclasses.replace(config.checkpoint, interval=max(1, steps // 4)),
        metrics=dataclasses.replace(config.metrics, log_interval=max(1, steps // 500)),
    )


def _steps_that_fit(config: RunConfig, minutes: float) -> int:
    """Steps that take about `minutes` on this machine, from the time of a few."""
    import tempfile

    from stellarator.cli import EXIT_CODES
    from stellarator.train.loop import Trainer

    _say(f"timing {_CALIBRATION_STEPS} steps")
    with tempfile.TemporaryDirectory() as scratch:
        trial = dataclasses.replace(
            config,
            name="calibration",
            folder=scratch,
            optim=dataclasses.replace(config.optim, warmup_steps=1),
            train=dataclasses.replace(config.train, steps=_CALIBRATION_STEPS, eval_interval=None),
            data=dataclasses.replace(config.data, validation=()),
            checkpoint=dataclasses.replace(config.checkpoint, interval=None),
            metrics=dataclasses.replace(config.metrics, report=False, tensorboard=False),
        )
        result = Trainer(trial).run()
        if result["status"] != "done":
            raise SystemExit(EXIT_CODES[result["status"]])
        lines = (Path(scratch) / "metrics.jsonl").read_text().splitlines()
    times = sorted(json.loads(line)["step_ms"] for line in lines[1:])
    steps = int(60e3 * minutes / times[len(times) // 2])
    return max(_MIN_STEPS, min(_MAX_STEPS, steps))


def _evaluate(config: RunConfig, result: dict) -> dict:
    """Figures of the trained model beside an untrained one and a unigram model; export."""
    import torch

    from stellarator.data.tokenizer import Tokenizer
    from stellarator.evaluate.infilling import exact_match
    from stellarator.train.export import export, model_from_checkpoint

    folder = Path(config.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.load(config.data.tokenizer)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.precision]
    model, _ = model_from_checkpoint(folder, dtype, device)
    model.eval()
    export(folder, folder / "model")
    records = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    evals = [r for r in records if r["kind"] == "eval"]
    steps = [r for r in records if r["kind"] == "train"]
    speeds = sorted(r["tokens_per_second"] for r in steps)
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result["step"],
        "tokens": result["tokens"],
        "training_seconds": round(sum(r["step_ms"] for r in steps) / 1e3, 1),
        "tokens_per_second": round(speeds[len(speeds) // 2], 1),
        "peak_memory_gib": round(max(r["memory_bytes"] for r in steps) / 2**30, 3),
        "validation_loss": evals[-1]["loss"],
        "untrained_loss": evals[0]["loss"],
        "unigram_loss": _unigram_loss(config, tokenizer),
        "infilling": {},
        "samples": [],
    }
    documents = [json.loads(line)["content"] for line in open(folder / "data" / "held_out.jsonl")]
    for kind, count in _HOLES.items():
        if not (holes := _holes(documents, count, kind)):
            _say(f"the held-out files have no hole of kind {kind}")
            continue
        _say(f"infilling {len(holes)} held-out holes of kind {kind}")
        found = exact_match(
            model, tokenizer, holes, max_new_tokens=_ANSWER, context=_CONTEXT, mode="spm"
        )
        summary["infilling"][kind] = {
            "count": found["count"],
            "exact": round(found["exact_match"] * found["count"]),
            "exact_trimmed": round(found["trimmed_match"] * found["count"]),
            "exact_of_one_text": round(found["constant_match"] * found["count"]),
            "edit_similarity": found["edit_similarity"],
        }
        summary["samples"].append(_sample(holes, found["predictions"], kind))
    return summary


def _unigram_loss(config: RunConfig, tokenizer) -> float:
    """The loss of a unigram model on the very tokens of the evaluations during training."""
    from stellarator.data.batches import IGNORED, Batches
    from stellarator.data.packing import PackedDataset
    from stellarator.data.shards import Shard
    from stellarator.evaluate.unigram import unigram_loss

    shards = [Shard(prefix) for prefix in config.data.validation]
    dataset = PackedDataset.from_config(config.data, shards, tokenizer, validation=True, fim=False)
    rows, train = config.train.global_batch_size, config.train
    batches = Batches(dataset, rows, train.micro_batch_size).evaluation(train.eval_batches * rows)
    targets = [batch.targets[batch.targets != IGNORED].numpy() for batch in batches]
    return unigram_loss(
        [Shard(prefix) for prefix in config.data.train], targets, tokenizer.vocab_size
    )


def _holes(documents: list[str], count: int, kind: str) -> list:
    """`count` holes, or as many (by halving) as small data has."""
    from stellarator.evaluate.infilling import make_holes

    while count:
        try:
            return make_holes(documents, count, seed=1, kind=kind)
        except ValueError:
            count //= 2
    return []


def _sample(holes, predictions: list[str], kind: str) -> dict:
    """One hole for the report: the first that was filled exactly, else the first."""
    from stellarator.evaluate.infilling import trim_at_suffix

    cut = [(h, trim_at_suffix(p, h.suffix)) for h, p in zip(holes, predictions, strict=True)]
    right = [pair for pair in cut if pair[0].middle.strip() == pair[1].strip()]
    hole, text = (right or cut)[0]
    verdict = "Filled exactly." if right else "No hole of this kind was filled exactly."
    return {
        "title": f"A held-out hole ({kind})",
        "prefix": "".join(hole.prefix.splitlines(keepends=True)[-12:]),
        "middle": text,
        "suffix": "".join(hole.suffix.splitlines(keepends=True)[:6]),
        "note": f"{verdict} {_NOTE.format(expected=hole.middle)}",
    }


def _json(value) -> str:
    return json.dumps(value, indent=1) + "\n"


def _print_summary(summary: dict, folder: Path, report: Path) -> None:
    _say(
        f"held-out loss {summary['validation_loss']:.3f} nats per token; untrained "
        f"{summary['untrained_loss']:.3f}, unigram {summary['unigram_loss']:.3f}"
    )
    for kind, found in summary["infilling"].items():
        _say(
            f"infilling {kind}: {found['exact']} of {found['count']} exact (the best single text "
            f"for all of them: {found['exact_of_one_text']}), {found['exact_trimmed']} when cut "
            f"where the suffix begins"
        )
    _say(f"done in {summary['total_seconds']:.0f} s. Look at {report}; model in {folder / 'model'}")
    _say(
        f"try: {sys.argv[0]} infill --mode spm --context {_CONTEXT} --max-new-tokens {_ANSWER} "
        f"--model {folder / 'model'} FILE.py:LINE"
    )
