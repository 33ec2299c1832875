"""The OpenAI-compatible HTTP surface: validates, tokenizes, asks a gateway, and turns tokens back into text."""
