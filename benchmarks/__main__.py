"""`python -m benchmarks VERB`."""

import argparse
import sys


def main() -> int:
    """Run one verb."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    train = verbs.add_parser("train", help="one training step beside transformers: time and memory")
    train.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    train.add_argument("--layers", type=int, default=6)
    train.add_argument("--width", type=int, default=384)
    train.add_argument("--heads", type=int, default=6)
    train.add_argument("--kv-heads", type=int, default=2)
    train.add_argument("--vocab", type=int, default=8192)
    train.add_argument("--rows", type=int, default=8)
    train.add_argument("--length", type=int, default=1024)
    train.add_argument("--repeats", type=int, default=7)
    train.add_argument("--peers", default="eager", help="eager, compiled, or eager,compiled")
    train.add_argument("--json", metavar="FILE", help="append one JSON line per provider")
    train.set_defaults(module="bench_train")
    gpu = verbs.add_parser("gpu", help="every op on a GPU: checked, then timed beside ATen")
    gpu.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    gpu.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    gpu.add_argument("--small", action="store_true", help="small shapes, to try it out")
    gpu.add_argument("--repeats", type=int, default=20)
    gpu.add_argument("--json", metavar="FILE", help="write everything measured")
    gpu.set_defaults(module="bench_ops")
    arguments = parser.parse_args()
    from importlib import import_module

    return import_module(f"benchmarks.{arguments.module}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
