"""What a criterion's name may say: options, products with powers, averages of ranks.

```text
influence(target=margin,aggregation=l2)      options, each accepted by the criterion
influence^0.25*magnitude^0.75                a product of importances; exponents above 0, 1 where none is given
rank(influence)+rank(magnitude)              the mean of ranks; inside rank(...) a criterion or a product
tempered(influence)                          stands for influence^p*magnitude^(1-p), one p each of TEMPERS
my_module:steady^0.5*magnitude^0.5           a criterion of the user's own, by import path, stands wherever a name does
```

Every name has one canonical text (no blanks, options and factors in a fixed order, equal factors joined), which artifacts
carry, and a *slug* for file names. Slugs use ``a-z 0-9 _ . -`` only and can be read back:

| in a name | ``(`` and ``,`` of options | ``=`` | ``^`` | ``*`` | ``+`` | ``rank(`` | ``)`` |
|---|---|---|---|---|---|---|---|
| in its slug | ``.`` | ``-`` | ``--`` | ``---`` | ``----`` | ``rank-`` | nothing |

``influence(target=margin,aggregation=l2)`` lies in ``influence.target-margin.aggregation-l2.safetensors``. In an import path
``.`` becomes ``..`` and ``:`` becomes ``...``: ``my_package.mine:steady`` lies in ``my_package..mine...steady.safetensors``.
A slug that would pass 150 characters is cut there and gets ``-----`` and a hash of the whole name instead of its end; one with
capital letters, which some file systems do not tell from small ones, gets the hash too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from prunekit.criteria.aggregations import AGGREGATIONS, written
from prunekit.errors import UsageError, nearest
from prunekit.imports import IMPORT_PATH
from prunekit.kernel import SHARES
from prunekit.registry import Registry
from prunekit.task import TARGET_NAMES

if TYPE_CHECKING:
    from prunekit.criteria.evidence import Criterion

TEMPERS = ("0", "0.1", "0.25", "0.5", "0.75", "1")
"""The exponents p that ``tempered`` tries: 0 is magnitude alone, 1 the criterion alone."""

RESERVED = ("rank", "tempered", "auto", "all")
LONGEST_SLUG = 150
GREATEST = Decimal(100)

LONGEST = 2000  # characters of a criterion's name, compositions included
_TOKEN = re.compile(rf"\s*(?:({IMPORT_PATH}|[A-Za-z_]\w*)|(\d+\.?\d*|\.\d+)|([()=,^*+]))")


@dataclass(frozen=True)
class Single:
    """One criterion with its options, in the order of ``OPTIONS``."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, text: str) -> Single:
        """From its canonical text, unchecked."""
        name, _, inside = text.removesuffix(")").partition("(")
        pairs = (option.partition("=") for option in inside.split(",")) if inside else ()
        return cls(name, tuple((key, value) for key, _, value in pairs))

    @property
    def text(self) -> str:
        inside = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}({inside})" if inside else self.name

    @property
    def singles(self) -> tuple[Single, ...]:
        return (self,)


@dataclass(frozen=True)
class Product:
    """Importances to powers, multiplied: ``Π_k I_k^{p_k}``; every ``p_k`` is above 0, no factor twice."""

    factors: tuple[tuple[Single, Decimal], ...]

    @property
    def text(self) -> str:
        return "*".join(f"{part.text}{'' if power == 1 else f'^{_plain(power)}'}" for part, power in self.factors)

    @property
    def singles(self) -> tuple[Single, ...]:
        return tuple(part for part, _ in self.factors)


@dataclass(frozen=True)
class Rank:
    """The mean of the parts' ranks."""

    parts: tuple[Single | Product, ...]

    @property
    def text(self) -> str:
        return "+".join(f"rank({part.text})" for part in self.parts)

    @property
    def singles(self) -> tuple[Single, ...]:
        return tuple(dict.fromkeys(single for part in self.parts for single in part.singles))


Spec = Single | Product | Rank


def product(factors: Iterable[tuple[Single | Product, Decimal]]) -> Single | Product:
    """The canonical product: nested ones flattened, equal factors joined, in the order of their texts.

    A factor to the power of 0 is no factor: it leaves no trace, not even of its zeros (``0^0`` is 1 here).
    """
    powers: dict[Single, Decimal] = {}
    for part, power in factors:
        for single, inner in part.factors if isinstance(part, Product) else ((part, Decimal(1)),):
            powers[single] = powers.get(single, Decimal(0)) + inner * power
    kept = sorted(((s, p) for s, p in powers.items() if p > 0), key=lambda factor: factor[0].text)
    if len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    return Product(tuple(kept))


def tempered(part: Single | Product, p: str | Decimal) -> Single | Product:
    """``part^p*magnitude^(1-p)``."""
    power = Decimal(p)
    return product([(part, power), (Single("magnitude"), 1 - power)])


# -- parsing -----------------------------------------------------------------------------------------------------


def parse(text: str, known: Registry[Criterion]) -> list[Spec]:
    """What ``text`` names: one criterion, or for ``tempered(...)`` the list that it stands for. Nothing is imported.

    Args:
        known: ``CRITERIA``. What is not in the table itself may have any option here; see ``check_accepted``.

    Raises:
        UsageError: not of the syntax above, an unknown name (near ones are offered), an option that the criterion does
            not take, or a value out of range.
    """
    if not isinstance(text, str):
        raise UsageError(f"criterion is {text!r:.60}; it must be a name, such as 'taylor'")
    if len(text) > LONGEST:
        raise UsageError(f"criterion {text[:60]!r} … has {len(text):,} characters; a name has {LONGEST:,} at most")
    return _Parser(text, known).whole()


class _Parser:
    """Recursive descent, one method a rule of the syntax."""

    def __init__(self, text: str, known: Registry[Criterion]) -> None:
        self.text, self.known = text, known
        self.tokens = list(self._tokens())
        self.at = 0

    def _tokens(self) -> Iterator[str]:
        end, text = 0, self.text.rstrip()
        while end < len(text):
            match = _TOKEN.match(text, end)
            if match is None:
                raise self.wrong(f"{text[end:].strip()[0]!r} has no meaning here")
            yield match[1] or match[2] or match[3]
            end = match.end()

    def wrong(self, why: str) -> UsageError:
        return UsageError(f"criterion {self.text!r}: {why}")

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        found = self.next
        if not found or (wanted is not None and found != wanted):
            what = repr(found) if found else "its end"
            raise self.wrong(f"expected {repr(wanted) if wanted else 'a name or a number'} where {what} is")
        self.at += 1
        return found

    def whole(self) -> list[Spec]:
        found: list[Spec]
        if self.next == "tempered":
            self.take()
            part = self.inside()
            found = list(dict.fromkeys(tempered(part, p) for p in TEMPERS))
        elif self.next == "rank":
            parts = [self.rank()]
            while self.next == "+":
                self.take()
                parts.append(self.rank())
            found = [Rank(tuple(sorted(parts, key=lambda part: part.text)))]
        else:
            found = [self.product()]
        if self.next == "+":
            raise self.wrong("importances on different scales are not added; write rank(...)+rank(...)")
        if self.next:
            raise self.wrong(f"{self.next!r} has no meaning here")
        return found

    def rank(self) -> Single | Product:
        self.take("rank")
        return self.inside()

    def inside(self) -> Single | Product:
        self.take("(")
        part = self.product()
        self.take(")")
        return part

    def product(self) -> Single | Product:
        factors = [self.power()]
        while self.next == "*":
            self.take()
            factors.append(self.power())
        found = product(factors)
        for part, power in found.factors if isinstance(found, Product) else ():
            if power > GREATEST:
                raise self.wrong(f"the exponents of {part.text} add up to {_plain(power)}, more than {GREATEST}")
        return found

    def power(self) -> tuple[Single, Decimal]:
        part = self.single()
        if self.next != "^":
            return part, Decimal(1)
        self.take()
        number = self.take()
        if not number[0].isdigit() and number[0] != ".":
            raise self.wrong(f"the exponent {number!r} is not a number such as 0.25")
        power = Decimal(number)
        if not 0 < power <= GREATEST:
            raise self.wrong(f"the exponent {number} must be above 0 and at most {GREATEST}")
        return part, power

    def single(self) -> Single:
        name = self.take()
        if name in ("rank", "tempered"):
            raise self.wrong(f"{name}(...) cannot stand inside another expression")
        if name not in self.known:
            where = "" if name == self.text else f" (in {self.text!r})"
            raise UsageError(f"criterion {name!r} does not exist{where}; {nearest(name, self.known.names())}")
        options: dict[str, str] = {}
        if self.next == "(":
            self.take()
            while True:
                key, value = self.option(name)
                if key in options:
                    raise self.wrong(f"{key} is given twice")
                options[key] = value
                if self.next != ",":
                    break
                self.take()
            self.take(")")
        return Single(name, tuple((key, options[key]) for key in OPTIONS if key in options))

    def option(self, name: str) -> tuple[str, str]:
        key = self.take()
        check_accepted(self.text, name, [key], self.known[name].accepts if self.known.is_own(name) else tuple(OPTIONS))
        self.take("=")
        value = self.take()
        try:
            return key, OPTIONS[key](value)
        except ValueError as error:
            raise self.wrong(f"{key} is {value!r}; {error}") from None


def check_accepted(text: str, name: str, keys: Iterable[str], accepts: tuple[str, ...]) -> None:
    """Raises UsageError for an option that criterion ``name``, in the whole name ``text``, does not take."""
    for key in keys:
        if key not in accepts:
            said = nearest(key, list(accepts)) if accepts else "it takes none"
            raise UsageError(f"criterion {text!r}: {name} has no option {key!r}; {said}")


# -- options: name -> what checks a value and gives its canonical text -------------------------------------------


def _one_of(known: Iterable[str]) -> Callable[[str], str]:
    names = list(known)

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(nearest(value, names))
        return value

    return check


def _count(value: str) -> str:
    if not value.isdecimal() or not 1 <= int(value) <= 10**4:
        raise ValueError("it must be a whole number from 1 to 10000")
    return str(int(value))


def _fraction(value: str) -> str:
    if not (value[0].isdigit() or value[0] == ".") or not 0 < Decimal(value) <= 1:
        raise ValueError("it must be a number above 0 and at most 1, such as 0.01")
    return _plain(Decimal(value))


def _plain(number: Decimal) -> str:
    return format(number.normalize(), "f")


OPTIONS: dict[str, Callable[[str], str]] = {
    "target": _one_of(TARGET_NAMES),
    "share": _one_of(SHARES),
    "aggregation": lambda value: written(_one_of(AGGREGATIONS)(value)),
    "nodes": _count,
    "group": _one_of(("l1", "l2")),
    "damping": _fraction,
}


# -- slugs -------------------------------------------------------------------------------------------------------


def slug(spec: Spec) -> str:
    """A file name without its ending; see the table at the top."""
    parts = [f"rank-{_slug(part)}" for part in spec.parts] if isinstance(spec, Rank) else [_slug(spec)]
    full = "----".join(parts)
    if len(full) <= LONGEST_SLUG and full.islower():
        return full
    full = full.lower()
    return f"{full[:LONGEST_SLUG].rstrip('-.')}-----{hashlib.sha256(spec.text.encode()).hexdigest()[:32]}"


def _slug(spec: Single | Product) -> str:
    if isinstance(spec, Single):
        name = spec.name.replace(".", "..").replace(":", "...")
        return ".".join([name, *(f"{key}-{value}" for key, value in spec.options)])
    return "---".join(f"{_slug(part)}{'' if power == 1 else f'--{_plain(power)}'}" for part, power in spec.factors)


def text_of(found: str) -> str:
    """The canonical text that ``slug`` made ``found`` of.

    Raises:
        ValueError: it holds a hash instead of its end (the file itself says what it is), or ``slug`` did not make it.
    """
    if "-----" in found:
        raise ValueError(f"{found!r} was cut; its file's provenance has the name")
    ranks = found.split("----")
    if found.startswith("rank-"):
        return "+".join(f"rank({_product_text(part.removeprefix('rank-'))})" for part in ranks)
    return _product_text(found)


_NAME = re.compile(r"\w+(?:(?:\.\.\w+)*\.\.\.\w+(?:\.\.\w+)*)?", re.ASCII)


def _product_text(found: str) -> str:
    texts = []
    for factor in found.split("---"):
        single, _, power = factor.partition("--")
        found_name = _NAME.match(single)
        if found_name is None:
            raise ValueError(f"{found!r} is no criterion's file name")
        name = found_name[0].replace("...", ":").replace("..", ".")
        rest = single[found_name.end() :].split(".")[1:]
        options: list[str] = []
        for piece in rest:  # a piece without "-" is what follows a number's point
            if "-" in piece:
                options.append(piece.replace("-", "=", 1))
            elif options:
                options[-1] += f".{piece}"
            else:
                raise ValueError(f"{found!r} is no criterion's file name")
        texts.append(name + (f"({','.join(options)})" if options else "") + (f"^{power}" if power else ""))
    return "*".join(texts)
