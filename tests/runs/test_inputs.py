"""inputs.py: what a run depends on is what it was, wherever it lies now; or the run says which
file, and what changed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastbyol import api, config_io
from fastbyol.config import Config
from fastbyol.data import convert, decode_ffcv, decode_torchvision
from fastbyol.engine.observer import Silent
from fastbyol.errors import UsageError
from fastbyol.runs import checkpoint, environment, inputs
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.metrics import read_events
from tiny import beton_files, tiny_config

SHORT = ("train.epochs=2", "probe.every_epochs=0")


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two data files and a run on them of two epochs."""
    folder = tmp_path_factory.mktemp("made")
    api.train(tiny_config(beton_files(folder), *SHORT), folder / "run")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of it all, the run an epoch short of its end and speaking of the copies."""
    shutil.copytree(made, tmp_path / "a")
    move_paths(tmp_path / "a", made)
    checkpoint.newest(tmp_path / "a/run/checkpoints").unlink()  # type: ignore[union-attr]
    return tmp_path / "a"


def move_paths(folder: Path, before: Path) -> None:
    """What resume --data does, by hand: the content is what counts."""
    file = folder / "run/config.toml"
    file.write_text(file.read_text().replace(f'"{before}/', f'"{folder}/'))


def refused(work: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(UsageError) as caught:
        work(*arguments, **named)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def unpin(run: Path) -> None:
    """As an earlier version left it."""
    env = json.loads((run / "env.json").read_text())
    env.pop("inputs")
    env.pop("device")
    (run / "env.json").write_text(json.dumps(env))
    for path in (run / "checkpoints").iterdir():
        loaded = checkpoint.load(path)
        meta = {
            key: value for key, value in loaded.meta.items() if key not in ("inputs", "made_by")
        }
        checkpoint.save(run / "checkpoints", meta["step"], loaded.tensors, meta, keep=9)


@pytest.mark.parametrize("name", ["train", "test"])
def test_other_data_of_the_same_name_are_refused(here: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    file = here / f"{name}.beton"
    convert.convert("textures", file, count=80, size=16, seed=9, overwrite=True)
    text = refused(api.resume, here / "run")
    assert text.startswith(
        f"{file}: is not the {name}ing data" if name == "train" else f"{file}: is not the test data"
    )
    assert f"{48 if name == 'train' else 50} samples then, 80 now" in text
    assert (
        f"fastbyol resume {here / 'run'} --{'data' if name == 'train' else 'test-data'} FILE"
        in text
    )
    assert "--init-from" in text
    convert.convert(
        "textures", file, count=48 if name == "train" else 50, size=16, seed=9, overwrite=True
    )
    assert "other images" in refused(api.resume, here / "run")
    assert {
        path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()
    } == before


def test_measuring_on_the_runs_own_data_wants_them_unchanged(here: Path) -> None:
    file = here / "test.beton"
    convert.convert("textures", file, count=64, size=16, seed=3, overwrite=True)
    assert "50 samples then, 64 now" in refused(api.evaluate, here / "run")
    assert api.evaluate(here / "run", test_data=file)["num_test"] == 32  # named: taken as it is
    convert.convert("textures", here / "train.beton", count=64, size=16, seed=3, overwrite=True)
    assert "--train-data" in refused(api.evaluate, here / "run", "knn", test_data=file)
    result = api.evaluate(here / "run", "knn", test_data=file, train_data=here / "train.beton")
    assert result["num_repeated"] == 64
    assert "64 of 64 scored images are among those fitted" in result["notes"][0]
    file.unlink()
    assert "no such file, the test data of" in refused(api.evaluate, here / "run")


def test_data_that_moved_are_named_once(
    here: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a folder with spaces, in another page layout, by a link, the run moved too: the end is
    the same bit for bit.
    """
    (tmp_path / "b c").mkdir()
    train, test = tmp_path / "b c" / "images.beton", tmp_path / "b c" / "link"
    convert.convert("textures", train, count=48, size=16, workers=2)
    (here / "train.beton").unlink()
    (here / "test.beton").rename(tmp_path / "elsewhere")
    test.symlink_to("../elsewhere")
    run = tmp_path / "b c" / "r2"
    (here / "run").rename(run)
    text = refused(api.resume, run)
    assert f"{here / 'train.beton'}: no such file" in text
    assert "resume '" in text
    assert "r2' --data FILE" in text
    monkeypatch.chdir(tmp_path / "b c")
    assert "test.beton: no such file" in refused(api.resume, "r2", data="images.beton")
    assert "48 samples then, 50 now" in refused(
        api.resume, "r2", data="../elsewhere", test_data="link"
    )
    assert api.resume("r2", data="images.beton", test_data="link").finished
    for name in ("metrics.jsonl", "layers.npy"):
        assert (run / name).read_bytes() == (made / "run" / name).read_bytes()
    config = config_io.read_run(run / "config.toml")
    assert (config.data.train, config.data.test) == (str(train), str(test))
    assert "# where it was moved to" in (run / "config.toml").read_text()
    monkeypatch.chdir("/")
    assert api.resume(run).finished  # without a flag now
    assert api.evaluate(run)["num_test"] == 25
    assert api.load_encoder(run) is not None


def test_a_run_that_pinned_nothing_goes_on_and_says_so(here: Path, made: Path) -> None:
    unpin(here / "run")
    assert "data.train is" in refused(api.resume, here / "run")  # a path that was changed by hand
    (here / "run/config.toml").write_text((made / "run/config.toml").read_text())
    heard = Listener()
    api.resume(
        here / "run", data=here / "train.beton", test_data=here / "test.beton", observer=heard
    )
    assert any("was not written down when it was begun" in note for note in heard.notes)
    assert (here / "run/metrics.jsonl").read_bytes() == (made / "run/metrics.jsonl").read_bytes()
    again = Listener()
    api.resume(here / "run", observer=again)
    assert not again.notes
    convert.convert("textures", here / "train.beton", count=60, size=16, overwrite=True)
    assert "48 samples then, 60 now" in refused(api.resume, here / "run")


def test_a_relative_path_of_an_earlier_version_becomes_absolute(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From elsewhere the way on is named; once it went on from where it was begun, it does so from
    anywhere.
    """
    unpin(here / "run")
    file = here / "run/config.toml"
    newest = checkpoint.newest(here / "run/checkpoints")
    assert newest is not None
    loaded = checkpoint.load(newest)
    file.write_text(file.read_text().replace(f'"{here}/', '"'))
    meta = {**loaded.meta, "config": file.read_text()}
    checkpoint.save(here / "run/checkpoints", meta["step"], loaded.tensors, meta)
    monkeypatch.chdir("/")
    text = refused(api.resume, here / "run")
    assert text.startswith("/train.beton: no such file")
    assert "--data FILE" in text
    monkeypatch.chdir(here)
    assert api.resume("run").finished
    monkeypatch.chdir("/")
    assert api.resume(here / "run").finished
    assert config_io.read_run(file).data.test == str(here / "test.beton")


@pytest.mark.parametrize("name", ["x" * 300, "../a\0b", "~nobody-here/x", "loop"])
def test_a_name_that_names_nothing_is_one_line(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    (here / "loop").symlink_to("loop")
    refused(api.resume, here / "run", data=name)


def test_a_lost_or_damaged_env_json_costs_no_pin(here: Path) -> None:
    convert.convert("textures", here / "train.beton", count=60, size=16, overwrite=True)
    for text in ("", "[]", '{"inputs": {"train": 3}}'):
        (here / "run/env.json").write_text(text)
        assert "48 samples then, 60 now" in refused(api.resume, here / "run")
    (here / "run/env.json").unlink()
    assert "48 samples then, 60 now" in refused(api.resume, here / "run")


def test_paths_are_kept_absolute(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "home", ignore=shutil.ignore_patterns("run"))
    (tmp_path / "home/below").mkdir()
    monkeypatch.chdir(tmp_path / "home/below")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    api.train(
        tiny_config(
            (Path("../train.beton"), Path("~/test.beton")), "train.epochs=1", "probe.every_epochs=0"
        ),
        "r",
    )
    data = config_io.read_run(Path("r/config.toml")).data
    assert (data.train, data.test) == (
        str(tmp_path / "home/train.beton"),
        str(tmp_path / "home/test.beton"),
    )
    monkeypatch.chdir("/")
    assert api.resume(tmp_path / "home/below/r").finished


def test_a_name_that_is_not_utf8_is_refused_in_a_line(made: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.beton")
    shutil.copy(made / "train.beton", odd)
    assert "not UTF-8" in refused(inputs.absolute, odd)
    config = tiny_config(beton_files(made), *SHORT)
    assert "not UTF-8" in refused(api.resume, made / "run", data=odd)
    assert config.data.train == str(made / "train.beton")


def begun(config: Config, run: Path, observer: Silent | None = None) -> None:
    """A run that is killed before its first checkpoint, its inputs pinned."""

    class Gone(Silent):
        def start(self, message: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.train(config, run, observer=observer or Gone())


def test_the_checkpoint_to_start_from_is_pinned_before_the_first_own_one(
    made: Path, tmp_path: Path
) -> None:
    source = checkpoint.newest(made / "run/checkpoints")
    older = min((made / "run/checkpoints").iterdir())
    assert source is not None
    copy = tmp_path / "weights.safetensors"
    shutil.copy(source, copy)
    begun(tiny_config(beton_files(made), *SHORT, f"train.init_from={copy}"), tmp_path / "run")
    shutil.copy(older, copy)
    text = refused(api.resume, tmp_path / "run")
    assert text.startswith(
        f"{copy}: the weights to start from: changed since {tmp_path / 'run'} was begun"
    )
    shutil.copy(source, copy)
    assert api.resume(tmp_path / "run").finished


def test_replayed_rates_are_pinned(made: Path, tmp_path: Path) -> None:
    lars = ("optim.name=lars", "optim.lr=0.3", *SHORT)
    for seed in (0, 1):
        api.train(
            tiny_config(beton_files(made), *lars, f"train.seed={seed}"), tmp_path / f"source{seed}"
        )
    shutil.copytree(tmp_path / "source0", tmp_path / "source")
    begun(
        tiny_config(beton_files(made), *lars, f"optim.replay_rates={tmp_path / 'source'}"),
        tmp_path / "run",
    )
    shutil.copy(tmp_path / "source1/layers.npy", tmp_path / "source")
    assert "recorded: changed since" in refused(api.resume, tmp_path / "run")
    file = tmp_path / "run/config.toml"
    text = file.read_text()
    file.write_text(
        text.replace(f"{tmp_path / 'source'}", f"{tmp_path / 'source0'}")
    )  # moved: what it recorded counts
    file.write_text(
        "\n".join(line for line in file.read_text().splitlines() if "replay_rates" not in line)
    )
    assert "optim.replay_rates is not set" in refused(api.resume, tmp_path / "run")
    file.write_text(text.replace(f"{tmp_path / 'source'}", f"{tmp_path / 'source0'}"))
    assert api.resume(tmp_path / "run").finished


def test_other_versions_are_noted_and_recorded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = environment.made_by
    monkeypatch.setattr(
        environment, "made_by", lambda device: now(device) | {"numpy": "0.1", "device": "abacus"}
    )
    heard = Listener()
    api.resume(here / "run", observer=heard)
    (note,) = (note for note in heard.notes if "otherwise than before" in note)
    assert "numpy was" in note
    assert "is abacus" in note
    (event,) = (event for event in read_events(here / "run") if event["event"] == "versions")
    assert event["step"] == 6
    assert event["changed"]["numpy"][1] == "0.1"
    assert set(event["changed"]) == {"numpy", "device"}
    silent = Listener()
    api.resume(here / "run", observer=silent)  # finished by the same
    assert not silent.notes


def test_test_data_that_are_the_training_images_are_noted(made: Path, tmp_path: Path) -> None:
    train = beton_files(made)[0]
    heard = Listener()
    api.train(
        tiny_config((train, train), "train.epochs=1", "probe.every_epochs=0"),
        tmp_path / "run",
        observer=heard,
    )
    assert any("holds the training images" in note for note in heard.notes)


def test_a_built_in_set_made_anew_elsewhere_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "one"))
    config = tiny_config(
        (Path("textures"), Path("textures")),
        "train.epochs=1",
        "data.textures_test_count=64",
        "probe.every_epochs=0",
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"test": None})})
    api.train(config, tmp_path / "run")
    checkpoint.newest(tmp_path / "run/checkpoints").unlink()  # type: ignore[union-attr]
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "two"))
    assert api.resume(tmp_path / "run").finished
    (file,) = (path for path in (tmp_path / "two").glob("*.beton") if "seed0" in path.name)
    moved = file.rename(tmp_path / "mine.beton")
    assert api.resume(tmp_path / "run", data=moved).finished
    data = config_io.read_run(tmp_path / "run/config.toml").data
    assert (data.train, data.test) == (str(moved), "textures")


def test_pins_read_back_and_damage_is_none(made: Path) -> None:
    with RunFolder.open(made / "run", lock=False) as folder:
        pinned = folder.inputs
    assert pinned is not None
    assert inputs.Inputs.read(pinned.as_json()) == pinned
    for said in (None, 3, {}, {**pinned.as_json(), "test": 3}, {**pinned.as_json(), "weights": 3}):
        assert inputs.Inputs.read(said) is None


def _ffcv(patch: pytest.MonkeyPatch, *, there: bool) -> None:
    """A stand-in of FFCV, installed or not: raw images are the same by it, JPEG images darker by a
    level.
    """

    def missing() -> None:
        raise UsageError("FFCV cannot be used (no such module)")

    def loop(crop: bool) -> Any:
        exact = decode_torchvision.loop(crop, has_jpeg=True)

        def decode(images: Any, status: Any, data: Any, places: Any) -> None:
            exact(images, status, data, places)
            images -= (images > 0) & (places["raw"] == 0)[:, None, None, None]

        return decode

    patch.setattr(decode_ffcv, "import_ffcv", (lambda: None) if there else missing)
    patch.setattr(decode_ffcv, "loop", loop)


def decoder_of(run: Path) -> set[str]:
    """What the run's files say: env.json and the newest checkpoint."""
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return {
        json.loads((run / "env.json").read_text())["inputs"]["decoder"],
        checkpoint.load(newest).meta["inputs"]["decoder"],
    }


@pytest.fixture(scope="module", params=["raw", "jpg"])
def decoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named by the mode of its files, with a run by each decoder."""
    folder = tmp_path_factory.mktemp(request.param)
    files = folder / "train.beton", folder / "test.beton"
    for seed, file in enumerate(files):
        convert.convert("textures", file, count=48, size=16, seed=seed, mode=request.param)
    with pytest.MonkeyPatch.context() as patch:
        _ffcv(patch, there=True)
        for name, said in (("ffcv", "auto"), ("torchvision", "torchvision")):
            api.train(tiny_config(files, *SHORT, f"data.decoder={said}"), folder / name)
    return folder


def _stopped(decoded: Path, name: str, folder: Path) -> Path:
    """A copy of a run, an epoch short of its end."""
    run = shutil.copytree(decoded / name, folder / name)
    checkpoint.newest(run / "checkpoints").unlink()  # type: ignore[union-attr]
    return run


def test_what_decoded_is_recorded_and_taken_again(
    decoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the decoder that ``auto`` would not take."""
    _ffcv(monkeypatch, there=True)
    ends = []
    for name in ("ffcv", "torchvision"):
        run = _stopped(decoded, name, tmp_path)
        assert api.resume(run).finished
        assert decoder_of(run) == decoder_of(decoded / name) == {name}
        assert api.evaluate(run)["decoder"] == name
        ends.append((run / "metrics.jsonl").read_bytes())
        assert ends[-1] == (decoded / name / "metrics.jsonl").read_bytes()
    assert (ends[0] == ends[1]) == decoded.name.startswith("raw")


def test_a_run_that_moves_to_where_ffcv_is_missing(
    decoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With raw images it goes on to the same end, and that is recorded; with JPEG images it is
    refused. It can be measured.
    """
    _ffcv(monkeypatch, there=False)
    run = _stopped(decoded, "ffcv", tmp_path)
    if decoded.name.startswith("raw"):
        assert api.resume(run).finished
        assert (run / "metrics.jsonl").read_bytes() == (decoded / "ffcv/metrics.jsonl").read_bytes()
        assert decoder_of(run) == {"torchvision"}
    else:
        text = refused(api.resume, run)
        assert text.startswith(
            f"{run}: the run was made with JPEG images decoded by ffcv, which cannot be used here"
        )
        assert "fastbyol doctor" in text
        assert "--init-from" in text
        assert decoder_of(run) == {"ffcv"}
    assert api.evaluate(run)["decoder"] == "torchvision"


def test_a_run_of_before_decoded_by_ffcv(
    decoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _stopped(decoded, "ffcv", tmp_path)
    for path in (run / "checkpoints").iterdir():
        loaded = checkpoint.load(path)
        loaded.meta["inputs"].pop("decoder")
        checkpoint.save(
            run / "checkpoints", loaded.meta["step"], loaded.tensors, loaded.meta, keep=9
        )
    _ffcv(monkeypatch, there=True)
    assert api.resume(run).finished
    assert decoder_of(run) == {"ffcv"}


def test_a_new_run_by_a_missing_ffcv_is_refused(
    decoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ffcv(monkeypatch, there=False)
    config = tiny_config(
        (decoded / "train.beton", decoded / "test.beton"), *SHORT, "data.decoder=ffcv"
    )
    assert refused(api.train, config, tmp_path / "run").startswith("FFCV cannot be used")
    assert not (tmp_path / "run").exists()
