"""YAML files of recipes and studies: what their plain text means, read and written so that both agree.

YAML 1.1, as PyYAML reads it, has surprises: ``2e-5`` and ``-.5`` are text, ``1:30`` is 90, ``010`` is 8, a date is a date that no
resolved recipe can hold. Here a number is what YAML 1.2 calls one, ``1:30``, dates and ``=`` are text, and ``010`` is refused.
What else YAML 1.1 has stays: ``yes``, ``no``, ``on`` and ``off`` are true or false, ``1_000`` is 1000, ``0x1F`` is 31. Quoted
text is text.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from prunekit.bounded import DIGITS, NESTING, RECIPE, text
from prunekit.errors import ArtifactError, UsageError

FLOAT = re.compile(
    r"""[-+]?(?: [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
              |  [0-9][0-9_]*[eE][-+]?[0-9]+
              |  \.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
              |  \.(?:inf|Inf|INF) )
        | \.(?:nan|NaN|NAN)""",
    re.VERBOSE,
)
INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")  # only double quotes keep these
KINDS = ("str", "int", "float", "bool", "null", "map", "seq", "merge")
LARGEST = 10**5  # values in a file, those that aliases and merges repeat counted each time


class _Refused(Exception):
    """What is wrong at a place of the file."""

    def __init__(self, node: Any, why: str) -> None:
        super().__init__(f"line {node.start_mark.line + 1}: {why}")


def _tag(kind: str) -> str:
    return f"tag:yaml.org,2002:{kind}"


_EVENTS: Any = (yaml.composer.Composer, yaml.CSafeLoader) if yaml.__with_libyaml__ else (yaml.SafeLoader,)
"""What reads the text: libyaml where PyYAML has it, which takes a tenth of the time; nodes are composed here either way."""


class _Loader(*_EVENTS):  # type: ignore[misc]
    """Safe YAML whose numbers are numbers, and which refuses what would be lost without a word."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag in (_tag("bool"), _tag("null"), _tag("merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        _EVENTS[-1].__init__(self, stream)
        yaml.composer.Composer.__init__(self)
        self.depth = 0
        self.values: dict[int, int] = {}
        """By node that is whole, how many values it stands for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, refused before anything is made of it if that would be too much."""
        event = self.peek_event()
        if event is not None and self.depth >= NESTING:
            raise _Refused(event, f"lists and mappings are nested deeper than {NESTING}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            self.values[id(node)] = 1 + sum(sum(self.values[id(n)] for n in (p if isinstance(p, tuple) else (p,))) for p in parts)
        if self.values.get(id(node), LARGEST + 1) > LARGEST:  # an alias inside of what it names is not whole yet
            raise _Refused(event, f"its aliases stand for more than {LARGEST:,} values, or one holds itself")
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_tag(""))
        if node.tag.startswith(_tag("")) and "/" not in kind and kind not in KINDS:
            raise _Refused(node, f"a value of type !!{kind} cannot be held in a recipe")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == _tag("merge"):
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(key, "a key is text or a number, not a list or mapping")
            value = self.construct_object(key, deep=True)
            if value in seen:
                raise _Refused(key, f"key {value!r} is given twice; it is on line {seen[value]} already")
            seen[value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > DIGITS:
            raise _Refused(node, f"a number of {len(text):,} digits is larger than any that can be computed with")
        unsigned = text.lstrip("+-")
        if re.fullmatch("0[0-9]+", unsigned):
            raise _Refused(node, f"{text} is octal to some and decimal to others; write {int(text)}, or '{text}' for text")
        try:
            if node.tag == _tag("int"):
                base = {"0b": 2, "0x": 16}.get(unsigned[:2], 10)
                return int(text, base)
            value = float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        except ValueError:
            raise _Refused(node, f"{node.value!r} is no number") from None
        if math.isinf(value) and "inf" not in text.lower():
            raise _Refused(node, f"{text} is larger than any number that can be computed with")
        return value


for kind in ("int", "float"):
    _Loader.add_constructor(_tag(kind), _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as a number, by ``_Loader`` or by YAML 1.1."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> Any:
        return self.represent_scalar(_tag("str"), data, style='"' if UNSEEN.search(data) else None)


_Dumper.add_representer(str, _Dumper.represent_text)
for which in (_Loader, _Dumper):
    which.add_implicit_resolver(_tag("float"), re.compile(rf"(?:{FLOAT.pattern})\Z", re.VERBOSE), list("-+0123456789."))
    which.add_implicit_resolver(_tag("int"), re.compile(rf"(?:{INT.pattern})\Z"), list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, read safely.

    Raises:
        UsageError: missing, unreadable, not YAML, a key given twice, a number that means two things, or no mapping.
    """
    if not os.path.lexists(path):
        raise UsageError(f"{path}: no such recipe")
    try:
        content = yaml.load(text(path, RECIPE), Loader=_Loader)  # a SafeLoader
    except ArtifactError as error:
        raise UsageError(str(error)) from None
    except _Refused as error:
        raise UsageError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys, this is a {type(content).__name__}")
    return content


def to_yaml(content: Any) -> str:
    """Text that ``read_yaml`` reads as ``content``: mappings, lists, text, numbers, true, false and null; tuples become lists."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
