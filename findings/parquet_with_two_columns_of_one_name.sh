#!/usr/bin/env bash
# pyarrow 26.0.1 and DuckDB 2.0.1: a Parquet file with two columns of one name is written, and not read by read_table.
#
# Guess before it was run: pyarrow.parquet.write_table refuses a table with two columns of one name.
# Seen: it writes the file without a word. pyarrow.parquet.read_table of this very file raises ArrowInvalid ("Multiple
#   matches for FieldRef.Name(x)"), unless it is asked for other columns alone; ParquetFile(...).read() reads both, and
#   DuckDB calls the second one x_1. So whoever adds features to a table looks whether a column has the key already.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet pyarrow==26.0.1 duckdb==2.0.1
cat >"$folder/run.py" <<'PYTHON'
import sys

import duckdb
import pyarrow as pa
from pyarrow import parquet

path = sys.argv[1] + "/twice.parquet"
parquet.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["x", "x", "y"]), path)


def read(columns):
    try:
        return parquet.read_table(path, columns=columns).column_names
    except pa.ArrowInvalid as error:
        return str(error).split(" in ")[0]


found = {
    "read_table": read(None),
    "read_table of y": read(["y"]),
    "ParquetFile.read": parquet.ParquetFile(path).read().column_names,
    "DuckDB": duckdb.sql(f"select * from '{path}'").columns,
}
assert found == {
    "read_table": "Multiple matches for FieldRef.Name(x)",
    "read_table of y": ["y"],
    "ParquetFile.read": ["x", "x", "y"],
    "DuckDB": ["x", "x_1", "y"],
}, f"changed: {found}"
print("as stated:", found)
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder"
