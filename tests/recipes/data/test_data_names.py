"""Names of data: which are folders, which are looked up on the hub, and how often."""

import shutil
import time

import datasets
import huggingface_hub
import pytest
from image_files import pictures, write_parquet

from gradmask.errors import DataError
from gradmask.recipes.data.opening import open_splits


@pytest.fixture
def hub(monkeypatch):
    """A hub that cannot be reached; counts how often it is asked."""
    asked = []

    def ask(self, name, **options):
        asked.append(name)
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # put back afterwards
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tried again"))
    return asked


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Photos" / "summer").mkdir(parents=True)
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("phtos", "Photos"),
        ("PHOTOS", "Photos"),
        ("./photo", "Photos"),
        ("cifar100", ""),
        ("Photos/sumer/", "Photos/summer"),
        ("Photos/a/b", "Photos"),
        ("./Photos/winter", "Photos"),
        ("../none/such", ".."),
        ("a b/c", ""),
        ("owner/name/more", ""),
        ("https://example.org/x", ""),
        ("x" * 300, ""),
        ("no\0name", ""),
    ],
)
def test_names_that_are_no_hub_names_are_not_looked_up(name, nearest, here, hub):
    with pytest.raises(
        DataError, match=r"must be a folder, a name on the .* \(owner/name\) or"
    ) as error:
        open_splits(name)
    assert f"the nearest there is: {(here / nearest).resolve()}." in str(error.value)
    assert not hub


@pytest.mark.parametrize("name", ["~/no-such-folder", "/no/such/folder", "~nobody-here/x"])
def test_folders_elsewhere(name, hub):
    with pytest.raises(DataError, match=rf"No folder at .*{name[2:]}; the nearest"):
        open_splits(name)
    assert not hub


def test_a_file_and_a_name_that_is_not_utf8(hub):
    with pytest.raises(DataError, match="file is a file, and must be a folder"):
        open_splits("./file")
    with pytest.raises(DataError, match=r"'caf\\udce9' is not UTF-8: rename"):
        open_splits("caf\udce9")


def test_a_hub_that_is_out_of_reach_is_asked_once(here, hub):
    with pytest.raises(DataError) as error:
        open_splits("Photos/winter")
    assert hub == ["Photos/winter"]
    assert f"nearest there is: {here / 'Photos'}. The Hugging Face hub cannot be reached" in str(
        error.value
    )


def test_a_name_that_the_hub_does_not_know(hub, monkeypatch):
    class Missing(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self):
            pass

    def ask(self, name, **options):
        raise Missing

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    with pytest.raises(DataError, match="hub has no data set user/none that you may read"):
        open_splits("user/none")


def test_a_hub_that_fails(hub, monkeypatch):
    def fail(**options):
        assert options == {"path": "user/none"}
        raise datasets.exceptions.DatasetNotFoundError("it is gated")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"No folder at user/none.*hub fails: it is gated"):
        open_splits("user/none")
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_copy_is_read_without_the_hub(here, hub, monkeypatch):
    write_parquet(here / "set", "train", pictures(9), [0, 1, 2] * 3)
    files = {"train": [str(here / "set" / "train-0.parquet")]}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(here / "made"))
    (made,) = (here / "made" / "parquet").glob("*/*/*/")
    copy = here / "hub" / "owner___name" / "default" / "0.0.0" / made.name
    shutil.copytree(made, copy)
    (copy / "parquet-train.arrow").rename(copy / "name-train.arrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "hub"))
    assert len(open_splits("owner/name")["train"]) == 9
    assert hub == ["owner/name"]


def test_parquet_files_in_any_capitals(here):
    for split, count in (("Train", 9), ("VALIDATION", 3), ("._train", 1)):
        write_parquet(here / "set", split, pictures(count), [0, 1, 2][:count] * (count // 3 or 1))
    (here / "set" / "._train-0.parquet").write_bytes(b"x")
    assert {s: len(rows) for s, rows in open_splits("set").items()} == {"train": 9, "validation": 3}
    (here / "Photos" / "._x.parquet").write_bytes(b"x")  # makes no folder one of parquet files
    with pytest.raises(DataError, match="holds no folders of classes"), pytest.warns():
        open_splits("Photos")
