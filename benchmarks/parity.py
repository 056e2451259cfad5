"""`python -m benchmarks parity`: every layout trains the same model as one process.

A few steps of a small model on real text, FIM and packed documents on, in float64 (and fp32): by
one process, and by every layout of a list in processes on gloo. Compared are the weights before
the first step (to the bit), the losses of all steps, and weights and moments after the last one.
Time is not measured. What a layout is: `ParallelConfig`.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.harness import environment
from benchmarks.parity_run import Pool
from benchmarks.usage import UsageError, count, one_of, positive
from stellarator.config import ModelConfig, ParallelConfig, RunConfig
from stellarator.data.documents import Document
from stellarator.data.formats import starcoder2_repository
from stellarator.data.shards import ShardWriter
from stellarator.data.tokenizer import Tokenizer
from stellarator.progress import Progress

STEPS = 5
BUCKET_MIB = 0.1  # seven of the model in float64
# Largest relative difference of a loss; of a tensor of weights or moments, by Euclidean norm. A
# single element means nothing in fp32: where a gradient is nearly zero its rounding decides which
# way AdamW steps. One process in fp32 is 3e-5 from one in fp64.
LIMITS = {"fp64": (1e-12, 1e-10), "fp32": (1e-5, 3e-4)}
_BASE = ModelConfig(
    vocab_size=419, num_layers=8, width=32, num_heads=4, num_kv_heads=2, ffn_width=64,
    max_positions=256, window=24,
)  # fmt: skip
_DROPOUT = {f"{name}_dropout": 0.1 for name in ("residual", "embedding", "attention")}
MODELS = {
    "starcoder2": _BASE,
    "starcoder2 dropout": dataclasses.replace(_BASE, **_DROPOUT),
    "starcoder2 untied": dataclasses.replace(_BASE, tie_embeddings=False),
    "starcoder": dataclasses.replace(
        _BASE, family="gpt_bigcode", positions="learned", num_kv_heads=1, window=None
    ),
}


@dataclass(frozen=True)
class Case:
    """A layout of a model; `dp` is what is left of the processes."""

    model: str
    parallel: ParallelConfig
    dp: int = 1
    recompute: str = "none"

    @property
    def processes(self) -> int:
        """All ranks."""
        return self.dp * self.parallel.tp * self.parallel.pp * self.parallel.cp

    @property
    def name(self) -> str:
        """The axes that are not 1."""
        p = self.parallel
        words = [f"tp {p.tp}"] * (p.tp > 1) + ["sp"] * p.sp
        if p.pp * p.stages_per_rank > 1:
            words.append(f"pp {p.pp} {p.schedule}")
        words += [f"cp {p.cp} {p.cp_form}"] * (p.cp > 1) + [f"dp {self.dp}"] * (self.dp > 1)
        words += [f"zero {p.zero}"] * (p.zero > 0)
        return " ".join(words + [self.recompute] * (self.recompute != "none"))


def _cases() -> list[Case]:
    """tp, pp, dp, cp of 1, 2, 4; sp; each schedule; zero 1, 2, 3; both forms of cp; mixtures."""
    found = []

    def add(model: str, dp: int = 1, recompute: str = "none", **parallel) -> None:
        parallel = ParallelConfig(bucket_mib=BUCKET_MIB, **parallel)
        found.append(Case(model, parallel, dp, recompute))

    two, dropping, untied, one = MODELS
    for dp in (2, 4):
        add(two, dp)
    for zero in (1, 2, 3):
        add(two, 2, zero=zero)
    for zero in (1, 2, 3):
        add(two, 4, zero=zero)
    for tp in (2, 4):
        for sp in (False, True):
            add(two, tp=tp, sp=sp)
    for pp in (2, 4):
        for schedule in ("gpipe", "1f1b", "zb_h1"):
            add(two, pp=pp, schedule=schedule)
        for schedule in ("interleaved", "zb_v"):
            add(two, pp=pp, schedule=schedule, stages_per_rank=2)
    add(two, 2, tp=2, sp=True)
    for zero in (1, 3):
        add(two, 2, tp=2, sp=True, zero=zero)
    add(two, 2, pp=2)
    add(two, 2, pp=2, zero=1)
    add(two, tp=2, sp=True, pp=2, schedule="zb_h1")
    add(two, 2, tp=2, sp=True, pp=2)
    add(two, 2, tp=2, pp=2, schedule="zb_v", stages_per_rank=2)
    add(dropping, 2, tp=2, sp=True, zero=2)
    add(dropping, tp=2, pp=2)
    add(dropping, pp=2, schedule="zb_v", stages_per_rank=2)
    add(dropping, 2, "selective", tp=2, sp=True, pp=2, schedule="zb_h1")
    add(two, 2, "full", tp=2, sp=True, zero=3)
    add(untied, tp=4, sp=True)
    add(untied, pp=2, schedule="zb_v", stages_per_rank=2)
    add(untied, 2, tp=2, pp=2, schedule="interleaved", stages_per_rank=2)
    add(one, 2, zero=2)
    add(one, tp=2, sp=True)
    add(one, tp=4)
    add(one, pp=4)
    add(one, 2, tp=2, sp=True, pp=2, schedule="zb_h1")
    for cp in (2, 4):
        for form in ("ring", "gather"):
            add(two, cp=cp, cp_form=form)
    add(two, cp=2, tp=2, sp=True)
    add(two, cp=2, pp=2)
    for zero in (0, 1, 3):
        add(two, 2, cp=2, zero=zero)
    add(two, 2, cp=2, pp=2, zero=1)
    add(dropping, cp=2)
    add(dropping, cp=4, cp_form="gather")
    add(dropping, cp=2, tp=2, sp=True, pp=2, schedule="zb_v", stages_per_rank=2)
    add(untied, cp=2, cp_form="gather")
    add(untied, 2, cp=2, tp=2, sp=True, zero=3)
    add(one, cp=2)
    add(one, cp=2, tp=2, sp=True)
    add(one, cp=2, pp=4)
    return found


CASES = _cases()


def corpus(folder: Path) -> None:
    """A tokenizer and training shards of this project's own sources."""
    root = Path(__file__).resolve().parents[1]
    paths = sorted(root.glob("engine/**/*.py"))[:40]
    texts = [path.read_text(encoding="utf-8")[:3000] for path in paths]
    tokenizer = Tokenizer.train(texts, MODELS["starcoder2"].vocab_size - 7, "starcoder2")
    tokenizer.save(folder / "tokenizer")
    writer = ShardWriter(folder / "train", np.uint16)
    for number in range(0, len(texts), 3):  # three files a repository
        documents = [
            Document(text, f"r{number}", f"f{i}.py", "Python", None)
            for i, text in enumerate(texts[number : number + 3])
        ]
        pieces = starcoder2_repository(documents, np.random.default_rng(number))
        writer.add_document([*tokenizer.encode_pieces(pieces), tokenizer.eod])
    writer.close()


def configuration(folder: Path, model: str, precision: str) -> RunConfig:
    """Of the run of one process: 8 rows a step in micro-batches of one."""
    base = RunConfig()
    return dataclasses.replace(
        base,
        name="parity",
        model=MODELS[model],
        data=dataclasses.replace(
            base.data,
            train=(str(folder / "train"),),
            tokenizer=str(folder / "tokenizer"),
            seq_length=64,
        ),
        optim=dataclasses.replace(base.optim, lr=3e-3, min_lr=3e-4, warmup_steps=2),
        train=dataclasses.replace(
            base.train,
            steps=STEPS,
            global_batch_size=8,
            micro_batch_size=1,
            precision=precision,
            device="cpu",
        ),
        metrics=dataclasses.replace(base.metrics, report=False, tensorboard=False, peak_tflops=1.0),
    )


def run_all(runs: list[tuple[RunConfig, Path]], processes: int, show: Callable[[int], None]) -> str:
    """Train one after the other, in so many processes.

    Args:
        runs: configuration and folder of each.
        processes: that share each run.
        show: told how many are done.
    Returns:
        what the processes said of the first run that failed; those behind it were not begun. Empty
        where all are done.
    """
    with Pool(processes) as pool:
        for done, (config, folder) in enumerate(runs, 1):
            pool.begin(config, folder, list(range(processes)))
            if error := pool.next()[1]:
                return error
            show(done)
    return ""


def read(folder: Path) -> tuple[dict, list[float], dict[str, np.ndarray]]:
    """Hashes of the first weights, all losses, the last weights and moments."""
    from safetensors.numpy import load_file

    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if record["kind"] in ("train", "eval")]
    last = max(folder.glob("checkpoints/step_*")) / "tensors.safetensors"
    return json.loads((folder / "first.json").read_text()), losses, load_file(last)


def copies_agree(folder: Path) -> bool:
    """Whether all ranks that hold the same elements began with the same."""
    seen: dict[str, str] = {}
    ranks = [json.loads(path.read_text()) for path in folder.glob("first-*.json")]
    pairs = [pair for own in ranks for pair in own.items()]
    return bool(pairs) and all(seen.setdefault(key, found) == found for key, found in pairs)


def differences(one: Path, many: Path) -> tuple[bool, float, float]:
    """Same first weights; largest relative difference of a loss; and of a tensor."""
    (first, losses, state), (first2, losses2, state2) = read(one), read(many)
    assert len(losses) == len(losses2) > 0 and state.keys() == state2.keys()
    loss = np.max([abs(a - b) / abs(a) for a, b in zip(losses, losses2, strict=True)])
    norm = np.linalg.norm
    pairs = ((x.ravel().astype(np.float64), state2[name].ravel()) for name, x in state.items())
    tensor = np.max([norm(b - a) / max(norm(a), 1e-30) for a, b in pairs])  # NaN stays NaN
    same = bool(first) and first == first2 and copies_agree(many)
    return same, float(loss), float(tensor)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `parity`."""
    text = "of the arithmetic, with commas between: fp64, fp32"
    parser.add_argument("--precision", default="fp64,fp32", help=text)
    parser.add_argument("--layout", default="", help="layouts that have these words in their name")
    parser.add_argument("--output", metavar="FILE.md", help="the table as a Markdown page")
    text = "random models, data, batches and layouts for so long instead of the table"
    parser.add_argument("--fuzz", type=positive, metavar="SECONDS", help=text)
    parser.add_argument("--seed", type=int, help="of --fuzz; it is printed")
    parser.add_argument("--trial", type=int, help="only this one of --fuzz")
    parser.add_argument("--processes", type=count, help="of --fuzz, at most (8)")


@dataclass(frozen=True)
class Found:
    """How one layout compares with one process."""

    precision: str
    case: Case
    same_first: bool  # weights before the first step, to the bit
    loss: float  # largest relative difference; NaN where the run failed
    state: float

    @property
    def right(self) -> bool:
        """Whether it trains the same model."""
        loss, state = LIMITS[self.precision]
        return self.same_first and self.loss <= loss and self.state <= state


def compare(
    cases: list[Case], precisions: list[str], show: Callable[[float, str], None]
) -> list[Found]:
    """Run the layouts, and one process for each of their models.

    show: told the share that is done and what runs.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus(folder)
        todo: dict[int, list[tuple[RunConfig, Path]]] = {}
        places = {}
        for precision, case in itertools.product(precisions, cases):
            config, key = configuration(folder, case.model, precision), (precision, case.model)
            if key not in places:
                places[key] = folder / " ".join(key)
                todo.setdefault(1, []).append((config, places[key]))
            places[precision, case] = folder / f"{precision} {len(places)}"
            train = dataclasses.replace(config.train, recompute=case.recompute)
            config = dataclasses.replace(config, parallel=case.parallel, train=train)
            todo.setdefault(case.processes, []).append((config, places[precision, case]))
        total, before = sum(map(len, todo.values())), 0
        for processes, runs in sorted(todo.items()):

            def tell(done: int, before: int = before, processes: int = processes) -> None:
                show((before + done) / total, f"{processes} processes")

            tell(0)
            if said := run_all(runs, processes, tell):
                print(f"{processes} processes: {said}", file=sys.stderr)
            before += len(runs)
        found = []
        for precision, case in itertools.product(precisions, cases):
            one, many = places[precision, case.model], places[precision, case]
            result = False, float("nan"), float("nan")
            if (many / "checkpoints" / "latest").exists():
                result = differences(one, many)
            found.append(Found(precision, case, *result))
        return found


def main(given: argparse.Namespace) -> int:
    """Run all layouts, or random ones; 1 if one of them trains another model."""
    if given.fuzz is not None:
        from benchmarks import fuzz  # which uses what is here

        return fuzz.main(given)
    alone = [name for name in ("trial", "seed", "processes") if getattr(given, name) is not None]
    if alone:
        words = ", ".join(f"--{name}" for name in alone)
        raise UsageError(f"{words}: expected with --fuzz SECONDS, got it without. Add it.")
    precisions = given.precision.split(",")
    one_of("--precision", precisions, LIMITS)
    words = given.layout.split()
    cases = [case for case in CASES if all(w in f"{case.model} {case.name}".split() for w in words)]
    one_of("--layout", [] if cases else [given.layout], [case.name for case in CASES])
    started = time.monotonic()
    with Progress("parity") as show:
        found = compare(cases, precisions, show)
    rows = [
        [
            *(x.precision, x.case.model, x.case.name, str(x.case.processes)),
            *("equal" if x.same_first else "NOT EQUAL", f"{x.loss:.1e}", f"{x.state:.1e}"),
            "not run" if np.isnan(x.loss) else "same" if x.right else "DIFFERENT",
        ]
        for x in found
    ]
    header = ["precision", "model", "layout", "processes", "first weights", "loss", "state", ""]
    table, right = results.table(rows, header), sum(x.right for x in found)
    end = f"{right} of {len(rows)} layouts train the same model, "
    if left := sum(row[-1] == "not run" for row in rows):
        end += f"{left} were not run, "
    end += f"in {time.monotonic() - started:.0f} s"
    print(f"{table}\n\n{end}")
    if given.output:
        write_page(Path(given.output), table, end)
    return 0 if right == len(rows) else 1


def write_page(path: Path, table: str, end: str) -> None:
    """The table with where and how it was made."""
    where = environment()
    limits = "; ".join(f"{name}: losses {a:g}, state {b:g}" for name, (a, b) in LIMITS.items())
    path.write_text(
        f"# Every layout trains the same model\n\n"
        f"`python -m benchmarks parity`, commit {where['commit']}, torch {where['torch']}, "
        f"{where['cpu']}, gloo on one machine.\n{STEPS} steps beside one process: largest "
        f"relative difference of a loss, and of a tensor of weights or moments by Euclidean norm. "
        f"Limits: {limits}.\n\n{table}\n\n{end}.\n"
    )
