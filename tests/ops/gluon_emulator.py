"""Gluon kernels of a Hopper GPU on the CPU: what is asynchronous there happens here late, or early.

The functions of a kernel run as they stand, with the names of Gluon replaced. A program is a few
partitions and a list of operations under way: copies by TMA, and matrix products. A seed chooses
what happens next: a partition goes on to its next operation, or something under way is done.

- Shared memory is NaN until it is written, and again from the moment that a copy into it begins.
- A product reads its operands when it is done, not when it is issued: a buffer that is given back
  too early is seen as NaN or as another block. Its result, until waited for, is no number. An
  operand in registers has to be named in the wait (`deps`), or its registers are free to change.
- Barriers count arrivals and bytes, and have phases. Where nothing can happen any more, `Deadlock`
  says who waits for what.
- What a partition writes to shared memory needs a fence before TMA may read it.

Not here: layouts, alignment, the four warps of a warpgroup, orders of memory that are weaker than
one operation after the other, time.

defines: Emulated, Deadlock
"""

import functools
import inspect
import itertools
import math
import random
import threading
import types

import torch


class Deadlock(RuntimeError):
    """Nothing can happen any more."""


class _Stopped(BaseException):
    """Ends the threads of a program that has failed elsewhere."""


class _Partition:
    """A thread that runs only while it is its turn; `ready` says whether it can go on."""

    def __init__(self, name, function, arguments, speed):
        self.name, self.speed, self.waits_for, self.ready = name, speed, "", lambda: True
        self.products, self.stores = [], []  # under way, oldest first
        self.issued = []  # products that no wait has covered
        self.unfenced = False  # TMA may not see yet what was written
        self.stopped, self.error, self.alive = False, None, True
        self.thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        # Released for the other thread to go on; a semaphore of Python is slower.
        self.go, self.back = threading.Lock(), threading.Lock()
        self.go.acquire(), self.back.acquire()

    def _run(self, function, arguments):
        try:
            self._pause()
            function(*arguments)
            assert not self.products, f"{self.name} ends with products under way"
            assert not self.stores, f"{self.name} ends with stores under way"
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.alive = False
        self.back.release()

    def _pause(self):
        self.go.acquire()
        if self.stopped:
            raise _Stopped

    def until(self, ready, waits_for):
        """Called in the thread: let others go on, and come back once `ready()` holds."""
        self.ready, self.waits_for = ready, waits_for
        self.back.release()
        self._pause()

    def step(self):
        """Called by the scheduler: go on to the next operation."""
        self.go.release()
        self.back.acquire()


class _Machine:
    """One program: its partitions, and the copies under way."""

    def __init__(self, seed, place, grid):
        self.random = random.Random(f"{seed} {place}")
        # How readily an operation is done: seed 0 not before everyone waits, seed 1 at once.
        self.haste = {0: 0.0, 1: 1.0}.get(seed, self.random.choice((0.1, 0.5, 0.9)))
        self.place, self.grid = place, grid
        self.loads, self.partitions, self.current = [], [], None

    def until(self, ready, waits_for):
        """A place where the current partition may be held up; before there are any, none is."""
        if self.current is None:
            assert ready(), f"the kernel waits for {waits_for} before its partitions start"
        else:
            self.current.until(ready, waits_for)

    def pause(self):
        self.until(lambda: True, "its turn")

    def specialize(self, functions_and_arguments, warps, registers):
        assert len(warps) == len(registers) == len(functions_and_arguments) - 1
        for number, (function, arguments) in enumerate(functions_and_arguments):
            name = f"{function.__name__} {number}"
            speed = self.random.choice((1, 50))
            self.partitions.append(_Partition(name, function, arguments, speed))
            for parameter, value in zip(inspect.signature(function).parameters, arguments):
                for i, barrier in enumerate(value if isinstance(value, _Ring) else ()):
                    barrier.name = f"{parameter}[{i}]"
        for partition in self.partitions:
            partition.thread.start()
        try:
            while any(p.alive for p in self.partitions):
                self._one_thing()
        finally:
            for partition in self.partitions:
                partition.stopped = True
                partition.go.release()
                partition.thread.join()
        assert not self.loads, "the program ends with loads under way"

    def _one_thing(self):
        """Let one operation be done, or one partition go on."""
        able = [p for p in self.partitions if p.alive and p.ready()]
        under_way = [(self.loads, i) for i in range(len(self.loads))]
        under_way += [(q, 0) for p in self.partitions for q in (p.products, p.stores) if q]
        if under_way and (not able or self.random.random() < self.haste):
            queue, index = self.random.choice(under_way)
            queue.pop(index)()
        elif able:
            self.current = self.random.choices(able, [p.speed for p in able])[0]
            self.current.step()
            if self.current.error is not None:
                raise self.current.error
        else:
            waiting = [f"{p.name} waits for {p.waits_for}" for p in self.partitions if p.alive]
            raise Deadlock("; ".join(waiting))


class _Barrier:
    """An mbarrier: `phase` counts the phases that are complete."""

    def __init__(self):
        self.name, self.count, self.missing, self.bytes, self.phase = "a barrier", None, 0, 0, 0

    def advance(self, arrivals, size):
        assert self.count is not None, f"{self.name} was not initialised"
        self.missing -= arrivals
        self.bytes += size
        assert self.missing >= 0, f"{self.name}: more arrivals than {self.count} in a phase"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def passed(self, parity):
        return self.phase & 1 != parity


class _Buffer:
    """Shared memory, or a view of it."""

    def __init__(self, data, machine):
        self.data, self.machine, self.dtype = data, machine, data.dtype

    def index(self, i):
        assert 0 <= i < len(self.data), f"buffer {i} of {len(self.data)}"
        return _Buffer(self.data[i], self.machine)

    def permute(self, order):
        return _Buffer(self.data.permute(order), self.machine)

    def load(self, layout):
        self.machine.pause()
        return self.data.clone()

    def store(self, value):
        self.machine.pause()
        self.data.copy_(value)
        self.machine.current.unfenced = True


class _Ring(list):
    """Barriers."""

    def index(self, i):
        assert 0 <= i < len(self), f"barrier {i} of {len(self)}"
        return self[i]


class _Product:
    """The result of a product under way."""

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc, self.value = a, b, acc, use_acc, None

    def done(self):
        a, b = (x.data if isinstance(x, _Buffer) else x for x in (self.a, self.b))
        self.value = a.float() @ b.float()
        if self.use_acc:
            self.value += self.acc.value if isinstance(self.acc, _Product) else self.acc

    def _too_early(self, *_):
        raise AssertionError("a product is read before a wait has covered it")

    __add__ = __mul__ = __truediv__ = amax = to = _too_early


class _Pointer:
    def __init__(self, data, offsets=0):
        self.data, self.offsets = data.view(-1), offsets
        self.dtype = types.SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offsets):
        return _Pointer(self.data, self.offsets + offsets)


class _Descriptor:
    """What a kernel sees of a TensorDescriptor; reads zeros outside, writes nothing there."""

    def __init__(self, host):
        self.data = host.base.as_strided(host.shape, host.strides)
        self.block, self.dtype = host.block_shape, host.base.dtype
        size = math.prod(self.block) * self.dtype.itemsize
        self.block_type = types.SimpleNamespace(nbytes=size)

    def _inside(self, place):
        """The part of the block at `place` that exists: in the tensor, and in the block."""
        here, there = [], []
        for start, length, size in zip(place, self.block, self.data.shape, strict=True):
            first = max(start, 0)
            last = max(min(start + length, size), first)
            there.append(slice(first, last))
            here.append(slice(first - start, last - start))
        return tuple(there), tuple(here)

    def read(self, place):
        there, here = self._inside(place)
        block = torch.zeros(self.block, dtype=self.dtype)
        block[here] = self.data[there]
        return block

    def write(self, place, block):
        there, here = self._inside(place)
        self.data[there] = block.view(self.block)[here]


def _language(machine):
    """Gluon's names, and those of Triton that the kernels share, on tensors of torch."""

    def extreme(of_two, of_many):
        def function(x, y):
            if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
                return of_two(torch.as_tensor(x), torch.as_tensor(y))
            return of_many(x, y)

        return function

    def reduced(x, axis, method):
        result = getattr(x, method)(axis)
        return result if result.dim() else result.item()

    def allocate(dtype, shape, layout):
        if dtype == torch.int64:
            return _Ring(_Barrier() for _ in range(shape[0]))
        return _Buffer(torch.full(shape, math.nan, dtype=dtype), machine)

    def load(pointer, mask=True, other=None):
        if not isinstance(pointer.offsets, torch.Tensor):
            return pointer.data[pointer.offsets].item()
        found = torch.full(pointer.offsets.shape, other or 0, dtype=pointer.data.dtype)
        mask = torch.as_tensor(mask).expand(found.shape)
        found[mask] = pointer.data[pointer.offsets[mask]]
        return found

    def where(condition, x, y):
        if isinstance(x, _Product):
            x._too_early()
        if isinstance(condition, torch.Tensor):
            return torch.where(condition, x, y)
        return x if condition else y

    def store(pointer, value, mask):
        pointer.data[pointer.offsets[mask]] = value[mask]

    def layout(*_, **__):
        return None

    return types.SimpleNamespace(
        float32=torch.float32, int64=torch.int64, constexpr=None, static_range=range,
        NVMMADistributedLayout=layout, NVMMASharedLayout=layout, BlockedLayout=layout,
        DotOperandLayout=layout, SliceLayout=layout, convert_layout=lambda x, layout: x,
        program_id=lambda axis: machine.place[axis], num_programs=lambda axis: machine.grid[axis],
        arange=lambda start, end, layout=None: torch.arange(start, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        cast=lambda x, dtype: x, cdiv=lambda x, y: -(-x // y), where=where,
        exp2=torch.exp2, log2=torch.log2,
        maximum=extreme(torch.maximum, max), minimum=extreme(torch.minimum, min),
        max=lambda x, axis: reduced(x, axis, "amax"), min=lambda x, axis: reduced(x, axis, "amin"),
        sum=lambda x, axis: reduced(x, axis, "sum"),
        load=load, store=store,
        allocate_shared_memory=allocate, warp_specialize=machine.specialize,
    )  # fmt: skip


def _asynchronous(machine):
    """The names of Hopper: barriers, TMA and products."""

    def wait(barrier, parity, pred=True):
        if pred:
            waits_for = f"{barrier.name} to pass parity {parity}, it has {barrier.phase} phases"
            machine.until(lambda: barrier.passed(parity), waits_for)

    def arrive(barrier, count=1, pred=True):
        machine.pause()
        if pred:
            barrier.advance(count, 0)

    def expect(barrier, size):
        machine.pause()
        barrier.advance(0, size)
        barrier.advance(1, 0)

    def init(barrier, count):
        assert barrier.count is None, f"{barrier.name} is initialised twice"
        barrier.count = barrier.missing = count

    def load(descriptor, place, barrier, buffer):
        machine.pause()
        assert math.prod(descriptor.block) == buffer.data.numel()
        buffer.data.fill_(math.nan)

        def done():
            buffer.data.copy_(descriptor.read(place).view(buffer.data.shape))
            barrier.advance(0, -descriptor.block_type.nbytes)

        machine.loads.append(done)

    def fence():
        if machine.current is not None:
            machine.current.unfenced = False

    def store(descriptor, place, buffer):
        machine.pause()
        assert not machine.current.unfenced, "TMA reads what was written without a fence"
        machine.current.stores.append(lambda: descriptor.write(place, buffer.data))

    def store_wait(count):
        queue = machine.current.stores
        machine.until(lambda: len(queue) <= count, "its stores")

    def product(a, b, acc, use_acc=True, is_async=False):
        machine.pause()
        result = _Product(a, b, acc, use_acc)
        assert is_async, "only asynchronous products are emulated"
        machine.current.products.append(result.done)
        machine.current.issued.append(result)
        return result

    def product_wait(count, deps):
        queue, issued = machine.current.products, machine.current.issued
        machine.until(lambda: len(queue) <= count, "its products")
        over = issued[: max(len(issued) - count, 0)]
        del issued[: len(over)]
        for result in over:
            kept = isinstance(result.a, _Buffer) or any(result.a is x for x in deps)
            assert kept, "an operand in registers is not among the deps of the wait"
        values = [x.value if isinstance(x, _Product) and x in over else x for x in deps]
        return values[0] if len(values) == 1 else tuple(values)

    barriers = {"wait": wait, "arrive": arrive, "expect": expect, "init": init}
    return {
        "mbarrier": types.SimpleNamespace(**barriers, MBarrierLayout=lambda: None),
        "tma_load": load,
        "tma_store": store,
        "tma_store_wait": store_wait,
        "fence_async_shared": fence,
        "warpgroup_mma": product,
        "warpgroup_mma_wait": product_wait,
    }


_source = functools.cache(inspect.getsource)  # which reads it word by word
_compiled = functools.cache(compile)


def _emulated(function, names, edits, made):
    """A jit function, and those that it calls, from their sources and with `names` for Gluon's.

    edits: {text: its replacement}; those that are found are taken out.
    """
    plain = getattr(function, "fn", function)
    if plain not in made:
        source = _source(plain)
        for old in [old for old in edits if old in source]:
            if source.count(old) != 1:
                raise LookupError(f"{source.count(old)} places in {plain.__name__}: {old}")
            source = source.replace(old, edits.pop(old))
        scope = {**plain.__globals__, **names}
        scope["triton"] = scope["gluon"] = types.SimpleNamespace(jit=lambda function: function)
        lines_above = "\n" * (plain.__code__.co_firstlineno - 1)  # for tracebacks
        exec(_compiled(lines_above + source, inspect.getsourcefile(plain), "exec"), scope)
        made[plain] = scope[plain.__name__]
        for name in plain.__code__.co_names:
            if hasattr(scope.get(name), "fn"):
                scope[name] = _emulated(scope[name], names, edits, made)
    return made[plain]


class Emulated:
    """A kernel to be launched as Gluon's are, on tensors of the CPU.

    edits: {text of the kernel or of what it calls: what to run instead}, to plant bugs.
    """

    def __init__(self, kernel, seed, edits=None):
        self.kernel, self.seed, self.edits = kernel, seed, edits or {}

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, enable_fp_fusion, **constants):
            assert num_warps == 4 and enable_fp_fusion, "one warpgroup, as compiled"
            arguments = [self._argument(x) for x in arguments]
            for place in itertools.product(*map(range, grid)):
                machine = _Machine(self.seed, place, grid)
                names = {"gl": _language(machine), "tl": _language(machine)}
                edits = dict(self.edits)
                kernel = _emulated(self.kernel, names | _asynchronous(machine), edits, {})
                if edits:
                    raise LookupError(f"not in the kernel: {list(edits)}")
                kernel(*arguments, **constants)

        return launch

    @staticmethod
    def _argument(x):
        if isinstance(x, torch.Tensor):
            return _Pointer(x)
        return _Descriptor(x) if hasattr(x, "block_shape") else x
