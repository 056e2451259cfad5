"""Token shards, against files put together here byte by byte with `struct`.

Also: every way to damage a small file, and a writer that is killed. Not covered: Megatron itself
reading the files (it is no dependency), and shards of more than 2^31 tokens.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from stellarator.data.shards import Shard, ShardError, ShardWriter, best_dtype

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def index_bytes(lengths, documents, *, code=8, itemsize=2, version=1, pointers=None) -> bytes:
    """An index as the format says it, with `struct` only."""
    if pointers is None:
        pointers, at = [], 0
        for length in lengths:
            pointers.append(at)
            at += length * itemsize
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", version)
        + struct.pack("<B", code)
        + struct.pack("<QQ", len(lengths), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def put(folder, index: bytes, tokens: bytes) -> str:
    prefix = str(folder / "shard")
    with open(prefix + ".idx", "wb") as file:
        file.write(index)
    with open(prefix + ".bin", "wb") as file:
        file.write(tokens)
    return prefix


def write(prefix, documents, dtype="uint16") -> None:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


def test_golden_bytes(tmp_path):
    write(tmp_path / "s", [[1, 2, 3], [], [65535]])
    assert (tmp_path / "s.bin").read_bytes() == bytes.fromhex("0100 0200 0300 ffff")
    assert (tmp_path / "s.idx").read_bytes() == bytes.fromhex(
        "4d4d4944494458 0000"  # MMIDIDX
        "0100000000000000"  # version 1
        "08"  # uint16
        "0300000000000000 0400000000000000"  # 3 sequences, 4 document entries
        "03000000 00000000 01000000"  # lengths
        "0000000000000000 0600000000000000 0600000000000000"  # byte offsets
        "0000000000000000 0100000000000000 0200000000000000 0300000000000000"
    )


def test_documents_of_several_sequences_are_read_whole(tmp_path):
    """As Megatron writes them when a document is split into sentences."""
    tokens = np.arange(10, dtype="<i4")
    index = index_bytes([2, 0, 3, 1, 4], [0, 3, 3, 4, 5], code=4, itemsize=4)
    shard = Shard(put(tmp_path, index, tokens.tobytes()))
    assert [document.tolist() for document in shard] == [[0, 1, 2, 3, 4], [], [5], [6, 7, 8, 9]]
    assert shard.lengths.tolist() == [5, 0, 1, 4] and shard.lengths.dtype == np.int64
    assert (len(shard), shard.num_sequences, shard.num_tokens) == (4, 5, 10)
    assert shard.dtype == np.dtype("int32")


def test_index_with_sequence_modes_of_multimodal_megatron(tmp_path):
    index = index_bytes([1, 1], [0, 1, 2]) + b"\x00\x01"
    shard = Shard(put(tmp_path, index, b"\x07\x00\x08\x00"))
    assert [document.tolist() for document in shard] == [[7], [8]]


@pytest.mark.parametrize("dtype", CODES)
def test_round_trip_of_every_dtype(tmp_path, dtype):
    rng = np.random.default_rng(len(dtype))
    limits = np.iinfo(dtype)
    lengths = [*rng.integers(0, 50, 60).tolist(), 0, 0]
    documents = [
        rng.integers(limits.min, limits.max, n, dtype=dtype, endpoint=True) for n in lengths
    ]
    write(tmp_path / "s", documents, dtype)
    assert (tmp_path / "s.idx").read_bytes()[17] == CODES[dtype]
    expected = index_bytes(
        lengths, list(range(len(lengths) + 1)), code=CODES[dtype], itemsize=limits.bits // 8
    )
    assert (tmp_path / "s.idx").read_bytes() == expected
    shard = Shard(tmp_path / "s")
    assert len(shard) == len(documents) and shard.lengths.tolist() == lengths
    for index, document in enumerate(documents):
        np.testing.assert_array_equal(shard[index], document)
        np.testing.assert_array_equal(shard[index - len(shard)], document)
        assert shard[index].dtype == np.dtype(dtype)


def test_views_are_not_copies_and_cannot_be_written(tmp_path):
    write(tmp_path / "s", [[1, 2, 3], [4]])
    shard = Shard(tmp_path / "s")
    assert shard[0].base is not None and not shard[0].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        shard[0][0] = 9
    for index in (2, -3):
        with pytest.raises(IndexError, match=r"expected a document in \[0, 2\), got"):
            shard[index]


def test_empty_shard_and_empty_documents(tmp_path):
    write(tmp_path / "none", [])
    assert len(Shard(tmp_path / "none")) == 0 and Shard(tmp_path / "none").num_tokens == 0
    write(tmp_path / "hollow", [[], np.array([])])
    assert [document.tolist() for document in Shard(tmp_path / "hollow")] == [[], []]


def test_pickle_opens_the_files_again(tmp_path):
    write(tmp_path / "s", [[1, 2], [3]])
    data = pickle.dumps(Shard(tmp_path / "s"))
    assert len(data) < 1000
    assert pickle.loads(data)[1].tolist() == [3]


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (300, "uint16"),
        (49_152, "uint16"),
        (65_499, "uint16"),
        (65_500, "int32"),
        (1 << 20, "int32"),
    ],
)
def test_dtype_is_chosen_as_megatron_does(vocab_size, expected):
    assert best_dtype(vocab_size) == np.dtype(expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 65536], r"expected ids in \[0, 65535\] \(uint16\), got 1 to 65536"),
        ([-1], "got -1 to -1"),
        ([[1, 2]], r"expected \(n,\) integer ids, got int64 of shape \(1, 2\)"),
        ([0.5], "got float64"),
    ],
)
def test_ids_that_do_not_fit_are_refused_and_nothing_is_kept(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "s", "uint16") as writer:
        writer.add_document([1, 2])
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_floats_are_no_tokens(tmp_path):
    with pytest.raises(ValueError, match="expected an integer dtype"):
        ShardWriter(tmp_path / "s", "float32")
    for code in (6, 7, 0, 9, 255):
        prefix = put(tmp_path, index_bytes([1], [0, 1], code=code), b"\x00\x00")
        with pytest.raises(ShardError, match=f"expected integer tokens.*got {code}"):
            Shard(prefix)


def test_hashes_are_those_of_the_files(tmp_path):
    import hashlib

    writer = ShardWriter(tmp_path / "s", "uint16")
    for count in range(20):
        writer.add_document(range(count))
    hashes = writer.close()
    for kind in ("bin", "idx"):
        data = (tmp_path / f"s.{kind}").read_bytes()
        assert hashes[kind] == hashlib.sha256(data).hexdigest()


GOOD = ([3, 2, 4], [0, 1, 3])
BAD = {
    "magic": (b"TOKENS\0\0\0" + index_bytes(*GOOD)[9:], "expected a Megatron index"),
    "legacy magic": (b"TNTIDX\x00\x00" + bytes(60), "expected a Megatron index"),
    "version": (index_bytes(*GOOD, version=2), "expected version 1 of the index, got 2"),
    "pointer past the end": (index_bytes(*GOOD, pointers=[0, 6, 1 << 40]), "expected sequence 2"),
    "negative pointer": (index_bytes(*GOOD, pointers=[-2, 6, 10]), "at byte 0.* got -2"),
    "overlap": (index_bytes(*GOOD, pointers=[0, 4, 10]), "expected sequence 1 at byte 6"),
    "unaligned": (index_bytes(*GOOD, pointers=[0, 6, 11]), "expected sequence 2 at byte 10"),
    "negative length": (index_bytes([3, -2, 8], GOOD[1]), "expected lengths >= 0, got -2"),
    "no documents": (index_bytes(GOOD[0], []), "document index 0 ... 3, got nothing"),
    "documents from 1": (index_bytes(GOOD[0], [1, 3]), "0 ... 3, got 1 ... 3"),
    "documents beyond": (index_bytes(GOOD[0], [0, 4]), "0 ... 3, got 0 ... 4"),
    "documents fall": (index_bytes(GOOD[0], [0, 2, 1, 3]), "never falls"),
    "documents negative": (index_bytes(GOOD[0], [0, -1, 3]), "never falls"),
    "2^60 sequences": (
        index_bytes(*GOOD)[:18] + struct.pack("<QQ", 1 << 60, 4) + bytes(100), "It is truncated"),
    "2^64 - 1 entries": (
        index_bytes(*GOOD)[:18] + struct.pack("<QQ", 3, (1 << 64) - 1) + bytes(9), "truncated"),
    "bytes left over": (index_bytes(*GOOD) + bytes(8), "expected 94 bytes .*, got 102"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damaged_index_is_one_clear_line(tmp_path, case):
    index, message = BAD[case]
    prefix = put(tmp_path, index, bytes(18))
    with pytest.raises(ShardError, match=message) as caught:
        Shard(prefix)
    text = str(caught.value)
    assert text.startswith(f"{prefix}.idx: expected ") and "\n" not in text and len(text) < 400


def test_every_truncation_of_both_files_is_found(tmp_path):
    index, tokens = index_bytes(*GOOD), bytes(18)
    prefix = put(tmp_path, index, tokens)
    assert len(Shard(prefix)) == 2
    for size in range(len(index)):
        with pytest.raises(
            ShardError, match=r"shard\.idx: expected .*, got .* It is truncated\. Copy it again"
        ):
            Shard(put(tmp_path, index[:size], tokens))
    for size in range(len(tokens)):
        with pytest.raises(ShardError, match=rf"shard\.bin: expected 18 bytes .*, got {size}\. It"):
            Shard(put(tmp_path, index, tokens[:size]))
    with pytest.raises(ShardError, match="got 20. It belongs to another index"):
        Shard(put(tmp_path, index, bytes(20)))


def test_any_changed_byte_of_the_index_gives_an_error_or_a_readable_shard(tmp_path):
    """Lengths that move from one sequence to the next without a trace cannot be told apart."""
    index, tokens = index_bytes(*GOOD), bytes(range(18))
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(len(index)):
        for value in {0, 1, 2, 127, 128, 255, int(rng.integers(256))} - {index[position]}:
            changed = index[:position] + bytes([value]) + index[position + 1 :]
            try:
                shard = Shard(put(tmp_path, changed, tokens))
            except ShardError:
                refused += 1
                continue
            assert sum(len(document) for document in shard) == shard.num_tokens
    assert refused > 500


def test_missing_files(tmp_path):
    with pytest.raises(ShardError, match=r"none\.idx: cannot be read: No such file"):
        Shard(tmp_path / "none")
    prefix = put(tmp_path, index_bytes(*GOOD), bytes(18))
    for name in ("shard.bin", "shard.idx"):
        with pytest.raises(ShardError, match=rf"Give {prefix} without \.{name[-3:]}\.$"):
            Shard(tmp_path / name)
    for folder in (tmp_path, f"{tmp_path}/"):
        with pytest.raises(ShardError, match=f"give a shard in it, such as {prefix}\\.$"):
            Shard(folder)
    with pytest.raises(ShardError, match="Give the prefix of a .bin and .idx pair"):
        Shard(tmp_path / "other.bin")
    os.remove(prefix + ".bin")
    with pytest.raises(ShardError, match=r"shard\.bin: cannot be read: No such file"):
        Shard(prefix)


def test_an_exception_leaves_the_old_shard(tmp_path):
    write(tmp_path / "s", [[1]])
    with pytest.raises(KeyError), ShardWriter(tmp_path / "s", "uint16") as writer:
        writer.add_document([2, 3])
        raise KeyError
    assert Shard(tmp_path / "s")[0].tolist() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


def test_stopped_between_the_two_files_there_is_no_index(tmp_path, monkeypatch):
    """An old index beside new tokens of the same size would read as a whole shard."""
    write(tmp_path / "s", [[1, 2], [3]])
    writer = ShardWriter(tmp_path / "s", "uint16")
    writer.add_document([4, 5, 6])

    def replace(source, target, calls=[]):  # noqa: B006
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    with pytest.raises(ShardError, match=r"s\.idx: cannot be read"):
        Shard(tmp_path / "s")


def test_a_full_disk_is_an_error_with_the_file_name(tmp_path):
    """/dev/full takes no byte: the writer's own file is a link to it."""
    os.symlink("/dev/full", tmp_path / "s.bin.partial")
    with (
        pytest.raises(OSError, match=r"No space left on device.*s\.bin\.partial"),
        ShardWriter(tmp_path / "s", "uint16") as writer,
    ):
        for _ in range(100):
            writer.add_document(range(1000))
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from stellarator.data.shards import ShardWriter
generation = 0
while True:
    generation += 1
    with ShardWriter(sys.argv[1], "uint16") as writer:
        for document in range(1 + generation % 5):
            writer.add_document([generation % 65536] * 20_000)
        print(generation, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_shard_or_none(tmp_path):
    """kill -9 at random times while the same shard is written again and again."""
    rng = np.random.default_rng(7)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    whole = 0
    for trial in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "s")], env=environment,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        for _ in range(int(rng.integers(1, 30))):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
        if (tmp_path / "s.idx").exists():
            shard = Shard(tmp_path / "s")
            values = np.unique(np.concatenate(list(shard)))
            assert len(values) == 1 and len(shard) == 1 + int(values[0]) % 5, trial
            whole += 1
    assert whole >= 3
