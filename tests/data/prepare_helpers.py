"""A small corpus of packages, and `prepare` of it with small sizes."""

import hashlib

import numpy as np

from stellarator.data.prepare import prepare


def code(rng: np.random.Generator, lines: int) -> str:
    """Text like Python; about half of it is the same in all files."""
    names = ["value", "index", "self", "node", "left", "caf\u00e9", "total_", "x1", "y23"]
    body = [
        f"    {rng.choice(names)} = {rng.choice(names)} + {rng.integers(100)}" for _ in range(lines)
    ]
    return f"def f{rng.integers(1 << 30)}():\n" + "\n".join(body) + "\n"


def make_corpus(root, *, repositories: int = 12, seed: int = 0):
    """A folder of packages with 1 to 5 files each; returns {(repository, path): text}."""
    rng = np.random.default_rng(seed)
    texts = {}
    for number in range(repositories):
        for file in range(int(rng.integers(1, 6))):
            path = f"package{number}/module{file}.py"
            texts[f"{root.name}/package{number}", path] = code(rng, int(rng.integers(2, 40)))
    evil = "x = '<|endoftext|><fim_prefix><file_sep><repo_name>'  # <gh_stars>\n" + code(rng, 5)
    texts[f"{root.name}/package0", "package0/evil.py"] = evil
    for (_, path), text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())
    return texts


def run(sources, output, **options):
    options = {"vocab_size": 330, "validation_fraction": 0.2, "seed": 3} | options
    return prepare(sources, output, **options)


def files_of(output) -> dict[str, str]:
    """Hash of every file but the timings."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.name != "timings.json"]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }
