"""The output folder of `prepare`: runs that fail, are stopped or killed, and what is not replaced.

The reference is the folder as it was before, or the hashes in the manifest of a result. Not
covered: two machines on one network file system.
"""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from prepare_helpers import files_of, make_corpus, run

from stellarator.data import prepare as module
from stellarator.data.shards import Shard
from stellarator.data.sources import SourceError, read_sources
from stellarator.data.tokenizer import Tokenizer


def test_a_failure_leaves_the_old_result_and_no_rest(tmp_path, monkeypatch):
    make_corpus(tmp_path / "lib")
    run([tmp_path / "lib"], tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("keep")
    before = files_of(tmp_path / "out")

    def full(*arguments):
        raise OSError(28, "No space left on device", "held_out.jsonl")

    monkeypatch.setattr(module, "_write_held_out", full)
    with pytest.raises(OSError, match="No space left on device"):
        run([tmp_path / "lib"], tmp_path / "out", seed=5, overwrite=True)
    assert files_of(tmp_path / "out") == before
    monkeypatch.undo()
    run([tmp_path / "lib"], tmp_path / "out", seed=5, overwrite=True)
    assert files_of(tmp_path / "out") != before
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("limit", [2_000, 8_000, 14_000, 20_000])
def test_files_that_cannot_grow_are_one_clear_line(tmp_path, limit):
    """As on a full disk, at several stages: the spool, the tokenizer, the shards."""
    make_corpus(tmp_path / "lib")
    program = (
        "import sys, resource\nfrom stellarator.data.prepare import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "try:\n    prepare([sys.argv[1]], sys.argv[2], vocab_size=400)\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "lib"), str(tmp_path / "out"), str(limit)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.fullmatch(r".*File too large.*: '.*/out.*'\n", done.stdout), done.stdout
    assert not (tmp_path / "out").exists()


def test_a_data_set_is_replaced_on_request_only(tmp_path):
    make_corpus(tmp_path / "lib")
    out = tmp_path / "out"
    run([tmp_path / "lib"], out)
    before = files_of(out)
    with pytest.raises(ValueError, match=r"got .*out, which holds a data set\. .* --overwrite"):
        run([tmp_path / "lib"], out, seed=5)
    assert files_of(out) == before
    run([tmp_path / "lib"], out, seed=5, overwrite=True)
    assert files_of(out).keys() == before.keys() and files_of(out) != before
    assert sorted(os.listdir(out)) == sorted(
        ["tokenizer", "train.bin", "train.idx", "validation.bin", "validation.idx"]
        + ["held_out.jsonl", "timings.json", "manifest.json"]
    )


@pytest.mark.parametrize("name", ["train.bin", "validation.idx", "tokenizer", "held_out.jsonl"])
def test_files_of_others_with_our_names_are_not_replaced(tmp_path, name):
    make_corpus(tmp_path / "lib")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    path = tmp_path / "out" / name
    path = path / "tokenizer.json" if name == "tokenizer" else path
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"which holds {name}. Choose another folder"):
        run([tmp_path / "lib"], tmp_path / "out")
    assert len(files_of(tmp_path / "out")) == 2 and path.read_text() == "mine"
    run([tmp_path / "lib"], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" != path.read_bytes()


@pytest.mark.parametrize("there", ["", "new", "new/deep"])
def test_a_failed_run_leaves_no_folder_that_it_made(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SourceError, match="does not exist"):
        run([tmp_path / "absent"], tmp_path / "new" / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("output", ["file", "file/inside", "file/in/side"])
def test_a_file_for_the_output_is_one_clear_line(tmp_path, output):
    make_corpus(tmp_path / "lib")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder for the output, got .*/file, which is"):
        run([tmp_path / "lib"], tmp_path / output)
    assert (tmp_path / "file").read_text() == "mine"


def check_whole(out) -> bool:
    """Whether there is a result; if there is, all of it belongs together."""
    if not (out / "manifest.json").exists():
        return False
    manifest = json.loads((out / "manifest.json").read_text())
    assert Tokenizer.load(out / "tokenizer").sha256 == manifest["tokenizer"]["sha256"]
    for side in module.SIDES:
        assert Shard(out / side).num_tokens == manifest[side]["tokens"]
        for kind, digest in manifest[side]["sha256"].items():
            assert digest == hashlib.sha256((out / f"{side}.{kind}").read_bytes()).hexdigest()
    held_out = list(read_sources([out / "held_out.jsonl"]))
    assert {d.repository for d in held_out} == set(manifest["split"]["held_out"])
    return True


def test_stopped_while_the_files_are_put_in_place(tmp_path, monkeypatch):
    """Before every one of the ten renames: with a manifest the result is whole."""
    make_corpus(tmp_path / "lib")
    out, rename, stops, whole = tmp_path / "out", os.rename, 0, 0
    for stop in range(20):
        run([tmp_path / "lib"], out, seed=1, overwrite=bool(stop and check_whole(out)))
        left = stop

        def replace(source, target):
            nonlocal left, stops
            if ".partial" in str(source) and ".partial" not in str(target):
                if left == 0:
                    stops += 1
                    raise KeyboardInterrupt
                left -= 1
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            run([tmp_path / "lib"], out, seed=2, overwrite=True)
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        whole += check_whole(out)
    assert stops == 10 and whole == 20 - stops


def test_two_runs_into_one_folder_at_a_time_are_refused(tmp_path):
    make_corpus(tmp_path / "lib")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another run is writing to it"):
            run([tmp_path / "lib"], tmp_path / "out")
    run([tmp_path / "lib"], tmp_path / "out")


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Another run ended between our opening of the file and our locking of it."""
    make_corpus(tmp_path / "lib")

    def flock(file, flags):
        os.remove(file.name)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.raises(RuntimeError, match="another run is writing to it"):
        run([tmp_path / "lib"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kill_at_any_moment_leaves_a_whole_result_or_none(tmp_path):
    make_corpus(tmp_path / "lib")
    program = (
        "import sys, itertools\nfrom stellarator.data.prepare import prepare\n"
        "for seed in itertools.count():\n"
        "    prepare([sys.argv[1]], sys.argv[2], vocab_size=400, seed=seed, overwrite=True)\n"
        "    print(seed, flush=True)\n"
    )
    rng = np.random.default_rng(0)
    out = tmp_path / "out"
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "lib"), str(out)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        process.stdout.readline()
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
        check_whole(out)
    assert run([tmp_path / "lib"], out, overwrite=True)["train"]["documents"] > 0
    assert not (out / ".partial").exists() and not (out / ".lock").exists()
