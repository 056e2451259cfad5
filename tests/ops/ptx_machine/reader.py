"""Reads the PTX of a kernel into the table of instructions that machine.cpp runs.

A row of the table is (operation, type, guard, whether it is negated, five numbers, first operand,
number of operands, whether all lanes go together). Operands are byte offsets: of a register in the
file of a warp, or, negative, of a constant. A register has 32 lanes of 4 or 8 bytes, a predicate is
one word of 32 bits.

defines: Kernel, parse
"""

import re
from dataclasses import dataclass, field

import numpy as np
from ptx_machine.instructions import COLLECTIVE, OPERATIONS, TYPES, encode, width

# Each lane has them from the start, in this order: machine.cpp writes them.
_SPECIAL = (
    "%tid.x %tid.y %tid.z %ntid.x %ntid.y %ntid.z %ctaid.x %ctaid.y %ctaid.z %nctaid.x %nctaid.y "
    "%nctaid.z %laneid %warpid"
).split()
_NUMBERS = len("operation type guard negated 1 2 3 4 5 first count together".split())


@dataclass
class Kernel:
    """What the machine needs to run one kernel."""

    name: str
    ptx: str
    params: list[tuple[int, int, str]] = field(default_factory=list)  # offset, bytes, type
    threads: int | None = None  # of a block, where the kernel says
    code: np.ndarray = None  # (instructions, 12) int32
    operands: np.ndarray = None  # int32
    constants: np.ndarray = None  # uint8
    register_bytes: int = 0  # of one warp
    shared_bytes: int = 0  # that it declares
    local_bytes: int = 0  # of a thread
    lines: list[str] = field(default_factory=list)  # of each instruction


class _Reader:
    """Registers, constants and labels of a kernel while its instructions are read."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]):
        self.kernel, self.symbols = kernel, symbols
        self.scopes: list[dict[str, str]] = [{}]  # names within { } to names of their own
        self.kinds, self.offsets, self.size = {}, {}, 0
        self.constants, self.pool, self.pool_size = {}, [], 0
        self.code, self.operands = [], []
        self.labels, self.tables, self.jumps = {}, {}, []
        self.num_names = 0
        for name in _SPECIAL:
            self.register(name, "b32")

    def register(self, name: str, kind: str) -> None:
        self.kinds[name], self.offsets[name] = kind, self.size
        self.size += 32 if kind == "pred" else 32 * max(4, width(kind))

    def own(self, name: str) -> str:
        """A name that nothing outside of this { } has."""
        if len(self.scopes) == 1:
            return name
        self.num_names += 1
        self.scopes[-1][name] = f"{name}@{self.num_names}"
        return self.scopes[-1][name]

    def found(self, name: str, scopes: list[dict[str, str]] | None = None) -> str:
        around = reversed(scopes or self.scopes)
        return next((scope[name] for scope in around if name in scope), name)

    def declare(self, text: str) -> None:
        """ "b32 %r<9>" or "pred p, q"."""
        kind, names = text.split(None, 1)
        for name in (x.strip() for x in names.split(",")):
            ranged = re.fullmatch(r"(\S+)<(\d+)>", name)
            for one in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
                self.register(self.own(one), kind)

    def wide(self, text: str) -> int:
        """Whether this is a register of 8 bytes."""
        return int(width(self.kinds.get(self.found(text), "b32")) == 8)

    def constant(self, bits: int, size: int) -> int:
        size = 8 if size == 8 else 4
        key = (bits & ((1 << 8 * size) - 1), size)
        if key not in self.constants:
            self.constants[key] = -self.pool_size - 1
            self.pool.append(key[0].to_bytes(size, "little") * 32)
            self.pool_size += 32 * size
        return self.constants[key]

    def value(self, text: str, size: int) -> int:
        """The operand of a register, a number or a symbol."""
        text = text.strip()
        name = self.found(text)
        if name in self.offsets:
            return self.offsets[name]
        if text in self.symbols:
            return self.constant(self.symbols[text], size)
        if text == "_":
            return self.constant(0, size)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return self.constant(int(text[2:], 16), 4)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return self.constant(int(text[2:], 16), 8)
        number = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text)
        if number is None:
            raise ValueError(f"operand {text!r}")
        return self.constant(int(number[2], 0) * (-1 if number[1] else 1), size)

    def predicate(self, text: str) -> int:
        text = text.strip()
        if re.fullmatch(r"-?\d", text):
            return self.constant(-1 if int(text) else 0, 4)
        return self.offsets[self.found(text)]

    def address(self, text: str) -> tuple[int, int, int]:
        """Of "[base + 16]": the operand of the base, what is added, bytes of the base."""
        match = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+))?\s*\]", text.strip())
        base, plus = self.found(match[1]), int(match[2], 0) if match[2] else 0
        if base in self.offsets:
            return self.offsets[base], plus, 8 if self.wide(base) else 4
        known = self.symbols.get(base)
        return self.constant(int(base, 0) if known is None else known, 8), plus, 8

    def jump(self, label: str) -> None:
        """The next instruction goes there; labels may come later."""
        self.jumps.append((len(self.code), label, list(self.scopes)))

    def emit(self, operation, kind, guard, numbers, operands, text) -> None:
        numbers = (*numbers, 0, 0, 0, 0, 0)[:5]
        together = operation in COLLECTIVE
        row = [OPERATIONS.index(operation), TYPES.index(kind), *guard, *numbers]
        row += [len(self.operands), len(operands), int(together)]
        assert len(row) == _NUMBERS
        self.code.append(row)
        self.operands.extend(operands)
        self.kernel.lines.append(text)

    def finish(self) -> None:
        """Everything is read: labels become numbers of instructions."""
        for index, label, scopes in self.jumps:
            label = self.found(label, scopes)
            if label in self.tables:  # of a brx: first entry and number of entries
                self.code[index][4:6] = len(self.operands), len(self.tables[label])
                self.operands.extend(self.labels[target] for target in self.tables[label])
            else:
                self.code[index][4] = self.labels[label]
        self.emit("ret", "b32", (-1, 0), (), (), "the end")
        self.kernel.code = np.array(self.code, np.int32)
        self.kernel.operands = np.array(self.operands or [0], np.int32)
        self.kernel.constants = np.frombuffer(b"".join(self.pool) or bytes(256), np.uint8).copy()
        self.kernel.register_bytes = self.size


def _parameters(kernel: Kernel, text: str) -> dict[str, int]:
    """Where each parameter lies."""
    symbols, offset = {}, 0
    for one in filter(None, (x.strip() for x in text.split(","))):
        name = re.search(r"(\w+)(?:\[(\d+)\])?$", one)
        kind = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", one)[1]
        size = int(name[2]) if name[2] else width(kind)
        given = re.search(r"\.param\s+\.align\s+(\d+)", one)
        align = int(given[1]) if given else min(8, size)
        offset = -(-offset // align) * align
        symbols[name[1]] = offset
        kernel.params.append((offset, size, kind))
        offset += size
    return symbols


def _variables(kernel: Kernel, ptx: str) -> dict[str, int]:
    """Where shared and local arrays lie; dynamic shared memory begins at 0."""
    symbols = {}
    arrays = r"\.(shared|local)\s+\.align\s+(\d+)\s+\.b8\s+(\w+)(?:\[(\d*)\])?;"
    for space, align, name, size in re.findall(arrays, ptx):
        kind = f"{space}_bytes"
        step = max(16, int(align))
        symbols[name] = -(-getattr(kernel, kind) // step) * step
        setattr(kernel, kind, symbols[name] + int(size or 0))
    kernel.local_bytes = -(-kernel.local_bytes // 16) * 16
    return symbols


def parse(text: str) -> Kernel:
    """The one kernel of a PTX text.

    Raises:
        NotImplementedError: an instruction that the machine does not know.
    """
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{", ptx, re.DOTALL)
    kernel = Kernel(entry[1], text)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    kernel.threads = int(threads[1]) if threads else None
    symbols = _parameters(kernel, entry[2]) | _variables(kernel, ptx)
    reader = _Reader(kernel, symbols)
    body, depth = ptx[entry.end() :], 1
    for brace in re.finditer(r"[{}]", body):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            body = body[: brace.start()]
            break
    _read(reader, body)
    reader.finish()
    return kernel


def _read(reader: _Reader, body: str) -> None:
    """All statements of a body. The { of a scope begins a statement; that of operands does not."""
    table = re.compile(r"^\s*([\w$]+):\s*\.branchtargets(.*?);", re.DOTALL | re.MULTILINE)
    for name, targets in table.findall(body):
        reader.tables[name] = [x.strip() for x in targets.split(",")]
    body = re.sub(r"^\s*\.(loc|file)\b.*$", "", table.sub("", body), flags=re.MULTILINE)
    token = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|((?:[^;{}]|\{[^{}]*\})*);)")
    place = 0
    while found := token.match(body, place):
        scope, label, statement = found.groups()
        if scope == "{":
            reader.scopes.append({})
        elif scope == "}":
            reader.scopes.pop()
        elif label:
            reader.labels[reader.own(label)] = len(reader.code)
        else:
            _statement(reader, " ".join(statement.split()))
        place = found.end()
    assert not body[place:].strip(), body[place : place + 200]


def _statement(reader: _Reader, text: str) -> None:
    if not text or text.startswith((".pragma", ".local", ".shared")):
        return
    if text.startswith(".reg"):
        return reader.declare(text[len(".reg") :].strip().lstrip("."))
    guard, instruction = (-1, 0), text
    match = re.match(r"@(!?)\s*(\S+)\s+(.*)", text)
    if match:
        guard, instruction = (reader.predicate(match[2]), int(bool(match[1]))), match[3]
    opcode, _, rest = instruction.partition(" ")
    encode(reader, opcode, _split(rest), guard, text)


def _split(text: str) -> list[str]:
    """Operands, at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
