"""How options of the command line are declared: in groups, with defaults that are looked up when needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rich_click as click

Command = Callable[..., Any]


class Fractions(click.ParamType[Any]):
    """Numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(map(float, value.split(",")))
        except ValueError:
            raise click.UsageError(f"--evaluate-at {value}: expected numbers as 0.125,0.5,1") from None


class Starts(click.ParamType[Any]):
    """Starting points: shares of the first range, several in one text, or the values of one by name."""

    name = "start"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return (value,)
        try:
            if "=" not in value:
                return tuple(float(share) for share in value.split(","))
            pairs = [pair.partition("=") for pair in value.split(",")]
            return ({name.strip(): float(number) for name, _, number in pairs},)
        except ValueError as error:
            raise click.UsageError(
                f"--starts {value}: expected 0.4,0.9 or NAME=VALUE,... ({error})"
            ) from None


class _Option(click.RichOption):
    """An option with a default that is looked up when it is needed: the libraries it is in load slowly.

    Args:
        look_up: its default, by its name.
        of_folders, held_out: that for images of folders, and for those of which some are held out, by its
            name, where these may be others.
    """

    def __init__(
        self,
        *flags: Any,
        look_up: Callable[[str], Any],
        of_folders: Callable[[str], Any] | None,
        held_out: Callable[[str], Any] | None,
        **settings: Any,
    ) -> None:
        self._shown: Any = None
        self.look_up, self.of_folders, self.held_out = look_up, of_folders or look_up, held_out or of_folders
        super().__init__(*flags, **settings)

    def get_default(self, ctx: click.Context, call: bool = True) -> Any:
        return self.look_up(str(self.name))

    @property
    def show_default(self) -> Any:
        """What the help says of the default: the context decides, or what differs for folders is told."""
        if not hasattr(self, "name"):  # Click asks before it has one
            return self._shown
        default, of_folders = self.look_up(self.name), self.of_folders(self.name)
        held_out = of_folders if self.held_out is None else self.held_out(self.name)
        told = [_typed(default)]
        told += [f"for folders {_typed(of_folders)}"] if of_folders != default else []
        told += [f"where good images of folders are held out {_typed(held_out)}"] * (held_out != of_folders)
        is_plain = len(told) == 1 and not isinstance(default, tuple)
        return self._shown if is_plain else "; ".join(told)

    @show_default.setter
    def show_default(self, shown: Any) -> None:
        self._shown = shown


def _typed(value: Any) -> str:
    """A default as it would be typed; where there is none to type, what it stands for."""
    if isinstance(value, tuple):
        return ",".join(f"{number:g}" for number in value)
    return "all" if value is None else str(value)


def option(*flags: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What Click's own `option` takes, for a `Group`."""
    return flags, settings


class Group:
    """Options that stand together in the help of a command; a decorator of commands.

    Args:
        title: above them in the help.
        options: from `option`.
        defaults: gives what has their defaults as attributes; None leaves them without.
        of_folders, held_out: give what has those for images of folders, and for those of which some are held
            out, where these are others.
    """

    def __init__(
        self,
        title: str,
        *options: tuple[tuple[str, ...], dict[str, Any]],
        defaults: Callable[[], object] | None = None,
        of_folders: Callable[[], object] | None = None,
        held_out: Callable[[], object] | None = None,
    ) -> None:
        self.defaults = defaults
        beside = {
            "of_folders": of_folders and _attribute_of(of_folders),
            "held_out": held_out and _attribute_of(held_out),
        }
        self._options: list[Callable[[Command], Command]] = []
        for flags, settings in options:
            own: dict[str, Any] = (
                {} if defaults is None else {"cls": _Option, "look_up": _attribute_of(defaults), **beside}
            )
            self._options.append(click.option(*flags, **own, panel=title, **settings))
        self.names = [_name(flags) for flags, _ in options]

    def __call__(self, command: Command) -> Command:
        for decorate in reversed(self._options):
            command = decorate(command)
        return command

    def taken(self, given: dict[str, Any]) -> dict[str, Any]:
        """Their values, taken out of all that the user gave."""
        return {name: given.pop(name) for name in self.names}


def _attribute_of(defaults: Callable[[], object]) -> Callable[[str], Any]:
    return lambda name: getattr(defaults(), name)


def _name(flags: tuple[str, ...]) -> str:
    named = [flag for flag in flags if not flag.startswith("-")]
    return named[0] if named else max(flags, key=len).lstrip("-").replace("-", "_")
