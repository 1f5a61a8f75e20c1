"""Text: files → documents → tokens → shards → windows → batches, one module for each arrow.

``documents`` reads files, ``vocabulary`` encodes, ``tokenization`` writes with both what ``shards`` lays out,
``windows`` orders the examples, and ``task`` makes the batches.
"""

from ssmscan.tasks.text.documents import find
from ssmscan.tasks.text.shards import Corpus
from ssmscan.tasks.text.task import Text
from ssmscan.tasks.text.tokenization import tokenize

__all__ = ["Corpus", "Text", "find", "tokenize"]
