"""The options of an algorithm as data: a frozen config, checked when it is made.

An algorithm is one function `(model, dataloader, true_edges, config) -> PruneScores`. Its
options can be given as a config, or one by one (`takes_options`). Functions with the published
library's parameter lists make a config of them and call such a function (`makes_config`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import partial, wraps
from inspect import Parameter
from typing import Any, TypeVar, get_type_hints

from torch import Tensor

from auto_circuit.checks import is_number, is_whole_number
from auto_circuit.errors import ConfigError
from auto_circuit.types import PruneScores

C = TypeVar("C", bound="AlgoConfig")
F = TypeVar("F", bound=Callable[..., Any])
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class AlgoConfig:
    """Options. Two configs are equal if they have the same class and describe the same.

    The constructor checks all that can be checked without a model, and raises ConfigError:
    what field, what was given, what is expected.
    """

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The options one by one, with their defaults (MISSING if there is none)."""
        return {field.name: field.default for field in fields(cls)}

    @classmethod
    def from_options(cls: type[C], **options: Any) -> C:
        """A config from options one by one."""
        return cls(**options)

    def options(self) -> dict[str, Any]:
        """The options one by one, as the functions that take them so call them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_options(self: C, **options: Any) -> C:
        """A copy with some options changed."""
        return self.from_options(**{**self.options(), **options})

    def description(self) -> dict[str, Any]:
        """Plain data (as of JSON), the same in every process: the class, and each field.

        Those that change no result, such as a memory limit, are left out.
        Scores are described by their SHA-256, edges by their names, an
        algorithm by its key and its own config.
        """
        left_out = _without_effect(self)
        plain = {
            field.name: _plain(getattr(self, field.name))
            for field in fields(self)
            if field.name not in left_out
        }
        return {"config": type(self).__name__, **plain}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        """The description as one line of JSON."""
        return json.dumps(self.description())


def _without_effect(config: AlgoConfig | type[AlgoConfig]) -> list[str]:
    """The options that change no result."""
    return [field.name for field in fields(config) if "for_readers" in field.metadata]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Enum):
        return value.name
    if is_whole_number(value):
        return int(value)
    if is_number(value):
        return float(value)
    if isinstance(value, Mapping):
        return {"sha256": _digest(value)}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    if hasattr(value, "description"):
        return value.description()
    return repr(value)


def _digest(prune_scores: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, scores in prune_scores.items():
        # In float64, which holds what every other kind of number holds.
        values = scores.detach().cpu().double().contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def makes_config(config_type: type[AlgoConfig]) -> Callable[[F], F]:
    """Decorates a function that takes a config's options one by one, and has more to do."""

    def decorate(function: F) -> F:
        function.config_type = config_type  # type: ignore[attr-defined]
        return function

    return decorate


def takes_options(
    config_type: type[AlgoConfig],
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorates a function with a parameter `config`: its options may come one by one too.

    In the place of the config, or after it by name; those given one by one change the
    config's. `help()` shows them with their defaults.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        names, signature = _with_options(function, config_type)
        place = list(inspect.signature(function).parameters).index("config")

        @wraps(function)
        def with_options(*args: Any, **kwargs: Any) -> Result:
            if len(args) > place and isinstance(args[place], AlgoConfig):
                kwargs["config"] = args[place]
                args = args[:place]
            # With a config, options without a default need not be given.
            is_given = kwargs.get("config") is not None
            bind = signature.bind_partial if is_given else signature.bind
            given = bind(*args, **kwargs).arguments
            options = {name: given.pop(name) for name in names if name in given}
            config = given.pop("config", None)
            if config is None:
                config = config_type.from_options(**options)
            elif not isinstance(config, config_type):
                raise ConfigError(
                    f"`config` is a {type(config).__name__}; {function.__name__} takes a "
                    f"{config_type.__name__}."
                )
            elif options:
                config = config.with_options(**options)
            return function(**given, config=config)

        with_options.__signature__ = signature  # type: ignore[attr-defined]
        return makes_config(config_type)(with_options)

    return decorate


def _with_options(
    function: Callable[..., Any], config_type: type[AlgoConfig]
) -> tuple[list[str], inspect.Signature]:
    """The options' names, and the signature with them in the place of the config."""
    own = inspect.signature(function)
    hints = get_type_hints(config_type)
    before, after, seen = [], [], False
    for name, parameter in own.parameters.items():
        if name == "config":
            seen = True
        elif seen:
            after.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
        else:
            before.append(parameter)
    options = [
        Parameter(
            name,
            # Published functions have options as positions: new ones go by name.
            (
                Parameter.KEYWORD_ONLY
                if name in _without_effect(config_type)
                else Parameter.POSITIONAL_OR_KEYWORD
            ),
            default=Parameter.empty if default is MISSING else default,
            annotation=hints.get(name, Parameter.empty),
        )
        for name, default in config_type.option_defaults().items()
    ]
    config = Parameter("config", Parameter.KEYWORD_ONLY, default=None)
    by_position = [o for o in options if o.kind != Parameter.KEYWORD_ONLY]
    by_name = [o for o in options if o.kind == Parameter.KEYWORD_ONLY]
    parameters = [*before, *by_position, *after, *by_name, config]
    return [option.name for option in options], own.replace(parameters=parameters)


def bound(
    function: Callable[..., PruneScores], config: AlgoConfig
) -> partial[PruneScores]:
    """The function with a config's options, each of which a caller may still change."""
    options = config.options()
    # What an algorithm's results are called by says nothing of what does not change them.
    given = {
        name: value
        for name, value in options.items()
        if value is not None or name not in _without_effect(config)
    }
    return partial(function, **given)


def config_of(function: Callable[..., PruneScores]) -> AlgoConfig | None:
    """The config with which a PruneAlgo's function runs; None if it takes none."""
    options: dict[str, Any] = {}
    if isinstance(function, partial):
        options, function = dict(function.keywords), function.func
    config_type: type[AlgoConfig] | None = getattr(function, "config_type", None)
    config = options.pop("config", None)
    if config_type is None:
        return config if isinstance(config, AlgoConfig) else None
    names = config_type.option_defaults()
    options = {name: value for name, value in options.items() if name in names}
    if isinstance(config, AlgoConfig):
        return config.with_options(**options)
    return config_type.from_options(**options)
