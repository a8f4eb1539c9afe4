"""Headway's public surface: everything a plugin author imports. `python -m headway` is the command line."""

from importlib import import_module
from pathlib import Path
from typing import Any

import core

if Path(core.__file__ or "").resolve().parent != Path(__file__).resolve().parent / "core":
    found = core.__file__ or list(core.__path__)
    raise ImportError(
        f"the package `core` that is imported here is {found}, not Headway's: uninstall the one or leave it "
        "off the path"
    )

from core.blocks import ROOT, Block
from core.chains import chain_key, prefix_keys, root_key
from core.clock import ReplayClock, VirtualClock, VirtualServer, WallClock
from core.compose import checkpoint, hf_config
from core.compose.build import Composition, Run, build
from core.compose.config import EngineConfig, Hardware, ModelConfig, ModelShape, ParallelConfig
from core.compose.defaults import default_choices, default_names
from core.compose.facts import differences as fact_differences
from core.compose.facts import facts as composition_facts
from core.compose.hooks import Registry, hookimpl, load_registry
from core.compose.memory import check_fits
from core.compose.params import describe, param
from core.context import Context, CostModel, Truth
from core.engine import Engine
from core.errors import (
    ConfigError,
    HeadwayError,
    InvariantError,
    ModelError,
    NothingPlanned,
    PluginError,
    PolicyError,
    RankError,
    WorkloadError,
    near,
)
from core.execution import ExecutorCaps, Preparation, StepResult, TimeModel, Tokens
from core.executor import BuildContext, Executor
from core.grants import Granted, NeedBlocks, NoBudget, NotReady
from core.handoff import Handoff
from core.inbox import Inbox
from core.inputs import SLO, Arrival, SamplingParams, Tags
from core.keyed import BlockHeap, KeyEviction, KeyOrder, MovingOrder
from core.measure import metrics
from core.measure.results import whole
from core.measure.served import read_served, served_requests, served_steps
from core.measure.step_log import Lists, StepColumns, StepLog
from core.outputs import RequestOutput, RunResult, StopText, TextStop
from core.outside import Observer, StepRecord, Workload
from core.plan import Allocation, Chunk, KVCopy, StepPlan
from core.policy import (
    API_VERSION,
    PREEMPTION_MODES,
    Admission,
    Admit,
    ChunkSize,
    Defer,
    Eviction,
    KVControl,
    LengthPrediction,
    Need,
    Order,
    Predictor,
    PrefixCache,
    Reject,
    Retention,
    Role,
    Scheduler,
    Victim,
)
from core.prompts import readable, token_ids
from core.renamed import with_names_of_today
from core.request import Request, RequestState
from core.step import StepBuilder
from core.testing.oracle import OracleExecutor
from core.testing.virtual import VirtualExecutor
from core.view import Match, View

__all__ = [
    "API_VERSION",
    "PREEMPTION_MODES",
    "ROOT",
    "SLO",
    "Admission",
    "Admit",
    "Allocation",
    "Arrival",
    "Block",
    "BlockHeap",
    "BuildContext",
    "Chunk",
    "ChunkSize",
    "Composition",
    "ConfigError",
    "Context",
    "CostModel",
    "Defer",
    "Engine",
    "EngineConfig",
    "Eviction",
    "Executor",
    "ExecutorCaps",
    "Granted",
    "Handoff",
    "Hardware",
    "HeadwayError",
    "Inbox",
    "InvariantError",
    "KVControl",
    "KVCopy",
    "KeyEviction",
    "KeyOrder",
    "LengthPrediction",
    "Lists",
    "Match",
    "ModelConfig",
    "ModelError",
    "ModelShape",
    "MovingOrder",
    "Need",
    "NeedBlocks",
    "NoBudget",
    "NotReady",
    "NothingPlanned",
    "Observer",
    "OracleExecutor",
    "Order",
    "ParallelConfig",
    "PluginError",
    "PolicyError",
    "Predictor",
    "PrefixCache",
    "Preparation",
    "RankError",
    "Registry",
    "Reject",
    "ReplayClock",
    "Request",
    "RequestOutput",
    "RequestState",
    "Retention",
    "Role",
    "Run",
    "RunResult",
    "SamplingParams",
    "Scheduler",
    "StepBuilder",
    "StepColumns",
    "StepLog",
    "StepPlan",
    "StepRecord",
    "StepResult",
    "StopText",
    "Tags",
    "TextStop",
    "TimeModel",
    "Tokens",
    "Truth",
    "Victim",
    "View",
    "VirtualClock",
    "VirtualExecutor",
    "VirtualServer",
    "WallClock",
    "Workload",
    "WorkloadError",
    "build",
    "chain_key",
    "check_fits",
    "checkpoint",
    "composition_facts",
    "default_choices",
    "default_names",
    "describe",
    "fact_differences",
    "hf_config",
    "hookimpl",
    "load_registry",
    "metrics",
    "near",
    "param",
    "prefix_keys",
    "read_served",
    "readable",
    "root_key",
    "served_requests",
    "served_steps",
    "token_ids",
    "whole",
    "with_names_of_today",
]


#: Names whose modules are heavy, or belong to one kind of plugin: imported only for those who ask.
LATER = {
    "LLM": "plugins.executors.torch.llm",
    "SimExecutor": "plugins.executors.sim",
    "KernelChoice": "plugins.kernels.compose",
    "KernelCaps": "plugins.kernels.ops",
}


#: Former names of what is imported from here.
FORMER_NAMES = {"Oracle": "Truth", "TokenBudget": "ChunkSize"}


def __getattr__(name: str) -> Any:
    """`from headway import LLM` imports the real engine, and torch with it."""
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    if name in FORMER_NAMES:
        return globals()[FORMER_NAMES[name]]
    raise AttributeError(f"module 'headway' has no attribute {name!r}")


if __name__ == "__main__":
    import sys

    from core.cli.main import main

    sys.exit(main(sys.argv[1:]))
