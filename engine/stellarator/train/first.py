"""The first values of the parameters of a run, made one by one: no rank holds the whole model.

defines: first_values
"""

import contextlib
from collections.abc import Iterator
from functools import partial

from stellarator.config import RunConfig
from stellarator.model.hf import Pretrained
from stellarator.model.init import initialize_
from stellarator.parallel.unfilled import Fill
from stellarator.train import resume


@contextlib.contextmanager
def first_values(config: RunConfig, resumed: bool) -> Iterator[Fill]:
    """What sets a part of a parameter, for as long as the block lasts.

    resumed: a checkpoint will set them; here they are zeros.

    Raises:
        RefusedError: `train.init_from` holds another model.
        FolderError: or is damaged.
    """
    start = config.train.init_from
    if resumed:
        yield lambda name, shard, values: values.zero_()
    elif start is None:
        yield partial(initialize_, config.model, config.train.seed)
    else:
        with Pretrained(start) as weights:
            if wrong := resume.model_difference(start, weights.config, config.model):
                raise resume.RefusedError(wrong)
            yield lambda name, shard, values: shard.take_(values, weights.read(name))
