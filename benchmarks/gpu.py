"""`python -m benchmarks gpu`: `run` for the Triton kernels on a GPU, at StarCoder2-3B's shapes.

Every op is checked at a small and, where the float64 reference fits, at the timed shape, and then
timed beside every peer that can be imported. `--table attention` times attention at long contexts:
8K and 16K, window 4096, documents, decoding. `--dry` goes the same way on tensors of the CPU at
small shapes, with TRITON_INTERPRET=1: its times mean nothing, its checks do.
"""

import argparse
import dataclasses

import torch

from benchmarks import results, suite
from benchmarks.run import print_report
from benchmarks.usage import UsageError, count
from stellarator.progress import Progress

_TOKENS, _ROWS = 4096, 2
# Plans of a table; plain eager code would need more memory than there is.
_PEERS = "sdpa,cudnn,flex,varlen,flash_attn,any_order,unpacked"
TABLES = {
    "attention": (
        {"ops": ("flash_attention",), "tokens": 8192, "rows": 2, "variants": ("causal",)},
        {"ops": ("flash_attention",), "tokens": 16384, "rows": 1},
        {"ops": ("decode_attention",), "model": "starcoder", "tokens": 8192, "rows": 64},
        {"ops": ("decode_attention",), "tokens": 16384, "rows": 16},
    )
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `gpu`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--model", default="starcoder2_3b")
    parser.add_argument("--tokens", type=count, help=f"of a row ({_TOKENS})")
    parser.add_argument("--rows", type=count, help=f"of the micro-batch ({_ROWS})")
    parser.add_argument("--peers", default="default", help="names with commas between")
    parser.add_argument("--op", help="with commas between (all)")
    parser.add_argument("--table", choices=TABLES, help="another set of shapes")
    parser.add_argument("--small", action="store_true", help="small shapes, to try it out")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, in float32")
    parser.add_argument("--repeats", type=count, default=20)
    parser.add_argument(
        "--output", "--json", dest="output", metavar="FILE", help="one JSON line a point"
    )


def plan_of(given: argparse.Namespace) -> suite.Plan:
    """The plan that the options describe; ops without a Triton kernel run what `auto` takes."""
    dry, small = given.dry, given.small or given.dry
    ops = {} if given.op is None else {"ops": tuple(given.op.split(","))}
    return suite.Plan(
        model="tiny" if dry else given.model,
        tokens=given.tokens if small else given.tokens or _TOKENS,
        rows=given.rows if small else given.rows or _ROWS,
        small=small,
        device="cpu" if dry else given.device,
        # The interpreter's casts to bfloat16 truncate.
        dtype="float32" if dry else given.dtype,
        impls=("triton", "auto"),
        peers=given.peers,
        warmup=0 if dry else 2,
        repeats=1 if dry else given.repeats,
        seconds=60.0,
        **ops,
    )


def plans_of(given: argparse.Namespace) -> list[suite.Plan]:
    """One plan, or those of a table."""
    if given.table is None:
        return [plan_of(given)]
    if given.dry or given.small or given.op or given.tokens or given.rows:
        raise UsageError(
            "--table: expected no --op, --tokens, --rows, --small or --dry, as a table has its "
            "own, got one. Leave it out."
        )
    peers = _PEERS if given.peers == "default" else given.peers
    base = dataclasses.replace(plan_of(given), tokens=None, rows=None, peers=peers)
    return [dataclasses.replace(base, **entry) for entry in TABLES[given.table]]


def main(given: argparse.Namespace) -> int:
    """Check, time and print; 1 if an op is wrong or nothing was measured."""
    todo = plans_of(given)
    for plan in todo:
        plan.check()
    with results.Writer(given.output) as write, Progress("gpu") as show:
        outcome = suite.run_all(todo, write, show)
    print_report(write.points, outcome)
    if todo[0].device == "cuda":
        print(f"\npeak of the allocator: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return 1 if outcome.wrong or not write.points else 0
