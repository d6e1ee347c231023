"""Linear attention as a citizen of torch.compile: convert, compile, distil, export."""

__version__ = "0.1.0"
