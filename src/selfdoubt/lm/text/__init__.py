"""Text and token ids: chat templates, prompts, encoders, detokenizers, stop texts."""
