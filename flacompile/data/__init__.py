"""Tokens to train and to measure on: read, split, and dealt out in rows."""

from flacompile.data.corpus import Corpus
from flacompile.data.reader import Batch, Reader, check_ids
from flacompile.data.samples import own_samples
from flacompile.data.sources import DataOptions, Source, read

__all__ = ["Batch", "Corpus", "DataOptions", "Reader", "Source", "check_ids", "own_samples", "read"]
