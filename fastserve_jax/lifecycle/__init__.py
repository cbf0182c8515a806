"""The rest of a model's life: data, training, and what is made of trained models."""
