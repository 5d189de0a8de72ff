"""Finds passes, targets and metrics. An entry point names a *package*; each public module in it is one pass (or one target, or one metric).

Listing names imports nothing; a class is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

from graphopt.core.errors import GraphoptError, PipelineError
from graphopt.core.options import kebab, near

if TYPE_CHECKING:
    from graphopt.core.contract import Metric, NamedMetric

PASSES, TARGETS, METRICS = "graphopt.passes", "graphopt.targets", "graphopt.metrics"
_BY_NAME = re.compile(r"([\w-]+)\s*(\{.*\})?", re.S)  # NAME or NAME{options}


class Registry(Mapping[str, type[Any]]):
    """Names -> classes of one group; the values are imported on demand.

    Args:
        group: of entry points that name packages.
        base: gives what every class is; called when the first is imported.
        plugins: files and modules of the user.
        builtin: a package that needs no entry point.
    """

    def __init__(self, group: str, base: Callable[[], type], plugins: tuple[str, ...] = (), builtin: str | None = None) -> None:
        self.group, self.base, self.plugins = group, base, plugins
        self._owners: dict[str, str] = {}
        self._places: dict[str, str | type[Any]] = {}
        for entry in sorted(entry_points(group=group), key=lambda e: (e.name != "builtin", e.name)):
            self._add_package(entry)
        if builtin is not None:
            self._add_package(EntryPoint("builtin", builtin, group))
        for plugin in plugins:
            self._add_plugin(plugin)

    def __getitem__(self, name: str) -> type[Any]:
        place = self._places[name]
        if isinstance(place, str):
            place = self._places[name] = self._class_in(importlib.import_module(place), name)
        return place

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._places else default

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def owner(self, name: str) -> str:
        """Who brings this name: `graphopt`, another distribution, or a plugin file."""
        return self._owners[name]

    def place(self, name: str) -> str | type[Any]:
        """The module of this name, or its class where that is imported already."""
        return self._places[name]

    def _add_package(self, entry: EntryPoint) -> None:
        owner = entry.dist.name if entry.dist is not None else entry.value
        try:
            spec = importlib.util.find_spec(entry.value)
        except ModuleNotFoundError:  # its parent package is gone
            spec = None
        if spec is None:
            raise PipelineError(f"{owner} registers `{entry.value}` for {self.group}, but there is no such package; reinstall {owner}")
        for module in pkgutil.iter_modules(spec.submodule_search_locations or []):
            if not module.name.startswith("_"):
                self._claim(module.name.replace("_", "-"), f"{entry.value}.{module.name}", owner)

    def _add_plugin(self, plugin: str) -> None:
        for cls in vars(load_plugin(plugin)).values():
            if self._is_member(cls) and not cls.__module__.startswith("graphopt."):
                self._claim(cls.name, cls, plugin)

    def _claim(self, name: str, place: str | type[Any], owner: str) -> None:
        if name in self._places and self._places[name] is not place:
            raise PipelineError(f"the name `{name}` in {self.group} is claimed by {self._owners[name]} and by {owner}; rename or remove one of them")
        self._places[name], self._owners[name] = place, owner

    def _is_member(self, cls: object) -> TypeGuard[type[Any]]:
        return isinstance(cls, type) and issubclass(cls, self.base()) and not inspect.isabstract(cls)

    def _class_in(self, module: ModuleType, name: str) -> type[Any]:
        for cls in vars(module).values():
            if self._is_member(cls) and cls.name == name:
                return cls
        kind = kebab(self.base().__name__).replace("-", " ")
        raise PipelineError(f"{module.__name__} must define the {kind} class of its file name (`{name}`), and does not")


def passes(plugins: tuple[str, ...] = ()) -> Registry:
    return Registry(PASSES, _of_contract("Pass"), plugins)


def targets(plugins: tuple[str, ...] = ()) -> Registry:
    return Registry(TARGETS, _of_contract("Target"), plugins)


def _of_contract(name: str) -> Callable[[], type]:
    return lambda: getattr(importlib.import_module("graphopt.core.contract"), name)


def metrics(plugins: tuple[str, ...] = ()) -> Registry:
    return Registry(METRICS, _of_contract("NamedMetric"), plugins, builtin=METRICS)


def load_plugin(plugin: str) -> ModuleType:
    """A plugin is a Python file or the name of an importable module."""
    path = Path(plugin)
    if path.suffix != ".py":
        try:
            return importlib.import_module(plugin)
        except ImportError as error:
            raise PipelineError(f"plugin `{plugin}` is neither a .py file nor an importable module: {error}") from error
        except (Exception, SystemExit) as error:
            raise PipelineError(f"plugin module {plugin} failed to import: {type(error).__name__}: {error}") from error
    name = f"graphopt_plugin_{path.stem}_{abs(hash(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise PipelineError(f"plugin file {path} does not exist")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PipelineError(f"plugin file {path} failed to import: {type(error).__name__}: {error}") from error
    return module


def load_metric(text: str, plugins: tuple[str, ...] = ()) -> Metric:
    """A metric from its name (`accuracy{data=dev.npz}`), or from `FILE.py:function` or `module:function`.

    Raises:
        GraphoptError: there is no such metric or function.
        PipelineError: it has no such option.
    """
    named = _BY_NAME.fullmatch(text.strip())
    if named is None:
        return load_function(text, "metric")
    from graphopt.core.pipeline import parse

    known = metrics(plugins)
    if named[1] not in known:
        forms = f"A metric is NAME{{options}} ({', '.join(known)}), FILE.py:FUNCTION or MODULE:FUNCTION"
        raise GraphoptError(f"there is no metric `{named[1]}`{near(named[1], known) or '.'} {forms}")
    found: list[NamedMetric] = parse(text.strip(), known, "metric")
    if len(found) != 1:
        raise GraphoptError(f"expected one metric such as accuracy{{data=dev.npz}}, found `{text}`")
    return found[0]


def load_function(text: str, what: str) -> Callable[..., Any]:
    """A function of the user from `FILE.py:function` or `module:function`; `what` it is for, in the words of an error.

    Raises:
        GraphoptError: there is no such function.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise GraphoptError(f"a {what} is FILE.py:FUNCTION or MODULE:FUNCTION, found `{text}`")
    found = getattr(load_plugin(place), name, None)
    if not callable(found):
        raise GraphoptError(f"{place} has no function `{name}`")
    function: Callable[..., Any] = found
    return function
