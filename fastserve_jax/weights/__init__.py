"""Names and files to parameters: the catalogue, downloads, GGUF and Hugging Face readers."""
