"""The one way to call a plugin: every failure carries its name, the step and the view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import HeadwayError, PolicyError

if TYPE_CHECKING:
    from .policy import Role
    from .request import Request
    from .view import View

_END: Any = object()
T = TypeVar("T")


class Calls:
    """What the core calls plugins through. `view` is None until an engine has built one."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.callbacks: dict[str, list[tuple[Role, Callable[..., None]]]] = {}

    def call(self, plugin: Any, function: Callable[..., T], *args: Any) -> T:
        """function(*args), a method of `plugin`, whose name stands in the PolicyError for what it raises."""
        try:
            return function(*args)
        except PolicyError as error:
            self._locate(error)
            raise
        except HeadwayError:
            raise
        except (Exception, SystemExit) as error:
            raise self.refusal(plugin, f"raised {type(error).__name__}: {error}") from error

    def each(self, plugin: Any, function: Callable[..., Any], *args: Any) -> Iterator[Any]:
        """The iterable that function(*args) returns: the call is made at once, the iterable read lazily."""
        answer = self.call(plugin, function, *args)
        if not hasattr(answer, "__iter__"):
            raise self.refusal(plugin, f"{function.__name__}() answered {answer!r}: expected an iterable")
        return self._walk(plugin, self.call(plugin, iter, answer))

    def _walk(self, plugin: Any, items: Iterator[Any]) -> Iterator[Any]:
        while (item := self.call(plugin, next, items, _END)) is not _END:
            yield item

    def notify(self, event: str, *args: Any) -> None:
        """A callback of every role that overrides it, in the order of composition."""
        for role, function in self.callbacks[event]:
            self.call(role, function, *args)

    def refusal(self, plugin: Any, message: str, request: Request | None = None) -> PolicyError:
        """The error for what a plugin did wrong without raising."""
        name = request.id if request is not None else ""
        error = PolicyError(message, plugin=plugin_name(plugin), request=name)
        self._locate(error)
        return error

    def _locate(self, error: PolicyError) -> None:
        """Adds the step and the view to an error that says neither."""
        if self.view is not None and not error.view:
            error.locate(self.view.step, self.view.describe())


def plugin_name(plugin: Any) -> str:
    """How errors name a plugin; an observer may be any object."""
    return getattr(plugin, "plugin_name", "") or type(plugin).__name__
