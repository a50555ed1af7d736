"""Similarity heads: how frame features become a video, and how texts and videos are compared.

A head is one file in this folder: a subclass of :class:`modules.heads.base.Head` under ``@register("name")``.
Importing this package imports every file in it, so a new file needs no other change.
"""

from __future__ import annotations

from modules.heads.base import HEADS, INTERACTIONS, Head, register

HEADS.load(__name__, __path__)

__all__ = ["HEADS", "INTERACTIONS", "Head", "register"]
