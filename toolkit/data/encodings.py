"""What a file is that is no UTF-8 text, for the message about it: a good file is never asked.

opened(path)                    # its bytes, unpacked
way_out(Path("x.csv"), 4096)    # 'It looks like CP1251: iconv -f CP1251 -t utf-8 x.csv > utf8-x.csv'
"""

import codecs
import gzip
import re
import shlex
from pathlib import Path
from typing import BinaryIO, cast

PACKED = {
    b"\x1f\x8b": ("gzip", "Let its name end with .gz; if it does, it is gzip in gzip: unpack it once"),
    b"PK\x03\x04": ("a zip archive", "Unpack it"),
    b"BZh": ("bzip2", "Unpack it (bunzip2)"),
    b"\xfd7zXZ": ("xz", "Unpack it (unxz)"),
    b"(\xb5/\xfd": ("zstd", "Unpack it (unzstd)"),
    b"PAR1": ("parquet", "Set data.format=parquet"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file", "Fetch it (git lfs pull)"),
}
WIDE = ("utf_16", "utf_32", "utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be")
USUAL = (  # of those that fit a short text equally well the first is named
    "cp1252", "gb18030", "shift_jis", "cp932", "cp1251", "big5", "euc_jp", "cp949", "cp1250", "koi8_r", "cp1254",
    "cp1253", "cp1255", "cp1256", "cp874", "iso8859_2", "iso8859_5", "iso8859_7", "cp866",
)  # fmt: skip
AROUND = 2**18  # bytes to look at, before and after the bad one


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends with .gz."""
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def way_out(path: Path, offset: int) -> str:
    """What a file looks like whose byte at ``offset`` is no UTF-8, and the command that converts it."""
    with opened(path) as file:
        file.seek(max(0, offset - AROUND) // 4 * 4)
        names = _encodings(file.read(2 * AROUND))
    if names == ["UTF-8"]:
        return "Its other lines are UTF-8: correct this one"
    if not names:
        return "It is in no encoding that could be told: convert it to UTF-8, or name another"
    old, new = (shlex.quote(str(p)) for p in (path, path.with_name(f"utf8-{path.name}")))
    command = f"iconv -f {names[0]} -t utf-8"
    command = f"gzip -dc {old} | {command} | gzip" if path.suffix == ".gz" else f"{command} {old}"
    return f"It looks like {' or '.join(names)}: {command} > {new}"


def _encodings(sample: bytes) -> list[str]:
    """The names that iconv has for what the bytes may be, the likeliest first; at most two."""
    from charset_normalizer import from_bytes

    lines = sample.split(b"\n")
    lines = lines[1:-1] if len(sample) > AROUND and len(lines) > 2 else lines  # the outer ones may be cut in a letter
    lines = [line for line in lines if not line.isascii()]
    if any(line.decode(errors="ignore").encode() == line for line in lines):
        return ["UTF-8"]
    if b"\x1b$" in sample and not lines:
        return ["ISO-2022-JP"]
    wide = b"\0" in sample or sample.startswith((b"\xff\xfe", b"\xfe\xff"))
    known = WIDE if wide else USUAL
    found = list(from_bytes(sample if wide else b"\n".join(lines), cp_isolation=list(known)))
    best = [match for match in found if (match.chaos, -match.coherence) <= (found[0].chaos, -found[0].coherence)]
    names = {name for match in best for name in match.could_be_from_charset}
    usual = (codecs.lookup(name).name.upper().replace("_", "-") for name in known if name in names)
    return [re.sub("-([LB]E)$", r"\1", name) for name in usual][:2]


def packed(file: BinaryIO) -> tuple[str, str] | None:
    """What ``file`` is by its first bytes, and the way out, if it is packed."""
    first = file.peek(32)  # type: ignore[attr-defined]
    return next((told for magic, told in PACKED.items() if first.startswith(magic)), None)
