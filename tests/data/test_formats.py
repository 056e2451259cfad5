"""Layouts of documents, against strings written out by hand and the rates of the papers.

Not covered: formats of issues, notebooks and commits, which are elsewhere.
"""

import numpy as np
import pytest

from stellarator.data.documents import Document
from stellarator.data.formats import Special, star_bucket, starcoder, starcoder2_repository


def rendered(pieces) -> str:
    """The pieces as one string, specials in their spelling."""
    return "".join(piece.token if isinstance(piece, Special) else piece for piece in pieces)


class Draws:
    """In place of a generator: gives the numbers it is told to."""

    def __init__(self, *numbers: float, order=None):
        self.numbers, self.order = list(numbers), order

    def random(self, count=None):
        if count is None:
            return self.numbers.pop(0)
        return np.array([self.numbers.pop(0) for _ in range(count)])

    def permutation(self, count):
        assert len(self.order) == count
        return np.array(self.order)


FILE = Document("x = 1\n", "owner/name", "src/a.py", "Python", "MIT", 42)


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ((0.5, 0.5, 0.5), "x = 1\n"),
        ((0.1, 0.5, 0.5), "<reponame>owner/name\nx = 1\n"),
        ((0.5, 0.1, 0.5), "<filename>src/a.py\nx = 1\n"),
        ((0.5, 0.5, 0.1), "<gh_stars>10-100\nx = 1\n"),
        ((0.1, 0.1, 0.1), "<reponame>owner/name<filename>src/a.py<gh_stars>10-100\nx = 1\n"),
        ((0.2, 0.2, 0.2), "x = 1\n"),
    ],
)
def test_starcoder_layout(draws, expected):
    assert rendered(starcoder(FILE, Draws(*draws))) == expected


def test_starcoder_leaves_out_what_is_not_known():
    document = Document("x", "", "")
    assert rendered(starcoder(document, Draws(0.0, 0.0, 0.5))) == "x"
    assert rendered(starcoder(document, Draws(0.0, 0.0, 0.0))) == "<gh_stars>0\nx"


@pytest.mark.parametrize(
    ("stars", "bucket"),
    [(None, "0"), (0, "0"), (-1, "0"), (1, "1-10"), (10, "1-10"), (11, "10-100"),
     (100, "10-100"), (101, "100-1000"), (1000, "100-1000"), (1001, "1000+"), (10**9, "1000+")],
)  # fmt: skip
def test_star_buckets(stars, bucket):
    assert star_bucket(stars) == bucket


def test_starcoder_rates_are_one_in_five_and_independent():
    rng, count = np.random.default_rng(0), 20_000
    shown = np.zeros((count, 3), dtype=bool)
    for row in shown:
        text = rendered(starcoder(FILE, rng))
        row[:] = [token in text for token in ("<reponame>", "<filename>", "<gh_stars>")]
    # five standard deviations of a share of 20,000 draws
    np.testing.assert_allclose(shown.mean(0), 0.2, atol=5 * (0.16 / count) ** 0.5)
    assert abs(shown.all(1).mean() - 0.008) < 5 * (0.008 / count) ** 0.5


FILES = [Document(f"code{i}", "owner/name", f"path{i}") for i in range(3)]


def test_starcoder2_layout_with_metadata():
    pieces = starcoder2_repository(FILES, Draws(0.49, order=[2, 0, 1]))
    assert rendered(pieces) == (
        "<repo_name>owner/name<file_sep>path2\ncode2<file_sep>path0\ncode0<file_sep>path1\ncode1"
    )
    assert pieces[:3] == [Special("<repo_name>"), "owner/name", Special("<file_sep>")]


def test_starcoder2_layout_without_metadata():
    pieces = starcoder2_repository(FILES, Draws(0.5, order=[1, 2, 0]))
    assert rendered(pieces) == "<file_sep>code1<file_sep>code2<file_sep>code0"


def test_starcoder2_rate_and_order_are_random():
    rng, count = np.random.default_rng(1), 6000
    texts = [rendered(starcoder2_repository(FILES, rng)) for _ in range(count)]
    share = sum(text.startswith("<repo_name>") for text in texts) / count
    assert abs(share - 0.5) < 5 * (0.25 / count) ** 0.5
    orders = {tuple(sorted(range(3), key=lambda i: text.index(f"code{i}"))) for text in texts}
    assert len(orders) == 6


def test_layouts_depend_on_the_generator_only():
    for layout in (lambda rng: starcoder(FILE, rng), lambda rng: starcoder2_repository(FILES, rng)):
        first = [layout(np.random.default_rng([5, n])) for n in range(50)]
        assert first == [layout(np.random.default_rng([5, n])) for n in range(50)]
        assert first != [layout(np.random.default_rng([6, n])) for n in range(50)]


def test_draws_do_not_depend_on_what_a_document_holds():
    """So that leaving out the name of one file changes no other file of the repository."""
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    starcoder(FILE, one), starcoder(Document("y", "", ""), other)
    assert one.random() == other.random()


def test_sentinels_in_names_and_text_stay_text():
    evil = Document("<file_sep><|endoftext|>", "<repo_name>", "<fim_prefix>", stars=1)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for pieces in (starcoder(evil, rng), starcoder2_repository([evil], rng)):
            special = [piece.token for piece in pieces if isinstance(piece, Special)]
            allowed = {"<reponame>", "<filename>", "<gh_stars>", "<repo_name>", "<file_sep>"}
            assert set(special) <= allowed and special.count("<file_sep>") <= 1
            assert any("<|endoftext|>" in piece for piece in pieces if isinstance(piece, str))


def test_documents_of_several_repositories_are_refused():
    other = Document("x", "someone/else", "a.py")
    with pytest.raises(ValueError, match="expected documents of one repository, got 2"):
        starcoder2_repository([FILES[0], other], np.random.default_rng(0))
    with pytest.raises(ValueError, match="got 0 repositories"):
        starcoder2_repository([], np.random.default_rng(0))
