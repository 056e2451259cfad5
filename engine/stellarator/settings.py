"""From a recipe, a TOML file and `section.key=value` overrides to one checked `RunConfig`.

defines: resolve, check, check_inputs, check_layout, check_run, to_toml, ConfigError

All errors of a configuration are collected and reported together, each with where it stands and the
nearest valid name. Standard library only, so a typo costs milliseconds and not an import of torch.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from pathlib import Path

from stellarator.config import ModelConfig, RunConfig
from stellarator.parallel import layout


class ConfigError(ValueError):
    """All that is wrong with a configuration; `problems` holds one line each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__(f"configuration: {count}\n" + "\n".join(f"  {p}" for p in problems))


def resolve(
    base: RunConfig,
    toml_path: str | None = None,
    overrides: typing.Sequence[str] = (),
    world_size: int | None = None,
) -> RunConfig:
    """`base` with the values of a TOML file, then of the overrides, checked.

    Args:
        base: usually made by a recipe.
        toml_path: TOML with sections named like the fields of RunConfig; later values win.
        overrides: "section.key=value" or "--section.key=value"; the value is read by the field's
            type: `none`, `true`, 3e-4, a comma-separated list, text.
        world_size: processes that are to train this: what is then needed besides is checked, too.
    Raises:
        ConfigError: unknown names, values of the wrong type, rules broken; all at once.
    """
    problems: list[str] = []
    values: list[tuple[str, object, str]] = []  # (dotted name, value, where it stands)
    if toml_path is not None:
        values += _read_toml(Path(toml_path), problems)
    values += _read_overrides(overrides, problems)
    config = base
    for name, value, where in values:
        config = _set(config, name.split("."), value, where, name, problems)
    # A layout is not judged while some of its words are not understood.
    judged = world_size is not None and not problems
    if problems := problems + (check_run(config, world_size) if judged else check(config)):
        raise ConfigError(problems)
    return config


def _read_toml(path: Path, problems: list[str]) -> list[tuple[str, object, str]]:
    """The leaves of a TOML file as dotted names."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return []
    except UnicodeDecodeError:
        problems.append(f"{path}: expected UTF-8 text, got other bytes")
        return []
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{path}: not valid TOML: {error}")
        return []
    leaves = []

    def walk(node: dict, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                leaves.append((prefix + key, value, f"{path}:{_line_of(text, prefix, key)}"))

    walk(tree, "")
    return leaves


def _line_of(text: str, prefix: str, key: str) -> int:
    """Line number of `key` in the section `prefix`; 1 if it is written in another form."""
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\]]+)\]", line):
            section = header[1].strip() + "."
        written = re.match(r"\s*([\w.\-]+)\s*=", line)
        if written and section + written[1] == prefix + key:
            return number
    return 1


def _read_overrides(overrides, problems: list[str]) -> list[tuple[str, object, str]]:
    """`section.key=value` strings as dotted names with text values."""
    found, words = [], list(overrides)
    sections = [field.name for field in dataclasses.fields(RunConfig)]
    while words:
        text = words.pop(0)
        name, equals, value = text.removeprefix("--").partition("=")
        if text.startswith("--") and not (equals and ("." in name or name in sections)):
            if not equals and words and not words[0].startswith("--") and "=" not in words[0]:
                value = words.pop(0)  # written after a space
            problems.append(_unknown_option(name, value))
        elif not equals:
            problems.append(f"{text!r}: expected section.key=value, got no '='")
        else:
            found.append((name, _Text(value), f"{text!r}"))
    return found


def _unknown_option(name: str, value: str) -> str:
    """What to say of `--name value`, which is how other programs take values."""
    wanted = name.replace("-", "_").split(".")
    leaves = list(_flat_names(RunConfig()))
    fitting = [leaf for leaf in leaves if leaf.split(".")[-len(wanted) :] == wanted]
    if not fitting:
        last = [leaf.rpartition(".")[2] for leaf in leaves]
        near = difflib.get_close_matches(wanted[-1], last, n=1, cutoff=0.7)
        fitting = [leaf for leaf, key in zip(leaves, last, strict=True) if key in near]
    if not fitting:
        return f"unknown option --{name}; `stellarator train --help` shows how values are written"
    written = " or ".join(f"{leaf}={value or 'VALUE'}" for leaf in fitting)
    return f"unknown option --{name}; values are written {written}"


def _flat_names(section, prefix: str = "") -> typing.Iterator[str]:
    """The dotted names of all values."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat_names(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


class _Text(str):
    """A value written on the command line, still to be read by the field's type."""


def _set(config, path: list[str], value, where: str, full: str, problems: list[str]):
    """A copy of `config` with the field at `path` replaced."""
    hints = typing.get_type_hints(type(config))
    name = path[0]
    if name not in hints:
        names = [f.name for f in dataclasses.fields(config)]
        problems.append(f"{where}: unknown name {name!r}{_nearest(name, names)}")
        return config
    current = getattr(config, name)
    if dataclasses.is_dataclass(current):
        if len(path) == 1:
            problems.append(f"{where}: {full} is a section, expected {full}.key=value")
            return config
        inner = _set(current, path[1:], value, where, full, problems)
        return dataclasses.replace(config, **{name: inner})
    if len(path) > 1:
        problems.append(f"{where}: {name} is a value, not a section")
        return config
    try:
        return dataclasses.replace(config, **{name: _convert(value, hints[name])})
    except ValueError as error:
        problems.append(f"{where}: {full}: {error}")
        return config


def _nearest(name: str, names: list[str]) -> str:
    """Suggestion for a misspelt name."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else f". Valid names: {', '.join(names)}"


def _convert(value, hint):
    """`value` as the type `hint` of a field; raises ValueError with what was expected."""
    if isinstance(hint, types.UnionType):  # `X | None`
        inner = next(h for h in typing.get_args(hint) if h is not type(None))
        if isinstance(value, str) and value.lower() in ("none", "off"):
            return None
        return _convert(value, inner)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, _Text):
            value = [_Text(part) for part in value.split(",") if part]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a list, got {value!r}")
        return tuple(_convert(part, inner) for part in value)
    return _convert_scalar(value, hint)


def _convert_scalar(value, hint):
    """`value` as bool, int, float or str."""
    text = isinstance(value, _Text)
    if hint is str and isinstance(value, str):
        return str(value)
    if hint is bool:
        if isinstance(value, bool):
            return value
        if text and value.lower() in ("true", "1", "yes", "on"):
            return True
        if text and value.lower() in ("false", "0", "no", "off"):
            return False
    elif hint in (int, float) and not isinstance(value, bool):
        number = _number(value) if text else value
        if hint is float and isinstance(number, (int, float)):
            with contextlib.suppress(OverflowError):
                return float(number)
        if hint is int and isinstance(number, int):
            return number
        if hint is int and isinstance(number, float) and number.is_integer():
            return int(number)
    raise ValueError(f"expected {hint.__name__}, got {value!r}")


def _number(text: str):
    """int or float written in `text`, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check(config: RunConfig) -> list[str]:
    """Every broken rule of a configuration, one line each; empty if there is none."""
    return (
        _check_model(config)
        + _check_data(config)
        + _check_optim(config)
        + _check_train(config)
        + _check_rest(config)
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    if value in allowed:
        return []
    return [f"{name}: expected one of {', '.join(allowed)}, got {value!r}"]


def _at_least(name: str, value, minimum) -> list[str]:
    if value is None or value >= minimum:
        return []
    return [f"{name}: expected at least {minimum}, got {value}"]


def _within(name: str, value: float, low: float, high: float) -> list[str]:
    if low <= value <= high:
        return []
    return [f"{name}: expected a value in [{low}, {high}], got {value}"]


def _finite(name: str, value: float | None, above: float | None = None) -> list[str]:
    """A finite number above `above`, or of at least 0."""
    if value is None or math.isfinite(value) and (value >= 0 if above is None else value > above):
        return []
    expected = "of at least 0" if above is None else f"above {above}"
    return [f"{name}: expected a finite number {expected}, got {value}"]


def _seed(name: str, value: int) -> list[str]:
    return _within(name, value, 0, 2**64 - 1)


def _check_model(config: RunConfig) -> list[str]:
    model = config.model
    problems = _one_of("model.family", model.family, ("starcoder2", "gpt_bigcode"))
    problems += _one_of("model.positions", model.positions, ("rope", "learned"))
    problems += _one_of("model.activation", model.activation, ("gelu_tanh", "gelu_erf"))
    sizes = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "ffn_width")
    for name in (*sizes, "max_positions", "window"):
        problems += _at_least(f"model.{name}", getattr(model, name), 1)
    if not problems:  # else the numbers cannot be compared
        problems += _check_shape(model)
    problems += _finite("model.rope_theta", model.rope_theta, above=0)
    problems += _finite("model.norm_eps", model.norm_eps, above=0)
    problems += _finite("model.init_std", model.init_std)
    for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
        rate = getattr(model, name)
        if not 0.0 <= rate < 1.0:
            problems.append(f"model.{name}: expected a rate in [0, 1), got {rate}")
    return problems


def _check_shape(model: ModelConfig) -> list[str]:
    """What the sizes of a model must be to each other."""
    problems = []
    if model.width % model.num_heads:
        problems.append(
            f"model.width: expected a multiple of num_heads = {model.num_heads}, got {model.width}"
        )
    elif model.head_width % 8:
        problems.append(
            "model.width: expected heads of a width that is a multiple of 8, "
            f"got {model.width} / {model.num_heads} = {model.head_width}"
        )
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"model.num_kv_heads: expected a divisor of num_heads = {model.num_heads}, "
            f"got {model.num_kv_heads}"
        )
    if model.family == "gpt_bigcode" and model.num_kv_heads not in (1, model.num_heads):
        problems.append(
            f"model.num_kv_heads: gpt_bigcode has 1 or num_heads = {model.num_heads}, "
            f"got {model.num_kv_heads}"
        )
    learned = model.family == "gpt_bigcode"
    if (model.positions == "learned") != learned:
        expected = "learned" if learned else "rope"
        problems.append(f"model.positions: {model.family} has {expected}, got {model.positions}")
    return problems


def _check_data(config: RunConfig) -> list[str]:
    data, model = config.data, config.model
    problems = _at_least("data.seq_length", data.seq_length, 16)
    for name in ("rate", "fragment_rate", "spm_rate"):
        problems += _within(f"data.fim.{name}", getattr(data.fim, name), 0.0, 1.0)
    problems += _at_least("data.fim.max_middle_tokens", data.fim.max_middle_tokens, 1)
    problems += _at_least("data.fim.max_text_tokens", data.fim.max_text_tokens, 16)
    if data.weights and len(data.weights) != len(data.train):
        problems.append(
            f"data.weights: expected one per shard of data.train ({len(data.train)}), "
            f"got {len(data.weights)}"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in data.weights):
        problems.append(f"data.weights: expected positive finite numbers, got {data.weights}")
    problems += _seed("data.seed", data.seed)
    if data.seq_length > model.max_positions:
        problems.append(
            f"data.seq_length: expected at most model.max_positions = {model.max_positions}, "
            f"got {data.seq_length}"
        )
    return problems


def _check_optim(config: RunConfig) -> list[str]:
    optim, steps = config.optim, config.train.steps
    problems = _one_of("optim.schedule", optim.schedule, ("cosine", "wsd", "constant"))
    problems += _one_of("optim.wsd_shape", optim.wsd_shape, ("linear", "cosine", "sqrt"))
    for name in ("lr", "min_lr", "weight_decay", "clip_norm"):
        problems += _finite(f"optim.{name}", getattr(optim, name))
    problems += _finite("optim.eps", optim.eps, above=0)
    problems += _at_least("optim.warmup_steps", optim.warmup_steps, 0)
    problems += _within("optim.beta1", optim.beta1, 0.0, 0.999999)
    problems += _within("optim.beta2", optim.beta2, 0.0, 0.99999999)
    problems += _at_least("optim.decay_steps", optim.decay_steps, 1)
    kinds = ("masters", "remainders", "stochastic")
    problems += _one_of("optim.weights", optim.weights, kinds)
    problems += _one_of("optim.moments", optim.moments, ("fp32", "8bit"))
    precision = config.train.precision
    if optim.weights in kinds[1:] and precision != "bf16":
        problems.append(
            f"optim.weights: {optim.weights} go with train.precision=bf16, got {precision}, "
            "whose parameters have all digits. Leave optim.weights out"
        )
    if optim.moments == "8bit" and precision == "fp64":
        problems.append(
            "optim.moments: 8bit goes with train.precision=bf16 or fp32, got fp64. "
            "Leave optim.moments out"
        )
    if optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr: expected at most lr = {optim.lr}, got {optim.min_lr}")
    if optim.schedule == "cosine" and (optim.decay_steps or steps) <= optim.warmup_steps < steps:
        problems.append(
            f"optim.decay_steps: expected more than warmup_steps = {optim.warmup_steps}, "
            f"got {optim.decay_steps}"
        )
    if optim.warmup_steps >= steps:
        problems.append(
            f"optim.warmup_steps: expected fewer than train.steps = {steps}, "
            f"got {optim.warmup_steps}"
        )
    return problems


def _check_train(config: RunConfig) -> list[str]:
    train = config.train
    problems = _one_of("train.precision", train.precision, ("bf16", "fp32", "fp64"))
    problems += _one_of("train.device", train.device, ("auto", "cpu", "cuda"))
    problems += _one_of("parallel.reduce_dtype", config.parallel.reduce_dtype, ("fp32", "bf16"))
    problems += _one_of("parallel.cp_form", config.parallel.cp_form, ("ring", "gather"))
    problems += _one_of("parallel.schedule", config.parallel.schedule, layout.schedules.NAMES)
    problems += layout.value_problems(config.parallel)
    problems += _finite("parallel.bucket_mib", config.parallel.bucket_mib, above=0)
    problems += _finite("parallel.timeout_seconds", config.parallel.timeout_seconds, above=0)
    problems += _one_of("train.recompute", train.recompute, ("none", "selective", "full"))
    problems += _one_of("train.on_nonfinite", train.on_nonfinite, ("stop", "skip"))
    implementations = ("auto", "triton", "cpu", "torch", "reference")
    problems += _one_of("train.kernels", train.kernels, implementations)
    for name in ("steps", "global_batch_size", "micro_batch_size", "eval_interval", "eval_batches"):
        problems += _at_least(f"train.{name}", getattr(train, name), 1)
    return problems + _seed("train.seed", train.seed)


def _check_rest(config: RunConfig) -> list[str]:
    problems = _at_least("checkpoint.interval", config.checkpoint.interval, 1)
    problems += _at_least("checkpoint.keep", config.checkpoint.keep, 2)
    problems += _at_least("metrics.log_interval", config.metrics.log_interval, 1)
    problems += _finite("metrics.peak_tflops", config.metrics.peak_tflops, above=0)
    if not config.folder:
        problems.append("folder: expected a path, got an empty string")
    return problems


def check_inputs(config: RunConfig) -> list[str]:
    """What a training run needs besides valid values: data."""
    problems = []
    if not config.data.train:
        problems.append(
            "data.train: expected prefixes of token shards, got none. "
            "Make them with `stellarator data prepare`"
        )
    if not config.data.tokenizer:
        problems.append("data.tokenizer: expected a folder with tokenizer.json, got none")
    if config.train.eval_interval and not config.data.validation:
        problems.append("data.validation: expected shards, as train.eval_interval is set, got none")
    return problems


def check_run(config: RunConfig, world_size: int) -> list[str]:
    """All of these at once: why so many processes cannot train what the configuration says."""
    problems = check(config) + check_inputs(config)
    return problems + [x for x in check_layout(config, world_size) if x not in problems]


def check_layout(config: RunConfig, world_size: int) -> list[str]:
    """Why so many processes cannot share the run as `parallel` says.

    Other problems of the configuration hide none of these, unless there are numbers below 1, with
    which nothing can be compared.
    """
    model, train, parallel, problems = config.model, config.train, config.parallel, []
    of_model = (model.width, model.num_heads, model.num_kv_heads, model.ffn_width, model.num_layers)
    of_batch = (config.data.seq_length, train.global_batch_size, train.micro_batch_size)
    if min(*of_model, *of_batch) < 1:
        return []
    if config.optim.moments == "8bit" and parallel.tp > 1 and not _whole_groups(config):
        problems.append(
            "optim.moments: 8bit with parallel.tp > 1 expects key/value heads that begin with a "
            f"group of 256 moments on every rank, got width {model.width}, {model.num_heads} heads "
            f"and parallel.tp = {parallel.tp}. Pass optim.moments=fp32"
        )
    sizes = {name: getattr(train, name) for name in ("global_batch_size", "micro_batch_size")}
    return problems + layout.problems(
        config.model, parallel, world_size, seq_length=config.data.seq_length, **sizes
    )


def _whole_groups(config: RunConfig) -> bool:
    """Whether the heads of a tensor rank are whole groups of 256 weights of the projection.

    Several ranks may hold one key/value head, and have to scale its moments alike.
    """
    model, tp = config.model, config.parallel.tp
    queries = max(1, model.num_heads // tp)
    kv_heads = max(1, model.num_kv_heads // tp)
    each = model.head_width * model.width
    return queries * each % 256 == 0 and kv_heads * each % 256 == 0


def to_toml(config) -> str:
    """`config` as TOML that `resolve` reads back to an equal value. `None` is written "none"."""
    lines: list[str] = []

    def emit(section, prefix: str) -> None:
        inner = []
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                inner.append((field.name, value))
            else:
                lines.append(f"{field.name} = {_toml_value(value)}")
        for name, value in inner:
            lines.append(f"\n[{prefix}{name}]")
            emit(value, f"{prefix}{name}.")

    emit(config, "")
    return "\n".join(lines) + "\n"


def _toml_value(value) -> str:
    """One value in TOML."""
    if value is None:
        value = "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04X}", escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    return repr(value)
