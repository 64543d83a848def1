"""Models: transformers behind one ``build_model``; adapters, freezing, parameter groups."""
