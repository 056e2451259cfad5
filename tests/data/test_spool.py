"""The split by repository and the documents that wait on disk.

The reference is arithmetic on the sizes, and the documents that were put in.
"""

import numpy as np
import pytest

from stellarator.data.documents import Document
from stellarator.data.spool import Spool, hold_out, seed_of, units_of


def test_hold_out_is_close_to_the_fraction_and_depends_on_names_only():
    rng = np.random.default_rng(0)
    for trial in range(200):
        count = int(rng.integers(2, 300))
        sizes = {f"r{i}": int(size) for i, size in enumerate(rng.lognormal(8, 2, count) + 1)}
        fraction = float(rng.choice([0.01, 0.05, 0.2, 0.5]))
        chosen = hold_out(sizes, fraction, trial)
        assert chosen and chosen < sizes.keys()
        share = sum(sizes[name] for name in chosen) / sum(sizes.values())
        assert share <= fraction or len(chosen) == 1
        if count > 100 and fraction >= 0.05 and max(sizes.values()) < 0.02 * sum(sizes.values()):
            assert share > 0.9 * fraction
        shuffled = {name: sizes[name] for name in rng.permutation(list(sizes))}
        assert hold_out(shuffled, fraction, trial) == chosen
    equal = dict.fromkeys((f"r{i}" for i in range(100)), 10)
    assert hold_out(equal, 0.1, 0) != hold_out(equal, 0.1, 1)
    assert len(hold_out(equal, 0.1, 0)) == 10


def test_every_repository_is_held_out_as_often_as_any_other():
    equal = dict.fromkeys((f"r{i}" for i in range(20)), 10)
    counts = dict.fromkeys(equal, 0)
    for seed in range(1000):
        for name in hold_out(equal, 0.2, seed):
            counts[name] += 1
    # binomial(1000, 0.2): standard deviation 12.6; five of them
    assert all(137 < count < 263 for count in counts.values())


def test_a_huge_repository_stays_on_the_training_side():
    sizes = {"huge": 1000, **{f"r{i}": 10 for i in range(20)}}
    assert all("huge" not in hold_out(sizes, 0.1, seed) for seed in range(100))
    assert hold_out({"a": 900, "b": 1000}, 0.05, 0) == {"a"}
    assert hold_out(sizes, 0.0, 0) == set()


def test_spool_gives_back_what_it_got(tmp_path):
    rng = np.random.default_rng(0)
    documents = [
        Document(
            f"text {i}\n\u4e2d\r", f"r{rng.integers(5)}", f"p{rng.integers(9)}\n.py", None, None, i
        )
        for i in range(100)
    ]
    spool = Spool(tmp_path / "spool")
    for document in documents:
        spool.add(document)
    assert [spool[number] for number in rng.permutation(100)] != documents
    assert [spool[number] for number in range(100)] == documents
    assert spool.repositories() == ["r0", "r1", "r2", "r3", "r4"]
    for repository in spool.repositories():
        numbers = spool.numbers(repository)
        wanted = [i for i, d in enumerate(documents) if d.repository == repository]
        assert numbers == sorted(wanted, key=lambda i: (documents[i].path, i))
    assert spool.num_bytes(range(100)) == sum(len(d.text.encode()) for d in documents)
    spool.close()
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize(
    ("paths", "level", "units"),
    [
        (["a/x", "b/y"], 1, ["r/a", "r/b"]),
        (["a/x", "a/y"], 2, ["r/a/x", "r/a/y"]),
        (["a/b/x", "a/b/y", "a/c"], 2, ["r/a/b", "r/a/c"]),
        (["x", "a/x"], 1, ["r/a", "r/x"]),
        (["a/x"], 0, ["r"]),
        (["", ""], 0, ["r"]),
    ],
)
def test_units_of_a_single_repository(tmp_path, paths, level, units):
    spool = Spool(tmp_path / "spool")
    for number, path in enumerate(paths):
        spool.add(Document(f"text {number}", "r", path))
    found, depth = units_of(spool)
    assert (sorted(found), depth) == (units, level)
    assert sorted(n for numbers in found.values() for n in numbers) == list(range(len(paths)))
    spool.close()


def test_seeds_of_repositories():
    assert seed_of(1, "a/b") == seed_of(1, "a/b")
    seeds = {tuple(seed_of(s, name)) for s in (1, 2) for name in ("a", "b", "", "1\0a")}
    assert len(seeds) == 8
    first = np.random.default_rng(seed_of(1234, "owner/name")).random()
    assert first == np.random.default_rng(seed_of(1234, "owner/name")).random()
