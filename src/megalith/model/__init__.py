"""Floor 4: models on real bytes: file readers, tokenizers, chat templates, torch modules. Torch only where needed."""
