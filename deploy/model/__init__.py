"""The default model: a small Qwen3-MoE trained from scratch on text every Python installation carries."""
