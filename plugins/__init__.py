"""Plug-ins: a file that registers something under a name, and brings the flags that it needs.

Encoders, heads, losses, frame rules and datasets are chosen by name on the command line. Each kind has a
:class:`Registry`; a file in the folder of its kind adds itself with ``@register("name")`` and is found by its presence.
Its flags are the fields of a frozen dataclass ``Options``, declared with :func:`flag`. This imports no other part.
"""

import argparse
import dataclasses
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Range = tuple[str, Callable[[Any], bool]]  # what a value must be, in words, and whether one is
# What a flag may have when a run goes on from a checkpoint (--resume_model): the same value only; any, as it changes
# nothing of training; any, with a warning, as it changes the last bits only; a higher one.
OnResume = Literal["", "free", "rounding", "rise"]
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


def user_path(text: str) -> Path:
    """A path of the command line; ``~`` is the home folder also where the shell leaves it, as in ``--dir='~/x'``."""
    return Path(os.path.expanduser(text))


def flag(
    default: Any,
    help: str,
    *,
    type: Callable[[str], Any] | None = None,
    choices: tuple[Any, ...] | None = None,
    must_be: Range | None = None,
    on_resume: OnResume = "",
    **more: Any,
) -> Any:
    """A dataclass field that is a command-line flag; a bool default makes a switch.

    type: text to value, needed where the default is None. must_be: see :func:`at_least`. on_resume: see
    :data:`OnResume`; a path is always free. more: stays in the metadata.
    """
    if type is Path:
        on_resume = "free"
    if type is None:
        type = parse_bool if isinstance(default, bool) else default.__class__
    about = {"help": help, "type": type, "choices": choices, "must_be": must_be, "on_resume": on_resume, **more}
    return dataclasses.field(default=default, metadata=about)


def add_flags(section: Any, fields: Iterable[dataclasses.Field]) -> None:
    """Add fields of options classes to an argparse parser or group.

    A flag that is not given leaves no trace in the parsed namespace; its default is that of its field.
    """
    for field in fields:
        about: dict[str, Any] = {name: field.metadata[name] for name in ("type", "choices")}
        if about["type"] is Path:
            about["type"] = user_path
        text, shown = field.metadata["help"], field.default
        if isinstance(shown, bool):
            about |= {"nargs": "?", "const": True, "metavar": "BOOL"}
            shown = str(shown).lower()
        text += f" (default: {shown})" if shown is not None else ""
        section.add_argument(f"--{field.name}", help=text.replace("%", "%%"), default=argparse.SUPPRESS, **about)


def from_flags(options: type, given: Mapping[str, Any]) -> Any:
    """The options of this class among the flags given, defaults for the rest."""
    return options(**{f.name: given[f.name] for f in dataclasses.fields(options) if f.name in given})


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


class Registry(dict[str, T]):
    """The plug-ins of one kind by name. `flag`: the one that chooses among them, `kind`: what they are, in words."""

    def __init__(self, flag: str, kind: str) -> None:
        super().__init__()
        self.flag, self.kind = flag, kind

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make a plug-in available under `name`; a class gets it as its attribute ``name``.

        Raises ValueError where another plug-in has the name.
        """

        def add(plugin: T) -> T:
            if name in self:
                raise ValueError(f"two plug-ins are called --{self.flag} {name}: {self[name]} and {plugin}")
            self[name] = plugin
            if isinstance(plugin, type):
                plugin.name = name  # type: ignore[attr-defined]
            return plugin

        return add

    def load(self, package: str, path: list[str]) -> None:
        """Import every file of a package, so that those which register something do."""
        for module in pkgutil.iter_modules(path):
            importlib.import_module(f"{package}.{module.name}")

    def __missing__(self, name: str) -> T:
        raise KeyError(f"--{self.flag} must be one of {', '.join(sorted(self))}, got {name}")
