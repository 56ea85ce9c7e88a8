"""Raw rows from one file or one hub data set: jsonl, json, csv, tsv, txt, parquet, each plain or .gz.

Files are read strictly: UTF-8 or nothing, whole lines, whole gzip streams. A line that is no row (broken JSON, too few
cells) is given out with its error, so that the caller can count it; a file that cannot be read on is a UserError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.data import hub
from pipeline.errors import UserError, did_you_mean

CANDIDATE_COLUMNS = ("data_src", "data_gt", "data_kd")  # of the headerless ranked-candidates TSV
BAR, BARRED_COLUMNS = " ||| ", ("prompt", "completion", "score")  # of the text files that came with ESRL
GZIP_MARK = b"\x1f\x8b"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# columns of chats, whose mappings Arrow fills up
NESTED = (
    *("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected"),
    *("tools", "chat_template_kwargs"),
)
SCORE_MARK = "<#SCORE#>"  # stands in every ranked-candidates cell and in no header
ARRAY = 'wanted an array of objects, {"data": [...]} or one object per line'
DECODER = json.JSONDecoder()
READ_WHOLE = (".json", ".json.gz", ".parquet.gz")
NO_VALUE = re.compile(r"[ \t\r\n,:]*")  # between the values of sound JSON


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it. `line` counts from 1: the text line, or the row where a file has no lines."""

    line: int
    columns: Mapping[str, object] = field(default_factory=dict)
    error: str = ""  # why this line is no row; `columns` is then empty


def raw_rows(path: str, ranked: bool = False, streaming: bool = False) -> Iterator[RawRow]:
    """The rows of a local file, or, where there is none, of a hub data set `owner/name[/folder][@revision][:split]`.

    `ranked`: a tsv or txt file has ranked candidates, and so no header line.
    `streaming`: what is not read is not fetched either. Files are read row by row anyway, but for some that are refused
    then. Raises UserError for a file that is absent, of unknown ending, badly encoded, cut short or damaged.
    """
    if hub.is_hub_name(path):
        return (RawRow(number, columns) for number, columns in hub.rows(path, streaming))
    file = Path(path)
    if not file.exists():
        raise UserError(f"{path}: no such file, wanted a file or a hub name owner/name{_nearby(file)}")
    if file.is_dir():
        raise UserError(f"{path}: a folder, wanted a file; name one with data.train=, or the folder with data.path=")
    ending = known_ending(file.name)
    if ending is None:
        raise UserError(f"{path}: unknown ending, wanted one of {', '.join(READERS)}, plain or .gz; rename the file")
    if streaming and path.endswith(READ_WHOLE):
        raise UserError(
            f"{path}: data.streaming, but such a file is read whole before its first row, wanted .jsonl, .csv, .tsv "
            "(each plain or .gz) or .parquet: write it as one of these"
        )
    return _ranked(path) if ranked and ending in (".tsv", ".txt") else READERS[ending](path)


def known_ending(name: str) -> str | None:
    """The ending of a file name that decides how to read it, .gz left off; None if unknown."""
    suffix = Path(name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in READERS else None


def stem(path: str) -> str:
    """What row ids begin with: the file's name without endings, or the hub name."""
    if hub.is_hub_name(path):
        return path.replace(":", "/")
    name = Path(path).name.removesuffix(".gz")
    return Path(name).stem


def text_lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number, line with its newline) of a UTF-8 file. Only the newline character ends a line."""
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, _decoded(path, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged_gzip(f"{path}:{number + 1}", error) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), wanted a readable file; check it") from error


def _decoded(path: str, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{line[error.start]:02x} at {error.start + 1} is not UTF-8"
        encoding = "UTF-16" if number == 1 and line.startswith(UTF16_MARKS) else "LATIN1"
        cure = f"convert the file, for instance with iconv -f {encoding} -t UTF-8"
        if number == 1 and line.startswith(GZIP_MARK):
            cure = "it is compressed: let its name end in .gz"
        raise UserError(f"{path}:{number}: {wrong}, wanted UTF-8 text; {cure}") from error


def _opened(path: str) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _damaged_gzip(place: str, error: Exception) -> UserError:
    return UserError(f"{place}: gzip data cut short or damaged ({error}), wanted a whole file; fetch it again")


def _nearby(file: Path) -> str:
    folder = file.parent
    names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(file.name, names) or f"; look into {folder}"


def _json_lines(path: str) -> Iterator[RawRow]:
    return _line_objects(text_lines(path))


def _line_objects(lines: Iterable[tuple[int, str]]) -> Iterator[RawRow]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield _object(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield RawRow(number, error=f"no JSON ({error}), wanted one JSON object per line")


def _object(line: int, value: object) -> RawRow:
    if isinstance(value, dict):
        return RawRow(line, value)
    return RawRow(line, error=f"JSON of type {type(value).__name__}, wanted an object with named columns")


def _json(path: str) -> Iterator[RawRow]:
    """An array of objects, {"data": [...]}, or JSON lines in spite of the ending."""
    lines = list(text_lines(path))
    if _is_json_lines(lines):
        return _line_objects(lines)
    return (_object(*entry) for entry in array_entries(path, "".join(line for _, line in lines)))


def _is_json_lines(lines: Sequence[tuple[int, str]]) -> bool:
    """True if the first line is an object by itself, and not the wrapper {"data": [...]}."""
    first = next((line for _, line in lines if line.strip()), "")
    try:
        value = json.loads(first)
    except ValueError:
        return False
    return isinstance(value, dict) and not isinstance(value.get("data"), list)


def _tsv(path: str) -> Iterator[RawRow]:
    """With a header line, quoted as csv; or the headerless ranked-candidates file, known by its mark and not quoted."""
    return _ranked(path) if SCORE_MARK in _first_line(path) else _table(path, csv.excel_tab)


def _txt(path: str) -> Iterator[RawRow]:
    """JSON lines, or cells separated by tabs or by bars: the first line decides."""
    first = _first_line(path)
    if not first or first.lstrip().startswith("{"):
        return _json_lines(path)
    if "\t" in first:
        return _tsv(path)
    if BAR in first:
        return _barred(path, BARRED_COLUMNS[: first.count(BAR) + 1])
    raise UserError(f'{path}:1: plain text, wanted JSON lines or tab-separated cells; write {{"text": ...}} lines')


def _first_line(path: str) -> str:
    """The first line that is not blank, if any."""
    return next((line for _, line in text_lines(path) if line.strip()), "")


def _ranked(path: str) -> Iterator[RawRow]:
    """Ranked candidates; of two columns where the first line has two, as in the files to predict from."""
    first = _first_line(path)
    columns = CANDIDATE_COLUMNS[:2] if first.count("\t") == 1 and SCORE_MARK not in first else CANDIDATE_COLUMNS
    for number, line in text_lines(path):
        if line.strip():
            yield _row(number, line.rstrip("\r\n").split("\t"), columns)


def _barred(path: str, columns: Sequence[str]) -> Iterator[RawRow]:
    """Lines `prompt ||| completion`, with or without ` ||| score`; a line break within a cell is written as \\n."""
    for number, line in text_lines(path):
        if line.strip():
            cells = line.rstrip("\r\n").split(BAR)
            yield _row(number, [cell.replace("\\n", "\n") for cell in cells], columns)


def _table(path: str, dialect: type[csv.Dialect]) -> Iterator[RawRow]:
    """Rows of a quoted table under its header. An empty cell is no value. `line` is the one where the row begins."""
    csv.field_size_limit(sys.maxsize)  # the module's default of 131,072 characters refuses long texts
    reader = csv.reader((line for _, line in text_lines(path)), dialect, strict=True)
    header, start = None, 1
    try:
        for cells in reader:
            if cells and header is None:
                header = _checked_header(f"{path}:{start}", cells)
            elif cells:
                yield _row(start, cells, header)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{start}: {error}, wanted quotes doubled and closed; write it with a csv tool"
        ) from error


def _checked_header(place: str, cells: Sequence[str]) -> Sequence[str]:
    other = next((mark for mark in (";", "\t", "|", ",") if len(cells) == 1 and mark in cells[0]), None)
    if other is not None:
        cure = "name the file .tsv" if other == "\t" else "write it anew with commas (.csv) or tabs (.tsv)"
        raise UserError(f"{place}: one column, {cells[0]!r}, wanted several: {other!r} separates them; {cure}")
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        raise UserError(f"{place}: the header names {', '.join(map(repr, twice))} twice; rename one of the columns")
    return cells


def _row(line: int, cells: Sequence[str], header: Sequence[str]) -> RawRow:
    if len(cells) != len(header):
        return RawRow(line, error=f"{len(cells)} cells, wanted {len(header)} ({', '.join(header)})")
    return RawRow(line, {name: cell or None for name, cell in zip(header, cells, strict=True)})


def _parquet(path: str) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with _opened(path) as stream:
            table = parquet.ParquetFile(io.BytesIO(stream.read()) if path.endswith(".gz") else stream)
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(number, {name: _unfilled(row[name]) if name in NESTED else row[name] for name in row})
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged_gzip(path, error) from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}:{number + 1}: no whole parquet file ({reason}); fetch or write it again") from error


def _unfilled(value: object) -> object:
    """`value` without what is null in its mappings: Arrow gives each of a column every key that one of them has."""
    if isinstance(value, dict):
        return {key: _unfilled(one) for key, one in value.items() if one is not None}
    return [_unfilled(one) for one in value] if isinstance(value, list) else value


def array_entries(path: str, text: str) -> Iterator[tuple[int, object]]:
    """(line, value) of each entry of `[...]` or `{"data": [...]}`; nothing for blank text.

    Raises UserError where the text breaks off or is something else, before the first entry.
    """
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise UserError(f"{path}:{line}: no JSON ({error}), {ARRAY}; fix it or write the file again") from error
    start = 0
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        names_and_values = list(_entries(text, 0))
        pairs = zip(names_and_values[::2], names_and_values[1::2], strict=True)
        start = [at for (_, name), (at, _) in pairs if name == "data"][-1]  # the last one counts, as in json.loads
    elif not isinstance(whole, list):
        raise UserError(f'{path}:1: JSON of type {type(whole).__name__} without a "data" array, {ARRAY}; rewrite it')
    line, counted = 1, 0
    for at, value in _entries(text, start):
        line, counted = line + text.count("\n", counted, at), at
        yield line, value


def _entries(text: str, start: int) -> Iterator[tuple[int, object]]:
    """(place, value) of all that the first bracket from `start` holds, in sound JSON; of an object, names count too."""
    at = NO_VALUE.match(text, start).end() + 1
    while text[at := NO_VALUE.match(text, at).end()] not in "]}":
        value, end = DECODER.raw_decode(text, at)
        yield at, value
        at = end


READERS: Mapping[str, Callable[[str], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, dialect=csv.excel),
    ".tsv": _tsv,
    ".txt": _txt,
    ".parquet": _parquet,
}
