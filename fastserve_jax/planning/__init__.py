"""What a model would need and give on chips that are not here."""
