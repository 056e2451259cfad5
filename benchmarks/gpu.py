"""`python -m benchmarks gpu`: check and time the kernels on a GPU, in under nine minutes.

At StarCoder2-3B's shapes: attention at long contexts first (8K and 16K, window 4096, documents,
decoding; `--table attention` is that alone), then every op at 4,096 tokens; `--table mlp` is the
products of the MLP at 16K. Each case is checked and then timed beside every peer that can be
imported, and CUDA C++ beside Triton where an op has both. The time of the whole run is shared
evenly by the cases, and those that it did not suffice for are named. It leaves NAME.json, one point
a line, and NAME.md, a page; page.py has what is on it. `--dry` goes the same way on tensors of the
CPU at small shapes, with TRITON_INTERPRET=1: its times mean nothing, its checks do.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from benchmarks import clocks, page, results, suite
from benchmarks.ops import OPS
from benchmarks.usage import UsageError, count, positive
from stellarator.progress import Progress

_MODEL, _TOKENS, _ROWS, _REPEATS = "starcoder2_3b", 4096, 2, 20
_SECONDS = 520.0  # of the whole run; nine minutes with what comes before and after
# Plans of a table. Peers of attention: plain eager code would need more memory than there is.
_PEERS = "sdpa,flash,cudnn,flex,varlen,flash_attn,any_order,unpacked"
TABLES = {
    "attention": (
        {"ops": ("flash_attention",), "tokens": 8192, "rows": 2, "variants": ("causal",)},
        {"ops": ("flash_attention",), "tokens": 16384, "rows": 1},
        {"ops": ("decode_attention",), "model": "starcoder", "tokens": 8192, "rows": 64},
        {"ops": ("decode_attention",), "tokens": 16384, "rows": 16},
    ),
    # The plain products, with epilogues between them, with the norm in front, and their gradients.
    "mlp": (
        {
            "ops": ("linear", "mlp", "layer_norm_mlp", "add_weight_gradient_"),
            "tokens": 16384,
            "rows": 1,
            "peers": "default",
        },
    ),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `gpu`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="(bfloat16)")
    parser.add_argument("--model", help=f"({_MODEL})")
    parser.add_argument("--tokens", type=count, help=f"of a row ({_TOKENS})")
    parser.add_argument("--rows", type=count, help=f"of the micro-batch ({_ROWS})")
    parser.add_argument("--peers", default="default", help="names with commas between")
    parser.add_argument("--op", help="with commas between (all, and the table of attention)")
    parser.add_argument("--table", choices=TABLES, help="this table alone")
    parser.add_argument("--small", action="store_true", help="small shapes, to try it out")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, in float32")
    parser.add_argument("--repeats", type=count, help=f"turns of a case at most ({_REPEATS})")
    parser.add_argument(
        "--seconds-total", type=positive, default=_SECONDS, help=f"of the run ({_SECONDS:g})"
    )
    parser.add_argument(
        "--output", "--json", dest="output", default="runs/gpu", metavar="NAME",
        help="NAME.json gets one JSON line a point, NAME.md the page (runs/gpu)",
    )  # fmt: skip


def plan_of(given: argparse.Namespace) -> suite.Plan:
    """The plan that the options describe; ops without a Triton kernel run what `auto` takes."""
    dry, small = given.dry, given.small or given.dry
    if dry and (given.device or given.dtype or given.model):
        raise UsageError(
            "--dry: expected no --device, --dtype or --model, as it is tiny, on the CPU and in "
            "float32, got one. Leave it out, or --dry."
        )
    ops = {} if given.op is None else {"ops": tuple(given.op.split(","))}
    return suite.Plan(
        model="tiny" if dry else given.model or _MODEL,
        tokens=given.tokens if small else given.tokens or _TOKENS,
        rows=given.rows if small else given.rows or _ROWS,
        small=small,
        device="cpu" if dry else given.device or "cuda",
        # The interpreter's casts to bfloat16 truncate.
        dtype="float32" if dry else given.dtype or "bfloat16",
        impls=("triton", "cuda", "auto"),
        peers=given.peers,
        warmup=0 if dry else 2,
        repeats=given.repeats or (1 if dry else _REPEATS),
        seconds=60.0,
        **ops,
    )


def plans_of(given: argparse.Namespace) -> list[suite.Plan]:
    """Those of a table; the plan of the options; or, without any, the table of attention first."""
    one = plan_of(given)
    own_shape = given.dry or given.small or given.op or given.tokens or given.rows
    if given.table is None and own_shape:
        return [one]
    if own_shape:
        raise UsageError(
            "--table: expected no --op, --tokens, --rows, --small or --dry, as a table has its "
            "own, got one. Leave it out."
        )
    base = dataclasses.replace(one, tokens=None, rows=None, peers=_PEERS)
    asked = {} if given.peers == "default" else {"peers": given.peers}
    entries = TABLES[given.table or "attention"]
    table = [dataclasses.replace(base, **(entry | asked)) for entry in entries]
    others = tuple(op for op in OPS if op != "decode_attention")
    return table if given.table else [*table, dataclasses.replace(one, ops=others)]


def files_of(name: str) -> tuple[Path, Path]:
    """NAME.json and NAME.md, which can be written; a suffix of these is not doubled."""
    path = Path(name)
    path = path.with_suffix("") if path.suffix in (".json", ".md") else path
    files = tuple(path.with_name(path.name + suffix) for suffix in (".json", ".md"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files[1].touch()
    except OSError as error:
        raise UsageError(f"--output: expected files that can be written, got {error}") from None
    return files


def main(given: argparse.Namespace) -> int:
    """Check, time, write and print; 1 if an op is wrong or nothing was measured."""
    begun, todo = time.monotonic(), plans_of(given)
    for plan in todo:
        plan.check()
    points_file, page_file = files_of(given.output)
    states = {"before": dataclasses.asdict(read_clocks(todo[0]))}
    with results.Writer(str(points_file)) as write, Progress("gpu") as show:
        left = given.seconds_total - (time.monotonic() - begun)
        outcome = suite.run(todo, write, show, seconds=left, extra={"clocks": states})
        states["after"] = dataclasses.asdict(read_clocks(todo[0]))
        write.again()  # every point has its run's states in its environment
    text = page.page(write.points, outcome, time.monotonic() - begun, dry=given.dry)
    page_file.write_text(text, encoding="utf-8")
    print(f"{text}\n{points_file} {page_file}")
    return 1 if outcome.wrong or not write.points else 0


def read_clocks(plan: suite.Plan) -> clocks.State:
    """Of the GPU of a plan while it multiplies matrices."""
    if plan.device != "cuda":
        return clocks.UNKNOWN
    x = torch.ones(4096, 4096, device="cuda", dtype=getattr(torch, plan.dtype))

    def multiply() -> None:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()

    return clocks.read(multiply)
