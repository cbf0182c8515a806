"""Text to tokens and back: vocabularies, incremental decoding, chat templates."""
