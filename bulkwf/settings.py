"""Resolves settings: a flag wins over the environment, and the environment over the default.

Each place that can give settings is a layer: `arguments`, `environment`, the flags of a command. A configuration file
will be a layer between the environment and the defaults. The defaults are no layer: they stand in `Options`.

A setting is named by its path in `Options`, such as `rate.instances_per_s`, or by its field in `Target`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from bulkwf.errors import ConfigError
from bulkwf.options import Options, SettingError, Target

__all__ = [
    "DEFAULT",
    "Given",
    "Layer",
    "Settings",
    "arguments",
    "default_text",
    "environment",
    "parse_duration",
    "parse_rate",
    "parsed",
]

DEFAULT = "default"
"""The origin of a value that no layer gives."""
VARIABLES = {
    "account_id": ("CLOUDFLARE_ACCOUNT_ID",),
    "base_url": ("CLOUDFLARE_API_BASE_URL", "CLOUDFLARE_BASE_URL"),
    "proxy": ("BULKWF_PROXY",),
}
"""The environment variables of each setting; the first one that is set counts."""
UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
"""Units of a duration, in seconds."""


class Given(NamedTuple):
    """A setting's value in one layer.

    Attributes:
        value: A value of the type of the setting's field.
        origin: Where the value comes from, as messages name it, such as `--rate` or `CLOUDFLARE_ACCOUNT_ID`.
    """

    value: Any
    origin: str


Layer = Mapping[str, Given]
"""The settings that one place gives, by name."""


def _names(kind: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(kind):
        path = prefix + field.name
        yield from _names(field.type, path + ".") if is_dataclass(field.type) else (path,)


NAMES = frozenset((*_names(Options), *_names(Target)))
"""The names of all settings."""


class Settings:
    """The settings of one call or command, merged.

    Args:
        layers: The first one that gives a setting wins.
    """

    def __init__(self, *layers: Layer) -> None:
        self._given = {name: given for layer in reversed(layers) for name, given in layer.items()}
        unknown = self._given.keys() - NAMES
        assert not unknown, f"no such settings: {sorted(unknown)}"

    def get(self, name: str) -> Any:
        """The value that a layer gives for the setting *name*; None if none does."""
        return self._given[name].value if name in self._given else None

    def origin(self, name: str) -> str:
        """Where the value of the setting *name* comes from; `DEFAULT` if no layer gives it."""
        return self._given[name].origin if name in self._given else DEFAULT

    def options(self) -> Options:
        """The run's options.

        Raises:
            ConfigError: A value is out of bounds; the message names its origin.
        """
        options: Options = self._build(Options)
        return options

    def target(self) -> Target:
        """The run's target.

        Raises:
            ConfigError: No account is given, or a value is malformed; the message names its origin.
        """
        if "account_id" not in self._given:
            raise ConfigError("no account id is given. Pass account_id (--account), or set CLOUDFLARE_ACCOUNT_ID.")
        target: Target = self._build(Target)
        return target

    @contextmanager
    def naming_origins(self, prefix: str = "") -> Iterator[None]:
        """In errors that the block raises, name the origin of the value (such as `--rate`) instead of its field.

        Args:
            prefix: Path of the group that the block checks, with a dot at its end; empty for `Options` itself.

        Raises:
            ConfigError: The block raised `SettingError`.
        """
        try:
            yield
        except SettingError as error:
            given = self._given.get(prefix + error.setting)
            raise ConfigError(f"{given.origin if given else error.setting} {error.problem}") from None

    def _build(self, kind: Any, prefix: str = "") -> Any:
        values: dict[str, Any] = {}
        for field in fields(kind):
            path = prefix + field.name
            if is_dataclass(field.type):
                values[field.name] = self._build(field.type, path + ".")
            elif path in self._given:
                values[field.name] = self._given[path].value
        with self.naming_origins(prefix):
            return kind(**values)


def arguments(**values: object) -> Layer:
    """The layer of a call's arguments; an argument that is None counts as not given."""
    return {name: Given(value, name) for name, value in values.items() if value is not None}


def environment(variables: Mapping[str, str]) -> Layer:
    """The layer of the environment. White space around a value is dropped; an empty one counts as not given.

    Credentials are not settings: `transport.credentials` reads them again each time the service refuses one.
    """
    layer = {}
    for setting, names in VARIABLES.items():
        for name in names:
            if setting not in layer and (text := variables.get(name, "").strip()):
                layer[setting] = Given(text, name)
    return layer


# --- text ----------------------------------------------------------------------------------------------------------


def parse_rate(origin: str, text: str, period: str) -> int | None:
    """The number in *text* such as `100/s` or `1000/5m`; None for `unlimited`.

    Args:
        origin: Where the text comes from.
        text: A number, with or without `/` and *period*; or `unlimited`.
        period: The one period that is accepted: `s` or `5m`.

    Raises:
        ConfigError: *text* has another form; the message names *origin*.
    """
    if text == "unlimited":
        return None
    found = re.fullmatch(rf"([0-9]{{1,9}})(?:/{period})?", text, re.ASCII)
    if found is None or not int(found[1]):
        raise ConfigError(
            f"{origin} must be a number of at least 1, such as 100/{period}, or unlimited; it is {text!r}."
        )
    return int(found[1])


def parse_duration(origin: str, text: str) -> float:
    """The seconds in *text* such as `90s`, `30m`, `2h` or `1d`; a number without a unit is seconds.

    Raises:
        ConfigError: *text* has another form; the message names *origin*.
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|m|h|d)?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"{origin} must be a time like 90s, 30m or 2h, not {text!r}.")
    return float(found[1]) * UNITS_S[found[2] or "s"]


def _rate_text(value: int | None, period: str) -> str:
    return "unlimited" if value is None else f"{value}/{period}"


def _duration_text(seconds: float) -> str:
    unit = next(unit for unit, length_s in reversed(UNITS_S.items()) if seconds % length_s == 0 or unit == "s")
    return f"{seconds / UNITS_S[unit]:.6f}".rstrip("0").rstrip(".") + unit


class Notation(NamedTuple):
    """How people write a setting whose value is a number with a unit.

    Attributes:
        parse: Given origin and text, returns the value.
        text: Given the value, returns its text.
    """

    parse: Callable[[str, str], Any]
    text: Callable[[Any], str]


def _per(period: str) -> Notation:
    return Notation(partial(parse_rate, period=period), partial(_rate_text, period=period))


DURATION = Notation(parse_duration, _duration_text)
NOTATIONS = {
    "rate.instances_per_s": _per("s"),
    "rate.requests_per_5m": _per("5m"),
    "retry.max_outage_s": DURATION,
    "timeout_s": DURATION,
    "drain_timeout_s": DURATION,
}
"""The settings that are written as text with a unit."""


def parsed(setting: str, value: Any, origin: str) -> Given:
    """A setting that people have written, converted to the type of its field.

    Args:
        setting: Name of the setting.
        value: As people wrote it: text for the settings in `NOTATIONS`.
        origin: Where the value comes from.

    Raises:
        ConfigError: The text does not follow the setting's notation; the message names *origin*.
    """
    notation = NOTATIONS.get(setting)
    return Given(value if notation is None else notation.parse(origin, value), origin)


def default_text(setting: str) -> str:
    """The default of a setting of `Options`, as people write it."""
    value = attrgetter(setting)(Options())
    return NOTATIONS[setting].text(value) if setting in NOTATIONS else str(value)
