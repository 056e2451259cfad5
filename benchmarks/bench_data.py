"""`python -m benchmarks data`: the data path, stage by stage, beside plain code for the same work.

Peers, each doing the least that the stage can be done with:
- reading a folder: walking it and reading the files whole; .jsonl.gz: gzip and json.loads a line;
  .parquet: pyarrow, column to a list. Ours also counts, checks sizes and encodings, and finds
  licence and language.
- tokenizing: encode_batch_fast of Hugging Face tokenizers on the bare texts. Ours also lays
  documents out with their special tokens, which text must not become.
- documents of a shard: numpy slices of a memory map, as int64.
- rows: random windows of a memory map, T+1 tokens as int64, which is what nanoGPT reads. Ours also
  goes through every document once an epoch, packs, and makes fill-in-the-middle.
Before anything is timed both must agree: on the texts, on the ids, on the documents, on the tokens.
"""

import argparse
import gzip
import itertools
import json
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.harness import CLOCKS, environment, take_turns, timed
from benchmarks.machine import Quietness
from benchmarks.points import UNTIMED
from benchmarks.usage import count, positive, refusals
from stellarator.config import FimConfig
from stellarator.data import formats
from stellarator.data.packing import PackedDataset
from stellarator.data.shards import Shard, ShardWriter, best_dtype
from stellarator.data.sources import read_sources
from stellarator.data.tokenizer import Tokenizer
from stellarator.progress import Progress


@dataclass(frozen=True)
class Stage:
    """Two functions without arguments that do the same work, and what they work on."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    num_bytes: int
    num_tokens: int
    agree: Callable[[], bool]


def _corpus(folder: Path, megabytes: float) -> dict[str, str]:
    """{relative path: text} of this Python's standard library, copied until it is large enough."""
    library, texts, size = Path(sysconfig.get_paths()["stdlib"]), {}, 0
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or size >= megabytes * 1e6:
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if not text.strip() or "\r" in text or text.startswith("\ufeff"):
            continue  # ours would clean it first
        relative = path.relative_to(library)
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        texts[str(relative)] = text
        size += len(text.encode())
    return texts


def _texts(paths: Iterable[Path]) -> list[str]:
    return [d.text for d in read_sources(list(paths), deduplicate=False)]


def _reading(work: Path, texts: dict[str, str]) -> list[Stage]:
    """A folder, .jsonl.gz and .parquet with the same texts."""
    import pyarrow
    import pyarrow.parquet

    folder, lines, table = work / "source", work / "texts.jsonl.gz", work / "texts.parquet"
    rows = [{"content": text, "path": path, "repo_name": "a/b"} for path, text in texts.items()]
    with gzip.open(lines, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)

    def plain_folder() -> list[str]:
        return [p.read_bytes().decode() for p in sorted(folder.rglob("*")) if p.is_file()]

    def plain_lines() -> list[str]:
        with gzip.open(lines, "rt", encoding="utf-8") as file:
            return [json.loads(line)["content"] for line in file]

    def plain_table() -> list[str]:
        return pyarrow.parquet.read_table(table, columns=["content"])["content"].to_pylist()

    size = sum(len(text.encode()) for text in texts.values())
    found = []
    for name, path, plain, peer in (
        ("read a folder", folder, plain_folder, "read_bytes"),
        ("read jsonl.gz", lines, plain_lines, "gzip + json"),
        ("read parquet", table, plain_table, "pyarrow"),
    ):
        found.append(
            Stage(
                name,
                lambda path=path: _texts([path]),
                plain,
                peer,
                size,
                0,
                lambda path=path, plain=plain: sorted(_texts([path])) == sorted(plain()),
            )
        )
    return found


def _tokenizing(folder: Path, tokenizer: Tokenizer, work: Path) -> Stage:
    """Documents with their layout against bare texts."""
    import tokenizers

    documents = list(read_sources([folder], deduplicate=False))
    texts = [d.text for d in documents]
    layouts = [formats.starcoder(d, np.random.default_rng(i)) for i, d in enumerate(documents)]
    tokenizer.save(work / "tokenizer")
    plain = tokenizers.Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    plain.encode_special_tokens = True

    def agree() -> bool:
        ours = tokenizer.encode_pieces_batch([[text] for text in texts[:50]])
        theirs = plain.encode_batch_fast(texts[:50], add_special_tokens=False)
        pairs = zip(ours, theirs, strict=True)
        return all(list(a) == b.ids for a, b in pairs)

    return Stage(
        "tokenize",
        lambda: tokenizer.encode_pieces_batch(layouts),
        lambda: plain.encode_batch_fast(texts, add_special_tokens=False),
        "tokenizers",
        sum(len(text.encode()) for text in texts),
        sum(map(len, tokenizer.encode_pieces_batch(layouts))),
        agree,
    )


def _loading(texts: list[str], tokenizer: Tokenizer, work: Path, length: int) -> list[Stage]:
    """A shard of the texts, ten times over; its documents; rows without and with FIM."""
    prefix, dtype = work / "train", best_dtype(tokenizer.vocab_size)
    encoded = tokenizer.encode_pieces_batch([[text] for text in texts])
    with ShardWriter(prefix, dtype) as writer:
        for ids in itertools.chain.from_iterable(itertools.repeat(encoded, 10)):
            writer.add_document([*ids, tokenizer.eod])
    shard = Shard(prefix)
    ends = np.cumsum(shard.lengths)
    mapped = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    starts = np.random.default_rng(0).integers(0, len(mapped) - length - 1, 500)

    def ours_documents() -> list[np.ndarray]:
        return [shard[i].astype(np.int64) for i in range(len(shard))]

    def plain_documents() -> list[np.ndarray]:
        pairs = zip((ends - shard.lengths).tolist(), ends.tolist(), strict=True)
        return [mapped[a:b].astype(np.int64) for a, b in pairs]

    def same_documents() -> bool:
        pairs = zip(ours_documents(), plain_documents(), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    stages = [
        Stage("documents of a shard", ours_documents, plain_documents, "numpy memmap",
              mapped.nbytes, len(mapped), same_documents)
    ]  # fmt: skip
    for name, fim in (("rows", FimConfig(rate=0.0)), ("rows with FIM", FimConfig())):
        dataset = PackedDataset([shard], (), tokenizer, length, fim)
        dataset.row(0)

        def ours(dataset=dataset) -> list:
            return [dataset.row(i) for i in range(len(starts))]

        def agree(dataset=dataset) -> bool:
            return all(_same_tokens(dataset, i) for i in range(20))

        stages.append(
            Stage(name, ours, lambda: [mapped[s : s + length + 1].astype(np.int64) for s in starts],
                  "numpy memmap", 0, len(starts) * length, agree)
        )  # fmt: skip
    return stages


def _same_tokens(dataset: PackedDataset, index: int) -> bool:
    """Whether a row has the bytes of its documents and no other; special tokens come and go."""
    row, tokenizer = dataset.row(index), dataset.tokenizer
    both = (row.tokens[: row.length], np.concatenate(dataset.raw_pieces(index)))
    texts = [tokenizer.decode_bytes(x[~np.isin(x, tokenizer.special_ids)]) for x in both]
    return sorted(texts[0]) == sorted(texts[1])


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `data`."""
    parser.add_argument("--megabytes", type=positive, default=8.0, help="of source text")
    parser.add_argument("--length", type=count, default=1024, help="tokens of a row")
    parser.add_argument("--vocab", type=count, default=8192)
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", metavar="FILE.json", help="one JSON line a stage")


def main(given: argparse.Namespace) -> int:
    """Check, time, print; 1 if ours and plain code disagree."""
    where = environment()
    with (
        tempfile.TemporaryDirectory() as name,
        results.Writer(given.output) as write,
        Progress("data") as show,
    ):
        work = Path(name)
        show(0.0, "making the texts")
        texts = _corpus(work / "source", given.megabytes)
        with refusals():  # of --vocab and --length
            tokenizer = Tokenizer.train(texts.values(), given.vocab, "starcoder")
            stages = _loading(list(texts.values()), tokenizer, work, given.length)
        stages = [
            *_reading(work, texts),
            _tokenizing(work / "source", tokenizer, work),
            *stages,
        ]
        for number, stage in enumerate(stages):
            show(number / len(stages), stage.name)
            write(_point(stage, given, where))
    print(results.where(where), markdown(write.points), sep="\n\n")
    for point in write.points:
        if warning := Quietness.warning(point["quiet"] or {"quiet": True}):
            print(f"{point['op']}: {warning}")
        if point["wrong"]:
            print(f"WRONG, not timed: {point['op']}: {point['wrong']}")
    return 1 if any(point["wrong"] for point in write.points) else 0


def _point(stage: Stage, given: argparse.Namespace, where: dict) -> dict:
    """Check and time one stage."""
    base = UNTIMED | {
        "op": f"data: {stage.name}", "variant": "", "model": "", "dtype": "", "device": "cpu",
        "sizes": {"bytes": stage.num_bytes, "tokens": stage.num_tokens}, "phase": "whole",
        "impl": "stellarator", "peer": stage.peer_name, "errors": {}, "clock": given.clock,
        "limits": {}, "environment": where,
    }  # fmt: skip
    if not stage.agree():
        return base | {"wrong": f"ours and {stage.peer_name} do not give the same"}

    quietness = Quietness()
    functions = {"ours": stage.ours, "peer": stage.peer}
    samplers = {name: timed(f, clock=given.clock) for name, f in functions.items()}
    times = take_turns(samplers, given.repeats, warmup=1)
    return (
        base
        | results.timed(times["ours"]["whole"], times["peer"]["whole"])
        | {"quiet": quietness.report()}
    )


def markdown(points: list[dict]) -> str:
    """One row a stage."""
    header = ["stage", "ms (p20, p80)", "MB/s", "M tokens/s", "peer", "peer ms", "speed"]
    rows = []
    for p in (p for p in points if p["wrong"] is None):
        ms, sizes = p["ms"], p["sizes"]
        tokens = f"{sizes['tokens'] / ms['p50'] / 1e3:.2f}" if sizes["tokens"] else ""
        size = f"{sizes['bytes'] / ms['p50'] / 1e3:.1f}" if sizes["bytes"] else ""
        spread = f"{ms['p50']:.1f} ({ms['p20']:.1f}, {ms['p80']:.1f})"
        rows.append([p["op"].removeprefix("data: "), spread, size, tokens, p["peer"],
                     f"{p['peer_ms']['p50']:.1f}", f"{p['ratio']:.2f}x"])  # fmt: skip
    return results.table(rows, header)
