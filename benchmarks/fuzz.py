"""`python -m benchmarks parity --fuzz SECONDS`: random runs over processes beside one process.

defines: Trial, Result, draw, broken, not_refused, fuzz, main

A trial is a random model, random data, batch and layout that `settings.check_layout` accepts, in
float64, and the same run by one process, in micro-batches of another size. Some runs are resumed:
another layout does their first steps. Compared is what `benchmarks.parity` compares, within its
limits. Each trial also breaks one rule of its layout, and that must be refused before there is a
process group. A trial is a function of (seed, its number, the most processes), so one that fails
can be run again alone.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import shlex
import shutil
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed

from benchmarks import parity
from benchmarks.parity_run import Pool
from stellarator import settings
from stellarator.config import FimConfig, ModelConfig, ParallelConfig, RunConfig
from stellarator.data.documents import Document
from stellarator.data.formats import starcoder2_repository
from stellarator.data.shards import ShardWriter
from stellarator.data.tokenizer import Tokenizer
from stellarator.parallel.pipeline import schedules
from stellarator.progress import Progress

STEPS = 3
PROCESSES = 8
VOCABULARY = parity.MODELS["starcoder2"].vocab_size


@dataclass(frozen=True)
class Trial:
    """A run by some processes, and by one; perhaps others do all but its last step."""

    many: RunConfig
    one: RunConfig
    processes: int
    earlier: tuple[RunConfig, int] | None = None


def corpora(folder: Path) -> None:
    """Those of the parity matrix, and `short`: documents of which many are in a row."""
    parity.corpus(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    writer = ShardWriter(folder / "short", np.uint16)
    for number, path in enumerate(sorted(Path(__file__).parent.glob("*.py"))):
        text = path.read_text(encoding="utf-8")[: 1 + 7 * number]
        document = Document(text, f"r{number}", path.name, "Python", None)
        pieces = starcoder2_repository([document], np.random.default_rng(number))
        writer.add_document([*tokenizer.encode_pieces(pieces), tokenizer.eod])
    writer.close()


def draw(folder: Path, seed: int, number: int, most: int = PROCESSES) -> Trial:
    """A trial.

    folder: with the `corpora`.
    most: processes.
    """
    rng = random.Random(f"{seed} {number} {most}")
    while True:
        model, data = _model(rng), {}
        data["seq_length"] = rng.choice([16, 24, 30, 32, 47, 48, 64, 80])
        data["train"] = tuple(str(folder / name) for name in rng.choice(
            [["train"], ["short"], ["train", "short"]]
        ))  # fmt: skip
        data["weights"] = (0.75, 0.25)[: len(data["train"])] if len(data["train"]) > 1 else ()
        data["validation"] = rng.choice([(), (str(folder / "short"),)])
        data["attend_across_documents"] = rng.random() < 0.3
        data["fim"] = FimConfig(
            rate=rng.choice([0.0, 0.5, 1.0]),
            split_at_files=rng.random() < 0.5,
            end_cut_middles=rng.random() < 0.5,
        )
        parallel, processes = _layout(rng, most)
        micro, count = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3, 4, 5, 7])
        dp = max(1, processes // (parallel.tp * parallel.pp * parallel.cp))
        rows = micro * count * dp
        base = parity.configuration(folder, "starcoder2", "fp64")
        many = dataclasses.replace(
            base,
            name=f"fuzz {seed} {number}",
            model=model,
            data=dataclasses.replace(base.data, seed=rng.randrange(1000), **data),
            optim=dataclasses.replace(
                base.optim,
                warmup_steps=1,
                decay_steps=STEPS,
                clip_norm=rng.choice([None, 0.1, 1.0]),
            ),
            train=dataclasses.replace(
                base.train,
                steps=STEPS,
                global_batch_size=rows,
                micro_batch_size=micro,
                recompute=rng.choice(["none", "selective", "full"]),
                kernels=rng.choice(["auto", "reference"]),
                eval_batches=1,
                seed=rng.randrange(1000),
            ),
            parallel=parallel,
        )
        if rows > 24 or settings.check(many) or settings.check_layout(many, processes):
            continue
        width = rng.choice([n for n in range(1, rows + 1) if rows % n == 0])
        train = dataclasses.replace(many.train, micro_batch_size=width, recompute="none")
        one = dataclasses.replace(many, train=train, parallel=ParallelConfig())
        earlier = None if many.data.validation else _earlier(rng, many, most)
        return Trial(many, one, processes, earlier)


def _earlier(rng: random.Random, many: RunConfig, most: int) -> tuple[RunConfig, int] | None:
    """Another layout that does the first steps, and its processes; often none."""
    for _ in range(rng.choice([0, 100])):
        parallel, processes = _layout(rng, most)
        width = rng.choice([1, 2, 3])
        train = dataclasses.replace(many.train, steps=STEPS - 1, micro_batch_size=width)
        config = dataclasses.replace(many, parallel=parallel, train=train)
        if not settings.check(config) and not settings.check_layout(config, processes):
            return config, processes
    return None


def _model(rng: random.Random) -> ModelConfig:
    """A small model of either family."""
    first = rng.random() < 0.35
    heads = rng.choice([1, 2, 3, 4, 4, 6, 8])
    groups = [g for g in range(1, heads + 1) if heads % g == 0]
    rates = {f"{name}_dropout": 0.0 for name in ("residual", "embedding", "attention")}
    if rng.random() < 0.3:
        rates = dict.fromkeys(rates, 0.0) | {n: rng.choice([0.0, 0.1, 0.4]) for n in rates}
    return ModelConfig(
        family="gpt_bigcode" if first else "starcoder2",
        vocab_size=VOCABULARY + rng.randrange(9),
        num_layers=rng.choice([1, 2, 3, 4, 5, 8]),
        width=heads * rng.choice([8, 16]),
        num_heads=heads,
        num_kv_heads=rng.choice([1, heads]) if first else rng.choice(groups),
        ffn_width=rng.choice([24, 32, 40, 64]),
        max_positions=rng.choice([80, 128]),
        positions="learned" if first else "rope",
        window=rng.choice([None, 1, 5, 16, 24, 200]),
        activation=rng.choice(["gelu_tanh", "gelu_erf"]),
        tie_embeddings=rng.random() < 0.6,
        **rates,
    )


def _layout(rng: random.Random, most: int) -> tuple[ParallelConfig, int]:
    """Of at most so many processes, whether it works or not; large ones are rarer."""
    sizes = [n for n in (1, 2, 2, 2, 3, 4, 4, 4, 6, 8) if n <= most]
    tp, cp, pp = (rng.choice([1, 1, 1, 2, 2, 3, 4, 8]) for _ in range(3))
    schedule = rng.choice(schedules.NAMES)
    parallel = ParallelConfig(
        tp=tp,
        sp=rng.random() < 0.5,
        pp=pp,
        stages_per_rank=rng.choice([1, 1, 2, 2, 3]),
        schedule=schedule,
        cp=cp,
        cp_form=rng.choice(["ring", "gather"]),
        zero=rng.randrange(4),
        bucket_mib=rng.choice([0.001, 0.01, 0.05, 32.0]),
    )
    return parallel, rng.choice(sizes)


def broken(trial: Trial, rng: random.Random) -> tuple[RunConfig, int, str]:
    """The trial with one rule of its layout broken, its processes, and what the refusal names."""
    config, processes = trial.many, trial.processes
    p, model, train = config.parallel, config.model, config.train
    dp = processes // (p.tp * p.cp * p.pp)
    plain = {"schedule": "1f1b", "stages_per_rank": 1}
    ways = [
        ("parallel.tp", {"parallel": {"tp": model.num_heads + 1}}),
        ("parallel.tp", {"parallel": {"tp": 2 * p.tp}, "model": {"ffn_width": 2 * p.tp + 1}}),
        ("parallel.pp", {"parallel": {"pp": model.num_layers + 1, **plain}}),
        ("parallel.stages_per_rank", {"parallel": {"schedule": "zb_v", "stages_per_rank": 3}}),
        ("parallel.schedule", {"parallel": {"schedule": "zb_h2"}}),
        ("parallel.sp", {"parallel": {"tp": 1, "sp": True}}),
        ("data.seq_length", {"parallel": {"tp": 2, "sp": True}, "data": {"seq_length": 47}}),
        ("parallel.zero", {"parallel": {"zero": 4}}),
        ("parallel.zero", {"parallel": {"pp": 2, "zero": 2, **plain}, "model": {"num_layers": 2}}),
        ("parallel.cp", {"parallel": {"cp": 0}}),
        ("processes", {"parallel": {"pp": 2, **plain}, "model": {"num_layers": 2}}),
        ("train.global_batch_size", {}),
    ]
    named, sections = rng.choice(ways)
    if named == "train.global_batch_size":  # one micro-batch more than the ranks can share
        dp = max(2, dp)
        sections = {"train": {named.partition(".")[2]: train.micro_batch_size * (3 * dp + 1)}}
    for section, changes in sections.items():
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **changes)}
        )
    p = config.parallel
    processes = max(1, p.tp * p.cp * p.pp) * dp + (named == "processes")
    return config, processes, named


def not_refused(config: RunConfig, processes: int, named: str) -> str:
    """What is wrong with how training says no to a layout, before there is a process group."""
    from stellarator.train.loop import Trainer

    with mock.patch.dict(os.environ, WORLD_SIZE=str(processes)):
        try:
            Trainer(config)
        except settings.ConfigError as error:
            said = str(error)
        else:
            said = "nothing"
    if named in said and not torch.distributed.is_initialized():
        return ""
    return f"expected a refusal that names {named}, got {said}: {' '.join(overrides(config))}"


@dataclass(frozen=True)
class Result:
    """How a trial ended."""

    number: int
    trial: Trial
    error: str = ""  # of a process, or of a broken layout that was not refused
    same_first: bool = False
    loss: float = float("nan")
    state: float = float("nan")

    @property
    def right(self) -> bool:
        """Whether it trains the same model, and the broken layout was refused."""
        loss, state = parity.LIMITS["fp64"]
        return not self.error and self.same_first and self.loss <= loss and self.state <= state

    def __str__(self) -> str:
        found = self.error or (
            f"first weights {'equal' if self.same_first else 'NOT EQUAL'}, loss {self.loss:.1e}, "
            f"state {self.state:.1e}"
        )
        return f"trial {self.number}: {layout_name(self.trial)}: {found}"


def layout_name(trial: Trial) -> str:
    """As in the table of the matrix."""
    p = trial.many.parallel
    case = parity.Case("", p, trial.processes // (p.tp * p.pp * p.cp))
    return (case.name or "one process") + ", resumed" * (trial.earlier is not None)


def overrides(config: RunConfig) -> list[str]:
    """All that is not the default, as words of `stellarator train`."""
    default = set(settings.to_toml(RunConfig()).splitlines())
    found, section = [], ""
    for line in settings.to_toml(config).splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif line and line not in default:
            ((name, value),) = tomllib.loads(line).items()
            if isinstance(value, list):
                value = ",".join(map(str, value))
            found.append(f"{section}{name}={value}")
    return found


def described(result: Result, seed: int, processes: int) -> str:
    """A trial, the command that runs it again, and its configurations."""
    options = f"--seed {seed} --processes {processes} --trial {result.number}"
    lines = [str(result), f"python -m benchmarks parity --fuzz 60 {options}"]
    if result.trial.earlier is not None:
        config, count = result.trial.earlier
        lines.append(f"{count} processes: {shlex.join(overrides(config))}")
    lines.append(f"{result.trial.processes} processes: {shlex.join(overrides(result.trial.many))}")
    return "\n  ".join([*lines, f"one process: {shlex.join(overrides(result.trial.one))}"])


def fuzz(
    folder: Path, seed: int, processes: int, numbers: Iterable[int], seconds: float
) -> Iterator[Result]:
    """Run trials until the time is over, at least one; the one that runs then is finished.

    folder: with the `corpora`.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(processes))
        for done, number in enumerate(numbers):
            if done and time.monotonic() - started > seconds:
                return
            trial = draw(folder, seed, number, processes)
            one, many = folder / f"{number} one", folder / f"{number} many"
            pool.begin(trial.one, one, [processes - 1])
            error = not_refused(*broken(trial, random.Random(f"{seed} {number}")))
            for config, count in filter(None, (trial.earlier, (trial.many, trial.processes))):
                if not error:
                    pool.begin(config, many, list(range(count)))
                while not error and pool.pending:
                    error = pool.next()[1]
            if error:  # processes may wait for one that failed
                stack.close()
                pool = stack.enter_context(Pool(processes))
                yield Result(number, trial, error)
            else:
                yield Result(number, trial, "", *parity.differences(one, many))
            for path in (one, many):
                shutil.rmtree(path, ignore_errors=True)


def main(given: argparse.Namespace) -> int:
    """Fuzz for so long; 1 if something was found."""
    seed = given.seed if given.seed is not None else int(time.time()) % 1_000_000
    processes = given.processes or 8
    print(f"seed {seed}, at most {processes} processes, float64", flush=True)
    numbers = itertools.count() if given.trial is None else [given.trial]
    started, wrong, kinds, number = time.monotonic(), 0, Counter(), 0
    with tempfile.TemporaryDirectory() as name, Progress("fuzz") as show:
        corpora(Path(name))
        for number, result in enumerate(fuzz(Path(name), seed, processes, numbers, given.fuzz), 1):
            spent = time.monotonic() - started
            kinds[layout_name(result.trial)] += 1
            show(min(1.0, spent / given.fuzz), f"{number} trials, {wrong} wrong")
            if given.trial is None and result.right:
                continue
            wrong += not result.right
            print(described(result, seed, processes), flush=True)
    print(
        f"{number - wrong} of {number} random runs train the same model and as many broken layouts "
        f"are refused, {len(kinds)} layouts, in {time.monotonic() - started:.0f} s, seed {seed}"
    )
    return 1 if wrong else 0
