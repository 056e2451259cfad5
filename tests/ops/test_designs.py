"""Designs that tables may choose on a GPU, at the tiles that are raced, against float64.

On a GPU, or compiled and emulated (grid.py): the interpreter knows neither warps of their own for
loads nor what Triton makes of them. The references are those of attention_cases.py, test_mlp.py and
test_weight_gradient.py. Not covered: speed.
"""

import pytest
import torch
from attention_cases import BF16, Case, check
from grid import COMPILED, TRITON
from test_mlp import compare as compare_mlp
from test_mlp import make as make_mlp
from test_weight_gradient import compare as compare_weight_gradient

from stellarator_kernels import tuned
from stellarator_kernels.matmul import PHASES
from stellarator_kernels.matmul import Tiles as ProductTiles

pytestmark = [
    TRITON,
    pytest.mark.skipif(not COMPILED, reason="there is no code in the interpreter"),
]
CAPABILITY = torch.cuda.get_device_capability() if COMPILED else None
HOPPER = pytest.mark.skipif(CAPABILITY != (9, 0), reason="no GPU of compute capability 9.0")
CASES = {
    "causal, group of 3": Case(300, H=6, G=2, D=128),
    "window": Case(520, H=2, G=1, D=128, window=200),
    "not causal, more keys": Case(130, S=300, H=2, G=1, D=128, causal=False),
    "head of 64": Case(300, H=2, G=1, D=64),
    "documents": Case(400, documents=(1, 130, 269), H=2, G=1, D=128),
}
NAMES = ("own", "step", "num_warps", "num_stages", "tma", "specialize")
GLUON = {"design": "gluon", "step": 64, "stages": 2, "dq_step": 64, "dq_stages": 3}


def tiles(*values):
    return dict(zip(NAMES, values, strict=True))


FORWARD = {
    "pointers": ("forward", tiles(128, 64, 8, 2, 0, 0)),
    "descriptors": ("forward", tiles(128, 64, 8, 3, 1, 0)),
    "loading warps, 64 rows": ("forward", tiles(64, 64, 4, 2, 1, 1)),
    "loading warps, 2 x 64 rows": ("forward", tiles(128, 64, 4, 2, 1, 1)),
    "gluon": ("forward design", {"design": "gluon", "step": 128, "stages": 2, "turns": 1}),
    "gluon, not by turns": (
        "forward design",
        {"design": "gluon", "step": 64, "stages": 3, "turns": 0},
    ),
}
BACKWARD = {
    "dq by descriptors": ("dq", tiles(128, 64, 8, 2, 1, 0)),
    "dq, loading warps": ("dq", tiles(64, 64, 4, 2, 1, 1)),
    "dkdv by descriptors": ("dkdv", tiles(64, 64, 8, 2, 1, 0)),
    "ordered": ("backward", {"design": "ordered"}),
    "gluon": ("backward", GLUON),
}
PRODUCTS = {
    "pointers": ProductTiles(128, 128, 64, 8, 3, 2),
    "descriptors": ProductTiles(128, 128, 64, 8, 3, 2, 8, 1, 0),
    "persistent": ProductTiles(128, 256, 64, 8, 3, 4, 8, 1, 1),
    "flattened": ProductTiles(128, 256, 64, 8, 3, 4, 8, 1, 1, 1),
}


def check_with(name, entry, case):
    """The case with one entry of a table."""
    phase = f"{name} packed" if case.documents and name == "forward" else name
    entries = {f"flash_attention forward design {case.D}": {"design": "triton"}}
    with tuned.use(entries | {f"flash_attention {phase} {case.D}": entry}):
        check(case, BF16, "triton")


@HOPPER
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("name", "entry"), FORWARD.values(), ids=FORWARD)
def test_the_forward(name, entry, case):
    if case.documents and entry.get("specialize") and entry["own"] == 128:
        pytest.skip("Triton (3.6 and 3.9) compiles it for rows without documents only")
    check_with(name, entry, case)


@HOPPER
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("name", "entry"), BACKWARD.values(), ids=BACKWARD)
def test_the_backward(name, entry, case):
    check_with(name, entry, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("design", PRODUCTS)
def test_the_products_of_an_mlp(design, dtype):
    if PRODUCTS[design].tma and CAPABILITY < (9, 0):
        pytest.skip("no copy engine")
    *tensors, dout = make_mlp(300, 136, 520, dtype)
    with tuned.use({f"matmul {phase}": vars(PRODUCTS[design]) for phase in PHASES}):
        compare_mlp(tensors, dout, impl="triton")


@pytest.mark.parametrize("design", PRODUCTS)
def test_the_weight_gradient(design):
    if PRODUCTS[design].tma and CAPABILITY < (9, 0):
        pytest.skip("no copy engine")
    dy, x = (torch.randn(300, width).to(torch.bfloat16) for width in (520, 136))
    with tuned.use({"matmul weight gradient": vars(PRODUCTS[design])}):
        compare_weight_gradient(torch.randn(520, 136), dy, x, impl="triton")
