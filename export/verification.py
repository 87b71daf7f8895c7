"""Parity of an ONNX export with the adapters as trained: logits, with the KV cache at work.

Every text runs through torch at once, with the adapter live and unmerged (PEFT, or the method's own forward),
and through the export as a server would: the prompt in one step, then token by token. Compared are all logits of
both phases, and the greedy choice at every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_merge.merge.errors import InputError, MismatchError

from .folder import Manifest, folder_layout, read_export
from .running import Decoder
from .runtime import check_packages

BARS: Mapping[str, float] = {"fp32": 1e-3, "fp16": 0.25, "bf16": 2.0}
TOKENS = 256  # positions compared when no prompt is given
PROMPT = 96  # of them in prefill
GENERATED = 64  # greedy tokens after each prompt
CLOSE = 1e-3  # two best logits nearer than this: float32 itself cannot order them


def verify_onnx(
    base: str | Path,
    adapter: str | Path | None,
    artefact: str | Path,
    *,
    name: str | None = None,
    prompts: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    device: str = "cpu",
    bar: float | None = None,
) -> dict[str, Any]:
    """Hold the export in `artefact` against `adapter` on `base` as trained (None: against the base alone).

    name: the adapter's name in a switchable or batched export; found by its source path when not given. prompts:
    texts, each followed by the tokens that torch chooses; tokens: ids to compare over; 256 deterministic
    pseudo-random ids when neither is given. bar: the largest difference of a logit that passes; by precision when
    not given (fp32 1e-3), but an int4 export needs one: quantisation moves logits by whole units.

    Returns figures, "problems" and "passed". Raises InputError or MismatchError when the three do not belong
    together.
    """
    folder = Path(artefact)
    check_packages("onnx_ir", "transformers")
    manifest = read_export(folder)
    if bar is None and manifest.precision not in BARS:
        raise InputError(
            f"{folder}: an {manifest.precision} export differs from what was trained by its quantisation",
            hint="say how large a difference of a logit may be: --tolerance",
        )
    if manifest.kind != "decoder":
        from .encoder_verification import verify_encoder

        return verify_encoder(base, adapter, folder, manifest, name=name, device=device, bar=bar)
    from adapter_merge.merge.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(base)
    layout = folder_layout(folder)
    check_base(folder, layout.base, checkpoint.fingerprint, base)
    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    model = reference_model(base, adapter)
    vocabulary = int(model.config.get_text_config().vocab_size)
    texts = token_lists(folder, model, prompts, tokens, vocabulary)
    expected = [torch_logits(model, ids) for ids, _ in texts]
    del model
    plain = expected
    if adapter is not None:
        model = reference_model(base, None)
        plain = [torch_logits(model, ids) for ids, _ in texts]
        del model
    decoder = Decoder(folder, device)
    found = None if manifest.mode == "merged" else chosen
    got = [onnx_logits(decoder, found, ids, prompt) for ids, prompt in texts]
    prefill = sum(prompt for _, prompt in texts)
    positions = sum(len(ids) for ids, _ in texts)
    return {
        **header(folder, manifest, chosen, adapter),
        "tokens": positions,
        "prefill_tokens": prefill,
        "decode_tokens": positions - prefill,
        **verdict(expected, got, plain, BARS.get(manifest.precision, 0.0) if bar is None else bar),
    }


def header(folder: Path, manifest: Manifest, chosen: str | None, adapter: str | Path | None) -> dict[str, Any]:
    """What was compared with what."""
    return {
        "artefact": "onnx",
        "path": str(folder),
        "mode": manifest.mode,
        "precision": manifest.precision,
        "adapter": chosen or "base",
        "compared_with": "the adapter as trained, in torch float32" if adapter else "the base, in torch float32",
    }


def verdict(expected: Sequence[Any], got: Sequence[Any], plain: Sequence[Any], bar: float) -> dict[str, Any]:
    """Figures over pairs of logits (positions, vocabulary), all problems, and whether there are none.

    A greedy choice counts as different unless the two best expected logits are nearer than CLOSE. `plain` are the
    base's logits: the adapter's own effect is what would be lost without it.
    """
    import numpy as np

    worst, total, count, effect, equal, positions = 0.0, 0.0, 0, 0.0, 0, 0
    for wanted, mine, base in zip(expected, got, plain, strict=True):
        positions += len(wanted)
        effect = max(effect, float(np.abs(wanted - base).max()))
        gap = np.abs(wanted - mine)
        if not np.isfinite(gap).all():
            worst = float("inf")
            continue
        worst = max(worst, float(gap.max()))
        total, count = total + float(gap.sum()), count + gap.size
        best, chosen, rows = wanted.argmax(-1), mine.argmax(-1), np.arange(len(wanted))
        equal += int(((best == chosen) | (wanted[rows, best] - wanted[rows, chosen] <= CLOSE)).sum())
    problems = []
    if not worst <= bar:
        problems.append(f"max |dlogit| {worst:.3g} is above {bar:.3g}")
    if equal != positions and bar <= BARS["fp32"]:
        problems.append(f"{positions - equal} greedy choices differ")
    logits = {
        "max_difference": worst,
        "mean_difference": total / count if count else float("inf"),
        "greedy_equal": equal,
        "greedy_total": positions,
        "effect": effect,
    }
    return {"tolerance": bar, "logits": logits, "problems": problems, "passed": not problems}


def token_lists(
    folder: Path, model: Any, prompts: Sequence[str] | None, tokens: Sequence[int] | None, vocabulary: int
) -> list[tuple[list[int], int]]:
    """(ids, how many of them are prefill) for every text. Raises InputError."""
    if tokens is None and prompts:
        from .prompting import Prompter

        prompter = Prompter(folder)
        found = []
        for text in prompts:
            prompt = prompter.encode(text)
            found.append((prompt + torch_greedy(model, prompt, GENERATED), len(prompt)))
        return found
    ids = list(tokens) if tokens is not None else sample_tokens(vocabulary)
    if len(ids) < 2 or not all(0 <= token < vocabulary for token in ids):
        raise InputError("tokens are wrong", expected=f"at least 2 ids below {vocabulary}", got=str(ids[:8]))
    return [(ids, max(1, min(PROMPT, len(ids) // 2)))]


def torch_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens that torch chooses greedily, end tokens or not."""
    import torch

    cache, fed, chosen = None, torch.tensor([list(prompt)]), []
    with torch.no_grad():
        for _ in range(count):
            result = model(input_ids=fed, past_key_values=cache, use_cache=True)
            cache, token = result.past_key_values, int(result.logits[0, -1].argmax())
            chosen.append(token)
            fed = torch.tensor([[token]])
    return chosen


def check_base(folder: Path, expected: str, got: str, base: str | Path) -> None:
    """Raise MismatchError when an export was not made from `base`."""
    if expected != got:
        raise MismatchError(f"{folder}: not an export of {base}", expected=f"fingerprint {expected[:16]}", got=got[:16])


def find_adapter(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], adapter: str | Path | None, name: str | None, mode: str
) -> str | None:
    """The name under which the export holds `adapter`. Raises InputError when that cannot be told."""
    if mode == "merged" and len(entries) > 1:
        raise InputError(
            f"{folder}: a combination is merged into it, and it is held against one adapter alone",
            got=", ".join(entries),
            hint="merge the same combination with adapter-merge merge and verify that",
        )
    if adapter is None:
        if mode == "merged" and entries:
            raise InputError(
                f"{folder}: an adapter is merged into it", expected=", ".join(entries), got="no adapter to compare with"
            )
        return None
    if name is not None:
        if name not in entries:
            raise InputError(f"{folder}: no adapter named {name!r}", expected=", ".join(entries) or "none")
        return name
    if len(entries) == 1:
        return next(iter(entries))
    wanted = Path(adapter).resolve()
    found = [key for key, entry in entries.items() if Path(entry["source"]).resolve() == wanted]
    if len(found) != 1:
        raise InputError(
            f"{folder}: which of its adapters is {adapter}?",
            expected=", ".join(entries) or "none",
            hint="say it by name",
        )
    return found[0]


def reference_model(base: str | Path, adapter: str | Path | None) -> Any:
    """The torch model in float32 with the adapter live in it."""
    from adapter_merge.merge.reference import load_model, trained_model

    if adapter is None:
        from adapter_merge.merge.checkpoint import resolve

        return load_model(resolve(base)).float()
    from adapter_merge.merge.inputs import open_pair

    return trained_model(open_pair(base, adapter))


def sample_tokens(vocabulary: int, count: int = TOKENS) -> list[int]:
    """The same token ids everywhere: a multiplicative walk over the vocabulary."""
    return [(7919 * (index + 1) + index * index) % vocabulary for index in range(count)]


def torch_logits(model: Any, tokens: Sequence[int]) -> Any:
    """(positions, vocabulary) float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].float().numpy()


def onnx_logits(decoder: Decoder, adapter: str | None, tokens: Sequence[int], prompt: int) -> Any:
    """(positions, vocabulary) float32: `prompt` tokens at once, the rest one by one through the cache."""
    import numpy as np

    ids = np.asarray([list(tokens)], np.int64)
    cache = decoder.start(ids.shape[1], adapter)
    rows = [decoder.step(cache, ids[:, :prompt])[0]]
    rows.extend(decoder.step(cache, ids[:, index : index + 1])[0] for index in range(prompt, ids.shape[1]))
    return np.concatenate(rows)
