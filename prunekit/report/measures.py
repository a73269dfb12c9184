"""How tables, plots and pages name a task's measures and write their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prunekit.measure import Told
from prunekit.task import TASKS
from prunekit.task.evaluation import CLASSIFICATION, measures_told

CLOSE = {"agreement": "agreement with dense", "kl": "KL to dense"}
"""Names in text of measures of closeness; another is ``NAME to dense``."""
NAMES = {
    "rmse": "RMSE",
    "r2": "R²",
    "miou": "mean IoU",
    "f1": "F1",
    "kl": "KL",
    "bits_per_token": "bits a token",
    "bits_per_byte": "bits a byte",
}
"""Names in text of the others, where text has another than artifacts."""


class Shown(Told):
    """A measure, and how its name and figures are written."""

    @property
    def share(self) -> bool:
        """Whether it is a share of which more is better, as everybody expects: its direction need not be told."""
        return self.unit == "%" and self.better == "higher"

    def directed(self, name: str) -> str:
        """``name``, and in which direction it is better where that is not obvious: ``accuracy``, ``RMSE ↓``."""
        arrow = "" if self.share or self.name == "kl" else {"higher": " ↑", "lower": " ↓"}.get(self.better, "")
        return f"{name}{arrow}"

    @property
    def plain(self) -> str:
        """Its name in text: ``RMSE``, ``mean IoU``, ``bits a token``."""
        return NAMES.get(self.name, self.name)

    @property
    def title(self) -> str:
        """Its name, with its direction."""
        return self.directed(CLOSE.get(self.name, f"{self.name} to dense") if self.close else self.plain)

    @property
    def brief(self) -> str:
        """The same where it is clear what is compared with what."""
        return self.directed(self.plain)

    @property
    def label(self) -> str:
        """For rows of tables whose figures have no unit of their own: ``accuracy``, ``KL to dense (nats)``."""
        return self.title if self.unit in ("", "%") else f"{self.title} ({self.unit})"

    @property
    def axis(self) -> str:
        """For axes, and columns of numbers without a unit: ``accuracy (%)``, ``RMSE ↓``."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, figure: float) -> str:
        """A figure in a sentence or a table of different things: ``97.50%``, ``0.513``."""
        if self.unit == "%":
            return f"{figure:.2%}"
        return f"{figure:.4f}" if self.unit == "nats" else f"{figure:.4g}"

    def spaced(self, figure: float) -> str:
        """The same for pages: ``97.5 %``."""
        return f"{100 * figure:.1f} %" if self.unit == "%" else self.text(figure)

    def number(self, figure: float) -> str:
        """A figure among others of its kind, in the unit, which stands elsewhere: ``97.5``, ``0.513``."""
        return f"{100 * figure:.1f}" if self.unit == "%" else f"{figure:.4g}"


def three(figure: float) -> str:
    """A measured figure with three significant digits: ``11.1``, ``0.123``, ``1,240``."""
    return f"{figure:,.0f}" if abs(figure) >= 999.5 else f"{figure:#.3g}".rstrip(".")


def shown(told: Iterable[Mapping[str, Any]] | None) -> list[Shown]:
    """Measures as artifacts tell of them; those of classification where an artifact is older than other tasks."""
    return [Shown(m["name"], m["better"], m["unit"], bool(m["close"])) for m in (CLASSIFICATION if told is None else told)]


def by_name(name: str, told: Iterable[Mapping[str, Any]] | None) -> Shown:
    """The measure of that name among those that an artifact tells of; one of ``prunekit.task``'s own where it tells of none.

    A measure that nobody tells of has no direction.
    """
    known = shown(told) if told is not None else [m for task in TASKS.values() for m in shown(measures_told(task()))]
    return next((measure for measure in known if measure.name == name), Shown(name, "", "", False))


def deciding(told: Iterable[Mapping[str, Any]] | None) -> Shown:
    """The measure that decides: the first one."""
    return shown(told)[0]
