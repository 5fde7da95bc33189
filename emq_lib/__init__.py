"""The thin library under the book: everything that two chapters share or that touches the GPU."""

__version__ = "0.1.0"
