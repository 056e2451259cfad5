"""Shared by all tests: Triton runs in its interpreter; a tiny corpus and a tiny run."""

import os

# Read by Triton when it decorates a kernel, so it must be set before anything imports triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Workers of pytest-xdist share the cores; one thread each is faster and makes timing steadier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses  # noqa: E402
import gc  # noqa: E402
import random  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

_WORDS = "alpha beta gamma delta value index total left right node tree name size größe 数".split()


def pytest_collection_modifyitems(items):
    """The files that lie here first: some take minutes, and one core would wait for the last."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def pytest_collection_finish(session):
    """Thousands of tests and what they import need not be looked through by every collection."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Show what tests have recorded as "summary", such as a seed, whether they pass or not."""
    for report in (
        r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome)
    ):
        for name, line in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(line)


def _source_file(rng: random.Random) -> str:
    """Text that looks like a Python file, some of it not ASCII."""
    lines = []
    for _ in range(rng.randint(2, 9)):
        name, argument = rng.choice(_WORDS), rng.choice(_WORDS)
        lines += [
            f"def {name}({argument}):",
            f"    {rng.choice(_WORDS)} = {rng.randint(0, 99)}",
            f"    return {argument} + {rng.choice(_WORDS)}  # {rng.choice(_WORDS)}",
            "",
        ]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A folder with tokenizer/, train and validation shards: 60 repositories of small files."""
    import numpy as np

    from stellarator.data.documents import Document
    from stellarator.data.formats import starcoder2_repository
    from stellarator.data.shards import ShardWriter
    from stellarator.data.tokenizer import Tokenizer

    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(7)
    repositories = [[_source_file(rng) for _ in range(rng.randint(1, 4))] for _ in range(60)]
    tokenizer = Tokenizer.train([t for r in repositories for t in r], 420, "starcoder2")
    tokenizer.save(folder / "tokenizer")
    writers = {s: ShardWriter(folder / s, np.uint16) for s in ("train", "validation")}
    for number, texts in enumerate(repositories):
        documents = [
            Document(text, f"r{number}", f"f{i}.py", "Python", None) for i, text in enumerate(texts)
        ]
        pieces = starcoder2_repository(documents, np.random.default_rng(number))
        ids = [*tokenizer.encode_pieces(pieces), tokenizer.eod]
        writers["validation" if number % 10 == 0 else "train"].add_document(ids)
    for writer in writers.values():
        writer.close()
    return folder


@pytest.fixture
def tiny_config(tiny_corpus, tmp_path):
    """A run of seconds on the tiny corpus: 2 layers, GQA, a window shorter than the row, FIM on."""
    from stellarator.config import RunConfig

    base = RunConfig()
    return dataclasses.replace(
        base,
        name="tiny",
        folder=str(tmp_path / "run"),
        model=dataclasses.replace(
            base.model,
            vocab_size=420,
            num_layers=2,
            width=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_width=64,
            max_positions=256,
            window=24,
        ),
        data=dataclasses.replace(
            base.data,
            train=(str(tiny_corpus / "train"),),
            seq_length=64,
            validation=(str(tiny_corpus / "validation"),),
            tokenizer=str(tiny_corpus / "tokenizer"),
        ),
        optim=dataclasses.replace(base.optim, lr=3e-3, min_lr=3e-4, warmup_steps=2),
        train=dataclasses.replace(
            base.train,
            steps=12,
            global_batch_size=8,
            micro_batch_size=4,
            device="cpu",
        ),
        metrics=dataclasses.replace(base.metrics, peak_tflops=1.0, tensorboard=False, report=False),
    )
