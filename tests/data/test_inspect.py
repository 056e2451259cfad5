"""What `data inspect` prints: documents and rows, decoded by the tokenizer that made them.

The reference is the shard itself. Packing and fill-in-the-middle have tests of their own.
"""

import pytest

from stellarator.cli import main
from stellarator.data.inspect import documents, rows
from stellarator.data.prepare import prepare
from stellarator.data.shards import Shard, ShardError
from stellarator.data.tokenizer import Tokenizer


def test_documents_are_those_of_the_shard(tiny_corpus):
    prefix, folder = str(tiny_corpus / "train"), str(tiny_corpus / "tokenizer")
    shard, tokenizer = Shard(prefix), Tokenizer.load(folder)
    head, *parts = documents(prefix, folder, 3)
    assert head == f"# {prefix}: {len(shard):,} documents, {shard.num_tokens:,} tokens, uint16"
    assert parts[::2] == [f"# document {i}: {shard.lengths[i]:,} tokens" for i in range(3)]
    assert parts[1::2] == [tokenizer.decode(shard[i]) for i in range(3)]
    assert len(list(documents(prefix, folder, 10_000))) == 1 + 2 * len(shard)


def test_rows_have_the_length_that_was_asked_for(tiny_corpus):
    prefix, folder = str(tiny_corpus / "train"), str(tiny_corpus / "tokenizer")
    tokenizer = Tokenizer.load(folder)
    head, *parts = rows(prefix, folder, 64, 4)
    assert "rows of 64 tokens" in head and len(parts) == 8
    for text in parts[1::2]:
        assert len(text) >= 32 and tokenizer.encode(text)


@pytest.mark.parametrize("extension", [".bin", ".idx"])
@pytest.mark.parametrize("show", [documents, lambda *words: rows(*words[:2], 64, words[2])])
def test_either_file_of_a_shard_stands_for_its_prefix(tiny_corpus, extension, show):
    prefix, folder = str(tiny_corpus / "train"), str(tiny_corpus / "tokenizer")
    assert list(show(prefix + extension, folder, 1)) == list(show(prefix, folder, 1))
    with pytest.raises(ShardError, match=r"absent\.idx: cannot be read"):
        list(show(str(tiny_corpus / ("absent" + extension)), folder, 1))


@pytest.mark.parametrize("rows_too", [[], ["--rows", "64"]])
def test_another_tokenizer_is_refused_as_in_training(tmp_path, capsys, rows_too):
    source = tmp_path / "src" / "a.py"
    source.parent.mkdir()
    source.write_text("def function(value):\n    return value + 1\n" * 20)
    prepare([tmp_path / "src"], tmp_path / "out", vocab_size=300, validation_fraction=0)
    Tokenizer.train(["something else " * 9], 310).save(tmp_path / "other")
    words = ["data", "inspect", str(tmp_path / "out" / "train"), *rows_too, "--tokenizer"]
    assert main([*words, str(tmp_path / "other")]) == 2
    right = tmp_path / "out" / "tokenizer"
    assert capsys.readouterr() == (
        "",
        f"error: {tmp_path / 'out' / 'train'}: expected shards of the tokenizer that was given, "
        f"got those of another one ({tmp_path / 'out' / 'manifest.json'}). Use the tokenizer in "
        f"{right}.\n",
    )
    assert main([*words, str(right)]) == 0


def test_a_prefix_may_end_like_a_file(tiny_corpus, tmp_path):
    for kind in ("bin", "idx"):
        (tmp_path / f"odd.bin.{kind}").write_bytes((tiny_corpus / f"train.{kind}").read_bytes())
    prefix, folder = str(tmp_path / "odd.bin"), str(tiny_corpus / "tokenizer")
    assert next(documents(prefix, folder, 1)).startswith(f"# {prefix}: ")
