"""Plug-ins: a file that registers something under a name, and brings the flags that it needs.

Encoders, heads, losses, frame rules and datasets are chosen by name on the command line. Each kind has a
:class:`Registry`; a file in the folder of its kind adds itself with ``@register("name")`` and is found by its presence.
Its flags are the fields of a frozen dataclass ``Options``, declared with :func:`flag`. This package imports nothing of
the project, so every part of it may be built on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Range = tuple[str, Callable[[Any], bool]]  # what a value must be, in words, and whether one is
FALSE_WORDS, TRUE_WORDS = ("false", "no", "off", "0"), ("true", "yes", "on", "1")


def at_least(low: float) -> Range:
    return f">= {low}", lambda value: value >= low


def above(low: float) -> Range:
    return f"> {low}", lambda value: value > low


def within(low: float, high: float) -> Range:
    return f"in [{low}, {high}]", lambda value: low <= value <= high


def parse_bool(text: str) -> bool:
    """``--flag``, ``--flag=true`` and ``--flag=False`` mean what they say."""
    if text.lower() in TRUE_WORDS + FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def flag(
    default: Any,
    help: str,
    *,
    type: Callable[[str], Any] | None = None,
    choices: tuple[Any, ...] | None = None,
    must_be: Range | None = None,
    **more: Any,
) -> Any:
    """A dataclass field that is a command-line flag; a bool default makes a switch.

    type: from text to value, needed where the default is None. must_be: the range of values, see :func:`at_least`.
    more: kept in the field's metadata for whoever declares the flag.
    """
    if type is None:
        type = parse_bool if isinstance(default, bool) else default.__class__
    return dataclasses.field(
        default=default, metadata={"help": help, "type": type, "choices": choices, "must_be": must_be, **more}
    )


def add_flags(section: Any, options: type) -> None:
    """Add the fields of an options class to an argparse parser or group.

    A flag that is not given leaves no trace in the parsed namespace; its default is that of the class.
    """
    for field in dataclasses.fields(options):
        about = {"nargs": "?", "const": True, "metavar": "BOOL"} if isinstance(field.default, bool) else {}
        text = field.metadata["help"]
        if field.default is not None:
            text += f" (default: {str(field.default).lower() if isinstance(field.default, bool) else field.default})"
        section.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            type=field.metadata["type"],
            choices=field.metadata["choices"],
            help=text.replace("%", "%%"),
            **about,
        )


def from_flags(options: type[T], given: Mapping[str, Any]) -> T:
    """The options of this class among the flags given, defaults for the rest."""
    return options(**{f.name: given[f.name] for f in dataclasses.fields(options) if f.name in given})  # type: ignore


def out_of_range(options: Any) -> str | None:
    """A sentence about the first value that its flag does not allow; None when all are fine."""
    for field in dataclasses.fields(options):
        must_be, value = field.metadata["must_be"], getattr(options, field.name)
        if must_be is not None and not must_be[1](value):  # NaN fails every comparison and lands here too
            return f"--{field.name} must be {must_be[0]}, got {value}"
    return None


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """For a plug-in without flags."""


class Registry(Mapping[str, T]):
    """The plug-ins of one kind by name. `flag`: the one that chooses among them, `kind`: what they are, in words."""

    def __init__(self, flag: str, kind: str) -> None:
        self.flag, self.kind = flag, kind
        self._found: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make a plug-in available under `name`. Raises ValueError where another one has it."""

        def add(plugin: T) -> T:
            if name in self._found:
                raise ValueError(f"two plug-ins are called --{self.flag} {name}: {self._found[name]} and {plugin}")
            self._found[name] = plugin
            return plugin

        return add

    def load(self, package: str, path: list[str]) -> None:
        """Import every file of a package, so that those which register something do."""
        for module in pkgutil.iter_modules(path):
            importlib.import_module(f"{package}.{module.name}")

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            raise KeyError(f"--{self.flag} must be one of {', '.join(sorted(self._found))}, got {name}")
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def options_of(plugin: Any) -> type:
    """The class of a plug-in's own flags."""
    return getattr(plugin, "Options", NoOptions)
