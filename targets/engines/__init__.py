"""Inference engines that a compiled checkpoint is proven on, one a file."""
