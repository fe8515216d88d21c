"""Numbers with what they count, as messages have them: "1 line", "2 lines"."""


def counted(number: int, one: str, several: str = "") -> str:
    """Return "1 line" or "1,234 lines": `one`, or `several` for any other number, by default `one` with an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
