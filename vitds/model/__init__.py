"""The models: a table of architectures and the Vision Transformer built from it. Importing this imports no torch."""
