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
        of_folders: that for images of folders, by its name, where this may be another.
    """

    def __init__(
        self,
        *flags: Any,
        look_up: Callable[[str], Any],
        of_folders: Callable[[str], Any] | None,
        **settings: Any,
    ) -> None:
        self._shown: Any = None
        self.look_up, self.of_folders = look_up, of_folders
        super().__init__(*flags, **settings)

    def get_default(self, ctx: click.Context, call: bool = True) -> Any:
        return self.look_up(str(self.name))

    @property
    def show_default(self) -> Any:
        """What the help says of the default: the context decides, or both of two."""
        if self.of_folders is None or self.name is None:  # Click asks before it has a name
            return self._shown
        default, of_folders = self.look_up(self.name), self.of_folders(self.name)
        return self._shown if default == of_folders else f"{default}; for folders {of_folders}"

    @show_default.setter
    def show_default(self, shown: Any) -> None:
        self._shown = shown


def option(*flags: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What Click's own `option` takes, for a `Group`."""
    return flags, settings


class Group:
    """Options that stand together in the help of a command; a decorator of commands.

    Args:
        title: above them in the help.
        options: from `option`.
        defaults: gives what has their defaults as attributes; None leaves them without.
        of_folders: gives what has those for images of folders, where these are others.
    """

    def __init__(
        self,
        title: str,
        *options: tuple[tuple[str, ...], dict[str, Any]],
        defaults: Callable[[], object] | None = None,
        of_folders: Callable[[], object] | None = None,
    ) -> None:
        self.defaults = defaults
        beside = of_folders and _attribute_of(of_folders)
        self._options: list[Callable[[Command], Command]] = []
        for flags, settings in options:
            own: dict[str, Any] = (
                {}
                if defaults is None
                else {"cls": _Option, "look_up": _attribute_of(defaults), "of_folders": beside}
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
