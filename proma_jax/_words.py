"""Words for messages."""


def counted(number: int, noun: str) -> str:
    """A number of things: "1 layer", "2 layers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
