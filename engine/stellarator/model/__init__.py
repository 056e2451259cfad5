"""The decoder of both StarCoder generations, by configuration alone.

defines:
    Transformer                       transformer.py: tokens to logits or loss
    build_model                       init.py: a Transformer with fresh weights
    load_pretrained, save_pretrained  hf.py: Hugging Face folders in and out
    KVCache                           cache.py: keys and values of a text being generated
"""

from stellarator.model.cache import KVCache
from stellarator.model.hf import load_pretrained, save_pretrained
from stellarator.model.init import build_model
from stellarator.model.transformer import Transformer

__all__ = ["KVCache", "Transformer", "build_model", "load_pretrained", "save_pretrained"]
