"""Headway's public surface: everything a plugin author imports. `python -m headway` is the command line."""

from core import metrics
from core.blocks import ROOT, Block
from core.clock import ReplayClock, VirtualClock, WallClock
from core.config import Hardware, ModelConfig, ModelShape
from core.engine import Engine, EngineConfig, RunResult
from core.errors import ConfigError, HeadwayError, InvariantError, ModelError, PluginError, PolicyError, WorkloadError, near
from core.hooks import hookimpl
from core.policy import (
    API_VERSION,
    Admission,
    Admit,
    Context,
    CostModel,
    Defer,
    Eviction,
    Executor,
    ExecutorCaps,
    KeyEviction,
    KVControl,
    LengthPrediction,
    Need,
    Observer,
    Oracle,
    Order,
    Predictor,
    PrefixCache,
    Reject,
    Retention,
    Role,
    Scheduler,
    StepRecord,
    StepResult,
    TokenBudget,
    Victim,
    Workload,
)
from core.request import SLO, Arrival, Request, RequestOutput, RequestState, SamplingParams, Tags
from core.step import Allocation, Chunk, Granted, Match, NeedBlocks, NoBudget, NotReady, StepBuilder, StepPlan, View
from core.testing.oracle import OracleExecutor

__all__ = [
    "API_VERSION", "ROOT", "SLO", "Admission", "Admit", "Allocation", "Arrival", "Block", "Chunk", "ConfigError", "Context", "CostModel",
    "Defer", "Engine", "EngineConfig", "Eviction", "Executor", "ExecutorCaps", "Granted", "Hardware", "HeadwayError", "InvariantError",
    "KVControl", "KeyEviction", "LengthPrediction", "Match", "ModelConfig", "ModelError", "ModelShape", "Need", "NeedBlocks", "NoBudget",
    "NotReady", "Observer", "Oracle", "OracleExecutor", "Order", "PluginError", "PolicyError", "Predictor", "PrefixCache", "Reject", "ReplayClock", "Request",
    "RequestOutput", "RequestState", "Retention", "Role", "RunResult", "SamplingParams", "Scheduler", "StepBuilder", "StepPlan",
    "StepRecord", "StepResult", "Tags", "TokenBudget", "Victim", "View", "VirtualClock", "WallClock", "Workload", "WorkloadError",
    "hookimpl", "metrics", "near",
]  # fmt: skip
