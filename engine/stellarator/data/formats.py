"""How documents are laid out as training text: StarCoder (v1) and StarCoder2 repository context.

defines: Special, Piece, starcoder, starcoder2_repository

A laid-out document is a list of pieces. A piece is `str`, which is text and is never read as a
special token whatever it holds, or `Special`, which is exactly one special token. The
`<|endoftext|>`
between documents is not a piece: whoever writes the shard puts it there.

Source: preprocessing of bigcode-project/bigcode-dataset (v1); arXiv:2402.19173, section 5
(StarCoder2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stellarator.data.documents import Document

METADATA_RATE = 0.2  # v1: of each of repository, file name and stars
REPOSITORY_METADATA_RATE = 0.5  # StarCoder2: of repositories shown with names


class Special(NamedTuple):
    """One special token, by its string."""

    token: str


Piece = str | Special


def star_bucket(stars: int | None) -> str:
    """The bucket of a star count: 0, 1-10, 10-100, 100-1000 or 1000+."""
    if not stars or stars < 0:
        return "0"
    if stars <= 10:
        return "1-10"
    if stars <= 100:
        return "10-100"
    if stars <= 1000:
        return "100-1000"
    return "1000+"


def starcoder(document: Document, rng: np.random.Generator) -> list[Piece]:
    """One file as StarCoder saw it: some metadata, a newline if there was any, then the text.

    `<reponame>`, `<filename>` and `<gh_stars>` come independently with probability 0.2 each, in
    this order. Three numbers are drawn whatever the document holds, so later documents do not
    depend on it; a name that is not known is left out.
    """
    draws = rng.random(3) < METADATA_RATE
    pieces: list[Piece] = []
    if draws[0] and document.repository:
        pieces += [Special("<reponame>"), document.repository]
    if draws[1] and document.path:
        pieces += [Special("<filename>"), document.path]
    if draws[2]:
        pieces += [Special("<gh_stars>"), star_bucket(document.stars)]
    if pieces:
        pieces.append("\n")
    pieces.append(document.text)
    return pieces


def starcoder2_repository(documents: Sequence[Document], rng: np.random.Generator) -> list[Piece]:
    """One repository as StarCoder2 saw it: all its files, in random order.

    With probability 0.5 `<repo_name>name<file_sep>path1\\ncode1<file_sep>path2\\ncode2 ...`, else
    `<file_sep>code1<file_sep>code2 ...`.

    Args:
        documents: the files of one repository (at least one).
        rng: one draw decides on the metadata, then the order is drawn.
    Raises:
        ValueError: no documents, or documents of several repositories.
    """
    names = {document.repository for document in documents}
    if len(names) != 1:
        raise ValueError(
            f"starcoder2_repository: expected documents of one repository, got {len(names)} "
            "repositories. Group the documents first."
        )
    metadata = rng.random() < REPOSITORY_METADATA_RATE
    pieces: list[Piece] = [Special("<repo_name>"), names.pop()] if metadata else []
    for index in rng.permutation(len(documents)):
        document = documents[index]
        text = f"{document.path}\n{document.text}" if metadata else document.text
        pieces += [Special("<file_sep>"), text]
    return pieces
