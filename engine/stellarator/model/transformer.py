"""The decoder: StarCoder (learned positions, one key/value head) and StarCoder2 (RoPE, grouped
heads, window) by configuration alone.

defines: Transformer, Layers, RECOMPUTE

    x = embedding[token] (+ position_embedding[position])
    per layer:  x += attention(norm(x));  x += mlp(norm(x))
    logits = head(norm(x))

The sum of a residual and the branch that precedes it is taken inside the next norm, so a layer
passes on both: `branch` (its last product) and `residual` (everything before).

Letters: B rows, T tokens, N = B*T, C width, V vocabulary, D head width.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn.functional import linear

from stellarator.config import ModelConfig
from stellarator.model.attention import Attention, Context
from stellarator.model.cache import KVCache
from stellarator.model.dropout import Dropout, Masks
from stellarator.model.layers import LayerNorm, parameter, recomputed
from stellarator.model.mlp import Mlp
from stellarator.parallel.gradients import room_of
from stellarator.parallel.layout import Part
from stellarator.parallel.loss import vocabulary_cross_entropy
from stellarator.parallel.rows import Cut
from stellarator.parallel.shard import Shard
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator_kernels import dropout as drop
from stellarator_kernels import embedding, linear_cross_entropy
from stellarator_kernels.checks import expect, expect_dtype, expect_shape
from stellarator_kernels.rope import rope_table

RECOMPUTE = ("none", "selective", "full")
_REDUCTIONS = ("mean", "sum", "none")


class Layer(torch.nn.Module):
    """(branch, residual) -> (branch, residual), each (B, T, C)."""

    def __init__(self, config: ModelConfig, kernels: str, tp: TensorParallel, *, device, dtype):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.attention_norm = LayerNorm(config.width, config.norm_eps, kernels, tp, **to)
        self.attention = Attention(config, kernels, tp, **to)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps, kernels, tp, **to)
        self.mlp = Mlp(config, kernels, tp, **to)

    def forward(self, branch, residual, context: Context, index: int, recompute: bool = False):
        self.attention.tp.axis.at(layer=index)
        branch, residual = self.attention(self.attention_norm, branch, residual, context, index)
        shape = context.positions.shape
        dropout = context.masks and context.masks.residual(2 * index + 1)
        return self.mlp(self.mlp_norm, branch, residual, shape, dropout, recompute)


class Embedding(torch.nn.Module):
    """ids -> rows of weight, of which this rank may hold a part."""

    def __init__(self, weight: Shard, kernels: str, *, device, dtype):
        super().__init__()
        # Other ops have implementations that this one lacks.
        self.kernels = _narrower(kernels)
        self.shards = {"weight": weight}
        self.weight = parameter(weight, device=device, dtype=dtype)

    @property
    def whole(self) -> bool:
        """Whether all rows are here."""
        return self.weight.shape[0] == self.shards["weight"].shape[0]

    def forward(self, ids: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
        options = {"room": room_of(self.weight), "impl": self.kernels}
        if self.whole:
            return embedding(ids, self.weight, **positions, **options)
        assert not positions, "positions are added behind the sum over the ranks"
        (part,) = self.shards["weight"].pieces
        local = ids - part.start
        here = (local >= 0) & (local < part.length)
        found = embedding(torch.where(here, local, 0), self.weight, **options)
        return torch.where(here[..., None], found, 0.0)  # the other ranks add theirs


class Head(torch.nn.Module):
    """The output matrix (V, C) of a model that does not share it with the embedding."""

    def __init__(self, weight: Shard, *, device, dtype):
        super().__init__()
        self.shards = {"weight": weight}
        self.weight = parameter(weight, device=device, dtype=dtype)


class Layers(torch.nn.Module):
    """Layers under their numbers in the whole model, all of them or some."""

    def __init__(self, layers: dict[int, Layer]):
        super().__init__()
        for index, layer in layers.items():
            self.add_module(str(index), layer)

    def __getitem__(self, index: int) -> Layer:
        return self._modules[str(index)]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._modules.values())

    def items(self) -> Iterator[tuple[int, Layer]]:
        """(number, layer) in their order."""
        return ((int(index), layer) for index, layer in self._modules.items())


def _narrower(kernels: str) -> str:
    """`kernels` for ops that have fewer implementations than others."""
    return kernels if kernels in ("triton", "reference") else "auto"


def _second(shard: Shard) -> Shard:
    """Of a parameter that the first stage holds, too: here it does not count."""
    return replace(shard, pieces=tuple(replace(p, copies=2, copy=1) for p in shard.pieces))


class Transformer(torch.nn.Module):
    """A decoder whose weights are not set yet: `build_model` and `load_pretrained` set them.

    Args:
        config: its shape. Dropout rates are applied where `forward` is given a `Dropout`.
        kernels: `impl` of every op.
        recompute: what the backward pass computes again instead of keeping, beside norms and
            gelu. "none"; "selective": the MLP's first product, whose result is the widest tensor;
            "full": whole layers. The gradients are the same to the bit. With sp "selective" gathers
            the input of that product once more; "full" sends again what the forward of a layer
            sends, but for the sum behind its last product.
        tp: the ranks that share every layer.
        part: what of the layers is here, on a rank of a pipeline; None: all.
        device, dtype: of the parameters.
    Raises:
        ValueError: the configuration contradicts itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: str = "auto",
        recompute: str = "none",
        tp: TensorParallel = ALONE,
        part: Part | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_config(config, recompute)
        self.config, self.kernels, self.recompute, self.tp = config, kernels, recompute, tp
        to, C = {"device": device, "dtype": dtype}, config.width
        vocabulary = tp.by_columns(config.vocab_size, C)
        (self.vocabulary,) = vocabulary.pieces
        self.part = part = part or Part(tuple(range(config.num_layers)))
        if part.first:
            self.embedding = Embedding(vocabulary, kernels, **to)
        elif part.last and config.tie_embeddings:
            self.embedding = Embedding(_second(vocabulary), kernels, **to)
        if part.first and config.positions == "learned":
            self.position_embedding = Embedding(tp.whole(config.max_positions, C), kernels, **to)
        self.layers = Layers({i: Layer(config, kernels, tp, **to) for i in part.layers})
        if part.last:
            self.final_norm = LayerNorm(C, config.norm_eps, kernels, tp, **to)
            if not config.tie_embeddings:
                self.head = Head(vocabulary, **to)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V_tp, C): the output matrix, which is the embedding in a tied model."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        reduction: str = "mean",
        cache: KVCache | None = None,
        dropout: Dropout | None = None,
        cut: Cut | None = None,
    ) -> torch.Tensor:
        """Logits, or with targets the loss.

        Args:
            tokens: (B, T) int64 in [0, V); the range is left to the embedding to check.
            targets: (B, T) int64, already shifted; -100 is left out.
            positions: (B, T) int64; None: 0, 1, ... in every row, or behind each row's cache.
            cu_seqlens: (E+1,) int32, bounds of documents over the B*T flattened tokens: attention
                stays within a document. None: a row is one document.
            reduction: of the losses: "mean" over the targets, "sum", or "none".
            cache: takes the keys and values of these tokens, which see all that it holds.
            dropout: what to drop, at the rates of the configuration; None: nothing.
            cut: where ranks share out the tokens of rows: tokens, targets and positions are those
                of this rank, as are logits and losses, and the documents are in its plan.
        Returns:
            without targets (B, T, V) fp32 (fp64 in a float64 model); with targets a scalar in nats
            of that dtype, or (B, T) for reduction="none", 0 where the target is -100.
        Raises:
            ValueError: shapes or dtypes disagree, or learned positions are fewer than T.
        """
        if targets is None:
            options = {"cu_seqlens": cu_seqlens, "cache": cache, "dropout": dropout, "cut": cut}
            return self.logits(self.hidden(tokens, positions=positions, **options))
        todo = "Shift the tokens by one, keep the shape"
        expect_shape("model", "targets", targets, "(B, T)", tuple(tokens.shape), todo)
        expect_dtype("model", "targets", targets, (torch.int64,), "Pass targets.long()")
        expect(reduction in _REDUCTIONS, "model", f"reduction in {_REDUCTIONS}", reduction,
               "Pass one of them")  # fmt: skip
        expect(cache is None, "model", "no cache with targets", "both",
               "Compute the loss in one pass")  # fmt: skip
        options = {"cu_seqlens": cu_seqlens, "dropout": dropout, "cut": cut}
        states = self.hidden(tokens, positions=positions, **options)
        loss = self._loss(states.flatten(0, 1), targets.flatten(), reduction)
        return loss.view(tokens.shape) if reduction == "none" else loss

    def _loss(self, states: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """Of states (N, C) and targets (N,)."""
        weight = self.head_weight
        if self.tp.alone:
            room = room_of(weight)
            options = {"reduction": reduction, "dweight": room and room(), "impl": self.kernels}
            return linear_cross_entropy(states, weight, targets, **options)
        place = self.vocabulary.start, self.config.vocab_size, self.tp.axis
        impl = _narrower(self.kernels)
        losses = vocabulary_cross_entropy(states, weight, targets, *place, impl)
        if reduction == "none":
            return losses
        total = losses.sum()
        return total if reduction == "sum" else total / (targets != -100).sum().clamp(min=1)

    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: KVCache | None = None,
        dropout: Dropout | None = None,
        cut: Cut | None = None,
    ) -> torch.Tensor:
        """The states (B, T, C) after the final norm; arguments as in `forward`."""
        positions = self._check_inputs(tokens, positions, cu_seqlens, cache, cut)
        expect(cache is None or dropout is None, "model", "no dropout with a cache", "both",
               "Generate without")  # fmt: skip
        context = self._context(positions, cu_seqlens, cache, dropout, cut)
        branch, residual = None, self._embed(tokens, context)
        for index, layer in self.layers.items():
            branch, residual = self._run_layer(layer, branch, residual, context, index)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self._finish(branch, residual, context)

    def stage(
        self,
        layers: range,
        x: torch.Tensor | None,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        dropout: Dropout | None = None,
        cut: Cut | None = None,
    ) -> torch.Tensor:
        """Some layers, with the embedding before the first and the loss behind the last.

        Args:
            layers: of this rank, one behind the other.
            x: the residual stream before them, (B, T, C) or with sp (1, N_sp, C); None: the first.
            tokens, targets, positions, cu_seqlens, dropout, cut: as in `forward`.
        Returns:
            the residual stream behind them, or behind the last layer the sum of the losses.
        """
        positions = self._check_inputs(tokens, positions, cu_seqlens, None, cut)
        context = self._context(positions, cu_seqlens, None, dropout, cut)
        branch, residual = None, self._embed(tokens, context) if x is None else x
        for index in layers:
            branch, residual = self._run_layer(self.layers[index], branch, residual, context, index)
        if layers.stop == self.config.num_layers:
            states = self._finish(branch, residual, context)
            return self._loss(states.flatten(0, 1), targets.flatten(), "sum")
        if context.masks is not None:  # what the next norm would drop
            options = context.masks.residual(2 * layers.stop)
            keys = {"p": options["dropout_p"], "keys": options["dropout_keys"]}
            branch = drop(branch, **keys, impl=_narrower(self.kernels))
        return branch + residual

    def _embed(self, tokens: torch.Tensor, context: Context) -> torch.Tensor:
        """The residual stream before the first layer."""
        self.tp.axis.at(layer=None)
        learned, positions = self.config.positions == "learned", context.positions
        if learned and self.embedding.whole and self.tp.alone:
            table = self.position_embedding.weight
            x = self.embedding(tokens, positions=positions, position_weight=table)
        else:
            x = self.tp.leave(self.embedding(tokens))
            if learned:
                x = x + self.position_embedding(self.tp.own_tokens(positions))
        if context.masks is not None:
            x = drop(x, **context.masks.embedding(), impl=_narrower(self.kernels))
        return x

    def _context(self, positions, cu_seqlens, cache, dropout: Dropout | None, cut) -> Context:
        """What all layers share."""
        rotation = masks = None
        if self.config.positions == "rope":
            rotation = rope_table(positions, self.config.head_width, self.config.rope_theta)
        if dropout is not None:
            shape = positions.shape if cut is None else (cut.plan.B, cut.plan.T)
            masks = Masks(dropout, self.config, shape, positions.device, self.tp, cut)
        return Context(positions, rotation, cu_seqlens, cache, masks, cut)

    def _finish(self, branch, residual, context: Context) -> torch.Tensor:
        """The states (B, T, C) of all tokens behind the final norm."""
        self.tp.axis.at(layer=None)
        last = context.masks and context.masks.residual(2 * self.config.num_layers)
        return self.tp.enter(self.final_norm(branch, residual, last)[0], context.positions.shape)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V) in fp32, or fp64 for float64 states; all of V on every rank."""
        logits = linear(states, self.head_weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.tp.alone:
            return logits
        part = self.vocabulary
        behind = self.config.vocab_size - part.start - part.length
        return self.tp.sum(torch.nn.functional.pad(logits, (part.start, behind)))

    def _run_layer(self, layer, branch, residual, context, index):
        """One layer, with its recomputation in the backward pass if asked for."""
        given = (branch, residual, context, index)
        if self.recompute == "full" and torch.is_grad_enabled():
            return recomputed(layer, *given)
        return layer(*given, recompute=self.recompute == "selective")

    def _check_inputs(self, tokens, positions, cu_seqlens, cache, cut) -> torch.Tensor:
        """The positions (B, T), after every argument has been checked."""
        op = "model"
        expect(tokens.dim() == 2, op, "tokens (B, T)", tuple(tokens.shape), "Add a batch dimension")
        expect_dtype(op, "tokens", tokens, (torch.int64,), "Pass tokens.long()")
        B, T = tokens.shape
        limit = self.config.max_positions
        if self.config.positions == "learned":
            T_all = T if cut is None else cut.plan.T
            T_all = T_all if cache is None else T + cache.longest
            expect(T_all <= limit, op, f"at most {limit} learned positions", T_all, "Cut the rows")
        if cache is not None:
            expect(self.tp.alone, op, "no cache with tensor parallelism", "both",
                   "Generate on one rank")  # fmt: skip
            expect(cu_seqlens is None, op, "no cu_seqlens with a cache", "both",
                   "Give every document its own row")  # fmt: skip
            expect(len(cache.lengths) == B, op, f"a cache of {B} rows", len(cache.lengths),
                   "Make the cache for this batch")  # fmt: skip
            cache.check_room(T)
        if cut is not None:
            plan, mask = cut.plan, (cut.plan.causal, cut.plan.window)
            expect(cu_seqlens is None and cache is None, op, "no cu_seqlens or cache with a cut",
                   "both", "Give the bounds of documents to the plan")  # fmt: skip
            expect(mask == (True, self.config.window), op,
                   f"a causal plan with window {self.config.window}", mask,
                   "Make it for this model")  # fmt: skip
            expect_shape(op, "tokens", tokens, "(B, T/P)", (plan.B, plan.T // plan.size),
                         "Pass cut.own of the rows")  # fmt: skip
        if positions is None and cut is not None:
            return cut.positions(tokens.device)
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            return positions if cache is None else positions + cache.lengths[:, None]
        expect_shape(op, "positions", positions, "(B, T)", (B, T), "One position per token")
        expect_dtype(op, "positions", positions, (torch.int64,), "Pass positions.long()")
        return positions


def _check_config(config: ModelConfig, recompute: str) -> None:
    """Raise ValueError with every contradiction of a configuration."""
    problems = []
    if config.positions not in ("rope", "learned"):
        problems.append(f"positions: expected rope or learned, got {config.positions!r}")
    if config.activation not in ("gelu_tanh", "gelu_erf"):
        problems.append(f"activation: expected gelu_tanh or gelu_erf, got {config.activation!r}")
    if config.width % config.num_heads:
        problems.append(
            f"width: expected a multiple of {config.num_heads} heads, got {config.width}"
        )
    elif config.positions == "rope" and config.head_width % 2:
        problems.append(f"width: expected an even head width for RoPE, got {config.head_width}")
    if config.num_heads % config.num_kv_heads:
        problems.append(
            f"num_kv_heads: expected a divisor of num_heads = {config.num_heads}, "
            f"got {config.num_kv_heads}"
        )
    if config.window is not None and config.window < 1:
        problems.append(f"window: expected at least 1 visible key or None, got {config.window}")
    if recompute not in RECOMPUTE:
        problems.append(f"recompute: expected one of {RECOMPUTE}, got {recompute!r}")
    if problems:
        raise ValueError("model: " + "; ".join(problems) + ". Change the configuration.")
