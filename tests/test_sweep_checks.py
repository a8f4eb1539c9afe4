"""A sweep is checked before its first job: everything that is wrong with any job is said at once, and nothing
has run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from core.cli import schema, sweep
from core.compose.hooks import load_registry
from headway import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SIM = ("executor=sim", "tracking=none")


class Composer:
    """Hydra, counted."""

    asked = 0

    def __call__(self, job: Sequence[str]) -> DictConfig:
        self.asked += 1
        return compose("config", overrides=list(job))


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    registry = load_registry()
    schema.register(registry)
    sweep.register(registry)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def jobs(*overrides: str) -> list[list[str]]:
    """Every combination of the comma-separated values, in Hydra's order."""
    keys = [o.partition("=")[0] for o in overrides]
    return [
        [f"{k}={v}" for k, v in zip(keys, values, strict=True)]
        for values in product(*(o.partition("=")[2].split(",") for o in overrides))
    ]


def refusal(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        sweep.check_jobs(jobs(*overrides), Composer())
    return str(caught.value).splitlines()


def test_a_sweep_without_a_mistake_passes_and_says_at_once_that_it_is_checked(hydra, capsys):
    sweep.check_jobs(jobs(*SIM, "scheduler=fcfs,chunked", "cache=none,hash,radix"), Composer())
    assert capsys.readouterr().out == "checking 6 compositions\n"


def test_what_is_wrong_is_listed_for_all_jobs_together_a_line_for_each_reason(hydra):
    first, *reasons = refusal(*SIM, "order=fcfs,sjf,sfj", "engine.block_size=0,16")
    assert first == "5 of 6 jobs cannot run, so none was started"
    assert reasons == [
        "  jobs 0, 2, 4: engine.block_size=0: expected at least 1 and at most 65536",
        "  job 3: order=sjf needs a predictor, and none is chosen: set predictor=constant, history, noisy "
        "or oracle",
        "  job 5: order=sfj: there is no such order. Did you mean spf, sjf?",
    ]


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (
            ("workload=mooncake", "workload.path=/no/such,/nor/this"),
            "job 1: workload.path=/nor/this: there is no such file",
        ),
        (
            ("workload=random,clients", "++workload.num_requests=2"),
            "job 1: workload.num_requests: workload=clients has no such parameter",
        ),
        (
            ("engine.max_model_len=4096,4097",),
            "job 1: engine.max_model_len=4097: the model's context is 4096 tokens",
        ),
        (("executor=sim,replay",), "job 1: executor.path='': expected a run directory with replay.npz"),
        (
            ("executor=sim,oracle", "parallel.tp=2"),
            "job 1: parallel.tp=2 parallel.pp=1: executor=oracle runs on one rank",
        ),
        (
            ("executor=torch", "kernels=torch,triton", "executor.device=cpu"),
            "job 1: kernels: 'triton' runs on cuda, not on cpu",
        ),
        (
            ("executor=torch", "parallel.tp=1,3"),
            "job 1: parallel.tp=3 does not divide the model's 8 attention heads",
        ),
        (
            ("executor=torch", "executor.device=cpu,warp"),
            "job 1: executor.device='warp': expected auto, cpu, cuda or cuda:N",
        ),
        (
            ("executor=torch", "model.name_or_path=tiny,/no/such"),
            "job 1: model '/no/such': no such directory",
        ),
        (("seed=1,2", "order=vtc", "order.wq=x"), "jobs 0, 1: order.wq=x: expected a number"),
    ],
)
def test_what_can_be_known_without_weights_or_ranks_is_known_before_the_first_job(
    hydra, monkeypatch, overrides, answer
):
    monkeypatch.setattr(
        "core.compose.build.prepare_executor", lambda *given: pytest.fail("an executor was prepared")
    )
    assert any(
        answer in line
        for line in refusal(
            "tracking=none", *([] if overrides[0].startswith("executor") else ["executor=sim"]), *overrides
        )
    )


def test_hydra_composes_what_is_new_and_not_every_job(hydra):
    """It needs 0.1 s for each, so 96 jobs would be 10 s before the first line."""
    composer = Composer()
    swept = jobs(
        *SIM,
        "scheduler=fcfs,chunked",
        "order=fcfs,srpt,vtc,plas",
        "predictor=oracle",
        "cache=none,hash,radix",
        "seed=0,1,2,3",
    )
    sweep.check_jobs(swept, composer)
    assert len(swept) == 96 and composer.asked <= 1 + 1 + 3 + 2
    composer = Composer()
    sweep.check_jobs(jobs(*SIM, f"seed={','.join(map(str, range(100)))}"), composer)
    assert composer.asked == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("policy=none,ltr", "cache=none,radix", "seed=0,1"),
        ("order=vtc,dlpm", "order.wp=1,2"),
        ("experiment=vtc_fairness", "order=fcfs,vtc", "engine.max_num_seqs=4,8"),
    ],
)
def test_compositions_put_together_from_parts_are_those_that_hydra_makes(hydra, overrides):
    parts = sweep.Parts(Composer(), sweep._registry[0])
    for job in jobs(*SIM, *overrides):
        assert parts.composition(job) == schema.composition(compose("config", overrides=job)), job


def test_a_parameter_that_only_some_swept_choices_have_is_left_to_the_jobs():
    given = [
        "-m",
        "workload=azure,mooncake",
        "workload.path=FILE",
        "order=vtc",
        "order.wp=1",
        "cache=choice(a,b)",
        "cache.x=1",
    ]
    assert sweep.loosened(given) == [
        "-m",
        "workload=azure,mooncake",
        "++workload.path=FILE",
        *given[3:6],
        "++cache.x=1",
    ]


EXPERIMENT = """# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      order: fcfs,sjf
      seed: 1,2
"""


def test_from_the_outside_nothing_runs_and_nothing_is_left(tmp_path):
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    (folder / "night.yaml").write_text(EXPERIMENT)
    given = [
        *SIM,
        "experiment=night",
        f"hydra.searchpath=[file://{tmp_path / 'own'}]",
        "hydra.sweep.dir=sweep",
    ]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *given],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout.splitlines() == ["checking 4 compositions"]
    assert ended.stderr.splitlines()[0] == "error: 2 of 4 jobs cannot run, so none was started"
    assert "jobs 2, 3: order=sjf needs a predictor" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "sweep").exists()
