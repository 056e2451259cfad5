"""Recipes: every published size has its published number of parameters, on the meta device.

Independent reference: the counts of the released checkpoints, written here as literals. Also that
recipes pass the configuration checks, and that `import stellarator` stays free of torch.
"""

import dataclasses
import subprocess
import sys

import pytest

from stellarator import recipes, settings
from stellarator.config import RunConfig
from stellarator.model import build_model

COUNTS = {
    "starcoder2_3b": 3_030_371_328,
    "starcoder2_7b": 7_173_923_840,
    "starcoder2_15b": 15_957_889_024,
    "starcoder2_3b_long": 3_030_371_328,
    "starcoder2_7b_long": 7_173_923_840,
    "starcoder2_15b_long": 15_957_889_024,
    "santacoder": 1_124_886_528,
    "starcoderbase_1b": 1_137_207_296,
    "starcoderbase_3b": 3_043_311_104,
    "starcoderbase_7b": 7_327_263_232,
    "starcoderbase": 15_517_456_384,
    "starcoder": 15_517_456_384,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_to_the_unit(name):
    model = build_model(recipes.get(name).model, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_every_recipe_is_listed_checked_and_explained():
    assert set(COUNTS) | {"demo", "tiny"} == set(recipes.names())
    for name in recipes.names():
        config = recipes.get(name)
        assert isinstance(config, RunConfig) and config.name == name
        assert settings.check(config) == []
        assert settings.resolve(config) == config
        lines = getattr(recipes, name).__doc__.splitlines()
        assert lines[0].endswith(".") and any("Command: " in line for line in lines), name


def test_published_constants():
    base, long = recipes.get("starcoder2_3b"), recipes.get("starcoder2_3b_long")
    assert long.model == dataclasses.replace(base.model, rope_theta=999999.4420358813)
    assert (base.data.seq_length, long.data.seq_length, long.model.window) == (4096, 16384, 4096)
    starcoder = recipes.get("starcoderbase")
    assert starcoder.train.global_batch_size * starcoder.data.seq_length == 4_194_304
    assert (starcoder.optim.lr, starcoder.optim.min_lr) == (3e-4, 3e-5)
    assert starcoder.model.num_kv_heads == 1
    first = [n for n in COUNTS if not n.startswith("starcoder2")]
    assert len(first) == 6
    for fim in (recipes.get(n).data.fim for n in first):  # as Megatron's loader has it
        assert (fim.split_at_files, fim.end_cut_middles) == (False, False)
    for name, config in ((n, recipes.get(n)) for n in COUNTS):
        assert config.model.head_width == 128, name
        optim = config.optim
        assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-8)
        assert (optim.weight_decay, optim.clip_norm, config.data.fim.rate) == (0.1, 1.0, 0.5)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="'starcoder2-3B'. Did you mean 'starcoder2_3b'"):
        recipes.get("starcoder2-3B")
    with pytest.raises(ValueError, match="There are demo, tiny, starcoder2_3b"):
        recipes.get("zzzz")
    for helper in ("get", "names", "_train", "dataclasses"):
        with pytest.raises(ValueError, match="expected the name of a recipe"):
            recipes.get(helper)


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, stellarator; from stellarator import recipes; recipes.get('demo'); "
        "assert 'torch' not in sys.modules, 'torch'; assert 'numpy' not in sys.modules, 'numpy'; "
        "assert 'build_model' in dir(stellarator); "
        "assert not hasattr(stellarator, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_public_names_are_there():
    import stellarator

    for name in ("build_model", "load_pretrained", "save_pretrained"):
        assert callable(getattr(stellarator, name))
    assert stellarator.recipes is recipes
