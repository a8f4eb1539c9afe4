"""Connections of somebody who does not know the key, and a store in which somebody writes: at worst the run
is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.torch_engines import GREEDY, engine_of, shared_prompts, variant

from headway import Arrival, ConfigError, EngineConfig, ModelConfig, RankError
from plugins.executors.torch import TorchExecutor
from plugins.executors.torch.config import TorchConfig
from plugins.kernels.torch import TorchKernels
from plugins.parallel import channel as wire
from plugins.parallel import handshake, launch, torchrun
from plugins.parallel.channel import exactly
from plugins.parallel.config import MeshConfig
from plugins.parallel.execution import Job
from plugins.parallel.handshake import NONCE, PROOF, Door, Refused, Stranger, admit, prove, reach
from plugins.parallel.messages import Hello, pack

KEY, OTHER = b"k" * 32, b"o" * 32
LOCAL = ("127.0.0.1", 0)


def soon() -> float:
    return time.monotonic() + 5.0


@contextmanager
def pair():
    """(driver's end, rank's end) of a TCP connection."""
    with socket.create_server(LOCAL) as server, socket.create_connection(server.getsockname()) as theirs:
        ours, _ = server.accept()
        with ours:
            yield ours, theirs


def ending(function, *args) -> BaseException | None:
    """What it raised."""
    try:
        function(*args)
    except BaseException as error:
        return error
    return None


def beside(function, *args) -> tuple[threading.Thread, list]:
    """Runs it in a thread, which leaves what it raised in the list."""
    ended: list = []
    thread = threading.Thread(target=lambda: ended.append(ending(function, *args)), daemon=True)
    thread.start()
    return thread, ended


# ---- the proof -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks_key", "driver", "rank"), [(KEY, None, None), (OTHER, Stranger, Refused)])
def test_both_ends_prove_that_they_know_the_key(ranks_key, driver, rank):
    with pair() as (ours, theirs):
        thread, proved = beside(lambda: prove(theirs, ranks_key, soon()))
        admitted = ending(admit, ours, KEY, soon())
        ours.close()
        thread.join()
    assert [type(e) for e in (admitted, proved[0])] == [
        type(None) if e is None else e for e in (driver, rank)
    ]


def test_a_driver_that_does_not_know_the_key_is_found_out_before_anything_is_sent_to_it():
    with pair() as (ours, theirs):
        thread, proved = beside(prove, theirs, KEY, soon())
        ours.sendall(secrets.token_bytes(NONCE))
        assert len(exactly(ours, NONCE + PROOF, soon())) == 64
        ours.sendall(secrets.token_bytes(PROOF))
        thread.join()
        assert isinstance(proved[0], Stranger)
        theirs.close()
        assert ours.recv(1) == b""  # nothing came after the proof


def test_a_proof_that_is_sent_back_proves_nothing():
    """As driver the stranger has no proof of his own but the rank's."""
    with pair() as (ours, theirs):
        thread, proved = beside(prove, theirs, KEY, soon())
        ours.sendall(secrets.token_bytes(NONCE))
        ours.sendall(exactly(ours, NONCE + PROOF, soon())[NONCE:])
        thread.join()
    assert isinstance(proved[0], Stranger)


def test_a_proof_of_another_connection_proves_nothing():
    heard = []
    with pair() as (ours, theirs):
        thread, _ = beside(prove, theirs, KEY, soon())
        ours.sendall(secrets.token_bytes(NONCE))
        heard.append(exactly(ours, NONCE + PROOF, soon()))
        ours.close()
        thread.join()
    with pair() as (ours, theirs):
        theirs.sendall(heard[0])
        assert isinstance(ending(admit, ours, KEY, soon()), Stranger)


def test_nobody_in_between_can_pass_proofs_on():
    """A stranger who had the rank come to him forwards every byte between it and the driver."""

    def forward(source, sink):
        while part := source.recv(4096):
            sink.sendall(part)
        sink.shutdown(socket.SHUT_WR)

    with pair() as (driver, to_driver), pair() as (from_rank, rank):
        ports = {driver.getsockname()[1], from_rank.getsockname()[1]}
        assert len(ports) == 2
        for ends in ((to_driver, from_rank), (from_rank, to_driver)):
            beside(forward, *ends)
        thread, proved = beside(prove, rank, KEY, soon())
        assert isinstance(ending(admit, driver, KEY, soon()), Stranger)
        driver.close()
        thread.join()
        assert isinstance(proved[0], Refused)


# ---- the door --------------------------------------------------------------------------------------------


@pytest.fixture
def door():
    opened = Door(socket.create_server(LOCAL), KEY)
    yield opened
    opened.close()


def rank_of(door: Door, key: bytes = KEY) -> None:
    channel = reach("127.0.0.1", door.port, key, soon())
    channel.send(wire.HELLO, pack(Hello(1, "host", "orders", {})))


def says(door: Door, what: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", door.port))
    connection.sendall(what)
    return connection


STRANGERS = {
    "silent": lambda door: [says(door, b"")],
    "many": lambda door: [says(door, b"") for _ in range(3 * handshake.ENTERING)],
    "garbled": lambda door: [says(door, secrets.token_bytes(100)) for _ in range(8)],
    "another protocol": lambda door: [says(door, b"GET / HTTP/1.1\r\nHost: driver\r\n\r\n" + b"x" * 64)],
    "half a proof": lambda door: [says(door, b"x" * (NONCE + PROOF - 1))],
    "gone at once": lambda door: [says(door, b"x").close() for _ in range(8)],
    "another key": lambda door: [beside(rank_of, door, OTHER)],
}


@pytest.mark.parametrize("strangers", STRANGERS)
def test_a_rank_comes_in_while_strangers_stand_in_the_door(door, strangers):
    there = STRANGERS[strangers](door)
    thread, ended = beside(rank_of, door)
    hello, channel = door.met.get(timeout=5)
    thread.join()
    assert (hello.rank, ended, there != []) == (1, [None], True)
    assert door.met.empty()
    channel.close()


def test_a_slow_stranger_is_sent_away(monkeypatch):
    monkeypatch.setattr(handshake, "PATIENCE", 0.2)
    door = Door(socket.create_server(LOCAL), KEY)
    with says(door, b"x") as slow:
        slow.settimeout(5)
        assert len(exactly(slow, NONCE)) == NONCE
        assert slow.recv(1) == b""
    door.close()
    assert door.strangers == 1


def test_who_knows_the_key_and_says_nothing_that_can_be_understood_is_sent_away(door):
    channel = reach("127.0.0.1", door.port, KEY, soon())
    channel.send(wire.BEAT, b"")
    with pytest.raises((EOFError, OSError)):
        channel.receive()


def test_a_late_stranger_finds_the_door_closed(door):
    door.close()
    with pytest.raises(ConnectionRefusedError):
        says(door, b"")


def test_a_rank_whose_key_is_another_gives_up_long_before_its_patience(door):
    with pytest.raises(Refused):
        reach("127.0.0.1", door.port, OTHER, time.monotonic() + 3600)


# ---- torchrun's store ------------------------------------------------------------------------------------


@pytest.fixture
def agent(monkeypatch):
    """torchrun's store as its agent holds it, and what it tells rank 0 of two."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    told = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    for name in (torchrun.KEY, torchrun.KEY_FILE):
        monkeypatch.delenv(name, raising=False)
    return store


def job(timeout: float = 0.1) -> Job:
    model = ModelConfig(name_or_path=str(variant("qwen3")))
    return Job(
        TorchConfig(device="cpu"),
        model,
        TorchKernels(),
        EngineConfig(),
        0,
        MeshConfig(tp=2, timeout=timeout),
    )


class Disagreeing:
    """A rank 1 that would run something else, so that the run ends as soon as it is met."""

    def __init__(self, asked: Job, difference: str = "seed") -> None:
        self.facts = launch.facts(asked) | {difference: "something else"}
        self.told: list = []

    def come(self) -> None:
        orders, _ = torchrun.join(1, self.facts, 5.0)
        self.told.append(orders.receive()[0])


@pytest.mark.parametrize("difference", ["torch", "seed", "shape"])
def test_hosts_that_do_not_agree_are_refused_before_a_weight_is_read(agent, difference):
    asked = job(timeout=60)
    rank = Disagreeing(asked, difference)
    thread, ended = beside(rank.come)
    with pytest.raises(ConfigError, match=f"rank 1 on .* runs with {difference} something else, rank 0 with"):
        launch.Ranks(asked)
    thread.join()
    assert (rank.told, ended) == ([wire.REFUSED], [None])


def test_a_rank_is_met_among_strangers_and_the_key_is_nowhere_in_the_store(agent, monkeypatch):
    asked, seen = job(timeout=60), []
    rank = Disagreeing(asked)
    written = os.open
    monkeypatch.setattr(torchrun.os, "open", lambda *args: (seen.append(args), written(*args))[1])

    def come() -> None:
        port = int(agent.get(torchrun.PLACE).split()[0])
        for _ in range(8):
            socket.create_connection(("127.0.0.1", port)).sendall(secrets.token_bytes(80))
        file = Path(seen[0][0])
        seen.append((file.read_bytes(), file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777))
        rank.come()

    thread, ended = beside(come)
    with pytest.raises(ConfigError, match="rank 1 on"):
        launch.Ranks(asked)
    thread.join()
    assert ended == [None]
    (path, flags, mode), (key, of_file, of_folder) = seen
    assert (len(key), of_file, of_folder, mode) == (32, 0o600, 0o700, 0o600) and flags & os.O_EXCL
    assert re.fullmatch(rb"\d+ [0-9a-f]{32}", agent.get(torchrun.PLACE)) and not Path(path).exists()
    assert key.hex().encode() not in agent.get(torchrun.PLACE) and key not in agent.get(torchrun.PLACE)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x80\x04cposix\nsystem\n",
        b"99999 -",
        b"80 ../../etc/passwd",
        b"1 -\n",
        b"x" * 100_000,
        b"attacker:1 -",
    ],
)
def test_a_rank_refuses_what_rank_0_has_not_written(agent, value):
    agent.set(torchrun.PLACE, value)
    with pytest.raises(RankError, match="rank 1: torchrun's store says .* which rank 0 has not written"):
        torchrun.join(1, {}, 1.0)


def test_a_rank_that_is_sent_to_a_stranger_refuses_him(agent, monkeypatch):
    monkeypatch.setenv(torchrun.KEY, "k" * 32)
    with socket.create_server(LOCAL) as server:
        agent.set(torchrun.PLACE, f"{server.getsockname()[1]} -")
        thread, ended = beside(torchrun.join, 1, {}, 5.0)
        stranger, _ = server.accept()
        stranger.sendall(bytes(NONCE))
        exactly(stranger, NONCE + PROOF, soon())
        stranger.sendall(bytes(PROOF))
        thread.join()
        assert stranger.recv(1) == b""
    assert (
        isinstance(ended[0], RankError)
        and "rank 1: rank 0 at 127.0.0.1" in str(ended[0])
        and "set HEADWAY_KEY" in str(ended[0])
    )


def test_whoever_overwrites_the_store_ends_the_run_with_an_error_that_says_who_is_missing(agent):
    """Every key, again and again."""
    stop = threading.Event()

    def overwrite() -> None:
        while not stop.is_set():
            agent.set(torchrun.PLACE, "1 " + "0" * 32)

    thread, _ = beside(overwrite)
    rank, ended = beside(torchrun.join, 1, {}, 0.5)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(launch.LAGGING, True, 0.5)
            with pytest.raises(RankError, match=r"rank 1 did not connect within 0.6 s \(parallel.timeout"):
                launch.Ranks(job())
        rank.join()
    finally:
        stop.set()
        thread.join()
    assert isinstance(ended[0], (ConfigError, RankError)) and "rank 1" in str(ended[0])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "127.0.0.1"),
        ({"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.5"}, "127.0.0.1"),
        ({"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.5", "HEADWAY_KEY": "k" * 16}, "127.0.0.1"),
        ({"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.5", "HEADWAY_KEY": "k" * 16}, "10.0.0.5"),
    ],
)
def test_the_driver_can_be_reached_from_another_host_only_with_a_key_and_several_hosts(
    agent, monkeypatch, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert torchrun.meeting_point() == expected


def test_a_rank_without_the_key_says_what_to_set(agent):
    agent.set(torchrun.PLACE, "1 -")
    with pytest.raises(
        ConfigError, match=r"rank 0 has a key, rank 1 on .* has none: set HEADWAY_KEY \(or HEADWAY_KEY_FILE"
    ):
        torchrun.join(1, {}, 1.0)
    agent.set(torchrun.PLACE, "1 " + "a" * 32)
    with pytest.raises(
        ConfigError, match="rank 1 on .* finds no key of rank 0 here. Without a key ranks meet on one host"
    ):
        torchrun.join(1, {}, 1.0)


def test_a_key_that_protects_nothing_is_refused(agent, monkeypatch, tmp_path):
    monkeypatch.setenv(torchrun.KEY, "secret")
    with pytest.raises(ConfigError, match="HEADWAY_KEY holds 6 bytes: expected at least 16"):
        torchrun.users_key()
    file = tmp_path / "key"
    file.write_text("k" * 32)
    file.chmod(0o644)
    monkeypatch.setenv(torchrun.KEY_FILE, str(file))
    with pytest.raises(ConfigError, match="may be read by others .mode 644.: chmod 600"):
        torchrun.users_key()
    file.chmod(0o600)
    assert torchrun.users_key() == b"k" * 32
    monkeypatch.setenv(torchrun.KEY_FILE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read .No such file"):
        torchrun.users_key()


def test_a_folder_for_keys_that_others_can_open_is_refused(agent, monkeypatch, tmp_path):
    monkeypatch.setattr(torchrun.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"headway-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="not a folder that only you can open"):
        launch.Ranks(job())


def test_a_port_in_use_is_refused(agent):
    asked = job()
    with socket.create_server(LOCAL) as taken:
        asked.parallel.port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="set parallel.port=0"):
            launch.Ranks(asked)


def test_gpus_that_map_each_others_memory_meet_at_a_file_that_only_the_user_can_open(agent, monkeypatch):
    asked = job()
    asked.parallel.all_reduce = "symmetric"
    files: list[Path] = []
    monkeypatch.setattr(launch.Ranks, "_meet", lambda ranks: files.append(ranks._file))
    monkeypatch.setattr(launch.Ranks, "_give", lambda ranks, order, kind: enough())
    with pytest.raises(RankError, match="enough"):
        launch.Ranks(asked)
    assert files[0].parent.stat().st_mode & 0o777 == 0o700
    order = dataclasses.replace(launch.order_of(asked), store_file=str(files[0]))
    here, there = launch.store_of(order, None), launch.store_of(order, None)
    here.set("address", "value")
    assert there.get("address") == b"value"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.5")
    monkeypatch.setenv(torchrun.KEY, "k" * 32)
    with pytest.raises(
        ConfigError, match="all_reduce=symmetric: it runs on one host, this run is on several"
    ):
        launch.Ranks(asked)


def enough() -> None:
    raise RankError("enough")


def test_without_torchruns_agent_the_store_listens_where_the_driver_does(agent, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("MASTER_ADDR", socket.gethostname())
    with socket.create_server(LOCAL) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    before = listening(os.getpid())
    store = torchrun.announce(1, "-")
    assert {host for host, _ in listening(os.getpid()) - before} == {"127.0.0.1"}
    store.set_timeout(timedelta(seconds=1))


# ---- what a run on one host listens to -------------------------------------------------------------------


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of the sockets of a process at which others can connect."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                host, port = local.split(":")
                packed = b"".join(bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8))
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks for sockets in /proc")
def test_ranks_of_one_host_listen_on_loopback_alone_and_strangers_there_do_not_end_the_run(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    before = listening(os.getpid())
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(name_or_path=str(variant("qwen3"))), parallel=MeshConfig(tp=2, timeout=30))
    process = executor.execution.ranks._processes[1]
    places = (listening(os.getpid()) - before) | listening(process.pid)
    assert places and {host for host, _ in places} == {"127.0.0.1"}
    strangers = [socket.create_connection(place) for place in places for _ in range(4)]
    for stranger in strangers[::2]:
        stranger.sendall(secrets.token_bytes(64))
    arrivals = [Arrival(0.0, prompt, GREEDY, id=f"p{i}") for i, prompt in enumerate(shared_prompts(512))]
    result = engine_of(executor).run(arrivals)
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    executor.close()
    assert result.status == "finished"
    assert torchrun.KEY.encode() not in environment
