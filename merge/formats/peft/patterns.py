"""rank_pattern and alpha_pattern: regular expressions from untrusted files.

PEFT matches a key against the end of a module's path: re.match(rf"(.*\\.)?({key})$", path), first key that matches wins
(peft.utils.other.get_pattern_key). Some expressions take hours to match, so only those with little, polynomial
backtracking are accepted: at most MAX_REPEATS repeats, each of single characters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from adapter_merge.errors import Problem

MAX_LENGTH = 1000
MAX_REPEATS = 4
SMALL_REPEAT = 8  # a repeat of at most this many characters is not counted

_parser: Any = re._parser  # type: ignore[attr-defined]
_constants: Any = re._constants  # type: ignore[attr-defined]


class Pattern:
    """Values by module path: the value of the first key that matches."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = [(re.compile(rf"(?:.*\.)?(?:{key})$"), value) for key, value in (values or {}).items()]

    def get(self, module: str, default: Any) -> Any:
        """Return the value for `module`, a path such as model.layers.0.self_attn.q_proj, or `default`."""
        for key, value in self._values:
            if key.match(module):
                return value
        return default


def read_pattern(config: Mapping[str, Any], name: str, file: str, problems: list[Problem]) -> Pattern:
    """Return the pattern `name` of an adapter's config; unusable keys and values are added to `problems`."""
    content = config.get(name)
    if content is None:
        return Pattern()
    if not isinstance(content, dict):
        problems.append(Problem(f"{file}: {name} is wrong", "a map of patterns to numbers", repr(content)[:200]))
        return Pattern()
    good = {}
    for key, value in content.items():
        wrong = pattern_fault(key)
        if wrong is not None:
            problems.append(Problem(f"{file}: {name}: the key {key[:100]!r} is not usable", got=wrong))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            problems.append(Problem(f"{file}: {name}[{key[:100]!r}] is wrong", "a positive number", repr(value)[:100]))
        else:
            good[key] = value
    return Pattern(good)


def pattern_fault(key: str) -> str | None:
    """Return why `key` cannot be used as a pattern; None when it can."""
    if len(key) > MAX_LENGTH:
        return f"a pattern of {len(key)} characters (at most {MAX_LENGTH})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # deprecated syntax counts as an error
            parsed = _parser.parse(key)
            re.compile(rf"(?:.*\.)?(?:{key})$")
    except (re.error, RecursionError, OverflowError, Warning) as error:
        return f"not a regular expression: {error}"
    try:
        repeats = _count_repeats(parsed)
    except (ValueError, RecursionError) as error:
        return str(error)
    return f"{repeats} repeats in one pattern (at most {MAX_REPEATS})" if repeats > MAX_REPEATS else None


def _count_repeats(parsed: Iterable[tuple[Any, Any]]) -> int:
    """Count the repeats of single characters in `parsed`. Raises ValueError for repeated groups and back-references."""
    count = 0
    single = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN)
    for code, argument in parsed:
        if code in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            _, most, inner = argument
            inside = list(inner)
            if most <= 1:
                count += _count_repeats(inside)
            elif len(inside) != 1 or inside[0][0] not in single:
                raise ValueError("a repeated group, which could take hours to match")
            elif most > SMALL_REPEAT:
                count += 1
        elif code is _constants.SUBPATTERN:
            count += _count_repeats(argument[-1])
        elif code is _constants.BRANCH:
            count += sum(_count_repeats(branch) for branch in argument[1])
        elif code in (_constants.ASSERT, _constants.ASSERT_NOT):
            count += _count_repeats(argument[1])
        elif code is _constants.ATOMIC_GROUP:
            count += _count_repeats(argument)
        elif code in (_constants.GROUPREF, _constants.GROUPREF_EXISTS):
            raise ValueError("a back-reference, which could take hours to match")
    return count
