"""Similarity heads: how frame features become a video, and how texts and videos are compared.

A head is one file in this folder: a subclass of :class:`modules.heads.base.Head` under ``@register("name")``.
Importing this package imports every file in it, so a new file needs no other change.
"""

import importlib
import pkgutil

from checkpoints.read import ClipSizes
from modules.heads.base import HEADS, Head, HeadOptions, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["HEADS", "Head", "build_head", "register"]


def build_head(name: str, sizes: ClipSizes, options: HeadOptions) -> Head:
    """The head of ``--sim_header name``; with ``--interaction ti`` or ``wti`` its frames meet the text tokens."""
    from modules.heads.token_interaction import TokenInteraction

    head = HEADS[name](sizes, options)
    return head if options.interaction == "no" else TokenInteraction(head)
