"""KL divergence between the unmerged adapter and a merged model on texts: the cost of quantising a merged model.

At each token of a text, P is the distribution of the next token that the live, unmerged adapter computes on the base's
dequantised weights, and Q that of the merged model:

    KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)), in nats, averaged over all tokens of all texts

The same divergence of the base without adapter shows the cost of losing the whole adapter. Models compute in
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

TEXT_TOKENS = 512  # tokens of each text; later ones are not used
CHUNK_BYTES = 512 << 20  # of the live adapter's logits in memory


@dataclass(frozen=True)
class TextFigures:
    """The difference between a merged model and the unmerged adapter on texts."""

    texts: int
    tokens: int  # places whose next token is compared
    kl: float  # mean KL(adapter || merged), nats per token
    kl_base: float  # the same of the base without adapter
    same_choice: float  # share of places where both have the same most probable token


def check_texts(folder: Path, texts: Sequence[str]) -> None:
    """Raise InputError for empty `texts` or a model without tokenizer, MissingDependencyError without transformers."""
    require("transformers")
    if not any(text.strip() for text in texts):
        raise InputError("--texts: contains no text", expected="one text per line")
    if open_tokenizer(folder) is None:
        raise InputError(f"{folder}: has no tokenizer, and --texts compares on tokens", expected="tokenizer.json")


def text_divergence(bound: BoundAdapter, merged: Path, texts: Sequence[str]) -> TextFigures:
    """Compare the model in `merged` with the live adapter on `texts`, without a chat template.

    Uses the first TEXT_TOKENS tokens of each text.
    """
    paths = _tokenize(bound.base.folder, texts)
    kl = kl_base = same_choices = 0.0
    for chunk in _chunks(paths, _vocabulary_size(bound)):
        trained = all_logits(live_network(bound, FLOAT32), chunk)
        kl_base += sum(
            _compute_divergence(*pair)[0]
            for pair in _pair_logits(trained, streamed_base(bound.base, FLOAT32).model, chunk)
        )
        for pair in _pair_logits(trained, streamed_base(open_base(merged), FLOAT32).model, chunk):
            divergence, equal = _compute_divergence(*pair)
            kl, same_choices = kl + divergence, same_choices + equal
    count = sum(len(path.ids) for path in paths)
    return TextFigures(len(paths), count, kl / count, kl_base / count, same_choices / count)


def _pair_logits(trained: list[Tensor], model: nn.Module, chunk: list[TokenPath]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of the live adapter and of `model` for each path."""
    return zip(trained, all_logits(model, chunk), strict=True)


def _compute_divergence(
    trained: Tensor,  # (T, vocabulary) logits
    merged: Tensor,  # (T, vocabulary)
) -> tuple[float, float]:
    """Return the sum over all places of KL(trained || merged), and the number of places of the same choice."""
    p, q = trained.double().log_softmax(-1), merged.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum()), float((p.argmax(-1) == q.argmax(-1)).sum())


def _tokenize(folder: Path, texts: Sequence[str]) -> list[TokenPath]:
    tokenizer = open_tokenizer(folder)
    with quiet_libraries():
        rows = [tokenizer(text, return_tensors="pt")["input_ids"][0][:TEXT_TOKENS] for text in texts if text.strip()]
    paths = [TokenPath(ids, 0) for ids in rows if len(ids)]
    if not paths:
        raise InputError("--texts: the tokenizer returns no tokens for them", expected="one text per line")
    return paths


def _vocabulary_size(bound: BoundAdapter) -> int:
    text = bound.base.config.get("text_config")
    size = (text if isinstance(text, dict) else bound.base.config).get("vocab_size")
    return size if isinstance(size, int) else 1 << 18


def _chunks(paths: Sequence[TokenPath], vocabulary: int) -> Iterator[list[TokenPath]]:
    """Yield lists of paths whose logits, padded to the longest, take at most CHUNK_BYTES; one path at least."""
    chunk: list[TokenPath] = []
    for path in sorted(paths, key=lambda path: len(path.ids)):
        if chunk and (len(chunk) + 1) * len(path.ids) * vocabulary * 4 > CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(path)
    if chunk:
        yield chunk
