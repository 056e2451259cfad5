"""What the tests of reading share: reading with a complete account, in a process of its own too."""

import json
import os
import subprocess
import sys

from stellarator.data.documents import Report
from stellarator.data.sources import read_sources


def read(*paths, limits=None, deduplicate=True):
    """(documents, report) of these sources; the account must be complete."""
    report = Report()
    options = {"report": report, "limits": limits, "deduplicate": deduplicate}
    documents = list(read_sources(paths, **options))
    report.check()
    assert report.kept == len(documents)
    assert report.kept_bytes == sum(len(document.text.encode()) for document in documents)
    json.dumps(report.to_json(), ensure_ascii=False).encode()
    return documents, report


READER = r"""
import json, re, sys, time
from stellarator.data.documents import Report
from stellarator.data.sources import read_sources
import pyarrow.parquet, zstandard  # so that their own size is not counted

def peak_mib():  # of this process alone; ru_maxrss is inherited from the parent
    return int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024

report, began, before = Report(), time.process_time(), peak_mib()
texts = [document.text for document in read_sources(sys.argv[1:], report=report)]
grown, seconds = peak_mib() - before, time.process_time() - began
report.check()
print(json.dumps([texts, report.skipped, report.seen, grown, seconds]))
"""


def read_apart(*paths):
    """(texts, reasons, seen) read in a process of its own: at most 5 s of CPU and 64 MiB more."""
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)], capture_output=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60,
    )  # fmt: skip
    texts, skipped, seen, grown_mib, seconds = json.loads(done.stdout)
    assert grown_mib < 64 and seconds < 5, (grown_mib, seconds)
    return texts, skipped, seen


def put(path, data: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path
