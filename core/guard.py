"""Calls into plugins. Whatever a plugin raises or answers wrongly ends the run with that plugin's name, the step and the view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .clock import is_finite
from .errors import HeadwayError, PolicyError
from .policy import LengthPrediction, Predictor, Role
from .request import Request

if TYPE_CHECKING:
    from .view import View

_END = object()


class Guard:
    """What the engine, the builder and the view call plugins through."""

    def __init__(self, view: View) -> None:
        self._view = view

    def call(self, plugin: Any, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), a method of `plugin`."""
        try:
            return function(*args)
        except HeadwayError:
            raise
        except (Exception, SystemExit) as error:
            raise self.named(error, plugin) from error

    def each(self, plugin: Role, function: Callable[..., Any], *args: Any) -> Iterator[Any]:
        """The iterable that function(*args) answers; it is asked at once, and walked no further than somebody asks for."""
        answer = self.call(plugin, function, *args)
        if not hasattr(answer, "__iter__"):
            raise self.refusal(plugin, f"{function.__name__}() answered {answer!r}: expected an iterable")
        return self._walk(plugin, self.call(plugin, iter, answer))

    def _walk(self, plugin: Role, items: Iterator[Any]) -> Iterator[Any]:
        while (item := self.call(plugin, next, items, _END)) is not _END:
            yield item

    def refusal(self, plugin: Any, message: str, request: Request | None = None) -> PolicyError:
        """The error for what a plugin did wrong without raising."""
        view = self._view
        return PolicyError(
            message,
            plugin=plugin_name(plugin),
            step=view.step,
            request=request.id if request is not None else "",
            view=view.describe(),
        )

    def named(self, error: BaseException, plugin: Any = None) -> BaseException:
        """The error of a plugin with the plugin's name, the step and the view; what already says them, or no plugin raised, as it is."""
        culprit = _culprit(error) or plugin
        if culprit is None or isinstance(error, HeadwayError) or not isinstance(error, (Exception, SystemExit)):
            return error
        named = self.refusal(culprit, f"raised {type(error).__name__}: {error}")
        named.__cause__ = error
        return named


class CheckedPredictor(Predictor):
    """The predictor as policies meet it: what it answers is checked, and whether anybody asked is known."""

    def __init__(self, inner: Any, guard: Guard) -> None:
        self.inner, self._guard = inner, guard
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict(self, request: Request) -> LengthPrediction:
        self.asked = True
        answer = self._guard.call(self.inner, self.inner.predict, request)
        if not isinstance(answer, LengthPrediction) or not (is_finite(answer.mean) and is_finite(answer.upper)):
            message = f"predict() answered {answer!r}: expected a LengthPrediction whose mean and upper are finite numbers of tokens"
            raise self._guard.refusal(self.inner, message, request)
        return answer


def plugin_name(plugin: Any) -> str:
    """How errors name a plugin; an observer may be any object."""
    return getattr(plugin, "plugin_name", "") or type(plugin).__name__


def _culprit(error: BaseException) -> Role | None:
    """The innermost role on the traceback: who really raised."""
    found, tb = None, error.__traceback__
    while tb is not None:
        owner = tb.tb_frame.f_locals.get("self")
        if isinstance(owner, Role):
            found = owner
        tb = tb.tb_next
    return found
