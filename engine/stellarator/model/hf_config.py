"""`config.json` of Hugging Face for the two model types, read and written.

defines: read_config, write_config

Reading is strict: a setting that would change the computation and that this model does not have is
an error, and so is a setting that nobody here knows. Writing gives both dialects: `rope_theta` and
`torch_dtype` of transformers 4, `rope_parameters` and `dtype` of transformers 5.
"""

from stellarator.config import ModelConfig
from stellarator.model.hf_files import FolderError

_REQUIRED = object()

# Our field: (their key, value where it is absent, type). Defaults are those of transformers.
_FIELDS = {
    "starcoder2": {
        "vocab_size": ("vocab_size", _REQUIRED, int),
        "num_layers": ("num_hidden_layers", _REQUIRED, int),
        "width": ("hidden_size", _REQUIRED, int),
        "num_heads": ("num_attention_heads", _REQUIRED, int),
        "num_kv_heads": ("num_key_value_heads", _REQUIRED, int),
        "ffn_width": ("intermediate_size", _REQUIRED, int),
        "max_positions": ("max_position_embeddings", 4096, int),
        "window": ("sliding_window", None, int),
        "norm_eps": ("norm_epsilon", 1e-5, float),
        "activation": ("hidden_act", "gelu_pytorch_tanh", str),
        "tie_embeddings": ("tie_word_embeddings", True, bool),
        "init_std": ("initializer_range", 0.018042, float),
        "residual_dropout": ("residual_dropout", 0.0, float),
        "embedding_dropout": ("embedding_dropout", 0.0, float),
        "attention_dropout": ("attention_dropout", 0.0, float),
    },
    "gpt_bigcode": {
        "vocab_size": ("vocab_size", _REQUIRED, int),
        "num_layers": ("n_layer", _REQUIRED, int),
        "width": ("n_embd", _REQUIRED, int),
        "num_heads": ("n_head", _REQUIRED, int),
        "ffn_width": ("n_inner", None, int),
        "max_positions": ("n_positions", 1024, int),
        "norm_eps": ("layer_norm_epsilon", 1e-5, float),
        "activation": ("activation_function", "gelu_pytorch_tanh", str),
        "tie_embeddings": ("tie_word_embeddings", True, bool),
        "init_std": ("initializer_range", 0.02, float),
        "residual_dropout": ("resid_pdrop", 0.1, float),
        "embedding_dropout": ("embd_pdrop", 0.1, float),
        "attention_dropout": ("attn_pdrop", 0.1, float),
    },
}
_ARCHITECTURES = {"starcoder2": "Starcoder2ForCausalLM", "gpt_bigcode": "GPTBigCodeForCausalLM"}
_MAY_BE_NULL = ("window", "ffn_width")
_MAXIMUM = {"num_layers": 1024}  # others: 2^24, so that no product of two overflows
_LARGEST = 1e30  # of other numbers; Python's integers have no end

# The same function under several names of transformers' table of activations.
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu_erf"),
    **dict.fromkeys(
        ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
        "gelu_tanh",
    ),
}
_ACTIVATION_NAMES = {"gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# Settings with one value that this model has. What they would change is not implemented here.
_ONLY = {
    "use_bias": True,
    "mlp_bias": True,
    "attention_bias": True,
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "pruned_heads": {},
    "use_sliding_window": True,
}
# Settings that do not change what a decoder computes: sampling defaults, heads for other tasks,
# bookkeeping, choices of implementation.
_IGNORED = frozenset(
    """
    _name_or_path _commit_hash architectures attention_softmax_in_fp32 bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label inference_runner label2id length_penalty
    max_batch_size max_length max_sequence_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_key_length pad_token_id pre_allocate_kv_cache prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    scale_attention_softmax_in_fp32 sep_token_id summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache validate_runner_input
    """.split()
)
_OWN_RULE = frozenset(
    """
    auto_map head_dim layer_types multi_query num_key_value_heads rope_parameters rope_theta
    """.split()
)
_IMPLEMENTATIONS = (
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)


def read_config(settings: dict, where: str) -> ModelConfig:
    """The configuration that a `config.json` describes.

    Args:
        settings: the parsed file.
        where: its path, for messages.
    Raises:
        FolderError: all that is missing, of the wrong type, unsupported or unknown, at once.
    """
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in _FIELDS:
        raise FolderError(
            f"{where}: expected model_type {' or '.join(_FIELDS)}, got {family!r}. "
            "Other model types cannot be loaded."
        )
    problems: list[str] = []
    values = {
        ours: _value(settings, ours, *theirs, problems) for ours, theirs in _FIELDS[family].items()
    }
    _check_only(settings, family, problems)
    if not problems:
        if family == "gpt_bigcode":
            _finish_bigcode(settings, values, problems)
        else:
            _finish_starcoder2(settings, values, problems)
    if not problems:
        _check_shape(settings, values, problems)
    if problems:
        raise FolderError(f"{where}: " + "; ".join(problems) + ".")
    return ModelConfig(family=family, **values)


def _value(settings, ours, key, default, kind, problems):
    """One setting, its type and range checked; an activation is translated."""
    value = settings.get(key, default)
    if value is _REQUIRED:
        problems.append(f"{key}: expected {kind.__name__}, got nothing")
        return None
    if value is None and ours in _MAY_BE_NULL:
        return None
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{key}: expected {kind.__name__}, got {value!r}")
        return None
    if kind is int and not 1 <= value <= _MAXIMUM.get(ours, 1 << 24):
        problems.append(f"{key}: expected 1 to {_MAXIMUM.get(ours, 1 << 24)}, got {value}")
    if kind is float and not 0 <= value < _LARGEST:
        problems.append(f"{key}: expected a number from 0, got {value}")
        return None
    if ours == "activation":
        if value not in _ACTIVATIONS:
            problems.append(f"{key}: expected one of {', '.join(_ACTIVATIONS)}, got {value!r}")
        return _ACTIVATIONS.get(value)
    return float(value) if kind is float else value


def _check_only(settings: dict, family: str, problems: list[str]) -> None:
    """Settings that ask for what this model does not do."""
    if "auto_map" in settings:
        problems.append("auto_map: asks for code from the folder, which is never run")
    for key, only in _ONLY.items():
        if settings.get(key, only) != only:
            problems.append(f"{key}: expected {only!r}, got {settings[key]!r}, not supported")
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        if settings.get(key) not in _IMPLEMENTATIONS:
            problems.append(f"{key}: {settings[key]!r} is not known")
    known = {key for key, _, _ in _FIELDS[family].values()} | _ONLY.keys() | _IGNORED | _OWN_RULE
    unknown = [k for k in settings if k not in known and "attn_implementation" not in k]
    if unknown:
        problems.append(
            f"unknown settings {', '.join(sorted(unknown))}: they may change the computation, "
            "remove those that do not"
        )


def _finish_starcoder2(settings: dict, values: dict, problems: list[str]) -> None:
    """RoPE in either dialect; the window counts for every layer."""
    values["positions"] = "rope"
    nested = settings.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        problems.append(f"rope_parameters: expected an object, got {nested!r}")
        return
    if nested.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters: rope_type {nested['rope_type']!r} is not supported")
    if extra := nested.keys() - {"rope_theta", "rope_type", "partial_rotary_factor"}:
        problems.append(f"rope_parameters: {', '.join(sorted(extra))} is not supported")
    if nested.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("rope_parameters: a partial_rotary_factor is not supported")
    thetas = [d["rope_theta"] for d in (settings, nested) if d.get("rope_theta") is not None]
    theta = thetas[0] if thetas else 10000.0
    if len(set(map(repr, map(_as_float, thetas)))) > 1:
        problems.append(f"rope_theta: {thetas[0]} and {thetas[1]} contradict each other")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < _LARGEST:
        problems.append(f"rope_theta: expected a positive number, got {theta!r}")
        return
    values["rope_theta"] = float(theta)
    kinds = settings.get("layer_types")
    wanted = "full_attention" if values["window"] is None else "sliding_attention"
    if kinds is not None and kinds != [wanted] * values["num_layers"]:
        problems.append(f"layer_types: expected {wanted} in every layer")


def _as_float(value):
    """Numbers compare as floats: 10000 and 10000.0 are one theta."""
    return float(value) if isinstance(value, int) and abs(value) < _LARGEST else value


def _finish_bigcode(settings: dict, values: dict, problems: list[str]) -> None:
    """Learned positions; one key/value head, or one for every query head."""
    multi_query = settings.get("multi_query", True)
    if not isinstance(multi_query, bool):
        problems.append(f"multi_query: expected true or false, got {multi_query!r}")
    for key in ("rope_theta", "rope_parameters", "layer_types"):
        if settings.get(key) is not None:
            problems.append(f"{key}: gpt_bigcode has learned positions and no window")
    values["positions"], values["window"] = "learned", None
    values["num_kv_heads"] = heads = 1 if multi_query else values["num_heads"]
    if settings.get("num_key_value_heads", heads) != heads:
        problems.append(
            f"num_key_value_heads: expected {heads} because multi_query is {multi_query}"
        )
    values["ffn_width"] = values["ffn_width"] or 4 * values["width"]


def _check_shape(settings: dict, values: dict, problems: list[str]) -> None:
    """Sizes that must divide each other."""
    width, heads, groups = values["width"], values["num_heads"], values["num_kv_heads"]
    if width % heads:
        problems.append(f"expected a width that {heads} heads divide, got {width}")
    elif settings.get("head_dim") not in (None, width // heads):
        problems.append(f"head_dim: expected {width // heads}, got {settings['head_dim']!r}")
    elif values["positions"] == "rope" and (width // heads) % 2:
        problems.append(f"expected an even head width for RoPE, got {width // heads}")
    if heads % groups:
        problems.append(f"expected key/value heads that divide {heads}, got {groups}")


def write_config(config: ModelConfig, dtype: str, end_of_text: int) -> dict:
    """`config.json` for transformers 4.4x to 5.x.

    Args:
        config: of the model.
        dtype: "float32", "bfloat16", ...
        end_of_text: id of the token that begins and ends documents.
    Raises:
        ValueError: the model type of `family` cannot express the configuration.
    """
    _check_expressible(config)
    settings = {
        theirs: getattr(config, ours) for ours, (theirs, _, _) in _FIELDS[config.family].items()
    }
    activation_key = _FIELDS[config.family]["activation"][0]
    settings[activation_key] = _ACTIVATION_NAMES[config.activation]
    settings |= {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.family == "starcoder2":
        theta = config.rope_theta
        settings |= {
            "use_bias": True,
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        }
    else:
        settings |= {
            "multi_query": config.num_kv_heads == 1,
            "scale_attn_weights": True,
            "attention_softmax_in_fp32": True,
            "scale_attention_softmax_in_fp32": True,
        }
    return settings


def _check_expressible(config: ModelConfig) -> None:
    """Raise ValueError if the model type has no words for the configuration."""
    problems = []
    if config.family not in _FIELDS:
        problems.append(f"family {config.family!r} is none of {', '.join(_FIELDS)}")
    if config.family == "starcoder2" and config.positions != "rope":
        problems.append("starcoder2 has RoPE, not learned positions")
    if config.family == "gpt_bigcode":
        if config.positions != "learned":
            problems.append("gpt_bigcode has learned positions, not RoPE")
        if config.window is not None:
            problems.append(f"gpt_bigcode has no window, the model has {config.window}")
        if config.num_kv_heads not in (1, config.num_heads):
            problems.append(
                f"gpt_bigcode has 1 or {config.num_heads} key/value heads, "
                f"not {config.num_kv_heads}"
            )
    if problems:
        raise ValueError("save_pretrained: " + "; ".join(problems) + ". Change model.family.")
