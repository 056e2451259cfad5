"""What each PTX instruction is for machine.cpp: an operation with a type, numbers and operands.

`encode` looks the instruction up by its first word; what is not known here is refused by name. The
numbers of an operation (at most five) are those that its case in compute.cpp or execute.cpp reads.

defines: OPERATIONS, TYPES, COLLECTIVE, NOTHING, width, encode
"""

import re
from dataclasses import dataclass

OPERATIONS = (
    "mov pack unpack ld_param ld st atom cp_async cp_async_commit cp_async_wait ldmatrix stmatrix "
    "add sub mul mul_hi mul_wide mad mad_hi mad_wide fma div rem min max neg abs not and or xor "
    "shl shr bfe bfi bfind lop3 shf prmt popc clz brev selp setp set_pred cvt cvt_pack cvta ex2 "
    "lg2 rcp sqrt rsqrt sin cos tanh copysign testp shfl redux vote elect bar bar_arrive bra brx "
    "ret trap nop converge mma wgmma wgmma_commit wgmma_wait mbarrier_init mbarrier_arrive "
    "mbarrier_expect mbarrier_wait fence_async tma_load tma_store tma_commit tma_wait map_replace "
    "map_copy"
).split()
TYPES = (
    "b8 u8 s8 b16 u16 s16 b32 u32 s32 b64 u64 s64 f16 bf16 f32 f64 pred f16x2 bf16x2 tf32"
).split()
# All lanes of a warp execute these together, those that come first wait.
COLLECTIVE = set(
    "converge shfl redux vote elect bar bar_arrive mma wgmma ldmatrix stmatrix".split()
)
NOTHING = 1 << 30  # the operand of a result that nobody wants

_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
_BYTES |= dict.fromkeys(("b64", "u64", "s64", "f64"), 8)
_FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
_SPACES = {"global": 1, "shared": 2, "local": 3}  # 0: generic
_ROUNDINGS = {"rz": 1, "rm": 2, "rp": 3, "rzi": 1, "rmi": 2, "rpi": 3}  # 0: to nearest
_TO_INTEGERS = ("rni", "rzi", "rmi", "rpi")
_COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan".split()
_ATOMICS = "add min max and or xor exch cas".split()
_FIELDS = (  # of a tensor map
    "global_address rank box_dim global_dim global_stride element_stride elemtype "
    "interleave_layout swizzle_mode fill_mode"
).split()


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
    operation, is_wide = ("ld_param" if x.has("param") else "ld"), x.of.wide(group(x.args[0])[0])
    x.emit(operation, (x.space(), plus, wide, 0, is_wide), [at, *x.results(0)])


def _store(x: Line) -> None:
    """And what is stored may be narrower than the registers."""
    at, plus, wide = x.of.address(x.args[0])
    wides = sum(x.of.wide(name) << k for k, name in enumerate(group(x.args[1])))
    x.emit("st", (x.space(), plus, wide, wides), [at, *x.values(1)])


def _atomic(x: Line) -> None:
    first = 0 if x.base == "red" else 1
    what = next(m for m in x.mods if m in _ATOMICS)
    at, plus, wide = x.of.address(x.args[first])
    given = [v for i in range(first + 1, len(x.args)) for v in x.values(i)]
    results = x.results(0) if first else []
    vector = next((int(m[1]) for m in x.mods if re.fullmatch(r"v[248]", m)), 1)
    numbers = (x.space(), plus, wide, _ATOMICS.index(what), 16 * vector + len(results))
    x.emit("atom", numbers, [at, *results, *given])


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
    name = "mad_hi" if x.has("hi") else "fma" if x.kind in _FLOATS else "mad"
    x.emit(name, (x.flush,), [x.value(i) for i in range(4)])


def _one(x: Line) -> None:
    if x.kind == "pred":
        return x.emit("not", (), [x.pred(0), x.pred(1)])
    narrow = x.base in ("popc", "clz", "bfind")
    number = int(x.has("shiftamt")) if x.base == "bfind" else x.flush
    x.emit(x.base, (number,), [x.value(0, 4 if narrow else x.size), x.value(1)])


def _bits(x: Line) -> None:
    """bfe, bfi: the place and the length are 32 bits wide."""
    own = len(x.args) - 2
    x.emit(x.base, (), [*(x.value(i) for i in range(own)), x.value(own, 4), x.value(own + 1, 4)])


def _words(x: Line) -> None:
    """lop3, shf, prmt."""
    numbers = (int(x.args[4], 0),) if x.base == "lop3" else (int(x.has("r")), int(x.has("wrap")))
    x.emit(x.base, numbers, [x.value(i) for i in range(4)])


def _compare(x: Line) -> None:
    outs = x.args[0].split("|")
    logic = next((i for i, m in enumerate(("and", "or", "xor"), 1) if m in x.mods), 0)
    other = [x.of.predicate(x.args[3].lstrip("!"))] if logic else []
    flip = int(logic and x.args[3].startswith("!"))
    how = next(_COMPARISONS.index(m) for m in x.mods if m in _COMPARISONS)
    results = [x.of.predicate(out) for out in outs]
    x.emit("setp", (how, logic, flip, len(outs)), [*results, x.value(1), x.value(2), *other])


def _convert(x: Line) -> None:
    to, of = (m for m in x.mods if m in TYPES)
    if to in ("f16x2", "bf16x2"):
        values = [x.value(i, 4) for i in range(3)]
        return x.emit("cvt_pack", (int(x.has("relu")),), values, to)
    rounding = next((_ROUNDINGS[m] for m in x.mods if m in _ROUNDINGS), 0)
    sat, whole = int(x.has("sat")), int(x.has(*_TO_INTEGERS))
    values = [x.value(0, width(to)), x.value(1, width(of))]
    x.emit("cvt", (TYPES.index(of), rounding, sat, x.flush, whole), values, to)


def _shuffle(x: Line) -> None:
    outs = x.args[0].split("|")
    mode = ("up", "down", "bfly", "idx").index(x.mods[1])
    results = [x.of.value(outs[0], 4), *map(x.of.predicate, outs[1:])]
    all_lanes = int(x.args[4], 0) in (-1, 0xFFFFFFFF)
    given = [x.value(i, 4) for i in (1, 2, 3)]
    x.emit("shfl", (mode, len(outs), 0, 0, int(not all_lanes)), [*results, *given], "b32")


def _vote(x: Line) -> None:
    if x.base == "activemask":
        return x.emit("vote", (4,), [x.value(0, 4), x.of.constant(-1, 4)])
    mode = ("all", "any", "uni", "ballot").index(x.mods[1])
    result = x.value(0, 4) if mode == 3 else x.pred(0)
    given = x.of.predicate(x.args[1].lstrip("!"))
    x.emit("vote", (mode, int(x.args[1].startswith("!"))), [result, given])


def _reduce(x: Line) -> None:
    how = ("add", "min", "max", "and", "or", "xor").index(x.mods[1])
    x.emit("redux", (how,), [x.value(0), x.value(1)])


def _elect(x: Line) -> None:
    lane, leader = x.args[0].split("|")
    result = NOTHING if lane == "_" else x.of.value(lane, 4)
    x.emit("elect", (), [result, x.of.predicate(leader)])


def _barrier(x: Line) -> None:
    if x.has("warp"):
        return x.emit("converge")
    zero = x.of.constant(0, 4)
    given = [x.value(i, 4) if len(x.args) > i else zero for i in (0, 1)]
    x.emit("bar_arrive" if x.has("arrive") else "bar", (), given)


def _jump(x: Line) -> None:
    x.of.jump(x.args[-1])
    x.emit(x.base, (), [x.value(0, 4)] if x.base == "brx" else [])


def _cvta(x: Line) -> None:
    space = 4 if x.has("param") else x.space()
    x.emit("cvta", (int(x.has("to")), space), [x.value(0), x.value(1)])


def _fence(x: Line) -> None:
    of_async = x.has("proxy") and x.mods[1].startswith("async")
    x.emit("fence_async" if of_async else "nop")


def _copy(x: Line) -> None:
    """cp.async, cp.async.bulk."""
    bulk = x.has("bulk")
    if x.has("commit_group"):
        return x.emit("tma_commit" if bulk else "cp_async_commit")
    if x.has("wait_group", "wait_all"):
        left = int(x.args[0], 0) if x.args else 0
        return x.emit("tma_wait" if bulk else "cp_async_wait", (left,))
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
    depth = next(int(m[6:]) for m in x.mods if m in ("m16n8k8", "m16n8k16"))
    if kinds[0] != "f32" or kinds[3] != "f32" or (depth == 8) != (kinds[1] == "tf32"):
        raise NotImplementedError("a product of these types")
    sizes = [len(group(arg)) for arg in x.args]
    registers = [v for i in range(4) for v in x.values(i, 4)]
    x.emit("mma", (depth, sizes[1], sizes[2]), registers, kinds[1])


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
    place = 1 if what in ("arrive", "try_wait", "test_wait") else 0
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
    elif what in ("try_wait", "test_wait") and x.has("parity"):
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
    _load: "ld ldu",
    _store: "st",
    _atomic: "atom red",
    _two: "add sub mul min max div rem and or xor shl shr copysign",
    _three: "fma mad",
    _one: "neg abs not ex2 lg2 rcp sqrt rsqrt sin cos tanh popc clz brev bfind",
    _bits: "bfe bfi",
    _words: "lop3 shf prmt",
    _compare: "setp",
    _convert: "cvt",
    _cvta: "cvta",
    _shuffle: "shfl",
    _reduce: "redux",
    _vote: "vote activemask",
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
    lambda x: x.emit("selp", (), [*(x.value(i) for i in range(3)), x.pred(3)]): "selp",
    lambda x: x.emit("ret"): "ret exit",
    lambda x: x.emit("trap"): "trap",
    lambda x: x.emit("nop"): "membar setmaxnreg griddepcontrol prefetch discard nanosleep",
    lambda x: x.emit("mov", (), [x.value(0, 8), x.of.constant(0, 8)], "b64"): "createpolicy",
    lambda x: x.emit(
        "testp",
        (("finite", "infinite", "number", "notanumber").index(x.mods[0]),),
        [x.pred(0), x.value(1)],
    ): "testp",
}
_BY_WORD = {word: form for form, words in _FORMS.items() for word in words.split()}


def encode(of, opcode: str, args: list[str], guard: tuple[int, int], text: str) -> None:
    """Emit one instruction to the reader `of`."""
    base, *mods = opcode.replace("::", "_").split(".")
    try:
        _BY_WORD[base](Line(of, base, mods, args, guard, text))
    except (KeyError, IndexError, ValueError, StopIteration, TypeError) as error:
        raise NotImplementedError(f"PTX {text!r}: {type(error).__name__}: {error}") from error
