"""Similarity heads: how texts and videos are compared. One file each, found by its presence in this folder."""

from modules.heads.base import HEADS, INTERACTIONS, Head, register

HEADS.load(__name__, __path__)

__all__ = ["HEADS", "INTERACTIONS", "Head", "register"]
