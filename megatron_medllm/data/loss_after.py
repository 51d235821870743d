"""Where a document's loss begins: behind the first of some marker texts.

Markers are looked for in the document's text, not among its ids: a tokenizer rarely cuts a text where a marker ends
(`:` and a line break are one token of Qwen2.5's), so a marker tokenized alone need not be found in any document.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from megatron.core.utils import log_single_rank
from tokenizers import Tokenizer

from megatron_medllm.account import Account
from megatron_medllm.errors import UserError

log = logging.getLogger(__name__)

# Documents of a source that `check_markers` looks at, evenly spread; some seconds of work.
LOOKED_AT = 10_000


class LossAfter:
    """Finds where the loss of tokenized documents begins."""

    def __init__(self, markers: tuple[str, ...], tokenizer_file: Path) -> None:
        """`markers`: not empty, none of them `""`."""
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._decode: Callable[[list[int]], str] = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        # A document was normalized when it was tokenized (NFC for Qwen2.5); a marker is looked for in both forms.
        normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
        self._markers = tuple(dict.fromkeys([*markers, *(normalize(marker) for marker in markers)]))
        # A long document is asked for once a row; what it answers does not change.
        self._first_learned = lru_cache(maxsize=256)(self._search)

    def first_learned(self, document: np.ndarray) -> int | None:
        """Index of the first token behind the first marker in `document` [n]; None when it has no marker.

        A token that holds the marker's end and more is counted to the marker. May be n: nothing follows.
        """
        return self._first_learned(document.astype(np.int64).tobytes())

    def _search(self, content: bytes) -> int | None:
        ids = np.frombuffer(content, dtype=np.int64).tolist()
        if not self._has_marker(ids):
            return None
        shortest, longest = 1, len(ids)  # prefixes with a marker: the first is at most `longest` long
        while shortest < longest:
            middle = (shortest + longest) // 2
            if self._has_marker(ids[:middle]):
                longest = middle
            else:
                shortest = middle + 1
        return longest

    def _has_marker(self, ids: list[int]) -> bool:
        text = self._decode(ids)
        return any(marker in text for marker in self._markers)


def check_markers(loss_after: LossAfter, sources: Mapping[str, Iterable[np.ndarray]]) -> Account:
    """Count which documents of the sources hold a marker, and say so in the log.

    Args:
        loss_after: the markers.
        sources: documents [n] by source; see `LOOKED_AT`.

    Returns:
        an account of documents by source. A document without a marker is kept: it is learned whole. One whose marker
        stands at its very end is lost.

    Raises:
        UserError: no document of any source holds a marker, or a source has nothing to learn.
    """
    account = Account("documents")
    matched = looked_at = 0
    for name, documents in sources.items():
        account.subject(name)
        looked_at_here = matched_here = 0
        for document in documents:
            looked_at_here += 1
            first = loss_after.first_learned(document)
            matched_here += first is not None
            # The document's last token is its end: a marker before it leaves that alone to learn.
            if first is not None and first >= len(document) - 1:
                account.lose(name, "nothing follows the marker", f"document {looked_at_here}")
            else:
                account.keep(name)
        found = f"loss_after: {matched_here} of {looked_at_here} documents of {name} hold a marker"
        log_single_rank(log, logging.INFO, found)
        looked_at += looked_at_here
        matched += matched_here
    if not matched:
        raise UserError(
            f"loss_after: none of {looked_at} documents holds a marker, so that all would be learned; "
            "look at the text with `medllm corpus inspect`, or leave loss_after out"
        )
    account.require("choose a marker that stands before what is to be learned")
    for line in account.loss_lines():
        log_single_rank(log, logging.WARNING, line)
    return account
