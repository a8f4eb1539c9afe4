"""Workers of bench_engine.py for steps that hold prompts beside decodes: an online load, on Headway and on
vLLM, and one kind of step alone.

online   240 requests as Poisson arrivals; 70% of them in 8 groups that share 80% of their prompt (256 to
         1,536 tokens); answers of 32 to 384; Qwen3-8B's shape; 6,000 KV blocks of 16 tokens; prefix
         caching; 2,048 tokens per step. Each repeat is another seed. Before them, twelve requests one after
         the other: the first one's time to its first token against the tenth's.
mixed    64 requests decode at about 1,000 tokens of context while a chunk of 512 tokens of another prompt is
         computed in each step
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

BLOCKS, BLOCK_SIZE, CONTEXT, BUDGET = 6000, 16, 4096, 2048
LOAD: dict[str, Any] = {
    "num_requests": 240, "groups": 8, "input_len": [256, 1536], "output_len": [32, 384], "arrival": "poisson"
}  # fmt: skip
VOCABULARY = 151_936
DECODES, CHUNK, PROMPT = 64, 512, 900

Times = Sequence[float]  # seconds at which a request arrived and got each of its tokens


def load(rate: float, seed: int) -> list[Any]:
    from plugins.workloads.shared_prefix import SharedPrefix

    workload = SharedPrefix(**LOAD, rate=rate)
    return list(workload.arrivals(seed, VOCABULARY, CONTEXT))


def drawn(rng: Random, length: int) -> list[int]:
    """A prompt of so many tokens that no other one has."""
    return [rng.randint(0, 10_000) for _ in range(length)]


def turns(rates: Sequence[float], repeats: int) -> list[tuple[float, int]]:
    """(rate, repeat) of every load: repeat 0 warms up, at the highest rate alone."""
    return [(max(rates), 0), *((rate, repeat) for rate in rates for repeat in range(1, repeats + 1))]


def figures(requests: Sequence[tuple[float, Times]]) -> dict[str, float]:
    """Of (arrival, token times) of each request: means and 99th percentiles, milliseconds."""
    ttft = sorted((times[0] - arrival) * 1e3 for arrival, times in requests)
    tpot = sorted((times[-1] - times[0]) / max(1, len(times) - 1) * 1e3 for _, times in requests)
    tail = lambda values: values[min(len(values) - 1, len(values) * 99 // 100)]  # noqa: E731
    return {
        "mean_ttft_ms": statistics.fmean(ttft),
        "p99_ttft_ms": tail(ttft),
        "mean_tpot_ms": statistics.fmean(tpot),
        "p99_tpot_ms": tail(tpot),
    }


def headway_online(llm: Any, rates: Sequence[float], repeats: int, report: Callable[..., None]) -> None:
    """llm: a headway.LLM with the limits above."""
    for rate, repeat in turns(rates, repeats):
        begin = 0.2  # seconds after the run begins
        arrivals = [replace(a, time=begin + a.time) for a in load(rate, repeat)]
        outputs = llm.engine.run(arrivals).outputs
        report(
            engine="headway",
            rate=rate,
            repeat=repeat,
            **figures([(o.arrival_time, o.token_times) for o in outputs]),
        )
    report(engine="headway", late_preparations=llm.engine.executor.preparation.late)


def headway_first(llm: Any, report: Callable[..., None]) -> None:
    """Twelve requests one after the other, of 512 tokens that no other one has, in the first run of an
    engine."""
    from headway import Arrival, SamplingParams

    rng = Random(0)
    arrivals = [
        Arrival(0.2 + 0.3 * i, drawn(rng, 512), SamplingParams(ignore_eos=True, max_tokens=4))
        for i in range(12)
    ]
    outputs = llm.engine.run(arrivals).outputs
    report(engine="headway", first_ttft_ms=[(o.token_times[0] - o.arrival_time) * 1e3 for o in outputs])


def vllm_online(model: str, rates: Sequence[float], repeats: int, report: Callable[..., None]) -> None:
    """model: a directory with config.json and a tokenizer."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def answer(engine: Any, name: str, begin: float, arrival: Any) -> tuple[float, Times]:
        await asyncio.sleep(max(0.0, begin + arrival.time - time.perf_counter()))
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=arrival.output_len)
        times: list[float] = []
        async for output in engine.generate({"prompt_token_ids": arrival.prompt_token_ids}, sampling, name):
            times += [time.perf_counter()] * (len(output.outputs[0].token_ids) - len(times))
        return begin + arrival.time, times

    async def serve() -> None:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model,
                load_format="dummy",
                max_model_len=CONTEXT,
                num_gpu_blocks_override=BLOCKS,
                max_num_seqs=256,
                max_num_batched_tokens=BUDGET,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        for rate, repeat in turns(rates, repeats):
            begin = time.perf_counter() + 0.2
            asked = [
                answer(engine, f"{rate}/{repeat}/{i}", begin, a) for i, a in enumerate(load(rate, repeat))
            ]
            report(engine="vllm", rate=rate, repeat=repeat, **figures(await asyncio.gather(*asked)))
        engine.shutdown()

    asyncio.run(serve())


def mixed_steps(llm: Any, repeat: int) -> None:
    """Requests that decode for long, then prompts long enough for many steps of one chunk beside them."""
    from headway import Arrival, SamplingParams

    rng = Random(repeat)
    begin = 0.05  # seconds after the run begins
    answer = lambda n: SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n)  # noqa: E731
    arrivals = [Arrival(begin, drawn(rng, PROMPT), answer(600)) for _ in range(DECODES)]
    arrivals += [Arrival(begin + 3.0, drawn(rng, 7 * CHUNK), answer(1)) for _ in range(4)]
    llm.engine.run(arrivals)


def span_over_kernels(llm: Any, repeat: int) -> float:
    """GPU time of 16 mixed steps in a row, over the sum of their kernels' own times."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    class Window:
        """An observer that profiles the 5th to 20th full mixed step."""

        def __init__(self) -> None:
            self.steps = 0
            self.profiler = profile(activities=[ProfilerActivity.CUDA])

        def on_start(self, engine: Any) -> None: ...

        def on_step(self, record: Any) -> None:
            if record.plan.num_tokens < CHUNK + DECODES:
                return
            self.steps += 1
            if self.steps == 5:
                self.profiler.start()
            elif self.steps == 21:
                torch.cuda.synchronize()
                self.profiler.stop()

        def on_requests(self, finished: Any) -> None: ...
        def close(self, result: Any) -> None: ...

    with profile(activities=[ProfilerActivity.CUDA]):  # the first one takes seconds to start
        torch.cuda.synchronize()
    window = Window()
    llm.engine.observers.append(window)
    mixed_steps(llm, repeat)
    llm.engine.observers.pop()
    on_gpu = [e for e in window.profiler.events() if e.device_type.name == "CUDA"]
    span = max(e.time_range.end for e in on_gpu) - min(e.time_range.start for e in on_gpu)
    return float(span / sum(e.time_range.elapsed_us() for e in on_gpu))
