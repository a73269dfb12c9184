"""Data sets that the ``datasets`` library reads whole: folders of ``save_to_disk``, and, with a network, those on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prunekit import bounded
from prunekit.data.files.faults import Faults
from prunekit.data.files.lines import Row
from prunekit.data.files.options import ON_HUB, SPLIT_NAMES, Options
from prunekit.data.files.sources import Source
from prunekit.errors import ArtifactError, UsageError, quoted, theirs
from prunekit.imports import needed

BUILDERS = ("arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text")
"""Kinds of files that are read of a hub data set; none of them holds code, or pickles."""
TIMEOUT = 10.0  # seconds that the hub is waited for


@dataclass(frozen=True)
class Part:
    """One split of a data set: its columns, what reads its rows, and, of columns of classes, their names."""

    said: str
    names: list[str]
    rows: Callable[[Faults], Iterator[tuple[str, Row]]]
    feature_names: Callable[[str], Sequence[str] | None]
    size: int
    identity: Callable[[], str]


def saved(source: Source, options: Options, fetch: bool) -> dict[str, Part]:
    """The splits of a data set.

    Args:
        fetch: a hub data set may be downloaded; else it must be in the library's cache.

    Raises:
        ArtifactError: a file of it is missing or broken.
        UsageError: there is no network, or no such data set.
    """
    if source.kind == "saved":
        return {"train": _part(_from_disk(Path(source.places[0])), source.said)}
    address = source.places[0].removeprefix(ON_HUB)
    found = _from_hub(address, options.subset, fetch)
    if len(found) == 1:
        return {"train": _part(next(iter(found.values())), address)}
    return {SPLIT_NAMES[name]: _part(data, f"{address} ({name})") for name, data in found.items() if name in SPLIT_NAMES}


def parquet(paths: Sequence[Path]) -> Part:
    """Rows of parquet files."""
    datasets = needed("datasets")
    for path in paths:
        bounded.size(path)
    said = str(paths[0])
    try:
        with silently():
            data = datasets.Dataset.from_parquet([str(path) for path in paths])
    except Exception as error:  # pyarrow's and the library's own kinds
        raise ArtifactError(f"{said}: not a whole parquet file ({quoted(error)})") from None
    return _part(data, said)


def _from_disk(folder: Path) -> Any:
    datasets = needed("datasets")
    try:
        files = [one["filename"] for one in bounded.parsed(bounded.text(folder / "state.json", bounded.JSON))["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{folder}/state.json: not what save_to_disk writes ({quoted(error)})") from None
    bounded.size(folder / "dataset_info.json", bounded.JSON)
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise ArtifactError(f"{folder}/state.json: names the file {name!r:.60}; its files lie beside it")
        bounded.size(folder / name)
    try:
        with silently():
            return datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's and the library's own kinds
        raise ArtifactError(f"{folder}: not a whole folder of save_to_disk ({quoted(error)})") from None


def _from_hub(name: str, subset: str | None, fetch: bool) -> Any:
    datasets = needed("datasets")
    import huggingface_hub

    where, offline = f"{ON_HUB}{name}", datasets.config.HF_HUB_OFFLINE
    fetch = fetch and not offline
    if fetch:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=TIMEOUT)
        except huggingface_hub.errors.RepositoryNotFoundError:
            raise UsageError(f"{name}: no such file or folder here, and no such data set on the hub") from None
        except Exception as error:  # of the network's many kinds
            raise UsageError(
                f"{name}: no such file or folder here, and the Hugging Face hub cannot be reached ({type(error).__name__})"
            ) from None
    datasets.config.HF_HUB_OFFLINE = not fetch
    try:
        told = "reading it with datasets" if fetch else "reading it from the cache of datasets (import and train alone fetch)"
        with silently(), theirs(f"{where}: {told}"):
            builder = datasets.load_dataset_builder(name, subset)
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in (*BUILDERS, "cache"):
                raise UsageError(f"{where}: is of {kind} files; prunekit reads {', '.join(BUILDERS)}")
            if fetch:
                builder.download_and_prepare()
            return builder.as_dataset()
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@contextmanager
def silently() -> Iterator[None]:
    """``datasets`` says nothing meanwhile, and shows no bars: what matters of it is said by prunekit, in one line."""
    datasets = needed("datasets")
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _part(data: Any, said: str) -> Part:
    datasets = needed("datasets")
    data = data.with_format(None)
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            data = data.cast_column(name, type(feature)(decode=False))

    def rows(faults: Faults) -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(data, 1):
            yield said, Row(f"row {number}", {name: _named(value, data.features[name]) for name, value in row.items()})

    def identity() -> str:
        return json.dumps([data._fingerprint, len(data)])

    return Part(said, list(data.column_names), rows, partial(_classes, data.features), int(data.data.nbytes), identity)


def _named(value: Any, feature: Any) -> Any:
    """A class's name in the place of its index."""
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [_named(one, inner) for one in value]
    names = getattr(feature, "names", None)
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _classes(features: Any, column: str) -> Sequence[str] | None:
    feature = features[column]
    found: Sequence[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return found
