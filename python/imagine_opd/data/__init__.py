"""Rows: from a file, a list or a dataset to `Row` values, each bad one named with its place and the fix."""

from imagine_opd.data.load import BadRow, LoadedRows, load_rows
from imagine_opd.data.rows import parse_row

__all__ = ["BadRow", "LoadedRows", "load_rows", "parse_row"]
