"""What each PTX instruction is for machine.cpp: an operation with a type, numbers and operands.

`encode` looks the instruction up by its first word. What is not known here, a word behind it
included, is refused by name: it has what the compiled kernels use. The numbers of an operation (at
most five) are those that its case in compute.cpp or execute.cpp reads.

defines: OPERATIONS, TYPES, COLLECTIVE, NOTHING, Line, group, width, encode
"""

import re
from dataclasses import dataclass

OPERATIONS = (
    "mov pack unpack ld_param ld st add_atomic cp_async cp_async_commit cp_async_wait ldmatrix "
    "stmatrix add sub mul mul_hi mul_wide mad mad_wide fma div rem min max neg abs not and or xor "
    "shl shr bfe prmt selp setp set_pred cvt cvt_pack cvta ex2 rcp sqrt shfl redux elect bar bra "
    "brx ret nop converge mma wgmma wgmma_commit wgmma_wait mbarrier_init mbarrier_arrive "
    "mbarrier_expect mbarrier_wait fence_async tma_load tma_store tma_commit tma_wait map_replace "
    "map_copy"
).split()
TYPES = ("b8 u8 s8 b16 u16 s16 b32 u32 s32 b64 u64 s64 f16 bf16 f32 f64 pred f16x2 bf16x2").split()
# All lanes of a warp execute these together, those that come first wait. That the four warps of a
# warpgroup come to a product together is not checked.
COLLECTIVE = set("converge shfl redux elect bar mma wgmma ldmatrix stmatrix".split())
NOTHING = 1 << 30  # the operand of a result that nobody wants

_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
_BYTES |= dict.fromkeys(("b64", "u64", "s64", "f64"), 8)
_FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
_SPACES = {"global": 1, "shared": 2, "local": 3}  # 0: generic
_COMPARISONS = "eq ne lt le gt ge equ neu ltu leu gtu geu num nan".split()
_FIELDS = (  # of a tensor map
    "global_address rank box_dim global_dim global_stride element_stride elemtype "
    "interleave_layout swizzle_mode fill_mode"
).split()
# The words that may follow the first one.
_INTEGERS = "b16 b32 b64 u16 u32 u64 s16 s32 s64"
_SUMS = f"{_INTEGERS} f16 bf16 f32 f64 f16x2 bf16x2 rn ftz"
_PLACES = "global shared shared_cta v2 v4"
_MATRICES = "sync aligned m8n8 x1 x2 x4 trans shared shared_cta b16"
_WORDS = {
    "mov": f"{_INTEGERS} f32 f64 pred",
    "ld": f"{_PLACES} local {_INTEGERS} b8 u8 s8 f32 f64 param acquire relaxed gpu cg nc",
    "st": f"{_PLACES} local {_INTEGERS} b8 u8 f32 f64",
    "atom": "global gpu relaxed release acquire acq_rel add v2 v4 f32 u32 s32",
    "add": _SUMS,
    "sub": _SUMS,
    "mul": f"{_SUMS} lo hi wide",
    "mad": f"{_INTEGERS} lo wide",
    "fma": _SUMS,
    "div": f"{_SUMS} full approx",
    "rem": _INTEGERS,
    "min": _SUMS + " NaN",
    "max": _SUMS + " NaN",
    "neg": _SUMS,
    "abs": _SUMS,
    "not": f"{_INTEGERS} pred",
    "and": f"{_INTEGERS} pred",
    "or": f"{_INTEGERS} pred",
    "xor": f"{_INTEGERS} pred",
    "shl": _INTEGERS,
    "shr": _INTEGERS,
    "bfe": "u32 s32",
    "prmt": "b32",
    "selp": f"{_INTEGERS} f32 f64",
    "setp": f"{_INTEGERS} f16 bf16 f32 f64 {' '.join(_COMPARISONS)}",
    "cvt": f"{_SUMS} u8 s8 rni rzi rmi rpi",
    "cvta": "to global shared local param u64",
    "ex2": "approx ftz f32",
    "rcp": "approx ftz rn f32 f64",
    "sqrt": "approx ftz rn f32 f64",
    "shfl": "sync bfly idx b32",
    "redux": "sync min max s32 u32",
    "elect": "sync",
    "bar": "sync warp",
    "barrier": "sync",
    "bra": "uni",
    "brx": "idx",
    "ret": "",
    "setmaxnreg": "inc dec sync aligned u32",
    "fence": "proxy async shared_cta tensormap_generic acquire gpu",
    "cp": "async bulk tensor 1d 2d 3d 4d 5d shared shared_cta shared_cluster global ca cg read "
    "mbarrier_complete_tx_bytes bulk_group commit_group wait_group",
    "ldmatrix": _MATRICES,
    "stmatrix": _MATRICES,
    "mma": "sync aligned m16n8k16 row col f32 f16 bf16",
    "wgmma": "fence commit_group wait_group mma_async sync aligned f32 f16 bf16",
    "mbarrier": "init inval arrive expect_tx try_wait parity shared shared_cta b64",
    "tensormap": f"replace tile {' '.join(_FIELDS)} shared_cta b1024 b32 b64 global release gpu "
    "cp_fenceproxy sync aligned tensormap_generic",
}
_WORDS["red"] = _WORDS["atom"]


def width(kind: str) -> int:
    """Bytes of a value of this type; a predicate has one word for a warp."""
    return _BYTES.get(kind, 4)


def group(text: str) -> list[str]:
    """The parts of "{a, b}", or the one operand."""
    text = text.strip()
    return [x.strip() for x in text[1:-1].split(",")] if text.startswith("{") else [text]


@dataclass
class Line:
    """An instruction while it is encoded; `of` is the reader, which knows registers."""

    of: object
    base: str
    mods: list[str]
    args: list[str]
    guard: tuple[int, int]
    text: str

    def __post_init__(self):
        self.kind = next((m for m in reversed(self.mods) if m in TYPES), "b32")
        self.size = width(self.kind)
        self.flush = int("ftz" in self.mods)

    def has(self, *words: str) -> bool:
        return any(word in self.mods for word in words)

    def space(self) -> int:
        """Of the first modifier that names one; ".shared::cta" is shared."""
        named = (_SPACES[m.split("_")[0]] for m in self.mods if m.split("_")[0] in _SPACES)
        return next(named, 0)

    def value(self, i: int, size: int | None = None) -> int:
        return self.of.value(self.args[i], self.size if size is None else size)

    def values(self, i: int, size: int | None = None) -> list[int]:
        size = self.size if size is None else size
        return [self.of.value(x, size) for x in group(self.args[i])]

    def results(self, i: int, size: int | None = None) -> list[int]:
        """The same where "_" takes nothing."""
        size = self.size if size is None else size
        return [NOTHING if x == "_" else self.of.value(x, size) for x in group(self.args[i])]

    def pred(self, i: int) -> int:
        return self.of.predicate(self.args[i])

    def emit(self, operation: str, numbers=(), operands=(), kind: str | None = None) -> None:
        self.of.emit(operation, kind or self.kind, self.guard, numbers, operands, self.text)


def _mov(x: Line) -> None:
    if x.kind == "pred":
        x.emit("set_pred", (), [x.pred(0), x.pred(1)])
    elif x.args[0].startswith("{"):
        part = x.size // len(group(x.args[0]))
        x.emit("unpack", (part,), [x.value(1), *x.results(0, part)])
    elif x.args[1].startswith("{"):
        part = x.size // len(group(x.args[1]))
        x.emit("pack", (part,), [x.value(0), *x.values(1, part)])
    else:
        x.emit("mov", (), [x.value(0), x.value(1)])


def _load(x: Line) -> None:
    """The results may be wider than what is loaded."""
    at, plus, wide = x.of.address(x.args[1])
    operation = "ld_param" if x.has("param") else "ld"
    is_wide = int(x.size == 8 or any(x.of.wide(name) for name in group(x.args[0])))
    x.emit(operation, (x.space(), plus, wide, 0, is_wide), [at, *x.results(0)])


def _store(x: Line) -> None:
    """And what is stored may be narrower than the registers."""
    at, plus, wide = x.of.address(x.args[0])
    wides = sum(x.of.wide(name) << k for k, name in enumerate(group(x.args[1])))
    x.emit("st", (x.space(), plus, wide, wides), [at, *x.values(1)])


def _atomic(x: Line) -> None:
    """Sums only; what was there before is the result of atom."""
    first = 0 if x.base == "red" else 1
    at, plus, wide = x.of.address(x.args[first])
    results = x.results(0) if first else []
    given = x.values(first + 1)
    numbers = (x.space(), plus, wide, len(given), len(results))
    x.emit("add_atomic", numbers, [at, *results, *given])


def _two(x: Line) -> None:
    if x.kind == "pred":
        x.emit(x.base, (), [x.pred(i) for i in range(3)])
    elif x.has("wide"):
        x.emit("mul_wide", (), [x.value(0, 2 * x.size), x.value(1), x.value(2)])
    else:
        name = "mul_hi" if x.base == "mul" and x.has("hi") else x.base
        last = x.value(2, 4) if x.base in ("shl", "shr") else x.value(2)
        x.emit(name, (x.flush, int(x.has("NaN"))), [x.value(0), x.value(1), last])


def _three(x: Line) -> None:
    if x.has("wide"):
        ends = x.value(0, 2 * x.size), x.value(3, 2 * x.size)
        return x.emit("mad_wide", (), [ends[0], x.value(1), x.value(2), ends[1]])
    x.emit("fma" if x.kind in _FLOATS else "mad", (x.flush,), [x.value(i) for i in range(4)])


def _one(x: Line) -> None:
    if x.kind == "pred":
        return x.emit("not", (), [x.pred(0), x.pred(1)])
    x.emit(x.base, (x.flush,), [x.value(0), x.value(1)])


def _extract(x: Line) -> None:
    """The place and the length are 32 bits wide."""
    x.emit("bfe", (), [x.value(0), x.value(1), x.value(2, 4), x.value(3, 4)])


def _compare(x: Line) -> None:
    how = next(_COMPARISONS.index(m) for m in x.mods if m in _COMPARISONS)
    x.emit("setp", (how,), [x.pred(0), x.value(1), x.value(2)])


def _convert(x: Line) -> None:
    to, of = (m for m in x.mods if m in TYPES)
    if to in ("f16x2", "bf16x2"):
        return x.emit("cvt_pack", (), [x.value(i, 4) for i in range(3)], to)
    whole = [m for m in x.mods if m in ("rni", "rzi", "rmi", "rpi")]  # else to nearest
    rounding = ("rni", "rzi", "rmi", "rpi").index(whole[0]) if whole else 0
    values = [x.value(0, width(to)), x.value(1, width(of))]
    x.emit("cvt", (TYPES.index(of), rounding, x.flush, len(whole)), values, to)


def _shuffle(x: Line) -> None:
    """By all lanes."""
    if int(x.args[4], 0) not in (-1, 0xFFFFFFFF):
        raise NotImplementedError("a shuffle by some lanes")
    mode = ("bfly", "idx").index(x.mods[1])
    outs = x.args[0].split("|")
    results = [x.of.value(outs[0], 4), *map(x.of.predicate, outs[1:])]
    x.emit("shfl", (mode, len(outs)), [*results, *(x.value(i, 4) for i in (1, 2, 3))], "b32")


def _reduce(x: Line) -> None:
    x.emit("redux", (("min", "max").index(x.mods[1]),), [x.value(0), x.value(1)])


def _elect(x: Line) -> None:
    lane, leader = x.args[0].split("|")
    result = NOTHING if lane == "_" else x.of.value(lane, 4)
    x.emit("elect", (), [result, x.of.predicate(leader)])


def _barrier(x: Line) -> None:
    if x.has("warp"):
        return x.emit("converge")
    zero = x.of.constant(0, 4)
    x.emit("bar", (), [x.value(i, 4) if len(x.args) > i else zero for i in (0, 1)])


def _jump(x: Line) -> None:
    x.of.jump(x.args[-1])
    x.emit(x.base, (), [x.value(0, 4)] if x.base == "brx" else [])


def _cvta(x: Line) -> None:
    space = 4 if x.has("param") else x.space()
    x.emit("cvta", (int(x.has("to")), space), [x.value(0), x.value(1)])


def _fence(x: Line) -> None:
    x.emit("fence_async" if x.has("async") else "nop")


def _copy(x: Line) -> None:
    """cp.async, cp.async.bulk."""
    bulk = x.has("bulk")
    if x.has("commit_group"):
        return x.emit("tma_commit" if bulk else "cp_async_commit")
    if x.has("wait_group"):
        return x.emit("tma_wait" if bulk else "cp_async_wait", (int(x.args[0], 0),))
    if bulk:
        return _tensor_copy(x)
    (to, to_plus, _), (of, of_plus, _) = (x.of.address(x.args[i]) for i in (0, 1))
    size = int(x.args[2], 0)
    read = x.value(3, 4) if len(x.args) > 3 else x.of.constant(size, 4)
    x.emit("cp_async", (size, to_plus, of_plus), [to, of, read])


def _tensor_copy(x: Line) -> None:
    if not x.has("tensor"):
        raise NotImplementedError("a bulk copy without a tensor map")
    rank = next(i for i in range(1, 6) if f"{i}d" in x.mods)
    is_load = x.mods[x.mods.index(f"{rank}d") + 1].startswith("shared")
    tensor, shared = (x.args[1], x.args[0]) if is_load else (x.args[0], x.args[1])
    inner = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", tensor, re.DOTALL)
    places = [x.of.value(place, 4) for place in inner[2].split(",")]
    at, plus, _ = x.of.address(shared)
    operands = [at, x.of.value(inner[1], 8)]
    if not is_load:
        return x.emit("tma_store", (rank, plus), [*operands, *places])
    barrier, barrier_plus, _ = x.of.address(x.args[2])
    x.emit("tma_load", (rank, plus, barrier_plus), [*operands, barrier, *places])


def _matrices(x: Line) -> None:
    registers, address = (0, 1) if x.base == "ldmatrix" else (1, 0)
    at, plus, wide = x.of.address(x.args[address])
    x.emit(x.base, (int(x.has("trans")), plus, wide), [at, *x.values(registers, 4)], "b32")


def _mma(x: Line) -> None:
    kinds = [m for m in x.mods if m in TYPES]
    if kinds[0] != "f32" or kinds[3] != "f32":
        raise NotImplementedError("a product of these types")
    x.emit("mma", (), [v for i in range(4) for v in x.values(i, 4)], kinds[1])


def _wgmma(x: Line) -> None:
    if x.mods[0] != "mma_async":
        what = {"fence": "nop", "commit_group": "wgmma_commit", "wait_group": "wgmma_wait"}
        return x.emit(what[x.mods[0]], (int(x.args[0], 0),) if x.args else ())
    shape = next(found for m in x.mods if (found := re.fullmatch(r"m64n(\d+)k(\d+)", m)))
    kinds = [m for m in x.mods if m in TYPES]
    if kinds[0] != "f32" or kinds[1] not in ("f16", "bf16") or x.args[4:6] != ["1", "1"]:
        raise NotImplementedError("a product of these types, or of negated operands")
    from_registers = x.args[1].startswith("{")
    left = x.values(1, 4) if from_registers else [x.value(1, 8)]
    scale = x.args[3]
    add = x.of.constant(-int(bool(int(scale))), 4) if scale.isdigit() else x.of.predicate(scale)
    turned = [int(arg) for arg in x.args[6:]]
    turned = [0, *turned] if from_registers else turned
    numbers = (int(shape[1]), int(shape[2]), int(from_registers), *turned)
    x.emit("wgmma", numbers, [add, x.value(2, 8), *left, *x.values(0, 4)], kinds[1])


def _mbarrier(x: Line) -> None:
    what = x.mods[0]
    place = 1 if what in ("arrive", "try_wait") else 0
    at, plus, _ = x.of.address(x.args[place])
    given = x.value(place + 1, 4) if len(x.args) > place + 1 else x.of.constant(1, 4)
    if what == "init":
        x.emit("mbarrier_init", (plus,), [at, given])
    elif what == "inval":
        x.emit("nop")
    elif x.has("expect_tx"):
        x.emit("mbarrier_expect", (plus, int(what == "arrive")), [at, given])
    elif what == "arrive":
        x.emit("mbarrier_arrive", (plus,), [at, given])
    elif what == "try_wait" and x.has("parity"):
        x.emit("mbarrier_wait", (plus,), [x.pred(0), at, given])
    else:
        raise NotImplementedError("an mbarrier used in this way")


def _tensormap(x: Line) -> None:
    if x.mods[0].startswith("cp_fenceproxy"):
        (to, to_plus, _), (of, of_plus, _) = (x.of.address(x.args[i]) for i in (0, 1))
        return x.emit("map_copy", (to_plus, of_plus), [to, of])
    which = next(m for m in x.mods if m in _FIELDS)
    at, plus, _ = x.of.address(x.args[0])
    ordinal = int(x.args[1], 0) if len(x.args) == 3 else 0
    size = 8 if which in ("global_address", "global_stride") else 4
    value = x.value(len(x.args) - 1, size)
    x.emit("map_replace", (_FIELDS.index(which), ordinal, plus, size), [at, value])


_FORMS = {
    _mov: "mov",
    _load: "ld",
    _store: "st",
    _atomic: "atom red",
    _two: "add sub mul min max div rem and or xor shl shr",
    _three: "fma mad",
    _one: "neg abs not ex2 rcp sqrt",
    _extract: "bfe",
    _compare: "setp",
    _convert: "cvt",
    _cvta: "cvta",
    _shuffle: "shfl",
    _reduce: "redux",
    _elect: "elect",
    _barrier: "bar barrier",
    _jump: "bra brx",
    _fence: "fence",
    _copy: "cp",
    _matrices: "ldmatrix stmatrix",
    _mma: "mma",
    _wgmma: "wgmma",
    _mbarrier: "mbarrier",
    _tensormap: "tensormap",
    lambda x: x.emit("prmt", (), [x.value(i) for i in range(4)]): "prmt",
    lambda x: x.emit("selp", (), [*(x.value(i) for i in range(3)), x.pred(3)]): "selp",
    lambda x: x.emit("ret"): "ret",
    lambda x: x.emit("nop"): "setmaxnreg",
}
_BY_WORD = {word: form for form, words in _FORMS.items() for word in words.split()}


def encode(of, opcode: str, args: list[str], guard: tuple[int, int], text: str) -> None:
    """Emit one instruction to the reader `of`."""
    base, *mods = opcode.replace("::", "_").split(".")
    known = f" {_WORDS.get(base, '')} "
    strange = [m for m in mods if f" {m} " not in known and not (base == "wgmma" and m[0] == "m")]
    if base not in _BY_WORD or strange:
        raise NotImplementedError(f"PTX {text!r}: {base!r} with {strange} is not known")
    try:
        _BY_WORD[base](Line(of, base, mods, args, guard, text))
    except (KeyError, IndexError, ValueError, StopIteration, TypeError) as error:
        raise NotImplementedError(f"PTX {text!r}: {type(error).__name__}: {error}") from error
