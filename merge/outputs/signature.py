"""Signatures of outputs by OpenSSF Model Signing (package model-signing), checked with a public key.

A signature is a Sigstore bundle around an in-toto statement that lists the sha256 of every file.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapter_merge.errors import FileFormatError, InputError, MissingDependencyError
from adapter_merge.files.installation import install_command

from .manifest import MANIFEST
from .unlisted_files import SIGNATURE

SIGN = "model_signing sign key OUT --private_key KEY --signature OUT/model.sig"


def check_signature(folder: Path, files: Iterable[str], public_key: Path) -> int:
    """Check that the owner of `public_key` signed all `files` and the manifest; return the number of signed files.

    Raises InputError where there is no signature or no key, MissingDependencyError without model-signing, and
    FileFormatError where the signature belongs to another key or other content, or does not cover every file.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise InputError(f"{folder}: is not signed", expected=f"a signature in {signature}", hint=SIGN)
    try:
        from model_signing import verifying
    except ImportError as error:
        raise MissingDependencyError(
            "checking a signature needs model-signing", got=str(error), hint=install_command("sign")
        ) from error
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{public_key}: not a public key", expected="PEM, NIST P-256, P-384 or P-521", got=_error_line(error)
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            verifier.verify(folder, signature)
        signed = _signed_names(signature)
    except (
        Exception
    ) as error:  # the library does not document its exceptions: ValueError for a changed file, others for a bad bundle
        raise FileFormatError(
            f"{folder}: the signature is not valid",
            expected=f"this content, signed by the owner of {public_key}",
            got=_error_line(error),
        ) from error
    missing = sorted({*files, MANIFEST} - signed)
    if missing:
        raise FileFormatError(
            f"{folder}: the signature does not cover {len(missing)} files, first {missing[0]}", hint=SIGN
        )
    return len(signed)


def _signed_names(signature: Path) -> set[str]:
    """Return the files that a signature lists; parts of a file are listed by its name and a range."""
    bundle = json.loads(signature.read_text("utf-8"))
    predicate: dict[str, Any] = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]
    names = {str(entry["name"]) for entry in predicate["resources"]}
    if predicate["serialization"]["method"] == "shards":
        return {name.rsplit(":", 2)[0] for name in names}
    return names


def _error_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + "..."
