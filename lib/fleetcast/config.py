"""The one config system: typed options, a YAML form, command-line overrides.

A room declares its options as an `Options` subclass, one docstring under each field. A job's config is those
options plus what every job takes:

    class Config(IngestOptions, JobConfig): ...

    config = parse(Config, ["--config", "nightly.yaml", "--step", "10min"])

Precedence: command line, then the YAML file, then defaults. An unknown name or a wrong type is an error that
names it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict

from fleetcast.errors import InputError


def _seconds(value: Any) -> Any:
    """`300`, `"300"`, `"5min"`, `"1h"`, `"2 days"` → whole seconds."""
    if isinstance(value, str) and not value.strip().isdigit():
        try:
            seconds = pd.Timedelta(
                re.sub(r"(?<=\d)d\b", "D", value)
            ).total_seconds()  # what pandas calls a day
        except ValueError as error:
            raise ValueError(f"expected a duration such as 300, 5min or 1h, got {value!r}") from error
        if seconds % 1 != 0:  # nor for nan
            raise ValueError(f"expected whole seconds, got {value!r}")
        return int(seconds)
    return value


#: A duration in whole seconds; `5min`, `1h` and the like are understood.
Seconds = Annotated[int, BeforeValidator(_seconds)]


class Options(BaseModel):
    """Base of every group of options."""

    # Of the type of a job config's, which inherits from both.
    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class S3Options(Options):
    """How `s3://` is reached, wherever a job or the server meets it.

    Keys are never given here: each node has them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in ~/.aws,
    or by its role.
    """

    endpoint_url: str | None = Field(None, pattern=r"^https?://[^@\s]+$")
    """The server, if it is not Amazon's: http(s)://host:port. AWS_ENDPOINT_URL if not given."""
    region: str | None = None
    """The region. AWS_DEFAULT_REGION, or that of the profile, if not given."""
    profile: str | None = None
    """The profile of ~/.aws whose keys and settings are used. AWS_PROFILE if not given."""
    connect_timeout: float = Field(5, gt=0)
    """How long a connection may take [s]."""
    read_timeout: float = Field(30, gt=0)
    """How long the server may be silent while it answers [s]."""
    attempts: int = Field(5, ge=1)
    """How often a request is tried that meets a broken connection, a time-out, or a server that is overloaded
    or fails (429, 5xx), with growing pauses in between."""
    max_connections: int = Field(10, ge=1)
    """Most connections of a process."""


AnyOptions = TypeVar("AnyOptions", bound=Options)


class BaseJobConfig(BaseSettings):
    """What every job takes."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: str | None = None
    """A YAML file with any of these options; the command line overrides it."""
    log_level: str = "INFO"
    """How much is logged to standard error: DEBUG, INFO, WARNING or ERROR."""
    num_cpus: int | None = None
    """CPUs of the Ray that is started here; all of them if not given. Not used on a running cluster."""
    object_store_gb: float | None = Field(None, ge=0.1)
    """Memory for the object store of the Ray that is started here [GB]; a tenth of the machine's if not
    given. Tables never pass through it: it carries receipts and logs, and one copy of a study's data."""
    spill_folder: str | None = None
    """Where that Ray writes what does not fit in its object store; its session's folder if not given."""
    s3: S3Options = S3Options()
    """How `s3://` is reached."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """No options from the environment: a run is what its command line and its YAML file say."""
        return (init_settings,)

    def only(self, options: type[AnyOptions]) -> AnyOptions:
        """The part of a flat job config that is one room's options."""
        return options(**{name: getattr(self, name) for name in options.model_fields})


class JobConfig(BaseJobConfig):
    """What every job takes that works on a store."""

    store: str
    """Where everything that the jobs make is kept: a folder or `s3://bucket/prefix`."""


Config = TypeVar("Config", bound=BaseJobConfig)


def parse(config_class: type[Config], arguments: list[str]) -> Config:
    """The config of a job from its command line.

    Raises InputError naming each wrong option, its value and what was expected; `--help` and unknown options
    leave through SystemExit as argparse does.
    """
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    file = pre.parse_known_args(arguments)[0].config
    from_file = read_yaml(file) if file else {}
    try:
        return CliApp.run(config_class, cli_args=arguments, **from_file)
    except ValidationError as error:
        raise InputError("; ".join(_explain(e) for e in error.errors())) from error


def read_yaml(file: str) -> dict[str, Any]:
    """Options from a YAML file, dashes in names read as underscores."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--config {file}: no such file")
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise InputError(f"--config {file}: expected a mapping of options, got {type(options).__name__}")
    return _underscored(options)


def _underscored(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key).replace("-", "_"): _underscored(item) for key, item in value.items()}
    return value


def _explain(error: Any) -> str:
    name = "--" + ".".join(str(part) for part in error["loc"]).replace("_", "-")
    if error["type"] == "missing":
        return f"{name} is required"
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of options that clash: the message names them, and what was given is all of them
        return message
    return f"{name}: {message[0].lower()}{message[1:]} (got {error['input']!r})"
