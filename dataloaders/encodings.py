"""What text that is not UTF-8 looks like, and how to convert it.

Nothing in such a file names its encoding, so this is a guess from the characters that a language uses most: each
candidate decodes the bytes, and counts for the share of its characters above ASCII that are usual ones.
"""

import codecs
import re
import shlex
from pathlib import Path

SAMPLE = 1 << 18  # bytes looked at
ENOUGH = 0.8  # share of usual characters that makes a candidate likely
CLOSE = 0.05  # a candidate this near to the best is named, too
BINARY = {b"PK\x03\x04": "a zip archive or an Excel workbook", b"\x1f\x8b": "a gzip file", b"\x80": "a pickle"}
MARKS = {  # UTF-32 first: its mark begins like that of UTF-16
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
CENTRAL = "[ąćęłńóśźżáčďéěíňřšťúůýžäöüßăâîșțşţőűľĺôđŁŚŻŹČŘŠŽ’„”“–…]"
ONE_BYTE = {  # Python's name -> characters usual in running text: mostly small letters
    "cp1252": "[à-öø-ÿßœšžÀÁÄÅÆÇÈÉÊÑÓÖÚÜØ’‘“”„–—…•«»°´·¿¡€£©®ª º½¼¾\xa0]",
    "cp1250": CENTRAL,
    "iso8859_2": CENTRAL,
    "cp1254": "[çğıöşüâîûÇĞİÖŞÜ’“”–…]",
    "cp1255": "[א-ת\u05b0-\u05c2]",  # before cp1251, which has letters at more places
    "cp1251": "[а-яёіїєґўјљњћђџ№«»–—…“”]",
    "koi8_r": "[а-яё]",
    "cp866": "[а-яё]",
    "iso8859_5": "[а-яёіїєўјљњћђџ№]",
    "cp1253": "[α-ωάέήίόύώϊϋΐΰς]",
    "cp1256": "[\u0621-\u0652\u067e\u0686\u06af،؟]",
    "cp874": "[\u0e01-\u0e4e]",
    "mac_roman": "[áàâäãåéèêëíìîïñóòôöõúùûüçßøæœ’‘“”–—…]",
    "cp850": "[áàâäãåéèêëíìîïñóòôöõúùûüçßøæ]",
}
LATIN = ("cp1252", "cp1250", "iso8859_2", "cp1254", "mac_roman", "cp850")
SEVERAL_BYTES = {  # Python's name -> ranges of the first and of the second byte of usual characters
    "gb18030": ((0xA1, 0xD7), (0xA1, 0xFE)),
    "big5": ((0xA1, 0xC6), (0x40, 0xFE)),
    "cp932": ((0x81, 0x98), (0x40, 0xFC)),
    "euc_jp": ((0xA1, 0xCF), (0xA1, 0xFE)),
    "cp949": ((0xA1, 0xC8), (0xA1, 0xFE)),
}
SIGN_IN_WORD = re.compile(r"(?<=[^\W\d_])[¿¡£©®«»°´·](?=[^\W\d_])")  # a letter read in the wrong encoding
KANA, HANGUL = re.compile("[ぁ-ヿ]"), re.compile("[가-힣]")
# Python's name -> iconv's, and what people call it.
NAMES = {
    "gb18030": ("GB18030", "GBK"),
    "big5": ("BIG5", "Big5"),
    "cp932": ("CP932", "Shift-JIS"),
    "euc_jp": ("EUC-JP", "EUC-JP"),
    "cp949": ("CP949", "EUC-KR"),
    "cp1252": ("CP1252", "cp1252 (latin-1 is a part of it)"),
    "koi8_r": ("KOI8-R", "KOI8-R"),
    "iso8859_2": ("ISO-8859-2", "ISO-8859-2"),
    "iso8859_5": ("ISO-8859-5", "ISO-8859-5"),
    "mac_roman": ("MACINTOSH", "Mac Roman"),
}


def remedy(raw: bytes, path: Path) -> str:
    """What the bytes of `path`, which are not UTF-8, look like, and what to do; begins in lower case, no full stop."""
    for start, kind in BINARY.items():
        if raw.startswith(start):
            return f"it is {kind}, no text; unpack it, or save it as text in UTF-8"
    if wide := _utf_16_or_32(raw):
        return f"it looks like {wide}; {_convert(path, wide)}"
    if b"\0" in raw:
        return "it has bytes of value 0, as no text has: it is damaged or no text file; copy it again"
    text = raw.decode("utf-8", errors="replace")
    bad = text.count("\ufffd")
    if sum(c > "\x7f" for c in text) > 2 * bad + 1:
        if bad == 1 and text.endswith("\ufffd"):
            return "it looks like UTF-8 that is cut off within its last character; copy it again"
        cause = "are damaged or were pasted from a file in another encoding; correct them in an editor"
        return f"it looks like UTF-8 but for {bad} places that {cause}"
    first = next(re.finditer(rb"[\x80-\xff]", raw)).start()
    guesses = _likely(raw[max(0, first - 1) : first + SAMPLE])
    if not guesses:
        unsure = "save it as UTF-8 where it was made, or convert it from its encoding, such as"
        return f"nothing tells its encoding; {unsure} {_convert(path, 'CP1252')}"
    listed = [NAMES.get(name, (name.upper(), name)) for name in guesses]
    looks = " or ".join(shown for _, shown in listed)
    more = f"; if that is the wrong one: -f {' or '.join(name for name, _ in listed[1:])}" if len(listed) > 1 else ""
    return f"it looks like {looks}; {_convert(path, listed[0][0])}{more}"


def _convert(path: Path, encoding: str) -> str:
    source, target = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    return f"convert it: iconv -f {encoding} -t UTF-8 {source} > {target}, then put that in its place"


def _utf_16_or_32(raw: bytes) -> str | None:
    """By the mark at the start, else by the zeros between ASCII characters."""
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            return name
    sample = raw[:SAMPLE]
    zeros = [sample[n::4].count(0) / max(1, len(sample[n::4])) for n in range(4)]
    if min(zeros[2:]) > 0.9 or min(zeros[:2]) > 0.9:
        return "UTF-32LE" if zeros[3] > 0.9 else "UTF-32BE"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if max(even, odd) > 0.05 and max(even, odd) > 4 * min(
        even, odd
    ):  # commas and line ends are ASCII in every language
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return None


def _likely(raw: bytes) -> list[str]:
    """Candidates for the encoding, the likeliest first; none where nothing fits."""
    scores = {name: _share_of_pairs(raw, name) for name in SEVERAL_BYTES}
    if not any(score >= ENOUGH for score in scores.values()):
        scores = {name: _share_of_letters(raw, name) for name in ONE_BYTE}
    best = max(scores.values())
    near = [name for name, score in scores.items() if score >= max(ENOUGH, best - CLOSE)]
    found: dict[str, str] = {}  # text -> encoding: where two give the same text, the first will do
    for name in sorted(near, key=lambda name: -scores[name]):
        found.setdefault(_decoded(raw, name), name)
    return list(found.values())[:3]


def _decoded(raw: bytes, encoding: str) -> str:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(raw)  # the end may be within a character
    except UnicodeDecodeError:
        return ""


def _share_of_pairs(raw: bytes, encoding: str) -> float:
    strange = [c for c in _decoded(raw, encoding) if c > "\x7f"]
    if not strange:
        return 0.0
    pairs = [c.encode(encoding) for c in strange]
    (low, high), (second_low, second_high) = SEVERAL_BYTES[encoding]
    usual = sum(len(p) == 2 and low <= p[0] <= high and second_low <= p[1] <= second_high for p in pairs)
    kana, hangul = (sum(map(bool, map(kind.match, strange))) / len(strange) for kind in (KANA, HANGUL))
    if encoding in ("cp932", "euc_jp") and kana < 0.2:  # there is no Japanese sentence without kana
        return 0.0
    if encoding == "cp949" and hangul < 0.5 or encoding in ("gb18030", "big5") and kana > 0.2:
        return 0.0
    # Korean syllables lie where Chinese has the first half of its usual characters: all there is no Chinese.
    if encoding == "gb18030" and sum(p[0] > 0xC8 for p in pairs) < 0.1 * len(pairs):
        return 0.0
    return usual / len(pairs)


def _share_of_letters(raw: bytes, encoding: str) -> float:
    text = _decoded(raw, encoding)
    strange = [c for c in text if c > "\x7f"]
    if not strange:
        return 0.0
    usual = sum(bool(re.match(ONE_BYTE[encoding], c)) for c in strange) - len(SIGN_IN_WORD.findall(text))
    # Latin letters above ASCII stand beside ASCII letters; those of other scripts beside each other.
    alone = len(re.findall(rb"(?<=[a-zA-Z])[\x80-\xff]|[\x80-\xff](?=[a-zA-Z])", raw)) / len(strange)
    return usual / len(strange) if (encoding in LATIN) == (alone >= 0.5) else 0.0
