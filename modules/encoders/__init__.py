"""Encoders: texts and frames into one space. One file each, found by its presence in this folder."""

from modules.encoders.base import ENCODERS, Encoder, Sizes, register

ENCODERS.load(__name__, __path__)

__all__ = ["ENCODERS", "Encoder", "Sizes", "register"]
