"""What this room raises when a person has to act."""


class StoreError(ValueError):
    """A checkpoint or an expert store that cannot be used; the message is one line that names the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
