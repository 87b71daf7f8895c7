"""KL divergence of a merged model to the unmerged adapter on texts: what quantising again costs, in its own unit.

At each token of a text, P is the distribution of the next token that the live, unmerged adapter computes on the base's
dequantised weights, and Q that of the merged model:

    KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)), in nats, averaged over all tokens of all texts

Beside it stands the same of the base without adapter: what losing all of the adapter would cost. Models compute in
float32 and are streamed (streamed_model.py); the sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch import float32 as FLOAT32

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.errors import InputError
from adapter_merge.quantisation.dense_view import open_base

from .compare_logits import TokenPath, all_logits, live_network, open_tokenizer
from .live_adapter import quiet_libraries, require
from .streamed_adapter import streamed_base

TEXT_TOKENS = 512  # of each text; what follows is not read
HELD_BYTES = 512 << 20  # of the live adapter's logits at a time


@dataclass(frozen=True)
class TextFigures:
    """How far a merged model is from the unmerged adapter on texts."""

    texts: int
    tokens: int  # places whose next token is compared
    kl: float  # mean KL(adapter || merged), nats per token
    kl_base: float  # the same of the base without adapter
    same_choice: float  # share of places where both hold the same token for the most probable


def check_texts(folder: Path, texts: Sequence[str]) -> None:
    """Raise InputError where `texts` are none, or the model in `folder` has no tokenizer; MissingDependencyError."""
    require("transformers")
    if not any(text.strip() for text in texts):
        raise InputError("--texts: holds no text", expected="one text a line")
    if open_tokenizer(folder) is None:
        raise InputError(f"{folder}: has no tokenizer, and --texts compares on tokens", expected="tokenizer.json")


def text_divergence(bound: BoundAdapter, merged: Path, texts: Sequence[str]) -> TextFigures:
    """Compare the model in `merged` with the live adapter on `texts`, which are taken as they are (no chat template).

    Of each text the first TEXT_TOKENS tokens count.
    """
    paths = _tokens(bound.base.folder, texts)
    kl = kl_base = same = 0.0
    for chunk in _chunks(paths, _vocabulary(bound)):
        trained = all_logits(live_network(bound, FLOAT32), chunk)
        kl_base += sum(
            _divergence(*pair)[0] for pair in _pairs(trained, streamed_base(bound.base, FLOAT32).model, chunk)
        )
        for pair in _pairs(trained, streamed_base(open_base(merged), FLOAT32).model, chunk):
            lost, equal = _divergence(*pair)
            kl, same = kl + lost, same + equal
    count = sum(len(path.ids) for path in paths)
    return TextFigures(len(paths), count, kl / count, kl_base / count, same / count)


def _pairs(trained: list[Tensor], model: nn.Module, chunk: list[TokenPath]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(trained, all_logits(model, chunk), strict=True)


def _divergence(
    trained: Tensor,  # (T, vocabulary) logits
    other: Tensor,  # (T, vocabulary)
) -> tuple[float, float]:
    """Return the sum over all places of KL(trained || other), and the number of places of the same choice."""
    p, q = trained.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum()), float((p.argmax(-1) == q.argmax(-1)).sum())


def _tokens(folder: Path, texts: Sequence[str]) -> list[TokenPath]:
    tokenizer = open_tokenizer(folder)
    with quiet_libraries():
        rows = [tokenizer(text, return_tensors="pt")["input_ids"][0][:TEXT_TOKENS] for text in texts if text.strip()]
    paths = [TokenPath(ids, 0) for ids in rows if len(ids)]
    if not paths:
        raise InputError("--texts: the tokenizer makes no token of them", expected="one text a line")
    return paths


def _vocabulary(bound: BoundAdapter) -> int:
    text = bound.base.config.get("text_config")
    size = (text if isinstance(text, dict) else bound.base.config).get("vocab_size")
    return size if isinstance(size, int) else 1 << 18


def _chunks(paths: Sequence[TokenPath], vocabulary: int) -> Iterator[list[TokenPath]]:
    """Yield as many paths as `HELD_BYTES` of logits hold, one at least. They are padded to the longest."""
    chunk: list[TokenPath] = []
    for path in sorted(paths, key=lambda path: len(path.ids)):
        if chunk and (len(chunk) + 1) * len(path.ids) * vocabulary * 4 > HELD_BYTES:
            yield chunk
            chunk = []
        chunk.append(path)
    if chunk:
        yield chunk
