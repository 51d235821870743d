"""JSON that is not one object a line: an array of objects, or objects printed over several lines.

Read value by value in bounded memory. `json.JSONDecoder.raw_decode` is asked again with more text where a value is not
yet whole.
"""

import codecs
import json
from collections.abc import Iterator

from megatron_medllm.corpus.streams import BrokenInputError

_BETWEEN = " \t\r\n,\ufeff"


def is_json_values(head: bytes) -> bool:
    """Whether a file that begins like this holds such JSON, and not JSON lines."""
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"[") or (
        head.startswith(b"{") and head[1:].split(b"\n")[0].strip() == b"" and b"\n" in head
    )


def read_values(blocks: Iterator[bytes], *, limit: int) -> Iterator[tuple[int, object]]:
    """Yield (line on which it begins, value) of all top-level values, and of the elements of top-level arrays.

    Bytes that are no UTF-8 become lone surrogates (`surrogateescape`).

    Raises:
        BrokenInputError: no JSON from here on, cut short, or a value longer than `limit` characters.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    parser = json.JSONDecoder()
    text, position, line, in_array, more = "", 0, 1, False, True

    def refill() -> None:
        nonlocal text, position, more
        block = next(blocks, None)
        more = block is not None
        text, position = text[position:] + decoder.decode(block or b"", final=not more), 0

    while True:
        while position < len(text) and text[position] in _BETWEEN:
            line += text[position] == "\n"
            position += 1
        if position == len(text):
            if not more:
                break
            refill()
        elif text[position] == "[" and not in_array:
            in_array, position = True, position + 1
        elif text[position] == "]" and in_array:
            in_array, position = False, position + 1
        else:
            try:
                value, end = parser.raw_decode(text, position)
            except RecursionError as error:
                raise BrokenInputError("not JSON", str(error), line=line) from None
            except json.JSONDecodeError as error:
                if not (more and _may_be_cut(error, len(text))):
                    raise BrokenInputError(
                        "not JSON", error.msg, line=line + text.count("\n", position, error.pos)
                    ) from None
                if len(text) - position > limit:
                    raise BrokenInputError(f"a value longer than {limit / 1e6:g} MB", line=line) from None
                refill()
                continue
            if end == len(text) and more:
                refill()  # a number may go on
                continue
            yield line, value
            line += text.count("\n", position, end)
            position = end
    if in_array:
        raise BrokenInputError("the JSON array is cut short", line=line)


def _may_be_cut(error: json.JSONDecodeError, length: int) -> bool:
    """Whether more text could mend the error: it lies at the end, or in a string that does not end."""
    return error.pos >= length - 12 or error.msg.startswith("Unterminated string")
