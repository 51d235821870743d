"""From a file's bytes to lines of UTF-8, in bounded memory: compressions, byte order marks, encodings, line ends.

However far a file unpacks, one step makes some 4 MB of it; a line longer than the stated bound is passed over, not
held. What breaks a file off raises `BrokenInputError`; what came before it stays read.
"""

import bz2
import codecs
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any

BATCH_BYTES = 4 << 20
_READ_BYTES = 1 << 20
_ZSTD_MAGIC, _ZSTD_SKIPPABLE = b"\x28\xb5\x2f\xfd", range(0x184D2A50, 0x184D2A60)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
# UTF-32's begins with UTF-16's: the longer one is tried first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What people call Shift_JIS or EUC-JP mostly holds ① and ㎎ too, which the standard's tables lack. Characters that a
# table lacks are looked up in its superset; the others stay the standard's (〜 is U+301C, where cp932 has U+FF5E).
_SUPERSETS = {"shift_jis": "cp932", "euc_jp": "euc_jis_2004"}


class BrokenInputError(Exception):
    """A file cannot be read on from here. `line` is 0 where only the reader's caller counts lines."""

    def __init__(self, kind: str, detail: str = "", *, line: int = 0) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail, self.line = kind, detail, line


def compression_of(head: bytes, suffix: str) -> str:
    """How a file is packed, by its first bytes or else by its name; "" for not at all."""
    if head.startswith(b"\x1f\x8b\x08"):  # the third byte tells it from a kanji in UTF-16
        return "gzip"
    if head.startswith(_ZSTD_MAGIC) or (len(head) >= 4 and int.from_bytes(head[:4], "little") in _ZSTD_SKIPPABLE):
        return "zstd"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bzip2"
    return COMPRESSIONS.get(suffix, "")


def marked_encoding(head: bytes) -> str:
    """The encoding that a byte order mark at the start of a file tells; "" where there is none."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "")


def normal_encoding(name: str) -> str:
    """Python's name of an encoding.

    Raises:
        LookupError: there is no such text encoding.
    """
    normal = codecs.lookup(name).name
    try:
        "".encode(normal)
    except UnicodeError:
        raise LookupError(name) from None
    return "utf-8" if normal in ("utf-8-sig", "ascii") else normal


def splits_by_bytes(encoding: str) -> bool:
    """Whether byte 10 is a line's end and nothing else, so that lines can be found before they are decoded."""
    return encoding == "utf-8" or "\n".encode(encoding) == b"\n"


def decode(text: bytes, encoding: str) -> str:
    """Decode, with the characters that a superset has and the encoding lacks.

    Raises:
        UnicodeDecodeError: it is not that encoding.
    """
    return text.decode(encoding, "medllm.superset" if encoding in _SUPERSETS else "strict")


def _look_up(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError) and error.encoding in _SUPERSETS:
        for size in (3, 2):
            character = error.object[error.start : error.start + size]
            try:
                found = character.decode(_SUPERSETS[error.encoding])
            except UnicodeDecodeError:
                continue
            if len(character) == size and len(found) == 1:
                return found, error.start + size
    raise error


def _look_up_or_escape(error: UnicodeError) -> tuple[str, int]:
    try:
        return _look_up(error)
    except UnicodeDecodeError:
        text, position = codecs.lookup_error("surrogateescape")(error)
        return str(text), position


codecs.register_error("medllm.superset", _look_up)
codecs.register_error("medllm.escape", _look_up_or_escape)


def read_blocks(stream: IO[bytes], compression: str, *, window_bytes: int) -> Iterator[bytes]:
    """The file's content in blocks of some 4 MB.

    Args:
        window_bytes: the largest zstd window or xz dictionary to allocate (`zstd --long=31` asks for 2 GiB).

    Raises:
        BrokenInputError: the packed stream is damaged or cut short.
    """
    if not compression:
        while block := stream.read(BATCH_BYTES):
            yield block
    elif compression == "zstd":
        yield from _gather(_unpack_zstd(stream, window_bytes))
    else:
        yield from _unpack(stream, compression, window_bytes)


def _gather(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of at least `BATCH_BYTES`, the last one and one before an error shorter."""
    held: list[bytes] = []
    size = 0
    try:
        for chunk in chunks:
            held.append(chunk)
            size += len(chunk)
            if size >= BATCH_BYTES:
                yield b"".join(held)
                held, size = [], 0
    except BrokenInputError:
        yield b"".join(held)
        raise
    yield b"".join(held)


class _Gzip:
    """zlib with the interface of bz2's and lzma's decompressors."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._member.decompress(self._member.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def needs_input(self) -> bool:
        return not self._member.unconsumed_tail and not self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data


def _new_member(compression: str, memory_bytes: int) -> Any:
    if compression == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=memory_bytes)
    return _Gzip() if compression == "gzip" else bz2.BZ2Decompressor()


def _unpack(stream: IO[bytes], compression: str, memory_bytes: int) -> Iterator[bytes]:
    """Members one behind the other, zeros between and behind them left out (block devices fill up with them)."""
    member, begun, data, members = _new_member(compression, memory_bytes), False, b"", 0
    while True:
        while not data and (not begun or member.needs_input):
            data = stream.read(_READ_BYTES)
            if not data:
                if begun:
                    raise BrokenInputError(f"the {compression} stream is cut short")
                return
            if not begun and members:
                data = data.lstrip(b"\0")
        try:
            text = member.decompress(data, BATCH_BYTES)
        except (zlib.error, OSError, lzma.LZMAError) as error:
            raise BrokenInputError(f"the {compression} stream is broken", str(error)) from None
        begun, data = True, b""
        yield text
        if member.eof:
            data = member.unused_data.lstrip(b"\0")
            member, begun, members = _new_member(compression, memory_bytes), False, members + 1


def _unpack_zstd(stream: IO[bytes], window_bytes: int) -> Iterator[bytes]:
    """Block by block: python-zstandard bounds no output, but a block holds 128 KiB at most (RFC 8878, 3.1.1.2)."""
    import zstandard

    def take(count: int) -> bytes:
        found = stream.read(count)
        if len(found) < count:
            raise BrokenInputError("the zstd stream is cut short")
        return found

    unpacker = zstandard.ZstdDecompressor(max_window_size=window_bytes)
    while magic := stream.read(4):
        if len(magic) < 4:
            raise BrokenInputError("the zstd stream is cut short")
        if int.from_bytes(magic, "little") in _ZSTD_SKIPPABLE:
            left = int.from_bytes(take(4), "little")
            while left:
                left -= len(take(min(left, _READ_BYTES)))
            continue
        if magic != _ZSTD_MAGIC:
            raise BrokenInputError("the zstd stream is broken", "no frame begins here")
        descriptor = take(1)
        has_checksum = descriptor[0] & 4
        frame = unpacker.decompressobj()
        try:
            yield frame.decompress(magic + descriptor + take(_rest_of_header(descriptor[0])))
            last = False
            while not last:
                header = take(3)
                facts = int.from_bytes(header, "little")
                last, kind, size = bool(facts & 1), facts >> 1 & 3, facts >> 3
                body = take(1 if kind == 1 else size)
                yield frame.decompress(header + body + (take(4) if last and has_checksum else b""))
        except zstandard.ZstdError as error:
            if "too much memory" in str(error):
                raise BrokenInputError("its zstd window is larger than `zstd_window_mb` allows") from None
            raise BrokenInputError("the zstd stream is broken", str(error)) from None


def _rest_of_header(descriptor: int) -> int:
    """Bytes of a frame header behind its descriptor (RFC 8878, 3.1.1.1)."""
    single_segment = descriptor >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    return (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size


def to_utf8(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Transcode a whole stream. What is not that encoding is passed on as no UTF-8 either, to spoil its own line only.

    Raises:
        BrokenInputError: nothing can be read from here on.
    """
    decoder = codecs.getincrementaldecoder(encoding)(
        "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "medllm.escape"
    )
    try:
        for block in blocks:
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        yield error.object[: error.start].decode(encoding, "ignore").encode("utf-8", "surrogatepass")
        raise BrokenInputError(f"not {encoding}", error.reason) from None


def read_lines(blocks: Iterator[bytes], *, limit: int) -> Iterator[tuple[list[bytes], str]]:
    """Yield (whole lines without their newline, "" or the kind of loss that the line behind them is).

    A line of more than `limit` bytes is such a loss.

    Raises:
        BrokenInputError: the blocks end in one; the line it breaks off is not given.
    """
    too_long = f"a line longer than {limit / 1e6:g} MB"
    held: list[bytes] = []  # the beginning of a line, as long as it is short enough
    size = 0
    for block in blocks:
        *lines, tail = block.split(b"\n")
        if lines:
            if size <= limit:
                lines[0] = b"".join([*held, lines[0]])
                yield from _within(lines, limit, too_long)
            else:
                yield [], too_long
                yield from _within(lines[1:], limit, too_long)
            held, size = [], 0
        size += len(tail)
        if size <= limit:
            held.append(tail)
        else:
            held = []
    if size > limit:
        yield [], too_long
    elif size:
        yield [b"".join(held)], ""


def _within(lines: list[bytes], limit: int, too_long: str) -> Iterator[tuple[list[bytes], str]]:
    start = 0
    for end, line in enumerate(lines):
        if len(line) > limit:
            yield lines[start:end], too_long
            start = end + 1
    yield lines[start:], ""
