"""The job writes the whole trace with Ray, whatever the parallelism, and says what it wrote."""

import io
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleetcast.config import parse
from fleetcast.errors import InputError
from fleetcast.runtime import ray_session
from fleetcast.traces.synthesis import SynthesizeOptions, parts, write_part

JOB = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "synthesize.py"))
SMALL = ["--machines", "6", "--days", "1", "--rows-per-part", "25000", "--format", "csv.gz", "--seed", "3"]
MICROSERVICES = [*SMALL, "--trace", "microservices-v2021", "--file-span", "12h", "--requests", "20"]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("arguments", [SMALL, MICROSERVICES], ids=["2018", "2021"])
def test_the_files_are_those_of_the_options_and_replace_an_earlier_run(ray_here, tmp_path, arguments):
    """Byte for byte what one process writes; parts of a longer earlier trace go, other files stay."""
    (tmp_path / "MSCallGraph_99.csv.gz").write_bytes(b"of an earlier run")
    (tmp_path / "NodeMetrics_0.tar.gz").write_bytes(b"of an earlier run")
    (tmp_path / "machine_usage-00099.csv.gz").write_bytes(b"of an earlier run")
    (tmp_path / "machine_usage-00000.tar.gz").write_bytes(b"of an earlier run")
    (tmp_path / "machine_usage-00000.csv.gz").write_bytes(b"of an earlier run")
    (tmp_path / "notes.txt").write_bytes(b"kept")

    config = parse(JOB["Config"], ["--out", str(tmp_path), *arguments])
    figures = JOB["main"](config)

    options = config.only(SynthesizeOptions)
    expected: dict[str, bytes] = {"notes.txt": b"kept"}
    rows: Counter[str] = Counter()
    for part in parts(options):
        file = io.BytesIO()
        rows[part.table] += write_part(options, part, file)
        expected[f"{part.name}.csv.gz"] = file.getvalue()
    assert files(tmp_path) == expected
    assert figures["rows"] == rows
    assert figures["files"] == len(expected) - 1 > len(rows)
    assert figures["bytes"] == sum(map(len, expected.values())) - len(b"kept")
    assert figures["rows_per_second"] > 0
    assert figures["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machines", "0"], r"--machines: .*greater than or equal to 1 \(got '0'\)"),
        (["--coupling", "2"], r"--coupling: .*less than or equal to 1 \(got '2'\)"),
        (["--format", "zip"], r"--format: .*'csv', 'csv.gz' or 'tar.gz' \(got 'zip'\)"),
        (["--machines", "4", "--services", "9"], r"--services: .*with machines = 4 \(got '9'\)"),
        (["--sample-interval", "7s"], r"--sample-interval: expected seconds that divide 6 h \(got '7s'\)"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(JOB["Config"], ["--out", "raw", *arguments])


def test_the_place_to_write_to_is_required():
    with pytest.raises(InputError, match="--out is required"):
        parse(JOB["Config"], SMALL)


def test_a_file_is_no_place_to_write_to(tmp_path):
    taken = tmp_path / "raw"
    taken.write_text("something else")
    with pytest.raises(InputError, match=r"--out .*raw: is a file, expected a folder"):
        JOB["main"](parse(JOB["Config"], ["--out", str(taken), *SMALL]))
    assert taken.read_text() == "something else"
