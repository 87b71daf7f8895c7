"""placeholder"""


def register() -> None:
    """Nothing yet."""
