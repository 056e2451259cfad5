"""Training of code language models of the StarCoder family.

defines, each bound on first use so that `import stellarator` costs nothing and imports no torch:
    build_model       a model with fresh weights from a ModelConfig
    load_pretrained   a model from a Hugging Face folder
    save_pretrained   a Hugging Face folder from a model
    recipes           module: complete configurations by name
    settings          module: recipe, TOML file and overrides to one checked configuration
    Trainer           one training run
    __version__       of the package that is installed
"""

import importlib

_HOMES = {
    "build_model": "stellarator.model.init",
    "load_pretrained": "stellarator.model.hf",
    "save_pretrained": "stellarator.model.hf",
    "recipes": None,  # a submodule
    "settings": None,
    "Trainer": "stellarator.train.loop",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    """The public name, imported now."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'stellarator' has no attribute {name!r}")
    if _HOMES[name] is None:
        return importlib.import_module(f"stellarator.{name}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def _version() -> str:
    """The version in the metadata of the installed package; a checkout that is not has none."""
    from importlib import metadata

    try:
        return metadata.version("stellarator")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
