"""Results made by hand."""

import json

from ssmscan.bench.result import Result

ROW = {
    "op": "linear_scan",
    "shape": {"b": 8, "l": 8192, "d": 2048},
    "dtype": "bfloat16",
    "direction": "fwd",
    "backend": "triton",
    "variant": "headline",
    "median_ms": 0.3251,
    "p20_ms": 0.324,
    "p80_ms": 0.327,
    "floor_ms": 0.314,
    "ratio_to_floor": 1.035,
    "peak_mib": 256.0,
}
SWEPT = {**ROW, "shape": {"b": 4, "l": 16384, "d": 2048}, "variant": "length sweep"}
RECORD = {
    "gpu": "h200",
    "commit": "abc",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "date": "2026-01-02T03:04:05+00:00",
    "copy_gbps": 4270.0,
    "host_us": {"fwd": 30.1, "fwdbwd": 242.3, "sdpa fwd": 31.8, "sdpa fwdbwd": 209.7},
    "rows": [
        ROW,
        {**ROW, "direction": "fwdbwd", "median_ms": 1.0},
        {**ROW, "backend": "torch", "median_ms": 54.9, "variant": "x and a"},
        SWEPT,
        {**SWEPT, "direction": "fwdbwd"},
    ],
}


def read(folder, record=RECORD):
    """The record, by way of a file."""
    path = folder / record["gpu"] / f"{record['rows'][0]['op']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    return Result.read(path)
