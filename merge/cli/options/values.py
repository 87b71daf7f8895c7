"""Types of option values. A wrong value is a usage error, raised before torch is imported."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    WholeNumber = click.ParamType[int]
    Text = click.ParamType[str]
    Number = click.ParamType[int | float]
    Choice = click.Choice[str]
else:
    WholeNumber = Text = Number = click.ParamType  # no generics before click 8.4
    Choice = click.Choice


class Size(WholeNumber):
    """A size with its unit, in bytes: 512MB is 512,000,000, 4GiB is 4 x 1024^3, 4096B is 4096.

    A number without a unit is refused, since 5 may mean bytes or gigabytes.
    """

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)", str(value).strip().upper())
        if match is None:
            self.fail(f"{value!r} is not a size with a unit, such as 512MB or 4GiB", param, ctx)
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


class Source(Text):
    """A folder, a file or a hub id, with or without NAME=. Any text is accepted; shells complete paths."""

    name = "folder|id"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        name, mark, path = incomplete.partition("=")
        if not mark:
            return [CompletionItem(incomplete, type="file")]
        folder = Path(path).parent if not path.endswith("/") else Path(path)
        start = "" if path.endswith("/") else Path(path).name
        paths = sorted(entry for entry in folder.glob(f"{start}*")) if folder.is_dir() else []
        return [CompletionItem(f"{name}={entry}{'/' if entry.is_dir() else ''}") for entry in paths]


class Device(Text):
    """auto, cpu, cuda or cuda:N."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r} is not auto, cpu, cuda or cuda:N", param, ctx)
        return str(value)


class Rank(Number):
    """A rank (16), or an energy below 1 (0.99)."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        from adapter_merge.api.options import parse_rank
        from adapter_merge.errors import InputError

        try:
            return parse_rank(str(value))
        except InputError:
            self.fail(f"{value!r} is neither a rank such as 16 nor an energy such as 0.99", param, ctx)


SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Dtype(Choice):
    """A dtype by its full name, or by the short name that ONNX tools use (fp32, fp16, bf16)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(SHORT.get(value, value), param, ctx)


class Share(click.FloatRange):
    """A number from 0 to 1."""

    def __init__(self) -> None:
        super().__init__(min=0, max=1)


SIZE, SOURCE, DEVICE, RANK, SHARE = Size(), Source(), Device(), Rank(), Share()
DTYPES = Dtype(["float32", "float16", "bfloat16"])


def stated_prompts(texts: tuple[str, ...]) -> list[str] | None:
    """Return the prompts of --prompt: a text, @FILE with one per line, or - for standard input; None without any.

    Raises InputError for a file that cannot be read or is empty.
    """
    from adapter_merge.api.options import read_prompts

    prompts: list[str] = []
    for text in texts:
        if text == "-":
            prompts.append(sys.stdin.read())
        elif text.startswith("@"):
            prompts += read_prompts(Path(text[1:]))
        else:
            prompts.append(text)
    return prompts or None
