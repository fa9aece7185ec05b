"""The one config system: a YAML file, overridden by the command line, checked at the door."""

import runpy
from pathlib import Path
from typing import Literal

import pytest
from fleetcast.config import JobConfig, Options, Seconds, parse
from fleetcast.errors import InputError
from pydantic import Field, model_validator

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.py"))


class Sizes(Options):
    max_items: int = Field(3, ge=1)
    """How many."""
    step: Seconds = 300
    """How long [s]."""
    mode: Literal["fast", "exact"] = "fast"
    """How well."""
    metrics: tuple[str, ...] = ("cpu",)
    """Which."""
    strict: bool = False
    """Whether to be strict."""

    @model_validator(mode="after")
    def _exact(self):
        if self.strict and self.mode == "fast" and self.max_items > 5:
            raise ValueError("strict: no more than 5 items are fast")
        return self


class Config(Sizes, JobConfig):
    """A job for the tests."""


def config(tmp_path: Path, text: str, *arguments: str) -> Config:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    return parse(Config, ["--config", str(file), *arguments])


def test_defaults_hold_where_nothing_is_given():
    made = parse(Config, ["--store", "s"])
    assert made.only(Sizes) == Sizes()
    assert (made.store, made.config, made.num_cpus) == ("s", None, None)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    made = config(tmp_path, "store: s\nmax_items: 5\nstep: 10min\n", "--max-items", "7")
    assert (made.store, made.max_items, made.step, made.mode) == ("s", 7, 600, "fast")


@pytest.mark.parametrize("name", ["max-items", "max_items"])
def test_names_in_the_file_have_dashes_or_underscores(tmp_path, name):
    assert config(tmp_path, f"store: s\n{name}: 5\n").max_items == 5


def test_lists_and_switches(tmp_path):
    assert parse(Config, ["--store", "s", "--metrics", "cpu", "--metrics", "memory"]).metrics == (
        "cpu",
        "memory",
    )
    assert parse(Config, ["--store", "s", "--metrics", "cpu,memory"]).metrics == ("cpu", "memory")
    assert parse(Config, ["--store", "s", "--strict"]).strict
    made = config(tmp_path, "store: s\nstrict: true\nmetrics: [net_in]\n", "--no-strict")
    assert (made.strict, made.metrics) == (False, ("net_in",))


@pytest.mark.parametrize(
    ("given", "seconds"), [("300", 300), ("5min", 300), ("1h", 3600), ("2 days", 172_800), ("1d", 86_400)]
)
def test_durations_are_seconds_or_have_a_unit(tmp_path, given, seconds):
    assert parse(Config, ["--store", "s", "--step", given]).step == seconds
    assert config(tmp_path, f"store: s\nstep: {given}\n").step == seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-items", "3"], "--store is required"),
        (["--store", "s", "--max-items", "many"], r"--max-items: .*valid integer.* \(got 'many'\)"),
        (["--store", "s", "--max-items", "0"], r"--max-items: .*greater than or equal to 1 \(got '0'\)"),
        (["--store", "s", "--mode", "best"], r"--mode: .*'fast' or 'exact' \(got 'best'\)"),
        (
            ["--store", "s", "--step", "soon"],
            r"--step: expected a duration such as 300, 5min or 1h, got 'soon'",
        ),
        (["--store", "s", "--step", "1500ms"], r"--step: expected whole seconds, got '1500ms'"),
        (["--store", "s", "--step", "nan"], r"--step: expected whole seconds, got 'nan'"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_was_expected(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(Config, arguments)


def test_options_that_clash_are_explained_without_all_that_was_given():
    with pytest.raises(InputError) as failure:
        parse(Config, ["--store", "s", "--strict", "--max-items", "6"])
    assert str(failure.value) == "strict: no more than 5 items are fast"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store: s\ncolour: red\n", r"--colour: .*not permitted \(got 'red'\)"),
        ("store: s\nmax_items: [1]\n", r"--max-items: .*valid integer.* \(got \[1\]\)"),
        ("- store\n- s\n", r"--config .*job.yaml: expected a mapping of options, got list"),
        ("just words", r"--config .*job.yaml: expected a mapping of options, got str"),
        ("store: [s", r"--config .*job.yaml: not valid YAML: "),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as failure:
        config(tmp_path, text)
    assert "\n" not in str(failure.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--config .*nowhere.yaml: no such file"):
        parse(Config, ["--config", str(tmp_path / "nowhere.yaml")])


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert config(tmp_path, "", "--store", "s").only(Sizes) == Sizes()


@pytest.mark.parametrize("argument", ["--colour=red", "--conf=job.yaml", "--max-item=3"])
def test_unknown_and_shortened_options_end_the_job_with_usage(argument, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, ["--store", "s", argument])
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_options_do_not_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MAX_ITEMS", "9")
    assert parse(Config, ["--store", "s"]).max_items == 3


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_option_of_every_job_is_explained(job, capsys):
    made = runpy.run_path(str(job))["Config"]
    for name, field in made.model_fields.items():
        assert field.description, f"--{name} is not explained"
    with pytest.raises(SystemExit) as end:
        parse(made, ["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in made.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
