"""How large a model is and what it costs, from its configuration alone.

defines: FORMULA, STATE_BYTES, SHARED_FROM, ITEMSIZE, state_bytes, bytes_per_parameter,
matmul_parameters, model_flops, row_pairs, layer_matmul_parameters, head_in_layers,
layer_parameters, embedding_parameters, position_parameters, num_parameters,
layer_activation_bytes, layer_deferred_bytes

Whoever counts parameters, FLOPs or bytes of a run asks here: training, its check of the memory, and
`stellarator plan`. Sizes are those of one tensor rank where `tp` is given. Standard library only.

Letters: N tokens, C width, H query heads, G key/value heads, D head width, F MLP width.
"""

from stellarator.config import ModelConfig

# MFU counts what the model needs, not what is recomputed.
FORMULA = "6*N_matmul*tokens + 12*D*H*L*visible_pairs"

# Bytes of one parameter in the flat buffers of `FlatOptimizer`, by `train.precision`; with narrower
# masters or moments see `state_bytes`.
STATE_BYTES = {
    "bf16": {"parameters": 2, "gradients": 4, "masters": 4, "moments": 8},
    "fp32": {"parameters": 4, "gradients": 4, "masters": 0, "moments": 8},
    "fp64": {"parameters": 8, "gradients": 8, "masters": 0, "moments": 16},
}
# The stage of ZeRO from which data-parallel ranks share out a kind.
SHARED_FROM = {"parameters": 3, "gradients": 2, "masters": 1, "moments": 1}
ITEMSIZE = {name: kinds["parameters"] for name, kinds in STATE_BYTES.items()}


def state_bytes(
    precision: str, weights: str = "masters", moments: str = "fp32"
) -> dict[str, float]:
    """Bytes of one parameter by kind, for these settings of `optim`.

    Moments of 8 bits have a scale for 256 each; those of biases and norms, which stay fp32, are
    counted like the others.
    """
    found = dict(STATE_BYTES[precision])
    if precision == "bf16":
        found["masters"] = {"masters": 4, "remainders": 2, "stochastic": 0}[weights]
    if moments == "8bit":
        found["moments"] = 2 * (1 + 4 / 256)
    return found


def bytes_per_parameter(
    precision: str,
    zero: int = 0,
    dp: int = 1,
    weights: str = "masters",
    moments: str = "fp32",
) -> float:
    """What a rank keeps for each parameter, with this stage of ZeRO over `dp` ranks."""
    kinds = state_bytes(precision, weights, moments).items()
    return sum(size / (dp if zero >= SHARED_FROM[kind] else 1) for kind, size in kinds)


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that take part in a matrix product: layers and head, not embeddings or norms."""
    return model.num_layers * layer_matmul_parameters(model) + model.width * model.vocab_size


def model_flops(model: ModelConfig, tokens: int, pairs: int) -> int:
    """FLOPs of a forward and a backward pass: 6 for each token and parameter of a product.

    Attention: 12 * D * H * L for each (query, key) pair that is visible, forward 4, backward 8.
    """
    attention = 12 * model.head_width * model.num_heads * model.num_layers * pairs
    return 6 * matmul_parameters(model) * tokens + attention


def row_pairs(model: ModelConfig, seq_length: int) -> int:
    """Visible (query, key) pairs of a row that is one document: the most that a row can have."""
    window = model.window or seq_length
    return sum(min(position + 1, window) for position in range(seq_length))


def layer_matmul_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Weights of the four products of a layer."""
    C, F = model.width, model.ffn_width
    return C * _qkv_width(model, tp) + C * C // tp + 2 * C * F // tp


def head_in_layers(model: ModelConfig) -> float:
    """The output matrix beside the products of a layer, for who shares out layers."""
    return model.vocab_size * model.width / layer_matmul_parameters(model)


def layer_parameters(model: ModelConfig, tp: int = 1) -> int:
    """A layer; norms and the biases behind the row-parallel products are on every tensor rank."""
    biases = _qkv_width(model, tp) + model.ffn_width // tp + 2 * model.width
    return layer_matmul_parameters(model, tp) + biases + 4 * model.width


def embedding_parameters(model: ModelConfig, tp: int = 1) -> int:
    """The embedding, or the head; the vocabulary is shared out, the last part may be smaller."""
    return -(-model.vocab_size // tp) * model.width


def position_parameters(model: ModelConfig) -> int:
    """Learned positions, if there are any."""
    return model.max_positions * model.width if model.positions == "learned" else 0


def num_parameters(model: ModelConfig) -> int:
    """The whole model."""
    ends = embedding_parameters(model) * (1 if model.tie_embeddings else 2)
    return (
        model.num_layers * layer_parameters(model)
        + ends
        + position_parameters(model)
        + 2 * model.width
    )


def layer_activation_bytes(
    model: ModelConfig, N: int, recompute: str, itemsize: int, *, tp: int = 1, sp: bool = False
) -> int:
    """What the forward of a layer leaves for its backward.

    none:       two sums of the residual stream with their statistics, queries, keys and values as
                attention takes them, the heads' outputs and their lse, what goes into the gelu
    selective:  the same without what goes into the gelu
    full:       the layer's two inputs

    Args:
        N: tokens of a micro-batch on this rank of the context axis.
        recompute: train.recompute.
        itemsize: of the parameters' dtype.
        tp, sp: tensor ranks; with sp they also share out what is between their products.
    """
    C, F = model.width, model.ffn_width // tp
    heads, qkv = C // tp, _qkv_width(model, tp)
    statistic = max(4, itemsize)  # fp32, in fp64 runs fp64
    stream = N // tp if sp else N  # tokens of the residual stream on this rank
    if recompute == "full":
        return 2 * stream * C * itemsize
    lse = N * (model.num_heads // tp) * statistic
    inner = qkv + heads + (F if recompute == "none" else 0)
    return (2 * stream * C + N * inner) * itemsize + lse + 4 * stream * statistic


def layer_deferred_bytes(
    model: ModelConfig, N: int, itemsize: int, *, tp: int = 1, sp: bool = False
) -> int:
    """What a layer holds between its input gradient and its weight gradients, where they are apart.

    Of each of its four products dy and x, or what x is made of: as large, and the same whatever is
    computed again.

    Args: as of `layer_activation_bytes`.
    """
    C, F, heads = model.width, model.ffn_width // tp, model.width // tp
    stream = N // tp if sp else N
    x = 2 * stream * C + N * (heads + F)
    dy = N * (_qkv_width(model, tp) + F + 2 * C)
    return (x + dy) * itemsize


def _qkv_width(model: ModelConfig, tp: int) -> int:
    """Columns of the fused projection; key/value heads fewer than ranks are on several of them."""
    kv_heads = max(1, model.num_kv_heads // tp)
    return (model.num_heads // tp + 2 * kv_heads) * model.head_width
