"""The whole way from source code to shards, decoded again and compared with what was put in.

The reference is the input: the texts of both sides, taken out of the shards by the tokenizer, must
be exactly the documents that the account says were kept, laid out by `formats`. Not covered:
corpora larger than memory.
"""

import hashlib
import json

import numpy as np
import pytest
from prepare_helpers import files_of, make_corpus, run

from stellarator.data import prepare as module
from stellarator.data.documents import Limits
from stellarator.data.filters import Filters
from stellarator.data.shards import Shard
from stellarator.data.sources import SourceError, read_sources
from stellarator.data.tokenizer import Tokenizer


def parts_of(ids, tokenizer: Tokenizer):
    """[(special token, text behind it), ...] of one document without its <|endoftext|>."""
    ids = [int(i) for i in ids]
    assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
    names = {index: token for token, index in tokenizer.special.items()}
    parts, text = [], []
    token = None
    for index in ids[:-1]:
        if index in names:
            parts.append((token, tokenizer.decode(text)))
            token, text = names[index], []
        else:
            text.append(index)
    return [*parts, (token, tokenizer.decode(text))]


def read_side(output, side: str, tokenizer: Tokenizer):
    """[(repository or None, path or None, text), ...] of a StarCoder2 shard."""
    found = []
    for ids in Shard(output / side):
        head, *parts = parts_of(ids, tokenizer)
        assert head == (None, "")
        repository = None
        for token, text in parts:
            if token == "<repo_name>":
                repository = text
                continue
            assert token == "<file_sep>"
            path, _, body = text.partition("\n") if repository else (None, "", text)
            found.append((repository, path, body))
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    texts = make_corpus(folder / "lib")
    (folder / "lib" / "package1" / "binary.py").write_bytes(b"\0")
    (folder / "lib" / "package1" / "long.py").write_text("x = " + "1" * 2000)
    (folder / "lib" / "copy.py").write_text(next(iter(texts.values())))
    calls = []
    manifest = run([folder / "lib"], folder / "out", progress=lambda *call: calls.append(call))
    return folder, texts, manifest, calls


def test_shards_hold_exactly_the_documents(prepared):
    folder, texts, manifest, _ = prepared
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer")
    sides = {side: read_side(folder / "out", side, tokenizer) for side in ("train", "validation")}
    found = sorted(text for side in sides.values() for _, _, text in side)
    # lib/copy.py comes first in the walk, so it is kept and the file it copies is the duplicate
    assert found == sorted(texts.values())
    named = [entry for side in sides.values() for entry in side if entry[0]]
    for repository, path, text in named:
        assert path == "copy.py" or texts[repository, path] == text
    assert 0 < len(named) < len(texts)
    for side, documents in sides.items():
        assert manifest[side]["documents"] == len(documents)
        assert manifest[side]["tokens"] == Shard(folder / "out" / side).num_tokens
        assert manifest[side]["bytes"] == sum(len(text.encode()) for _, _, text in documents)
        assert manifest[side]["examples"] == manifest[side]["repositories"]


def test_no_repository_is_on_both_sides(prepared):
    folder, texts, manifest, _ = prepared
    held_out = [json.loads(line) for line in open(folder / "out" / "held_out.jsonl")]
    repositories = {row["repo_name"] for row in held_out}
    assert repositories == set(manifest["split"]["held_out"]) and repositories
    assert len(held_out) == manifest["validation"]["documents"]
    train = {name for name, _ in texts} | {"lib/copy"}
    train -= repositories
    assert manifest["train"]["repositories"] == len(train) > 0
    assert manifest["validation"]["repositories"] == len(repositories)
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer")
    train_texts = {text for _, _, text in read_side(folder / "out", "train", tokenizer)}
    assert not train_texts & {row["content"] for row in held_out}
    total = manifest["train"]["bytes"] + manifest["validation"]["bytes"]
    assert 0.1 < manifest["validation"]["bytes"] / total <= 0.2


def test_held_out_documents_can_be_read_as_a_source(prepared):
    folder, _, manifest, _ = prepared
    documents = list(read_sources([folder / "out" / "held_out.jsonl"]))
    assert len(documents) == manifest["validation"]["documents"]
    for document in documents:
        assert (folder / "lib" / document.path).read_bytes().decode() == document.text
        assert document.language == "Python" and document.repository.startswith("lib/")


def test_the_manifest_accounts_for_every_file(prepared):
    folder, texts, manifest, _ = prepared
    report = manifest["report"]
    assert report["seen"] == len(texts) + 3
    assert report["skipped"] == {"binary": 1, "duplicate": 1, "long line": 1}
    assert report["kept"] == len(texts)
    assert report["kept"] == manifest["train"]["documents"] + manifest["validation"]["documents"]
    assert json.loads((folder / "out" / "manifest.json").read_text()) == manifest
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer")
    assert manifest["tokenizer"] == {
        "generation": "starcoder2", "vocab_size": 330, "sha256": tokenizer.sha256,
        "trained_here": True,
    }  # fmt: skip
    for side in ("train", "validation"):
        for kind, digest in manifest[side]["sha256"].items():
            data = (folder / "out" / f"{side}.{kind}").read_bytes()
            assert digest == hashlib.sha256(data).hexdigest()
        assert Shard(folder / "out" / side).dtype == manifest[side]["dtype"] == "uint16"
    timings = json.loads((folder / "out" / "timings.json").read_text())
    assert set(timings) == {"read", "tokenizer", "encode"}
    assert not (folder / "out" / ".partial").exists()


def test_corpus_text_gives_no_control_tokens(prepared):
    """What special tokens there are come from the layout, one <file_sep> for each document."""
    folder, texts, manifest, _ = prepared
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer")
    ids = np.concatenate([np.concatenate(list(Shard(folder / "out" / s))) for s in module.SIDES])
    counts = {token: int((ids == index).sum()) for token, index in tokenizer.special.items()}
    repositories = manifest["train"]["repositories"] + manifest["validation"]["repositories"]
    assert counts.pop("<file_sep>") == len(texts)
    assert counts.pop("<|endoftext|>") == repositories
    assert 0 < counts.pop("<repo_name>") < repositories
    assert not any(counts.values())
    assert sum(text.count("<file_sep>") for text in texts.values()) == 1  # it was there as text


def test_progress_rises_to_one(prepared):
    *_, calls = prepared
    shares = [share for share, _ in calls]
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] == 1.0
    assert {"training the tokenizer", "encoding", "done"} <= {text for _, text in calls}


def test_the_tokenizer_is_trained_on_the_training_side_only(tmp_path, monkeypatch):
    make_corpus(tmp_path / "lib")
    seen = []
    train = Tokenizer.train.__func__

    def watched(cls, texts, *arguments):
        return train(cls, (seen.append(text) or text for text in texts), *arguments)

    monkeypatch.setattr(Tokenizer, "train", classmethod(watched))
    run([tmp_path / "lib"], tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    documents = [text for _, _, text in read_side(tmp_path / "out", "train", tokenizer)]
    assert sorted(seen) == sorted(documents)


@pytest.mark.parametrize("format", ["starcoder", "starcoder2"])
def test_two_runs_are_the_same_to_the_bit(tmp_path, monkeypatch, format):
    """Also if the files were made in another order, and over an older result."""
    options = {"format": format, "generation": format}
    for name, seed in (("one", 1), ("two", 2)):
        texts = make_corpus(tmp_path / name / "lib")
        root = tmp_path / name / "lib"
        paths = np.random.default_rng(seed).permutation([path for _, path in texts])
        for path in paths:
            data = (root / path).read_bytes()
            (root / path).unlink()
            (root / path).write_bytes(data)
    monkeypatch.chdir(tmp_path / "one")
    first = run(["lib"], tmp_path / "a", **options)
    monkeypatch.chdir(tmp_path / "two")
    run(["lib"], tmp_path / "b", **options | {"seed": 99})
    second = run(["lib"], tmp_path / "b", **options, overwrite=True)
    assert first == second
    one, two = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert one == two and len(one) == 9
    other = run(["lib"], tmp_path / "c", **options | {"seed": 4})
    assert other["train"]["sha256"] != second["train"]["sha256"]


def test_format_of_the_first_generation(tmp_path):
    texts = make_corpus(tmp_path / "lib", repositories=30)
    manifest = run([tmp_path / "lib"], tmp_path / "out", generation="starcoder")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert tokenizer.generation == manifest["format"] == "starcoder"
    found, tokens = [], []
    for side in module.SIDES:
        shard = Shard(tmp_path / "out" / side)
        assert len(shard) == manifest[side]["documents"] == manifest[side]["examples"]
        for ids in shard:
            parts = parts_of(ids, tokenizer)
            tokens += [token for token, _ in parts[1:]]
            text = parts[-1][1]
            found.append(text.partition("\n")[2] if len(parts) > 1 else text)
    assert sorted(found) == sorted(texts.values())
    assert set(tokens) == {"<reponame>", "<filename>", "<gh_stars>"}


def test_a_tokenizer_that_is_given_is_used_as_it_is(tmp_path):
    make_corpus(tmp_path / "lib")
    given = Tokenizer.train(["def f():\n    return 1\n"], 400, "starcoder")
    given.save(tmp_path / "tokenizer")
    for name, tokenizer in (("a", given), ("b", tmp_path / "tokenizer")):
        manifest = run([tmp_path / "lib"], tmp_path / name, tokenizer=tokenizer)
        assert manifest["tokenizer"]["sha256"] == given.sha256
        assert not manifest["tokenizer"]["trained_here"]
        assert manifest["format"] == "starcoder"
        assert Tokenizer.load(tmp_path / name / "tokenizer").to_json() == given.to_json()


def test_large_repositories_become_several_examples(tmp_path, monkeypatch):
    texts = make_corpus(tmp_path / "lib", repositories=3)
    monkeypatch.setattr(module, "MAX_EXAMPLE_BYTES", 1000)
    manifest = run([tmp_path / "lib"], tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    found = [
        entry for side in module.SIDES for entry in read_side(tmp_path / "out", side, tokenizer)
    ]
    assert sorted(text for _, _, text in found) == sorted(texts.values())
    assert manifest["train"]["examples"] > manifest["train"]["repositories"]
    for side in module.SIDES:
        for ids in Shard(tmp_path / "out" / side):
            bodies = [text for token, text in parts_of(ids, tokenizer) if token == "<file_sep>"]
            assert len(bodies) == 1 or sum(len(body.encode()) for body in bodies) < 1200


def test_a_sample_is_enough_for_the_tokenizer_of_a_large_corpus(tmp_path, monkeypatch):
    texts = make_corpus(tmp_path / "lib", repositories=60)
    total = sum(len(text) for text in texts.values())
    monkeypatch.setattr(module, "TOKENIZER_BYTES", total // 4)
    seen = []
    train = Tokenizer.train.__func__

    def watched(cls, found, *arguments):
        return train(cls, (seen.append(text) or text for text in found), *arguments)

    monkeypatch.setattr(Tokenizer, "train", classmethod(watched))
    run([tmp_path / "lib"], tmp_path / "out")
    assert 0.1 < sum(map(len, seen)) / total < 0.45


def test_one_repository_is_split_by_the_parts_of_its_paths(tmp_path):
    make_corpus(tmp_path / "lib")
    rows = [
        {"repo_name": "owner/name", "path": f"src/{d.path}", "content": d.text}
        for d in read_sources([tmp_path / "lib"])
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = run([tmp_path / "d.jsonl"], tmp_path / "out")
    assert manifest["split"]["by"] == "the first 2 parts of the path"
    assert "there is one repository only" in manifest["report"]["notes"][0]
    held_out = [json.loads(line) for line in open(tmp_path / "out" / "held_out.jsonl")]
    parts = {"owner/name/" + "/".join(row["path"].split("/")[:2]) for row in held_out}
    assert parts == set(manifest["split"]["held_out"])
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert len(read_side(tmp_path / "out", "train", tokenizer)) == len(rows) - len(held_out)
    assert manifest["train"]["repositories"] == manifest["train"]["examples"] == 1


def test_nothing_to_split(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"content": "x = 1"}\n{"content": "y = 2"}\n')
    with pytest.raises(ValueError, match="expected at least 2 repositories.*got.*d.jsonl"):
        run([tmp_path / "d.jsonl"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = run([tmp_path / "d.jsonl"], tmp_path / "out", validation_fraction=0)
    assert (manifest["train"]["documents"], manifest["validation"]["documents"]) == (2, 0)
    assert len(Shard(tmp_path / "out" / "validation")) == 0
    assert (tmp_path / "out" / "held_out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": "gpt2"}, "expected generation in"),
        ({"format": "starcoder"}, "expected the format of the tokenizer, 'starcoder2', got 'star"),
        ({"vocab_size": 100}, r"expected vocab_size in \[294, 49152\]"),
        ({"vocab_size": 50_000}, "got 50000"),
        ({"validation_fraction": 0.6}, r"expected a fraction in \[0, 0.5\], got 0.6"),
        ({"validation_fraction": -0.1}, "got -0.1"),
        ({"tokenizer": "/nowhere"}, "/nowhere: cannot be read"),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run([tmp_path / "not looked at"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_no_documents(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no documents found in .*/empty: 0 files"):
        run([tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "empty" / "a.py").write_text("." * 50)
    with pytest.raises(SourceError, match="no document passed.*: 1 few letters and digits"):
        run([tmp_path / "empty"], tmp_path / "out")


def test_limits_and_filters_are_passed_on(tmp_path):
    texts = make_corpus(tmp_path / "lib")
    limit = int(np.median([len(text.encode()) for text in texts.values()]))
    manifest = run([tmp_path / "lib"], tmp_path / "out", limits=Limits(max_file_bytes=limit))
    assert manifest["report"]["skipped"].keys() == {"too large"}
    assert manifest["limits"]["max_file_bytes"] == limit
    filters = Filters(max_line_length=25)
    manifest = run([tmp_path / "lib"], tmp_path / "other", filters=filters)
    assert manifest["report"]["skipped"].keys() == {"long line"}
    assert manifest["filters"]["max_line_length"] == 25


def test_the_account_is_complete_whatever_the_input(tmp_path):
    """Random bytes under random names: kept + skipped = seen, and the run ends."""
    rng = np.random.default_rng(5)
    make_corpus(tmp_path / "lib", repositories=4)
    for number in range(150):
        name = f"{rng.integers(5)}/{number}" + str(
            rng.choice([".py", ".jsonl", ".c", ".gz", ".txt"])
        )
        path = tmp_path / "lib" / name
        path.parent.mkdir(exist_ok=True)
        alphabet = rng.choice(np.array([0, 9, 10, 32, 34, 92, 123, 195, 128, 255, 97, 98]), 8)
        path.write_bytes(rng.choice(alphabet, int(rng.integers(0, 300))).astype(np.uint8).tobytes())
    report = run([tmp_path / "lib"], tmp_path / "out")["report"]
    assert report["seen"] == report["kept"] + sum(report["skipped"].values())
    assert report["seen"] >= 150


def test_a_source_may_contain_the_output(tmp_path):
    """Its own files, such as the held-out documents, are not read the next time."""
    make_corpus(tmp_path / "lib")
    out = tmp_path / "lib" / "data" / "set"
    first = run([tmp_path / "lib"], out)
    again = run([tmp_path / "lib"], out, overwrite=True)
    assert again == first and first["report"]["folders_skipped"] == {"left out": 1}
    with pytest.raises(ValueError, match="expected another folder for the output, got the source"):
        run([tmp_path / "lib"], tmp_path / "lib" / ".", overwrite=True)
