"""Errors that clients get: an adapter that cannot be served, and an unknown name with the names that there are."""

from __future__ import annotations

import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any

from .adapter_loader import Loader

logger = logging.getLogger("vllm.adapter_merge")
NAMES_SHOWN = 50  # in the answer to a request for an unknown name


def make_refusal(loader: Loader, error: Exception, name: str, folder: Path | None = None) -> Any:
    """Return vLLM's response to a bad request with the causes, without paths; log the whole error."""
    from vllm.entrypoints.serve import create_error_response

    logger.warning("%s", error)
    message = loader.describe_error(error, name, folder)
    return create_error_response(message=message, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)


def make_unknown_response(models: Any, name: str, offered: list[str]) -> Any:
    """Return vLLM's response to an unknown name, with the known names."""
    from vllm.entrypoints.serve import create_error_response

    bases = [base.name for base in models.base_model_paths]
    names = list(dict.fromkeys([*bases, *models.lora_requests, *offered]))
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return create_error_response(
        message=f"The model `{name}` does not exist. There are: {', '.join(names[:NAMES_SHOWN])}{more}.",
        err_type="NotFoundError",
        status_code=HTTPStatus.NOT_FOUND,
        param="model",
    )
